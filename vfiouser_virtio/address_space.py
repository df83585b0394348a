"""Address space of this process for its clients' memory: windows, the limit of mappings, and where each region lies.

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
import itertools
import mmap
from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakSet

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.guest_files import GuestFile
from vfiouser_virtio.libc import last_error, libc

PAGE = mmap.PAGESIZE
# linux/mman.h; Python 3.11's mmap module lacks both.
_MAP_NORESERVE = 0x4000
_MAP_FIXED = 0x10
_ANONYMOUS = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
# What each DMA_MAP and DMA_UNMAP passes to mmap(2), put together once.
_FILE_AT, _ZEROS_AT = mmap.MAP_SHARED | _MAP_FIXED, _ANONYMOUS | _MAP_FIXED
_READ, _READ_WRITE = mmap.PROT_READ, mmap.PROT_READ | mmap.PROT_WRITE
_MREMAP_MAYMOVE_FIXED = 1 | 2
_MADV_REMOVE = 9
_MADV_POPULATE_READ, _MADV_POPULATE_WRITE = 22, 23
_MAP_FAILED = ctypes.c_void_p(-1).value

# Without argtypes, whose conversions of six arguments take 0.5 of 1.1 µs: what is no int (in C) is made a `_word`.
_mmap = libc.mmap
_mmap.restype = ctypes.c_void_p
_word = ctypes.c_void_p.from_param
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
        if _mmap(_word(self.base + start), _word(size), protection, _FILE_AT, fd, _word(offset)) == _MAP_FAILED:
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
        if not map_zeros(self.base + start, size):
            done = RESERVED.spend(lambda: map_zeros(self.base + start, size))
            error = last_error()
            RESERVED.fill()
            if not done:
                raise error


def map_zeros(address: int, size: int) -> bool:
    """Map anonymous pages over whatever is mapped at an address of this process; False, with errno, where refused."""
    return bool(_mmap(_word(address), _word(size), _READ_WRITE, _ZEROS_AT, -1, _word(0)) != _MAP_FAILED)


# ---- the limit of mappings -------------------------------------------------------------------------------------------


def max_map_count() -> int:
    """vm.max_map_count; Linux' default where /proc is not there."""
    try:
        with open("/proc/sys/vm/max_map_count", "rb") as file:
            return int(file.read())
    except (OSError, ValueError):
        return DEFAULT_MAX_MAP_COUNT


class MappingShare:
    """Mappings that one device's memory takes."""

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
    """Budget of memory mappings for all devices of a process, together ``total``.

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


# ---- where a client's memory lies ------------------------------------------------------------------------------------

# 256 GiB: more RAM than the guests that this is for, and a hundred such windows fit into a process (2^47 bytes).
WINDOW_BITS = 38
WINDOW_SIZE = 1 << WINDOW_BITS
MAX_WINDOWS = 4
"""Windows of one client, each of which takes 2^38 of the process's 2^47 bytes of addresses. A guest with a vIOMMU has
DMA addresses in two places, below 2^32 and below the IOMMU's limit; what is elsewhere lies apart."""

# A region in a window, with what it leaves of the anonymous mapping around it; apart, with the slack around it.
_IN_WINDOW, _APART, _APART_HUGE = 2, 1, 3

# What windows are aligned to, so that the usual huge pages fit.
_ALIGNMENT = 2 << 20


@dataclass(slots=True, eq=False, repr=False)
class Region:
    """DMA mapping. ``window`` is None where it is not mapped: it is reached by ``file``, or by messages."""

    address: int
    end: int
    readable: bool
    writable: bool
    window: Window | None = None
    origin: int = 0  # DMA address that is byte 0 of the window
    mapped: tuple[int, int] = (0, 0)  # what was mapped into the window: start and size, whole pages
    mappings: int = 0  # of the process's limit, at most
    # Begin and end of the DMA mapping, where this is only a part of it: DMA_UNMAP must take it as a whole.
    dma_map: tuple[int, int] | None = None
    file: GuestFile | None = None
    offset: int = 0  # in ``file``
    page_size: int = PAGE  # of the file that is mapped

    def mapping(self) -> str:
        """What maps it, for messages: they are made only when they are needed."""
        return f"DMA_MAP of {self.address:#x}..{self.end:#x}"

    def __str__(self) -> str:
        kind = "mapped" if self.window else "copied" if self.file else "by message"
        return f"{self.address:#x}..{self.end:#x} {'r' * self.readable}{'w' * self.writable} {kind}"


