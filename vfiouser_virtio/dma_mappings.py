"""What a client has mapped for its device: how it is laid into this process, and how it goes away again.

::

    map           ──▶ checked ──▶ laid into a window, or apart ──▶ in the `RegionMap`, where look-ups find it
    unmap, clear  ──▶ forgotten at once ──▶ pins end ──▶ Removal, in small steps ──▶ hold ends ──▶ reply, next client
                      (no look-up finds it)

Nothing of a client's memory stays mapped when its reply has gone, or when the next client comes. Where the kernel
refuses to unmap it, the device takes no client any more.
"""

import errno
import itertools
import mmap
from collections.abc import Callable

from vfiouser_virtio.address_space import PAGE, PROCESS, Window, max_map_count
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.memory_pins import MemoryPins
from vfiouser_virtio.regions import Region, RegionMap
from vfiouser_virtio.vfio_device import MAX_DMA_MAPS, Hold

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

STEP = 256
"""Regions that are unmapped at once, which takes some 2 ms. All of 28,000 pages would stop every device for 150 ms."""

Later = Callable[[Callable[[], bool]], None]
"""Calls a function again and again until it returns False, with turns of other tasks in between: to unmap 28,000 pages
takes 150 ms."""


# ---- where memory is laid --------------------------------------------------------------------------------------------


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


# ---- unmapping -------------------------------------------------------------------------------------------------------


class Removal:
    """The regions, in order of their addresses; with ``whole``, these are all, and their windows go with them."""

    def __init__(self, places: Places, regions: list[Region], *, whole: bool = False) -> None:
        self.regions = regions
        self.whole = whole
        self.hold: Hold | None = None
        """What ends when it is done."""
        self.error: OSError | None = None
        """Why something is still mapped."""
        self._places = places
        self._position = 0
        self._failed: list[Region] = []

    @property
    def is_short(self) -> bool:
        """Whether it takes one step."""
        return len(self.regions) <= STEP

    @property
    def still_mapped(self) -> list[Region]:
        """After it has ended: what could not be unmapped. Otherwise also what it has not come to."""
        return self._failed + self.regions[self._position :]

    def touches(self, address: int, end: int) -> bool:
        """Whether a range has something of what is being unmapped, or of what lies in between."""
        return self.regions[0].address < end and self.regions[-1].end > address

    def run(self) -> None:
        """Do all of it at once."""
        while self.step():
            pass

    def step(self) -> bool:
        """Do a part of it; whether there is more. Look at ``error`` after the last one."""
        first = self._position
        self._position = last = min(first + STEP, len(self.regions))
        try:
            self._places.take_out(self.regions, first, last)
        except OSError as error:
            self._failed += self.regions[first:last]
            self.error = error
        if last < len(self.regions):
            return True
        if self.whole:
            self._finish()
        return False

    def _finish(self) -> None:
        """Nothing of a client may be left. A window as a whole can be covered where its middle could not."""
        failed, self._failed, self.error = self._failed, [], None
        try:
            self._places.cover_windows()
        except OSError as error:
            self.error = error
        for region in failed:
            if self.error is None and self._places.covered(region):
                continue
            try:
                self._places.take_out([region], 0, 1)
            except OSError as error:
                self._failed.append(region)
                self.error = error
        if self.error is None:
            self._places.forget()


# ---- what is mapped, and the order in which it goes ------------------------------------------------------------------


