"""Where the client's memory lies in this process: in sparse windows, or apart from them (see `memory`)."""

import errno
import itertools
import mmap
from collections.abc import Callable

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.mapping_limit import PROCESS, max_map_count
from vfiouser_virtio.regions import Region
from vfiouser_virtio.window import PAGE, Window

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


class Places:
    """The windows of one client's memory. ``window`` is the one in which byte n is DMA address n, once it is needed."""

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
        protection = mmap.PROT_READ | (mmap.PROT_WRITE if region.writable else 0)

        def lay(window: Window, start: int, size: int, position: int) -> None:
            window.map(start, size, protection, fd, position)

        if page_size == PAGE:
            self._lay(region, lay, offset, PAGE)
            return [region]
        parts = _parts(region, offset, page_size)
        for index, part in enumerate(parts):
            try:
                self._lay(part, lay, offset + part.address - region.address, page_size)
            except PeerError:
                self.take_out(parts, 0, index)
                raise
        return parts

    def lay_alias(self, region: Region, vaddr: int, page_size: int) -> None:
        """Map once more what is mapped at ``vaddr``. Raises PeerError where that is no shared mapping, or not whole."""
        size = region.end - region.address
        if (region.address | size | vaddr) % PAGE:
            raise PeerError(f"{region.mapping()} mapped at {vaddr:#x}: not aligned to pages of {PAGE:#x}", errno.EINVAL)

        def lay(window: Window, start: int, size: int, position: int) -> None:
            window.alias(start, size, position, readable=region.readable)

        self._lay(region, lay, vaddr, max(page_size, PAGE))

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
        """The client is gone. A view that somebody kept holds its window; a new client gets new ones."""
        self.window = None
        self._windows.clear()

    def retire(self) -> None:
        """The device is served no more: what the process may map is for the others."""
        self._share.leave()

    def _lay(self, region: Region, lay: Callable[[Window, int, int, int], None], position: int, page_size: int) -> None:
        """Put the region where it belongs, or apart. ``position`` is where it begins in what has these pages.

        ``lay`` is called with a window, start and size in it, and the position of that: of whole pages.
        """
        address, size = region.address, region.end - region.address
        origin = address >> WINDOW_BITS << WINDOW_BITS
        try:
            window = self._window_of(region)
            # Huge pages are mapped whole: what begins or ends within one would lie over its neighbours in a window.
            if page_size != PAGE and window is not None and (window.base | address | size | position) % page_size:
                window = None
            if window is not None:
                self._count(region, _IN_WINDOW)
                region.mapped = address - origin, size
                lay(window, *region.mapped, position)
            else:
                self._count(region, _APART if page_size == PAGE else _APART_HUGE)
                skip = position % page_size
                origin = address - skip
                region.mapped = 0, -(-(size + skip) // page_size) * page_size
                window = Window(region.mapped[1], page_size)
                lay(window, *region.mapped, position - skip)
        except OSError as error:
            self._share.give_back(region.mappings)
            raise PeerError(f"{region.mapping()}: {error.strerror}", error.errno or errno.EINVAL) from error
        region.window, region.origin, region.page_size = window, origin, page_size

    def _window_of(self, region: Region) -> Window | None:
        """The window in which the region belongs, if there is one."""
        block = region.address >> WINDOW_BITS
        window = self._windows.get(block)
        if (region.end - 1) >> WINDOW_BITS != block or self._refused:
            return None
        if window is None and len(self._windows) < MAX_WINDOWS:
            try:
                window = self._windows[block] = Window(WINDOW_SIZE, _ALIGNMENT)
            except OSError:
                self._refused = True  # address space is limited: ulimit -v, strict overcommit
        if block == 0:
            self.window = window
        return window

    def _count(self, region: Region, mappings: int) -> None:
        if not self._share.take(mappings):
            raise PeerError(
                f"{region.mapping()}: this device has {self._share.used} of the process's memory mappings, and may "
                f"have {self._share.limit} (vm.max_map_count is {max_map_count()}, {len(PROCESS)} devices share it). "
                "Raise vm.max_map_count, use --processes, or let the guest map less",
                errno.ENOSPC,
            )
        region.mappings = mappings


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
