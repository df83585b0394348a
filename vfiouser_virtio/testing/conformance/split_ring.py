"""The driver's side of a split virtqueue (virtio 1.4, 2.7), laid bare: it writes whatever a check wants to try."""

import struct

from vfiouser_virtio.guest.ports import DmaMemory
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
from vfiouser_virtio.testing.conformance.verdicts import NotApplicable

UNWRITTEN = 0xEEEE_EEEE
"""What used elements hold before the device writes them."""

Descriptor = tuple[int, int, int, int]
"""addr, len, flags, next."""

_WORD = struct.Struct("<H")


class DriverRing:
    """A ring of ``size`` entries in new memory, empty; nothing is checked."""

    def __init__(self, memory: DmaMemory, size: int) -> None:
        self.size = size
        self._desc = memory.alloc(desc_size(size), DESC_ALIGN)
        self._avail = memory.alloc(avail_size(size), AVAIL_ALIGN)
        self._used = memory.alloc(used_size(size), USED_ALIGN)
        self.addresses = self._desc.address, self._avail.address, self._used.address
        """Of descriptor table, available ring and used ring."""
        self.clear()

    def clear(self) -> None:
        """As a driver sets a new ring up: all zeros, with a mark in every used element."""
        for part in (self._desc, self._avail, self._used):
            part.view[:] = bytes(len(part.view))
        self.avail_idx = 0
        for slot in range(self.size):
            USED_ELEM_CODEC.pack_into(self._used.view, 4 + USED_ELEM_CODEC.size * slot, UNWRITTEN, UNWRITTEN)

    # ---- what the driver writes ----------------------------------------------------------------------------------

    def describe(self, index: int, descriptor: Descriptor) -> None:
        """Store one descriptor. Raises NotApplicable where the device's queues are too small for what is tried."""
        if index >= self.size:
            raise NotApplicable(f"needs a queue of more than {self.size} entries")
        DESC_CODEC.pack_into(self._desc.view, DESC_CODEC.size * index, *descriptor)

    def offer(self, *heads: int) -> None:
        """Make chains available: the entries first, then the index in one store."""
        for head in heads:
            _WORD.pack_into(self._avail.view, 4 + 2 * (self.avail_idx % self.size), head)
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.set_avail_idx(self.avail_idx)

    def set_avail_idx(self, value: int) -> None:
        """Store avail.idx, whatever it says."""
        self._avail.view[2:4] = _WORD.pack(value)

    def set_avail_flags(self, flags: int) -> None:
        """Bit 0: the driver wants no interrupts (without EVENT_IDX)."""
        self._avail.view[0:2] = _WORD.pack(flags)

    def set_used_event(self, index: int) -> None:
        """With EVENT_IDX: interrupt when the element of this index has been used."""
        at = 4 + 2 * self.size
        self._avail.view[at : at + 2] = _WORD.pack(index & 0xFFFF)

    # ---- what the device writes ----------------------------------------------------------------------------------

    @property
    def used_flags(self) -> int:
        """Bit 0: the device wants no notifications."""
        return int(_WORD.unpack_from(self._used.view, 0)[0])

    @property
    def used_idx(self) -> int:
        """How many chains have come back, modulo 2^16."""
        return int(_WORD.unpack_from(self._used.view, 2)[0])

    def used_element(self, index: int) -> tuple[int, int]:
        """(id, len) of one element; ``index`` counts as used.idx does."""
        head, length = USED_ELEM_CODEC.unpack_from(self._used.view, 4 + USED_ELEM_CODEC.size * (index % self.size))
        return head, length

    def descriptor_table(self) -> bytes:
        """All of it, to see whether it has changed."""
        return bytes(self._desc.view)