class DmaMappings:
    """See the module. ``forget`` is called when regions are not to be found any more, before they are unmapped."""

    def __init__(self, forget: Callable[[], None], log: DeviceLog) -> None:
        self._log = log
        self.later: Later | None = None
        self.map = RegionMap()
        self.places = Places()
        self.pins = MemoryPins()
        self._forget = forget
        self._removals: list[Removal] = []
        self._lost: list[Region] = []  # that could not be unmapped
        self._left_behind = False  # a client's memory may be mapped that is not, or no longer, its device's to touch
        self._broken = False  # it was, when everything had been tried

    def new(self, address: int, size: int, *, readable: bool, writable: bool) -> Region:
        """A region that may be mapped, and added to the map. Raises PeerError."""
        if self._left_behind or self._broken:
            self.check_clear()
        end = address + size
        if size <= 0 or address < 0 or end > 1 << 64:
            raise PeerError(f"DMA_MAP of {address:#x}+{size:#x}: no such range", errno.EINVAL)
        overlapping = self.map.overlapping(address, end)
        if overlapping is not None:
            raise PeerError(f"DMA_MAP of {address:#x}..{end:#x} overlaps region {overlapping}", errno.EEXIST)
        if self._removals and any(removal.touches(address, end) for removal in self._removals):
            raise PeerError(f"DMA_MAP of {address:#x}..{end:#x}, of which some is still being unmapped", errno.EBUSY)
        if len(self.map) >= MAX_DMA_MAPS:
            raise PeerError(
                f"DMA_MAP of {address:#x}..{end:#x}: {MAX_DMA_MAPS} regions are mapped already. "
                "Behind a vIOMMU each page of each request is one: give the device a smaller queue-size",
                errno.ENOSPC,
            )
        return Region(address, end, readable, writable)

    def check_clear(self) -> None:
        """Raises PeerError, after which a connection cannot go on, where memory could not be unmapped."""
        if self._left_behind or self._broken:
            raise PeerError(
                "memory that a client has unmapped or left could not be let go: this device takes no client any more; "
                "start its process again",
                errno.EIO,
                fatal=True,
            )

    def unmap(self, address: int, size: int) -> Hold | None:
        """See `memory.GuestMemory.unmap`."""
        if address < 0 or size <= 0 or address + size > 1 << 64:
            raise PeerError(f"DMA_UNMAP of {address:#x}+{size:#x}: no such range", errno.EINVAL)
        end = address + size
        first, last = self.map.inside(address, end)
        cut = self.map.cut_by(address, end, first, last)
        if cut is not None:
            raise PeerError(f"DMA_UNMAP of {address:#x}..{end:#x} would cut region {cut} in two", errno.EINVAL)
        if first == last:
            return None
        removed = self.map.remove(first, last)
        self._forget()
        if not self.pins and last - first <= STEP:  # nearly always; behind a vIOMMU for each page of each request
            try:
                self.places.take_out(removed, 0, last - first)
            except OSError:
                pass  # once more, and then what else can be done
            else:
                return None
        removal = Removal(self.places, removed)
        hold = self._begin(removal)
        if removal.error is not None:
            what = f"DMA_UNMAP of {address:#x}..{end:#x}"
            raise PeerError(f"{what}: {removal.error.strerror}", removal.error.errno or errno.ENOMEM, fatal=True)
        return hold

    def clear(self) -> Hold | None:
        """See `memory.GuestMemory.clear`."""
        # First what makes it unreachable, which needs no memory and cannot fail; then what the kernel has to do.
        self._left_behind = True
        removed = self.map.remove_all()
        self._forget()
        lost, self._lost = self._lost, []
        return self._begin(Removal(self.places, removed + lost if lost else removed, whole=True))

    def retire(self) -> None:
        """See `memory.GuestMemory.retire`."""
        self.places.retire()

    def _begin(self, removal: Removal) -> Hold | None:
        """Unmap regions that are forgotten already, as soon as nobody uses them; the hold ends after that."""
        regions = removal.regions
        if self._removals:  # requests may use what was unmapped before
            regions = sorted(itertools.chain(regions, *(other.regions for other in self._removals)), key=_address)
        waiting = self.pins.wait_for(regions)
        if waiting is None and (self.later is None or removal.is_short):
            removal.run()
            self._ended(removal)
            return None
        removal.hold = Hold(1, None if waiting is None else waiting.expire)
        if removal.regions:
            self._removals.append(removal)
        if waiting is None:
            self._carry_out(removal)
        else:
            waiting.when_done(lambda: self._carry_out(removal))
        return removal.hold

    def _carry_out(self, removal: Removal) -> None:
        def step() -> bool:
            if removal.step():
                return True
            self._ended(removal)
            return False

        if self.later is None or removal.is_short:
            while step():
                pass
        else:
            self.later(step)

    def _ended(self, removal: Removal) -> None:
        if removal in self._removals:
            self._removals.remove(removal)
        if removal.error is None:
            self._left_behind = self._left_behind and not removal.whole
        elif removal.whole:
            self._lost = removal.still_mapped
            if not self._broken:
                self._log.error("%s; it takes no client any more", _cannot(removal.error))
            self._broken = True
        else:
            self._give_up(removal)
            if self._lost:
                return  # a reply to DMA_UNMAP would be a lie
        if removal.hold is not None:
            removal.hold.finish()

    def _give_up(self, failed: Removal) -> None:
        """Regions cannot be unmapped alone: unmap all that the client has, for which a whole window must be covered.

        The client cannot go on; what its device has under way fails. Until `clear` nothing else is mapped.
        """
        self._log.error("%s; its client loses all of its memory", _cannot(failed.error))
        self._left_behind = True
        self.pins.cancel_all()
        regions = [*self.map.remove_all(), *failed.still_mapped, *self._lost]
        self._forget()
        whole = Removal(self.places, regions, whole=True)
        whole.run()
        self._lost = whole.still_mapped


def _address(region: Region) -> int:
    return region.address


def _cannot(error: OSError | None) -> str:
    return f"memory of its client cannot be unmapped ({error.strerror if error else 'unknown'})"
