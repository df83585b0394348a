"""Broken packed virtqueues (see `support.broken`)."""

from typing import Any

import pytest
from support.broken import around, breaks
from support.broken_rings import backwards, write_to_requests

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.protocols.virtio.ring import RingEventFlags
from vfiouser_virtio.virtio import Virtqueue
from vfiouser_virtio.vring import PackedRing, packed

RESERVED = 3 << 16


@breaks("virtio14/PK1", packed=True)
def leaves_gaps(patch: pytest.MonkeyPatch) -> None:
    def store(original: Any, self: PackedRing, used: list[int]) -> None:
        self.next_used = (self.next_used + 1) % (2 * self.size)
        original(self, used)
        self.next_used = (self.next_used - 1) % (2 * self.size)

    around(patch, PackedRing, "_store", store)


@breaks("virtio14/PK2", device="blk", packed=True)
def uses_every_descriptor_of_the_ring(patch: pytest.MonkeyPatch) -> None:
    def store(original: Any, self: PackedRing, used: list[int]) -> Any:
        self.parts[0][16 * ((self.next_used + 5) % self.size)] ^= 1
        return original(self, used)

    around(patch, PackedRing, "_store", store)


@breaks("virtio14/PK3", device="blk", packed=True)
def writes_to_the_packed_request(patch: pytest.MonkeyPatch) -> None:
    def store(original: Any, self: PackedRing, used: list[int]) -> Any:
        write_to_requests(self, used)
        return original(self, used)

    around(patch, PackedRing, "_store", store)


@breaks("virtio14/PK4", device="blk", packed=True, logs="broke virtio.* a readable descriptor .* follows writable")
def takes_lists_from_behind(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any, ring: Any, memory: Any, head: int, descriptors: list[Any], slots: int) -> Any:
        return original(ring, memory, head, descriptors[::-1], slots)

    around(patch, packed, "make_chain", make)


@breaks("virtio14/MF1-packed", device="blk", packed=True, logs="broke virtio.* too many descriptors")
def takes_four_descriptors(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any, ring: Any, memory: Any, head: int, descriptors: list[Any], slots: int) -> Any:
        if len(descriptors) > 4:
            raise GuestError("too many descriptors")
        return original(ring, memory, head, descriptors, slots)

    around(patch, packed, "make_chain", make)


@breaks("virtio14/PK5", device="blk", packed=True)
def takes_the_first_id(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any, ring: Any, memory: Any, _head: int, descriptors: list[Any], slots: int) -> Any:
        return original(ring, memory, descriptors[0][3], descriptors, slots)

    around(patch, packed, "make_chain", make)


@breaks("virtio14/PK5-indirect", packed=True, logs="broke virtio.* an id in a table")
def minds_ids_in_a_table(patch: pytest.MonkeyPatch) -> None:
    def read(original: Any, *arguments: Any) -> Any:
        table = original(*arguments)
        if any(each_id for _, _, each_id, _ in table):
            raise GuestError("an id in a table")
        return table

    around(patch, packed, "read_table", read)


@breaks("virtio14/PK5-size", packed=True, logs="wrote queue_size 0x7: no size up to 0x40")
def wants_powers_of_two(patch: pytest.MonkeyPatch) -> None:
    around(patch, Virtqueue, "allows", lambda original, self, size: original(self, size) and not size & (size - 1))


# ---- event suppression -------------------------------------------------------------------------------------------


@breaks("virtio14/PK5-enable", packed=True)
def never_interrupts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PackedRing, "interrupt_due", lambda _self: False)


@breaks("virtio14/PK5-disable", "virtio14/PK5-desc-silent", packed=True)
def always_interrupts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PackedRing, "interrupt_due", lambda _self: True)


@breaks("virtio14/PK5-desc", packed=True)
def forgets_the_other_round(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(PackedRing, "_position", lambda _self, off_wrap: off_wrap & 0x7FFF)


@breaks("virtio14/PK5-device", packed=True)
def asks_with_reserved_flags(patch: pytest.MonkeyPatch) -> None:
    def request(original: Any, self: PackedRing) -> bool:
        there = bool(original(self))
        self._device_event[0] |= RESERVED
        return there

    def suppress(self: PackedRing) -> None:
        self._device_event[0] = RingEventFlags.DISABLE << 16 | RESERVED

    around(patch, PackedRing, "request_notification", request)
    patch.setattr(PackedRing, "suppress_notifications", suppress)


@breaks("virtio14/RB2-packed", packed=True, in_order=True)
def uses_packed_buffers_backwards(patch: pytest.MonkeyPatch) -> None:
    around(patch, PackedRing, "_store", lambda original, self, used: original(self, backwards(used)))
