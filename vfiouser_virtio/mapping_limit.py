"""The process's limit of memory mappings (vm.max_map_count, 65530 by default): a share for each device, and a reserve.

::

    0 ───────────────────────────────── 7/8 ──────── vm.max_map_count
    │ guaranteed to each │ first come,   │ Python, libraries,        │ RESERVE mappings that are
    │ device: half of it │ first served  │ threads, device authors   │ given up when one is short

At the limit mmap(2) fails, also where it would only replace mappings by fewer (MAP_FIXED), and so does the munmap(2) of
the middle of a mapping. One client that maps single pages would so make the first DMA_MAP of its neighbours fail, and
nothing could be unmapped either.
"""

import mmap
from collections.abc import Callable
from pathlib import Path
from weakref import WeakSet

DEFAULT_MAX_MAP_COUNT = 65530
RESERVE = 16
"""Mappings that exist to be given up: replacing a range takes at most two more than there are, for a moment."""


def max_map_count() -> int:
    """vm.max_map_count; Linux' default where /proc is not there."""
    try:
        return int(Path("/proc/sys/vm/max_map_count").read_text("ascii"))
    except (OSError, ValueError):
        return DEFAULT_MAX_MAP_COUNT


class MappingShare:
    """The mappings that one device's memory takes."""

    def __init__(self, budget: "MappingBudget") -> None:
        self._budget = budget
        self._served = True
        self.used = 0

    def take(self, count: int) -> bool:
        """Count that many more mappings; False, and none, where they would leave others less than is theirs."""
        if not self._served:
            self._served = True
            self._budget.add(self)
        used = self.used + count
        if used > self._budget.guaranteed and used > self._budget.limit_of(self):
            return False
        self.used = used
        return True

    def give_back(self, count: int) -> None:
        """That many are gone."""
        self.used -= count
        if not self._served and not self.used:
            self._budget.remove(self)

    def leave(self) -> None:
        """The device is served no more: nothing is kept free for it once its mappings are gone, until it maps again."""
        self._served = False
        self.give_back(0)

    @property
    def limit(self) -> int:
        """How many it may have at the moment."""
        return max(self._budget.guaranteed, self._budget.limit_of(self))


class MappingBudget:
    """What all devices of a process may map, together ``total`` mappings.

    Half of it is guaranteed, in equal parts, to each of them. The other half is for whoever needs it first: a device
    behind a vIOMMU has a mapping for each page that is in use, its idle neighbours a dozen.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.guaranteed = total
        self._shares: WeakSet[MappingShare] = WeakSet()

    def join(self) -> MappingShare:
        """The share of one more device, until it has left, or is garbage."""
        share = MappingShare(self)
        self.add(share)
        return share

    def add(self, share: MappingShare) -> None:
        """Keep free what is guaranteed to the share."""
        self._shares.add(share)
        self._divide()

    def remove(self, share: MappingShare) -> None:
        """Keep nothing free for the share, which has none."""
        self._shares.discard(share)
        self._divide()

    def limit_of(self, share: MappingShare) -> int:
        """How many mappings the share may have, so that each of the others can still get what is guaranteed."""
        self._divide()
        return self.total - sum(max(other.used, self.guaranteed) for other in self._shares if other is not share)

    def __len__(self) -> int:
        return len(self._shares)

    def _divide(self) -> None:
        self.guaranteed = self.total // (2 * max(len(self._shares), 1))


PROCESS = MappingBudget(max_map_count() // 8 * 7)
"""The budget of this process. A forked one begins with a copy."""


class Reserve:
    """Mappings without use, so that there are some to give up. Each is a shared one: such never become one mapping."""

    def __init__(self, count: int = RESERVE) -> None:
        self._count = count
        self._mappings: list[mmap.mmap] = []

    def fill(self) -> None:
        """Have all of them, or as many as can be had."""
        try:
            while len(self._mappings) < self._count:
                self._mappings.append(mmap.mmap(-1, mmap.PAGESIZE))
        except (OSError, MemoryError):
            pass  # at the limit; there are as many as there are

    def spend(self, attempt: Callable[[], bool]) -> bool:
        """Give them up one by one until ``attempt``, which needs mappings, says that it has succeeded."""
        while not (done := attempt()) and self._mappings:
            self._mappings.pop().close()
        return done


RESERVED = Reserve()
