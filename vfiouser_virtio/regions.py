"""Which DMA addresses are mapped: regions as the client made them, and the spans that they make up.

::

    regions   │ A rw │ B rw │ C r │      │ D rw │ E rw │     one for each DMA_MAP, and what DMA_UNMAP removes
    spans     │     A+B     │  C  │      │     D+E     │     neighbours in one window with the same rights

A look-up walks spans. A client may map 28,000 single pages, and a guest name all of them in each of its descriptors: to
walk those would take milliseconds for each.
"""

from bisect import bisect_left, bisect_right
from dataclasses import dataclass

from vfiouser_virtio.address_space import PAGE, Window
from vfiouser_virtio.errors import Unmapped
from vfiouser_virtio.guest_files import GuestFile

MAX_SPANS = 512
"""Spans that one range may cross. Rights that alternate from page to page keep 28,000 of them apart: to walk all of
them for each descriptor of a guest is an attack on our time. 1 MiB in pages, each in a window of its own, are 257."""


@dataclass(slots=True, eq=False)
class Region:
    """One DMA mapping. ``window`` is None where it is not mapped: it is reached by ``file``, or by messages."""

    address: int
    end: int
    readable: bool
    writable: bool
    window: Window | None = None
    origin: int = 0  # DMA address that is byte 0 of the window
    mapped: tuple[int, int] = (0, 0)  # what was mapped into the window: start and size, whole pages
    mappings: int = 0  # of the process's limit, at most
    dma_map: tuple[int, int] | None = None  # begin and end of the DMA mapping, where this is only a part of it
    file: GuestFile | None = None
    offset: int = 0  # in ``file``
    page_size: int = PAGE  # of the file that is mapped

    @property
    def unmapped_with(self) -> tuple[int, int]:
        """Begin and end of what DMA_UNMAP must take as a whole."""
        return self.dma_map or (self.address, self.end)

    def mapping(self) -> str:
        """What maps it, for messages: they are made only when they are needed."""
        return f"DMA_MAP of {self.address:#x}..{self.end:#x}"

    def __str__(self) -> str:
        kind = "mapped" if self.window else "copied" if self.file else "by message"
        return f"{self.address:#x}..{self.end:#x} {'r' * self.readable}{'w' * self.writable} {kind}"


@dataclass(slots=True, eq=False)
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
    """The regions of one client, by address."""

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

    def inside(self, address: int, end: int) -> tuple[int, int]:
        """Indexes of the first region that begins in the range, and of the one behind the last."""
        return bisect_left(self._starts, address), bisect_left(self._starts, end)

    def cut_by(self, address: int, end: int, first: int, last: int) -> Region | None:
        """A region of which only a part is in the range; ``first`` and ``last`` are what `inside` has said of it."""
        regions = self.regions
        if first and regions[first - 1].end > address:
            return regions[first - 1]
        if first < last:
            if regions[first].unmapped_with[0] < address:
                return regions[first]
            if regions[last - 1].unmapped_with[1] > end:
                return regions[last - 1]
        return None

    def remove(self, first: int, last: int) -> list[Region]:
        """Take out the regions with these indexes, at least one."""
        if first == 0 and last == len(self.regions):
            return self.remove_all()
        removed = self.regions[first:last]
        address, end = removed[0].address, removed[-1].end
        del self.regions[first:last]
        del self._starts[first:last]
        # The spans of these regions, of which the first and the last may have others as well.
        low, high = bisect_right(self._span_starts, address) - 1, bisect_left(self._span_starts, end)
        head, tail = self._spans[low], self._spans[high - 1]
        left = [head.part(head.address, address)] if head.address < address else []
        if tail.end > end:
            left.append(tail.part(end, tail.end))
        self._spans[low:high] = left
        self._span_starts[low:high] = [span.address for span in left]
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
