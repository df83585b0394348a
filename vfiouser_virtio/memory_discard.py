"""Guest RAM handed back to the host: holes punched into the files behind a client's memory.

===============================  ======================================================================================
memory                           how its pages are handed back
===============================  ======================================================================================
mapped (shared file, memfd)      madvise(2) MADV_REMOVE: a hole in the file, so the pages are free for every process.
                                 (MADV_DONTNEED frees nothing of a shared mapping: the file keeps its pages.)
huge pages                       the same, whole huge pages only
copied (`guest_files`)           fallocate(2) FALLOC_FL_PUNCH_HOLE
by message                       not at all: the client has kept the file to itself
===============================  ======================================================================================

What is read there afterwards is zero.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vfiouser_virtio.address_space import PAGE, Region
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.dma_mappings import RegionMap

_GRAIN = 4096  # of a guest's page numbers, whatever its pages or ours are
MAX_PARTIAL = 4096
"""Huge pages of which a part was given: a guest could name one small page of each of a million."""


class Discarded(NamedTuple):
    """Bytes that were handed back, and that could not be."""

    handed_back: int = 0
    unmapped: int = 0
    """No memory of the client's, or memory that the device may not write."""
    in_use: int = 0
    """Left alone, because a ring or a request lies there."""

    def plus(self, other: "Discarded") -> "Discarded":
        """Both together."""
        return Discarded(*(one + another for one, another in zip(self, other, strict=True)))


class Discards:
    """Memory of its client that one device hands back to the host."""

    def __init__(self, regions: RegionMap, log: DeviceLog) -> None:
        self._regions = regions
        self._log = log
        self._partial: OrderedDict[int, int] = OrderedDict()
        """Address of a huge page in this process to the parts of it that were given, as bits of `_GRAIN`."""

    def discard(self, address: int, length: int, in_use: Iterable[tuple[int, int]], *, gather: bool) -> Discarded:
        """Hand back the whole pages of a range, but for those that touch ``in_use``: (address, length) pairs.

        With ``gather`` a huge page goes back when all parts of it were given, in however many calls, until `retain`.
        """
        total = Discarded(unmapped=length)
        for region in self._regions.overlapping_all(address, address + length):
            if not region.writable:
                continue
            begin, end = max(address, region.address), min(address + length, region.end)
            total = total.plus(Discarded(unmapped=begin - end))
            position = begin
            for start, stop in _between(begin, end, in_use):
                total = total.plus(Discarded(self._hand_back(region, start, stop, gather), 0, start - position))
                position = stop
            total = total.plus(Discarded(in_use=end - position))
        return total

    @property
    def gathering(self) -> bool:
        """Whether there are parts of huge pages."""
        return bool(self._partial)

    def retain(self, address: int, length: int) -> None:
        """The guest uses this range again: huge pages of which it is a part are not to be handed back."""
        for region in self._regions.overlapping_all(address, address + length):
            if region.window is not None and region.page_size > PAGE:
                base = region.window.base - region.origin
                begin, end = max(address, region.address), min(address + length, region.end)
                for page, bits in _parts(base + begin, base + end, region.page_size):
                    if page in self._partial:
                        self._partial[page] &= ~bits

    def forget(self) -> None:
        """Regions were removed, or the driver has begun anew."""
        self._partial.clear()

    def _hand_back(self, region: Region, begin: int, end: int, gather: bool) -> int:
        try:
            if region.window is not None:
                return self._remove(region, begin, end, gather)
            if region.file is not None:
                return region.file.punch_hole(begin - region.address + region.offset, end - begin)
        except OSError as error:
            self._log.once(
                ("discard", error.errno),
                "%s: nothing of it can be handed back to the host: %s",
                region.mapping(),
                error.strerror,
            )
            return 0
        self._log.once(
            "discard",
            "the guest's RAM at %#x has no file descriptor: nothing of what the guest gives can be handed back to the "
            "host. In QEMU use -object memory-backend-memfd,id=mem,size=…,share=on -machine …,memory-backend=mem",
            region.address,
        )
        return 0

    def _remove(self, region: Region, begin: int, end: int, gather: bool) -> int:
        window, size = region.window, region.page_size
        assert window is not None
        base = window.base - region.origin
        first, last = base + begin, base + end
        low, high = -(-first // size) * size, last // size * size
        removed = 0
        if low < high:
            window.discard(low - window.base, high - low)
            removed = high - low
        if size > PAGE:
            for page in range(low, high, size):
                self._partial.pop(page, None)
            edges = [(first, last)] if low > high else [(first, low), (high, last)]
            for page, bits in (part for edge in edges for part in _parts(*edge, size)) if gather else ():
                whole = self._partial.pop(page, 0) | bits
                if whole == (1 << size // _GRAIN) - 1:
                    window.discard(page - window.base, size)
                    removed += size
                else:
                    self._partial[page] = whole
                    if len(self._partial) > MAX_PARTIAL:
                        self._partial.popitem(last=False)
        return removed


def _parts(first: int, last: int, size: int) -> Iterator[tuple[int, int]]:
    """The pages of this size that a range touches, each with the bits of its whole grains in the range."""
    for page in range(first // size * size, last, size):
        low = -(-max(first - page, 0) // _GRAIN)
        high = min(last - page, size) // _GRAIN
        if low < high:
            yield page, (1 << high) - (1 << low)


def _between(begin: int, end: int, in_use: Iterable[tuple[int, int]]) -> Iterator[tuple[int, int]]:
    """What is left of a range without whole pages of ours that are in use."""
    for address, length in sorted(in_use):
        low, high = address // PAGE * PAGE, -(-(address + length) // PAGE) * PAGE
        if low < end and high > begin:
            if begin < low:
                yield begin, low
            begin = max(begin, high)
    if begin < end:
        yield begin, end
