"""The order of the tests for several workers: those that take long come first, so that all workers end together.

xdist's ``worksteal`` gives each worker an equal part of the list, in its order, and moves what is left at the end of a
part to whoever has nothing to do.
"""

import itertools
from collections.abc import Callable, Sequence
from typing import TypeVar

Item = TypeVar("Item")


def dealt(items: Sequence[Item], workers: int, takes_long: Callable[[Item], bool]) -> list[Item]:
    """The items so that each worker's part begins with its share of the long ones."""
    long = [item for item in items if takes_long(item)]
    short = iter([item for item in items if not takes_long(item)])
    order: list[Item] = []
    for worker in range(workers):
        size = (len(items) - len(order)) // (workers - worker)  # as xdist cuts
        mine = long[worker::workers]
        order += [*mine, *itertools.islice(short, max(size - len(mine), 0))]
    return order
