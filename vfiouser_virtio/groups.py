"""Leaves of an exception group: nurseries put exceptions into groups, and groups into groups."""

from collections.abc import Iterator
from typing import TypeVar

Kind = TypeVar("Kind", bound=BaseException)


def leaves(error: BaseException) -> Iterator[BaseException]:
    """The exceptions that are no groups, in order; of one that is no group, itself."""
    if isinstance(error, BaseExceptionGroup):
        for inner in error.exceptions:
            yield from leaves(inner)
    else:
        yield error


def only(error: BaseException, kind: type[Kind]) -> Kind | None:
    """The first leaf, if all of them are of this kind; else None."""
    found = list(leaves(error))
    first = found[0]
    return first if isinstance(first, kind) and all(isinstance(leaf, kind) for leaf in found) else None
