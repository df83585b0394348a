"""Pins of guest memory in use, and what waits for them: DMA_UNMAP, a reset, a client that has left."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence

from vfiouser_virtio.address_space import Region
from vfiouser_virtio.vfio_device import Hold

Later = Callable[[Callable[[], bool]], None]
"""Calls a function again and again until it returns False, with turns of other tasks in between: to unmap 28,000 pages
takes 150 ms."""

Ranges = Sequence[tuple[int, int]]
"""(DMA address, length) pairs."""

AT_ONCE = 2048
"""Ranges that are compared at once with what is unmapped, which takes 0.8 ms: 256 requests of a disk have 262,144."""
# Ranges of a pin that are kept: the pairs of 262,144 would be looked through by Python's garbage collector, for 30 ms.
_KEPT = 64


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
        """That memory. Looked up at the first unmap, if any comes; and again, where it is too much to be kept."""
        ranges = self._look_up() if self._ranges is None else self._ranges
        if len(ranges) <= _KEPT:
            self._ranges = ranges
        return ranges


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

    def wait_for(self, removed: Iterable[Region], later: Later | None = None) -> Hold | None:
        """Likewise, of those that use memory of the regions, which are in order, as far as they are mapped.

        No look-up finds the regions any more, so nothing that is pinned from now on can. Where there is much to
        compare, most of it is left to ``later``, and there is a hold until that is done.
        """
        if not self._pins:
            return None
        search = _Search(self._pins, *_extents(removed))
        if search.step():
            if later is None:
                while search.step():
                    pass
            else:
                later(search.step)
        return None if search.hold.done else search.hold


class _Search:
    """Search among ``pins`` for those that use some memory, in steps; those that are left count for `hold`, too."""

    def __init__(self, pins: set[Pin], starts: list[int], ends: list[int]) -> None:
        self._pins = pins
        self._left = list(pins)
        self._starts, self._ends = starts, ends
        self._expired = False
        self.hold = Hold(len(self._left), self._expire)

    def _expire(self) -> None:
        self._expired = True
        for pin in tuple(self._pins):
            if self.hold in pin.holds:
                pin.cancel()

    def step(self) -> bool:
        """Look at some; whether there are more."""
        left, pins, budget = self._left, self._pins, AT_ONCE
        while left and budget > 0:
            pin = left.pop()
            if pin not in pins:  # its request has ended meanwhile
                self.hold.finish()
                continue
            ranges = pin.ranges
            budget -= len(ranges) + 1
            if not _touch(ranges, self._starts, self._ends):
                self.hold.finish()
                continue
            pin.holds.append(self.hold)
            if self._expired:
                pin.cancel()
        return bool(left)


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
