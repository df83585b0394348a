"""Pins of guest memory in use, and what waits for them: DMA_UNMAP, a reset, a client that has left."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence

from vfiouser_virtio.address_space import Region
from vfiouser_virtio.vfio_device import Hold

Ranges = Sequence[tuple[int, int]]
"""(DMA address, length) pairs."""


class Pin:
    """Pin of memory in use: DMA_UNMAP waits for it, and cancels it after a timeout."""

    __slots__ = ("_look_up", "_ranges", "cancel", "holds")

    def __init__(self, look_up: Callable[[], Ranges], cancel: Callable[[], None]) -> None:
        self._look_up = look_up
        self.cancel = cancel
        self.holds: list[Hold] = []
        self._ranges: Ranges | None = None

    @property
    def ranges(self) -> Ranges:
        """That memory. Looked up at the first unmap, if any comes."""
        if self._ranges is None:
            self._ranges = self._look_up()
        return self._ranges


class MemoryPins:
    """Pins of one device's memory."""

    def __init__(self) -> None:
        self._pins: set[Pin] = set()
        self._settling: list[Hold] = []

    def __len__(self) -> int:
        return len(self._pins)

    def all(self) -> tuple[Pin, ...]:
        """Those that there are now."""
        return tuple(self._pins)

    def add(self, pin: Pin) -> None:
        """The memory is in use until `remove`."""
        self._pins.add(pin)

    def remove(self, pin: Pin) -> None:
        """Nothing touches it any more, neither Python nor the kernel."""
        self._pins.discard(pin)
        for hold in pin.holds:
            hold.finish()
        pin.holds.clear()
        if self._settling and not self._pins:
            settled, self._settling = self._settling, []
            for hold in settled:
                hold.finish()

    def cancel_all(self) -> None:
        """Ask all that use memory to end soon."""
        for pin in tuple(self._pins):
            pin.cancel()

    def settle(self) -> Hold | None:
        """None when nothing is pinned, else a hold that ends when that is so; its `Hold.expire` cancels what is."""
        if not self._pins:
            return None
        hold = Hold(1, self.cancel_all)
        self._settling.append(hold)
        return hold

    def wait_for(self, removed: Iterable[Region]) -> Hold | None:
        """Likewise, of those that use memory of the regions, which are in order, as far as they are mapped."""
        if not self._pins:
            return None
        starts, ends = _extents(removed)
        pins = [pin for pin in self._pins if _touch(pin.ranges, starts, ends)]
        if not pins:
            return None

        def cancel_these() -> None:
            for pin in pins:
                pin.cancel()

        hold = Hold(len(pins), cancel_these)
        for pin in pins:
            pin.holds.append(hold)
        return hold


def _extents(regions: Iterable[Region]) -> tuple[list[int], list[int]]:
    """Begin and end of what is mapped without a gap: a client may unmap 28,000 pages of one request's at once."""
    starts: list[int] = []
    ends: list[int] = []
    for region in regions:
        if region.window is None:
            continue
        if ends and ends[-1] == region.address:
            ends[-1] = region.end
        else:
            starts.append(region.address)
            ends.append(region.end)
    return starts, ends


def _touch(ranges: Ranges, starts: list[int], ends: list[int]) -> bool:
    for address, length in ranges:
        index = bisect_right(ends, address)  # the first that ends behind the address
        if index < len(ends) and starts[index] < address + length:
            return True
    return False