class Places:
    """Windows of one client's memory. ``window`` is the one in which byte n is DMA address n, once it is needed."""

    def __init__(self) -> None:
        self.window: Window | None = None
        self._windows: dict[int, Window] = {}  # by the upper bits of the DMA addresses that are in it
        self._refused = False
        self._share = PROCESS.join()

    def lay_file(self, region: Region, fd: int, offset: int, page_size: int) -> list[Region]:
        """Map a file, of pages of that size, where ``region`` belongs, which may become several regions.

        Raises PeerError for what is not aligned to pages, and when there is no room.
        """
        size = region.end - region.address
        if (region.address | offset | size) % PAGE:
            raise PeerError(
                f"{region.mapping()} at offset {offset:#x}: not aligned to pages of {PAGE:#x}", errno.EINVAL
            )
        # Write access alone does not exist on x86 or arm: PROT_WRITE pages can be read.
        protection = _READ_WRITE if region.writable else _READ
        if page_size == PAGE:
            self._lay_file(region, fd, offset, PAGE, protection)
            return [region]
        parts = _parts(region, offset, page_size)
        for index, part in enumerate(parts):
            try:
                self._lay_file(part, fd, offset + part.address - region.address, page_size, protection)
            except PeerError:
                self.take_out(parts, 0, index)
                raise
        return parts

    def lay_alias(self, region: Region, vaddr: int, page_size: int) -> None:
        """Map once more what is mapped at ``vaddr``. Raises PeerError where that is no shared mapping, or not whole."""
        size = region.end - region.address
        if (region.address | size | vaddr) % PAGE:
            raise PeerError(f"{region.mapping()} mapped at {vaddr:#x}: not aligned to pages of {PAGE:#x}", errno.EINVAL)
        try:
            window, position = self._place(region, vaddr, max(page_size, PAGE))
            window.alias(*region.mapped, position, readable=region.readable)
        except OSError as error:
            raise self._refused_region(region, error) from error

    def take_out(self, regions: list[Region], first: int, last: int) -> None:
        """Put anonymous pages where these regions were mapped, and between them: a stale view reads zeros.

        Whatever else was there must be gone. They are in order. Raises OSError, with the rest not done.
        """
        window: Window | None = None
        start = end = freed = 0
        for index in range(first, last):
            region = regions[index]
            begin, size = region.mapped
            if region.window is not window or begin < end:
                if window is not None:
                    window.cover(start, end - start)
                window, start = region.window, begin
            end = begin + size
            freed += region.mappings
            if region.file is not None:
                region.file.release()
                region.file = None
        if window is not None:
            window.cover(start, end - start)
        self._share.give_back(freed)

    def cover_windows(self) -> None:
        """Put anonymous pages everywhere in the windows, whatever is mapped there. Raises OSError."""
        for window in self._windows.values():
            window.cover(0, WINDOW_SIZE)

    def covered(self, region: Region) -> bool:
        """Whether `cover_windows` has unmapped the region; it is counted no more."""
        if region.window not in self._windows.values():
            return False
        self._share.give_back(region.mappings)
        return True

    def forget(self) -> None:
        """The client is gone. A view that was kept holds its window; a new client gets new ones."""
        self.window = None
        self._windows.clear()

    def retire(self) -> None:
        """The device is served no more: what the process may map is for the others."""
        self._share.leave()

    def _lay_file(self, region: Region, fd: int, position: int, page_size: int, protection: int) -> None:
        try:
            window, position = self._place(region, position, page_size)
            window.map(*region.mapped, protection, fd, position)
        except OSError as error:
            raise self._refused_region(region, error) from error

    def _refused_region(self, region: Region, error: OSError) -> PeerError:
        self._share.give_back(region.mappings)
        return PeerError(f"{region.mapping()}: {error.strerror}", error.errno or errno.EINVAL)

    def _place(self, region: Region, position: int, page_size: int) -> tuple[Window, int]:
        """Give the region a place where it belongs, or apart; ``position`` is where it begins in what has these pages.

        Returns the window, in whose ``region.mapped`` it is to be mapped, and the position of that: of whole pages.
        Raises OSError where there is no window to be had.
        """
        address, size = region.address, region.end - region.address
        block = address >> WINDOW_BITS
        window = None
        if (region.end - 1) >> WINDOW_BITS == block:
            window = self._windows.get(block) or self._new_window(block)
        # Huge pages are mapped whole: what begins or ends within one would lie over its neighbours in a window.
        if page_size != PAGE and window is not None and (window.base | address | size | position) % page_size:
            window = None
        mappings = _IN_WINDOW if window is not None else _APART if page_size == PAGE else _APART_HUGE
        if not self._share.take(mappings):
            raise self._too_many(region)
        region.mappings = mappings
        if window is not None:
            region.origin = block << WINDOW_BITS
            region.mapped = address - region.origin, size
        else:
            skip = position % page_size
            region.origin = address - skip
            region.mapped = 0, -(-(size + skip) // page_size) * page_size
            window = Window(region.mapped[1], page_size)
            position -= skip
        region.window, region.page_size = window, page_size
        return window, position

    def _new_window(self, block: int) -> Window | None:
        """A window for DMA addresses with these upper bits; None where there is none to be had."""
        if self._refused or len(self._windows) >= MAX_WINDOWS:
            return None
        try:
            window = self._windows[block] = Window(WINDOW_SIZE, _ALIGNMENT)
        except OSError:
            self._refused = True  # address space is limited: ulimit -v, strict overcommit
            return None
        if block == 0:
            self.window = window
        return window

    def _too_many(self, region: Region) -> PeerError:
        return PeerError(
            f"{region.mapping()}: this device has {self._share.used} of the process's memory mappings, and may "
            f"have {self._share.limit} (vm.max_map_count is {max_map_count()}, {len(PROCESS)} devices share it). "
            "Raise vm.max_map_count, use --processes, or let the guest map less",
            errno.ENOSPC,
        )


def _parts(region: Region, offset: int, page_size: int) -> list[Region]:
    """The whole huge pages of a region, which fit into the window, apart from what begins or ends within one.

    QEMU maps 0..0xc0000 and 0x100000..: all but the first MiB of a guest's RAM is where look-ups are fast.
    """
    first, last = -(-region.address // page_size) * page_size, region.end // page_size * page_size
    cuts = sorted({region.address, first, last, region.end})
    if (region.address - offset) % page_size or first >= last or len(cuts) == 2:
        return [region]
    whole = (region.address, region.end)
    return [
        Region(start, end, region.readable, region.writable, dma_map=whole) for start, end in itertools.pairwise(cuts)
    ]
