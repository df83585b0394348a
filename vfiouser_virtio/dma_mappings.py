"""DMA mappings of one client: regions as it made them, the spans that look-ups walk, and how they go away again.

::

    regions   │ A rw │ B rw │ C r │      │ D rw │ E rw │     one for each DMA_MAP, and what DMA_UNMAP removes
    spans     │     A+B     │  C  │      │     D+E     │     neighbours in one window with the same rights

A look-up walks spans. A client may map 28,000 single pages, and a guest name all of them in each of its descriptors: to
walk those would take milliseconds for each.

::

    map           ──▶ checked ──▶ laid into this process (`Places`) ──▶ in the `RegionMap`, where look-ups find it
    unmap, clear  ──▶ forgotten at once ──▶ pins end ──▶ `Removal`, in small steps ─▶ hold ends ──▶ reply, next client
                      (no look-up finds it)

Nothing of a client's memory stays mapped when its reply has gone, or when the next client comes. Where the kernel
refuses to unmap it, the device takes no client any more.
"""

import errno
import itertools
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from vfiouser_virtio.address_space import Places, Region, Window
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import PeerError, Unmapped
from vfiouser_virtio.memory_pins import Later, MemoryPins
from vfiouser_virtio.memory_removal import STEP, Removal
from vfiouser_virtio.vfio_device import MAX_DMA_MAPS, Hold

MAX_SPANS = 512
"""Spans that one range may cross. Rights that alternate from page to page keep 28,000 of them apart: to walk all of
them for each descriptor of a guest is an attack on our time. 1 MiB in pages, each in a window of its own, are 257."""


# ---- what is mapped --------------------------------------------------------------------------------------------------


@dataclass(slots=True, eq=False, repr=False)
class Span:
    """Neighbouring regions with the same rights, and in the same window if in any: one slice of it."""

    address: int
    end: int
    readable: bool
    writable: bool
    window: Window | None
    origin: int

    def takes(self, region: Region) -> bool:
        """Whether a region next to it belongs to it."""
        return (
            self.window is region.window
            and self.origin == region.origin
            and self.readable == region.readable
            and self.writable == region.writable
        )

    def part(self, address: int, end: int) -> "Span":
        """What is left of it when the rest was unmapped."""
        return Span(address, end, self.readable, self.writable, self.window, self.origin)


class RegionMap:
    """Regions of one client, by address."""

    def __init__(self) -> None:
        self.regions: list[Region] = []
        self._starts: list[int] = []
        self._spans: list[Span] = []
        self._span_starts: list[int] = []
        self.missed = False
        """A look-up has not found what it looked for, and may wait for it to be mapped; for the owner to reset."""

    def __len__(self) -> int:
        return len(self.regions)

    def overlapping(self, address: int, end: int) -> Region | None:
        """A region that has something of the range."""
        index = bisect_left(self._starts, end)
        return self.regions[index - 1] if index and self.regions[index - 1].end > address else None

    def overlapping_all(self, address: int, end: int) -> list[Region]:
        """The regions that have something of the range, which may have holes."""
        first = bisect_right(self._starts, address) - 1
        if first < 0 or self.regions[first].end <= address:
            first += 1
        return self.regions[first : bisect_left(self._starts, end)]

    def add(self, region: Region) -> None:
        """Add a region that overlaps none."""
        address, end = region.address, region.end
        index = bisect_left(self._starts, address)
        self._starts.insert(index, address)
        self.regions.insert(index, region)

        spans = self._spans
        index = bisect_left(self._span_starts, address)
        before = spans[index - 1] if index and spans[index - 1].end == address else None
        after = spans[index] if index < len(spans) and spans[index].address == end else None
        if before is not None and before.takes(region):
            before.end = end
            if after is not None and after.takes(region):
                before.end = after.end
                del spans[index], self._span_starts[index]
        elif after is not None and after.takes(region):
            after.address = self._span_starts[index] = address
        else:
            origin = region.origin
            spans.insert(index, Span(address, end, region.readable, region.writable, region.window, origin))
            self._span_starts.insert(index, address)

    def inside(self, address: int, end: int) -> tuple[int, int, Region | None]:
        """Indexes of the first region that begins in the range, and of the one behind the last.

        The region is one of which only a part is in the range.
        """
        regions = self.regions
        first = bisect_left(self._starts, address)
        last = bisect_left(self._starts, end, first)
        if first and regions[first - 1].end > address:
            return first, last, regions[first - 1]
        if first < last:
            region = regions[first]
            if region.dma_map is not None and region.dma_map[0] < address:
                return first, last, region
            region = regions[last - 1]
            if region.end > end or (region.dma_map is not None and region.dma_map[1] > end):
                return first, last, region
        return first, last, None

    def remove(self, first: int, last: int) -> list[Region]:
        """Take out the regions with these indexes, at least one."""
        if first == 0 and last == len(self.regions):
            return self.remove_all()
        removed = self.regions[first:last]
        address, end = removed[0].address, removed[-1].end
        del self.regions[first:last]
        del self._starts[first:last]
        # The spans of these regions, of which the first and the last may have others as well.
        spans, starts = self._spans, self._span_starts
        low, high = bisect_right(starts, address) - 1, bisect_left(starts, end)
        head, tail = spans[low], spans[high - 1]
        if tail.end > end:
            spans.insert(high, tail.part(end, tail.end))
            starts.insert(high, end)
        if head.address < address:
            head.end = address
            low += 1
        del spans[low:high], starts[low:high]
        return removed

    def remove_all(self) -> list[Region]:
        """Take out all regions. Copies nothing, for it must succeed where there is no more memory."""
        removed, self.regions = self.regions, []
        self._starts.clear()
        self._spans.clear()
        self._span_starts.clear()
        return removed

    def check(self, address: int, length: int, *, write: bool) -> list[Span]:
        """The spans that a range lies in. Raises Unmapped, see `memory.GuestMemory.check`."""
        found: list[Span] = []
        position, end = address, address + length
        spans = self._spans
        index = bisect_right(self._span_starts, address) - 1
        while position < end or not found:
            span = spans[index] if 0 <= index < len(spans) else None
            if span is None or not span.address <= position < span.end:
                raise self._miss(f"{address:#x}+{length:#x}: no memory is mapped at {position:#x}")
            if not (span.writable if write else span.readable):
                raise self._miss(
                    f"{address:#x}+{length:#x}: memory at {position:#x} may not be {'written' if write else 'read'}"
                )
            if len(found) == MAX_SPANS:
                raise self._miss(f"{address:#x}+{length:#x} is made up of more than {MAX_SPANS} pieces of memory")
            found.append(span)
            position = span.end
            index += 1
        return found

    def _miss(self, what: str) -> Unmapped:
        self.missed = True
        return Unmapped(what)

    def between(self, address: int, end: int) -> list[Region]:
        """The regions of a range that has no hole (see `check`)."""
        return self.regions[bisect_right(self._starts, address) - 1 : bisect_left(self._starts, end)]


# ---- the order of it all ---------------------------------------------------------------------------------------------


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
        if len(self.map.regions) >= MAX_DMA_MAPS:
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
        first, last, cut = self.map.inside(address, end)
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
        """Unmap regions that are forgotten already, as soon as they are not in use; the hold ends after that."""
        regions = removal.regions
        if self._removals:  # requests may use what was unmapped before
            regions = sorted(itertools.chain(regions, *(other.regions for other in self._removals)), key=_address)
        waiting = self.pins.wait_for(regions, self.later)
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
