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
class LeavesGaps(PackedRing):
    def _store(self, used: list[int]) -> None:
        self.next_used = (self.next_used + 1) % (2 * self.size)
        super()._store(used)
        self.next_used = (self.next_used - 1) % (2 * self.size)


@breaks("virtio14/PK2", device="blk", packed=True)
class UsesEveryDescriptorOfTheRing(PackedRing):
    def _store(self, used: list[int]) -> None:
        self.parts[0][16 * ((self.next_used + 5) % self.size)] ^= 1
        super()._store(used)


@breaks("virtio14/PK3", device="blk", packed=True)
class WritesToThePackedRequest(PackedRing):
    def _store(self, used: list[int]) -> None:
        write_to_requests(self, used)
        super()._store(used)


@breaks("virtio14/MF1-packed", device="blk", packed=True, logs="broke virtio.* too many descriptors")
def takes_four_descriptors(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any, ring: Any, memory: Any, head: int, descriptors: list[Any], slots: int) -> Any:
        if len(descriptors) > 4:
            raise GuestError("too many descriptors")
        return original(ring, memory, head, descriptors, slots)

    around(patch, packed, "make_chain", make)


def without_fast_path(patch: pytest.MonkeyPatch) -> None:
    """Lists of three descriptors are looked at one by one, as all others."""
    patch.setattr(PackedRing, "_three", lambda *_: None)


@breaks("virtio14/PK4", device="blk", packed=True, logs="broke virtio.* a readable descriptor .* follows writable")
def takes_lists_from_behind(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any, ring: Any, memory: Any, head: int, descriptors: list[Any], slots: int) -> Any:
        return original(ring, memory, head, descriptors[::-1], slots)

    around(patch, packed, "make_chain", make)
    without_fast_path(patch)


@breaks("virtio14/PK5", device="blk", packed=True)
def takes_the_first_id(patch: pytest.MonkeyPatch) -> None:
    def make(original: Any, ring: Any, memory: Any, _head: int, descriptors: list[Any], slots: int) -> Any:
        return original(ring, memory, descriptors[0][3], descriptors, slots)

    around(patch, packed, "make_chain", make)
    without_fast_path(patch)


@breaks("virtio14/PK5-indirect", packed=True, logs="broke virtio.* an id in a table")
def minds_ids_in_a_table(patch: pytest.MonkeyPatch) -> None:
    def read(original: Any, *arguments: Any) -> Any:
        table = original(*arguments)
        if any(each_id for _, _, each_id, _ in table):
            raise GuestError("an id in a table")
        return table

    around(patch, packed, "read_table", read)


@breaks("virtio14/PK5-size", packed=True, logs="wrote queue_size 0x7: no size up to 0x40")
class WantsPowersOfTwo(Virtqueue):
    def allows(self, size: int) -> bool:
        return super().allows(size) and not size & (size - 1)


# ---- event suppression -------------------------------------------------------------------------------------------


@breaks("virtio14/PK5-enable", packed=True)
class NeverInterrupts(PackedRing):
    def interrupt_due(self) -> bool:
        return False


@breaks("virtio14/PK5-disable", "virtio14/PK5-desc-silent", packed=True)
class AlwaysInterrupts(PackedRing):
    def interrupt_due(self) -> bool:
        return True


@breaks("virtio14/PK5-desc", packed=True)
class ForgetsTheOtherRound(PackedRing):
    def _position(self, off_wrap: int) -> int:
        return off_wrap & 0x7FFF


@breaks("virtio14/PK5-device", packed=True)
class AsksWithReservedFlags(PackedRing):
    def request_notification(self) -> bool:
        there = super().request_notification()
        self.parts[2].cast("I")[0] |= RESERVED
        return there

    def suppress_notifications(self) -> None:
        self.parts[2].cast("I")[0] = RingEventFlags.DISABLE << 16 | RESERVED


@breaks("virtio14/RB2-packed", packed=True, in_order=True)
class UsesPackedBuffersBackwards(PackedRing):
    def _store(self, used: list[int]) -> None:
        super()._store(backwards(used))
