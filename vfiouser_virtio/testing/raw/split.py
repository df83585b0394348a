"""Driver side of a split virtqueue (virtio 1.4, 2.7), each structure by itself."""

import struct
from collections.abc import Collection, Sequence
from typing import TypeAlias

from vfiouser_virtio.protocols.virtio.ring import (
    AVAIL_ALIGN,
    DESC_ALIGN,
    DESC_CODEC,
    USED_ALIGN,
    USED_ELEM_CODEC,
    avail_size,
    desc_size,
    used_size,
)
from vfiouser_virtio.testing.raw.ring import NEXT, RawRam, RawRing, RingFullError, Segment

Descriptor: TypeAlias = tuple[int, int, int, int]
"""addr, len, flags, next."""

_WORD = struct.Struct("<H")


def split_areas(size: int) -> tuple[tuple[int, int], ...]:
    """(bytes, alignment) of descriptor table, available ring and used ring."""
    return (desc_size(size), DESC_ALIGN), (avail_size(size), AVAIL_ALIGN), (used_size(size), USED_ALIGN)


def linked(segments: Sequence[Segment], places: Sequence[int]) -> list[Descriptor]:
    """The descriptors of a chain at these indices of a table, each with the next one in its ``next``."""
    last = len(segments) - 1
    return [
        (address, length, flags | NEXT, places[n + 1]) if n < last else (address, length, flags, 0)
        for n, (address, length, flags) in enumerate(segments)
    ]


class RawSplitRing(RawRing):
    """Split ring: nothing is available; the memory is expected to be zero (`zero`)."""

    def __init__(self, ram: RawRam, size: int, addresses: tuple[int, int, int], index: int = 0) -> None:
        super().__init__(ram, size, addresses, index)
        self.avail_idx = self.seen_idx = 0
        self._kicked_idx = 0
        self._free = list(range(size))

    def zero(self, unwritten: int = 0) -> None:
        """Prepare the memory of a new ring: all zeros, but ``unwritten`` in every word of the used elements."""
        for address, (count, _align) in zip(self.addresses, split_areas(self.size), strict=True):
            self.ram.write(address, bytes(count))
        self.ram.write(self.device + 4, USED_ELEM_CODEC.pack(unwritten, unwritten) * self.size)

    # ---- what the driver writes ----------------------------------------------------------------------------------

    def describe(self, index: int, descriptor: Descriptor) -> None:
        """Store one descriptor. Raises `RingFullError` behind the end of the table."""
        if index >= self.size:
            raise RingFullError(f"needs a queue of more than {self.size} entries")
        self.ram.write(self.desc + DESC_CODEC.size * index, DESC_CODEC.pack(*descriptor))

    def offer(self, *heads: int, jump: int = 0) -> None:
        """Put heads into the available ring, then move its index behind them, or ``jump`` further, in one store."""
        for head in heads:
            self.ram.write(self.driver + 4 + 2 * (self.avail_idx % self.size), _WORD.pack(head))
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.avail_idx = (self.avail_idx + jump) & 0xFFFF
        self.ram.write(self.driver + 2, _WORD.pack(self.avail_idx))

    def set_avail_flags(self, flags: int) -> None:
        """Bit 0: the driver wants no interrupts (without EVENT_IDX)."""
        self.ram.write(self.driver, _WORD.pack(flags))

    def set_event(self, value: int) -> None:
        """used_event: interrupt when the element of this index has been used."""
        self.ram.write(self.driver + 4 + 2 * self.size, _WORD.pack(value & 0xFFFF))

    # ---- what the device writes ----------------------------------------------------------------------------------

    @property
    def used_flags(self) -> int:
        """Bit 0: the device wants no notifications."""
        return self._word(self.device)

    @property
    def used_idx(self) -> int:
        """How many chains have come back, modulo 2^16."""
        return self._word(self.device + 2)

    @property
    def avail_event(self) -> int:
        """With EVENT_IDX: the available element that the device wants to be notified of."""
        return self._word(self.device + 4 + USED_ELEM_CODEC.size * self.size)

    def used_element(self, index: int) -> tuple[int, int]:
        """(id, len) of one element; ``index`` counts as used.idx does."""
        at = self.device + 4 + USED_ELEM_CODEC.size * (index % self.size)
        head, length = USED_ELEM_CODEC.unpack(self.ram.read(at, USED_ELEM_CODEC.size))
        return head, length

    def descriptor_table(self) -> bytes:
        """All of it, to see whether it has changed."""
        return self.ram.read(self.desc, desc_size(self.size))

    def _word(self, address: int) -> int:
        return int(_WORD.unpack(self.ram.read(address, 2))[0])

    # ---- whole chains --------------------------------------------------------------------------------------------

    @property
    def free(self) -> int:
        return len(self._free)

    @property
    def next_available(self) -> int:
        return self.avail_idx

    def _add(self, segments: Sequence[Segment]) -> int:
        taken, self._free = self._free[: len(segments)], self._free[len(segments) :]
        for place, descriptor in zip(taken, linked(segments, taken), strict=True):
            self.describe(place, descriptor)
        self.pending[taken[0]] = taken
        self.offer(taken[0])
        return taken[0]

    @staticmethod
    def table(segments: Sequence[Segment]) -> bytes:
        return b"".join(DESC_CODEC.pack(*entry) for entry in linked(segments, range(len(segments))))

    def used(self) -> tuple[int, int] | None:
        return None if self.seen_idx == self.used_idx else self.used_element(self.seen_idx)

    def _taken(self, descriptors: Collection[int]) -> None:
        self._free += descriptors
        self.seen_idx = (self.seen_idx + 1) & 0xFFFF

    def wants_notification(self, *, event_idx: bool) -> bool:
        """Whether the device wants to know of what was made available since the last call (2.7.10)."""
        old, self._kicked_idx = self._kicked_idx, self.avail_idx
        if not event_idx:
            return not self.used_flags & 1
        return (self.avail_idx - self.avail_event - 1) & 0xFFFF < (self.avail_idx - old) & 0xFFFF
