"""The driver's side of a packed virtqueue (virtio 1.4, 2.8), laid bare like `split_ring`."""

from collections.abc import Sequence

from vfiouser_virtio.guest.ports import DmaMemory
from vfiouser_virtio.protocols.virtio.ring import (
    PACKED_DESC_ALIGN,
    PACKED_DESC_CODEC,
    PACKED_EVENT_ALIGN,
    PACKED_EVENT_SIZE,
    WRAP_COUNTER,
    DescFlags,
    RingEventFlags,
)
from vfiouser_virtio.testing.conformance.verdicts import NotApplicable

DESC = PACKED_DESC_CODEC
AVAIL, USED = int(DescFlags.AVAIL), int(DescFlags.USED)

Segment = tuple[int, int, bool]
"""address, length, writable."""


class PackedDriverRing:
    """``size`` descriptors in new memory, none of them available; both wrap counters are 1."""

    def __init__(self, memory: DmaMemory, size: int) -> None:
        self.size = size
        self._desc = memory.alloc(DESC.size * size, PACKED_DESC_ALIGN)
        driver, device = (memory.alloc(PACKED_EVENT_SIZE, PACKED_EVENT_ALIGN) for _ in range(2))
        self._driver_event, self._device_event = driver.view.cast("H"), device.view.cast("H")
        self.addresses = self._desc.address, driver.address, device.address
        self._next, self._wrap = 0, True
        self._used, self._used_wrap = 0, True
        self._free = size

    @property
    def next_slot(self) -> int:
        """Where the next buffer goes."""
        return self._next

    @property
    def next_available(self) -> int:
        """Slot and wrap counter of the next buffer, as notifications with data have them (2.9)."""
        return self._next | WRAP_COUNTER * self._wrap

    @property
    def next_used(self) -> tuple[int, bool]:
        """Slot and wrap counter of the next used descriptor."""
        return self._used, self._used_wrap

    def ask(self, flags: RingEventFlags, slot: int = 0, wrap: bool = False) -> None:
        """The driver's event suppression structure: which used buffers are to be notified (2.8.10)."""
        self._driver_event[0] = slot | WRAP_COUNTER * wrap
        self._driver_event[1] = flags

    @property
    def device_flags(self) -> int:
        """``flags`` of the device's event suppression structure."""
        return self._device_event[1]

    def write(self, segments: Sequence[Segment], ids: Sequence[int], flags: int = 0) -> None:
        """Make a list of descriptors available, with ``ids`` in them; only the last one counts (2.8.6).

        The flags of the first are stored last: until then the device sees nothing of the list. Raises NotApplicable
        where the device's queues are too small for what is tried.
        """
        self._free -= len(segments)
        if self._free < 0:
            raise NotApplicable(f"needs a queue of more than {self.size} entries")
        stores = []
        for number, ((address, length, is_writable), buffer_id) in enumerate(zip(segments, ids, strict=True)):
            own = (
                (DescFlags.WRITE if is_writable else 0) | (DescFlags.NEXT if number < len(segments) - 1 else 0) | flags
            )
            own |= AVAIL if self._wrap else USED
            stores.append((DESC.size * self._next, DESC.pack(address, length, buffer_id, own)))
            self._next += 1
            if self._next == self.size:
                self._next, self._wrap = 0, not self._wrap
        for at, data in reversed(stores):
            self._desc.view[at : at + DESC.size - 2] = data[:-2]
            self._desc.view[at + DESC.size - 2 : at + DESC.size] = data[-2:]

    def take_used(self, count: int) -> tuple[int, int] | None:
        """(id, len) at the next used slot, or None; then moves on by the ``count`` descriptors that its list had."""
        found = self.peek_used(0)
        if found is not None:
            self._free += count
            self._used, self._used_wrap = self._further(count)
        return found

    def peek_used(self, ahead: int) -> tuple[int, int] | None:
        """(id, len) so many slots behind the next used one, if that is used, too."""
        slot, wrap = self._further(ahead)
        _, length, buffer_id, flags = DESC.unpack_from(self._desc.view, DESC.size * slot)
        return (buffer_id, length) if bool(flags & AVAIL) == bool(flags & USED) == wrap else None

    def _further(self, count: int) -> tuple[int, bool]:
        at = self._used + count
        return (at, self._used_wrap) if at < self.size else (at - self.size, not self._used_wrap)

    def table(self, slot: int = 0, count: int | None = None) -> bytes:
        """The bytes of some descriptors, to see whether they change."""
        end = len(self._desc.view) if count is None else DESC.size * (slot + count)
        return bytes(self._desc.view[DESC.size * slot : end])
