"""Address space of this process for its clients' memory: windows for mapped files, and the limit of mappings.

A `Window` is a stretch of anonymous memory into which files are mapped, and which is covered again: mmap(2) with
MAP_FIXED, through ctypes. Each takes some of the mappings that a process may have (vm.max_map_count, 65530 by default):
there is a share for each device, and a reserve::

    0 ───────────────────────────────── 7/8 ──────── vm.max_map_count
    │ guaranteed to each │ first come,   │ Python, libraries,        │ RESERVE mappings that are
    │ device: half of it │ first served  │ threads, device authors   │ given up when one is short

At the limit mmap(2) fails, also where it would only replace mappings by fewer (MAP_FIXED), and so does the munmap(2) of
the middle of a mapping. One client that maps single pages would so make the first DMA_MAP of its neighbours fail, and
nothing could be unmapped either.
"""

import ctypes
import errno
import mmap
from collections.abc import Callable
from pathlib import Path
from weakref import WeakSet

from vfiouser_virtio.libc import last_error, libc

PAGE = mmap.PAGESIZE
# linux/mman.h; Python 3.11's mmap module lacks both.
_MAP_NORESERVE = 0x4000
_MAP_FIXED = 0x10
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
_MREMAP_MAYMOVE_FIXED = 1 | 2
_MADV_REMOVE = 9
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
_MAP_FAILED = ctypes.c_void_p(-1).value

_mmap = libc.mmap
_mmap.restype = ctypes.c_void_p
_mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_mremap = libc.mremap
_mremap.restype = ctypes.c_void_p
_mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
_madvise = libc.madvise
_madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

DEFAULT_MAX_MAP_COUNT = 65530
RESERVE = 16
"""Mappings that exist to be given up: replacing a range takes at most two more than there are, for a moment."""


# ---- windows ---------------------------------------------------------------------------------------------------------


class Window:
    """Anonymous NORESERVE mapping into which files are mapped. Freed when the last view of it is gone."""

    def __init__(self, size: int, align: int = PAGE) -> None:
        RESERVED.fill()
        # hugetlb files want addresses aligned to their page size: take more and start at the first such address.
        slack = align if align > PAGE else 0
        self._memory = mmap.mmap(-1, size + slack, _ANONYMOUS)
        start = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        skip = -start % align
        self.base = start + skip
        """The address of its first byte."""
        self.view = memoryview(self._memory)[skip : skip + size]
        self.readonly_view = self.view.toreadonly()

    def map(self, start: int, size: int, protection: int, fd: int, offset: int) -> None:
        """Map a file at ``start``, whole pages. Raises OSError."""
        if _mmap(self.base + start, size, protection, mmap.MAP_SHARED | _MAP_FIXED, fd, offset) == _MAP_FAILED:
            error = last_error()
            self.cover(start, size)  # Linux before 6.12 has taken away what was there, and left a hole
            raise error

    def alias(self, start: int, size: int, address: int, *, readable: bool) -> None:
        """Map at ``start`` what is mapped at ``address`` of this process, whole pages of a shared mapping.

        Either mapping can go without the other. Raises OSError: EINVAL, not a shared mapping; EFAULT, nothing is
        mapped there, or its file ends before it does (an access would be a SIGBUS).
        """
        # mremap(2): an old_size of zero makes a second mapping of the same pages. Where it fails, it may have taken
        # away what was at the new place already.
        if _mremap(address, 0, size, _MREMAP_MAYMOVE_FIXED, self.base + start) == _MAP_FAILED:
            error = last_error()
            self.cover(start, size)
            raise error
        # There is no file descriptor to ask for the size: have the kernel look at the last page. Linux before 5.14
        # does not know how (EINVAL).
        advice = _MADV_POPULATE_READ if readable else _MADV_POPULATE_WRITE
        if _madvise(self.base + start + size - PAGE, PAGE, advice) and last_error().errno == errno.EFAULT:
            self.cover(start, size)
            raise OSError(errno.EFAULT, "its file ends before the mapping does")

    def discard(self, start: int, size: int) -> None:
        """Punch a hole into the file that is mapped there, whole pages of it; they read zeros afterwards.

        Raises OSError: EACCES and EINVAL for what is no writable shared mapping, EOPNOTSUPP for a file system without
        holes.
        """
        if _madvise(self.base + start, size, _MADV_REMOVE):
            raise last_error()

    def cover(self, start: int, size: int) -> None:
        """Put anonymous pages there again: views of that place now read zeros.

        Raises OSError when that is impossible even with the mappings that are kept in reserve.
        """
        if not self._cover(start, size):
            done = RESERVED.spend(lambda: self._cover(start, size))
            error = last_error()
            RESERVED.fill()
            if not done:
                raise error

    def _cover(self, start: int, size: int) -> bool:
        protection = mmap.PROT_READ | mmap.PROT_WRITE
        return bool(_mmap(self.base + start, size, protection, _ANONYMOUS | _MAP_FIXED, -1, 0) != _MAP_FAILED)


# ---- the limit of mappings -------------------------------------------------------------------------------------------


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

    Half of it is guaranteed, in equal parts, to each of them. The other half is first come, first served: a device
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
