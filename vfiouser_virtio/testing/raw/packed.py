"""Driver side of a packed virtqueue (virtio 1.4, 2.8), each structure by itself."""

from collections.abc import Collection, Sequence

from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.virtio.ring import (
    PACKED_DESC_ALIGN,
    PACKED_DESC_CODEC,
    PACKED_EVENT,
    PACKED_EVENT_ALIGN,
    PACKED_EVENT_SIZE,
    WRAP_COUNTER,
    DescFlags,
    RingEventFlags,
    packed_desc_size,
)
from vfiouser_virtio.testing.raw.ring import NEXT, RawRam, RawRing, RingFullError, Segment

DESC = PACKED_DESC_CODEC
AVAIL, USED = int(DescFlags.AVAIL), int(DescFlags.USED)
_EVENT = codec(PACKED_EVENT)


def packed_areas(size: int) -> tuple[tuple[int, int], ...]:
    """(bytes, alignment) of the descriptor ring and of both event suppression structures."""
    event = PACKED_EVENT_SIZE, PACKED_EVENT_ALIGN
    return (packed_desc_size(size), PACKED_DESC_ALIGN), event, event


def off_wrap(slot: int, wrap: bool) -> int:
    """A slot and a wrap counter, as event suppression and notifications with data have them."""
    return slot | (WRAP_COUNTER if wrap else 0)


class RawPackedRing(RawRing):
    """Packed ring: no descriptor is available, both wrap counters are 1; the memory is expected to be zero."""

    def __init__(self, ram: RawRam, size: int, addresses: tuple[int, int, int], index: int = 0) -> None:
        super().__init__(ram, size, addresses, index)
        self.next_slot, self._wrap = 0, True
        """Where the next descriptor goes."""
        self.next_used = 0, True
        """Slot and wrap counter of the next used descriptor."""
        self._free = size

    # ---- what the driver writes ----------------------------------------------------------------------------------

    def store(self, entries: Sequence[tuple[int, int, int, int]], *, raw: bool = False) -> None:
        """Descriptors (addr, len, id, flags) from the next slot on, marked as available unless they are ``raw``.

        The flags of the first are stored last: until then the device sees nothing of the list.
        """
        stores: list[tuple[int, bytes]] = []
        for address, length, buffer_id, flags in entries:
            mark = 0 if raw else AVAIL if self._wrap else USED
            stores.append((self.desc + DESC.size * self.next_slot, DESC.pack(address, length, buffer_id, flags | mark)))
            self.next_slot, self._wrap = self._beyond(self.next_slot, self._wrap, 1)
        for at, data in reversed(stores):
            self.ram.write(at, data[:-2])
            self.ram.write(at + DESC.size - 2, data[-2:])

    def write(self, segments: Sequence[Segment], ids: Sequence[int]) -> None:
        """Make a list available with an id in each of its descriptors; only the last one counts (2.8.6).

        Raises `RingFullError`.
        """
        if self._free < len(segments):
            raise RingFullError(f"needs a queue of more than {self.size} entries")
        self._free -= len(segments)
        last = len(segments) - 1
        self.store(
            [
                (address, length, buffer_id, flags | (NEXT if n < last else 0))
                for n, ((address, length, flags), buffer_id) in enumerate(zip(segments, ids, strict=True))
            ]
        )

    def set_event(self, value: int, flags: int = RingEventFlags.DESC) -> None:
        """The driver's event suppression structure: which used buffers are to be notified (2.8.10)."""
        self.ram.write(self.driver, _EVENT.pack(value & 0xFFFF, flags))

    # ---- what the device writes ----------------------------------------------------------------------------------

    @property
    def device_flags(self) -> int:
        """``flags`` of the device's event suppression structure."""
        return int(_EVENT.unpack(self.ram.read(self.device, PACKED_EVENT_SIZE))[1])

    def wants_notification(self, *, event_idx: bool) -> bool:
        """Whether the device may want to know of what was made available (2.8.10); of one slot alone, always."""
        del event_idx
        return self.device_flags != RingEventFlags.DISABLE

    def used(self, ahead: int = 0) -> tuple[int, int] | None:
        """(id, len) so many slots behind the next used one, where that is used."""
        slot, wrap = self._beyond(*self.next_used, ahead)
        _, length, buffer_id, flags = DESC.unpack(self.descriptors(slot, 1))
        return (buffer_id, length) if bool(flags & AVAIL) == bool(flags & USED) == wrap else None

    def skip_used(self, count: int) -> None:
        """Move on by the descriptors of a used list."""
        self._free += count
        self.next_used = self._beyond(*self.next_used, count)

    def descriptors(self, slot: int, count: int) -> bytes:
        """The bytes of some descriptors, to see whether they change."""
        return self.ram.read(self.desc + DESC.size * slot, DESC.size * count)

    def _beyond(self, slot: int, wrap: bool, count: int) -> tuple[int, bool]:
        slot += count
        return (slot, wrap) if slot < self.size else (slot - self.size, not wrap)

    # ---- whole chains --------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        return self._free

    @property
    def next_available(self) -> int:
        return off_wrap(self.next_slot, self._wrap)

    def _add(self, segments: Sequence[Segment]) -> int:
        buffer_id = next(name for name in range(self.size) if name not in self.pending)  # the lowest one
        self.pending[buffer_id] = range(len(segments))
        self.write(segments, [buffer_id] * len(segments))
        return buffer_id

    @staticmethod
    def table(segments: Sequence[Segment]) -> bytes:
        return b"".join(DESC.pack(address, length, 0, flags) for address, length, flags in segments)

    def _taken(self, descriptors: Collection[int]) -> None:
        self.skip_used(len(descriptors))
