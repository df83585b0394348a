"""Of a product of parameters the plain run has a diagonal: each value occurs, but not with each of the others.

A test says so by ``pytest.mark.diagonal("one", "other")``; names that have their values together are one: ``"a,b"``.
All else of the product is a ``variant``, which CI runs.
"""

from collections.abc import Hashable, Iterable, Mapping
from typing import TypeVar

Item = TypeVar("Item")


def beside_it(items: Iterable[tuple[Item, Hashable, Mapping[str, Hashable]]]) -> list[Item]:
    """The items that are not on their test's diagonal.

    An item comes with its test, and with what each of the parameters is for it. On the diagonal, the parameter with the
    most values goes through them once, and the others keep step.
    """
    tests: dict[Hashable, list[tuple[Item, Mapping[str, Hashable]]]] = {}
    for item, test, params in items:
        tests.setdefault(test, []).append((item, params))
    found: list[Item] = []
    for members in tests.values():
        values = {name: list(dict.fromkeys(params[name] for _, params in members)) for name in members[0][1]}
        longest = max(values, key=lambda name: len(values[name]))
        for item, params in members:
            at = values[longest].index(params[longest])
            if any(params[name] != those[at % len(those)] for name, those in values.items()):
                found.append(item)
    return found
