"""The driver's side of a packed virtqueue (virtio 1.4, 2.8), laid bare like `split_ring`."""

import struct
from collections.abc import Sequence

from vfiouser_virtio.guest.ports import DmaMemory
from vfiouser_virtio.protocols.virtio.ring import DESC_ALIGN, DescFlags

# struct pvirtq_desc: addr, len, id, flags (2.8.13), and two bits of flags that the split ring does not have (2.8.1).
DESC = struct.Struct("<QIHH")
AVAIL, USED = 1 << 7, 1 << 15
_EVENT_SIZE, _EVENT_ALIGN = 4, 4  # struct pvirtq_event_suppress: off_wrap, flags (2.8.14)

Segment = tuple[int, int, bool]
"""address, length, writable."""


class PackedDriverRing:
    """``size`` descriptors in new memory, none of them available; both wrap counters are 1."""

    def __init__(self, memory: DmaMemory, size: int) -> None:
        self.size = size
        self._desc = memory.alloc(DESC.size * size, DESC_ALIGN)
        driver, device = (memory.alloc(_EVENT_SIZE, _EVENT_ALIGN) for _ in range(2))
        self.addresses = self._desc.address, driver.address, device.address
        self._next, self._wrap = 0, True
        self._used, self._used_wrap = 0, True

    @property
    def next_slot(self) -> int:
        """Where the next buffer goes."""
        return self._next

    def write(self, segments: Sequence[Segment], ids: Sequence[int], flags: int = 0) -> None:
        """Make a list of descriptors available, with ``ids`` in them; only the last one counts (2.8.6).

        The flags of the first are stored last: until then the device sees nothing of the list.
        """
        stores = []
        for number, ((address, length, is_writable), buffer_id) in enumerate(zip(segments, ids, strict=True)):
            own = int(DescFlags.WRITE) * is_writable | int(DescFlags.NEXT) * (number < len(segments) - 1) | flags
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
        _, length, buffer_id, flags = DESC.unpack_from(self._desc.view, DESC.size * self._used)
        if bool(flags & AVAIL) != self._used_wrap or bool(flags & USED) != self._used_wrap:
            return None
        self._used += count
        if self._used >= self.size:
            self._used, self._used_wrap = self._used - self.size, not self._used_wrap
        return buffer_id, length

    def table(self, slot: int = 0, count: int | None = None) -> bytes:
        """The bytes of some descriptors, to see whether they change."""
        end = len(self._desc.view) if count is None else DESC.size * (slot + count)
        return bytes(self._desc.view[DESC.size * slot : end])
