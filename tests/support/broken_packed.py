"""Broken packed virtqueues (see `support.broken`)."""

from support.broken import breaks, breaks_by_fault
from support.broken_rings import backwards, write_to_requests

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.memory import HotRegion
from vfiouser_virtio.protocols.virtio.ring import RingEventFlags
from vfiouser_virtio.virtio import Virtqueue
from vfiouser_virtio.vring import Chain, PackedRing
from vfiouser_virtio.vring.descriptors import Descriptor, Memory, read_table

RESERVED = 3 << 16


breaks_by_fault("virtio14/PK1", "packed-gap", packed=True)


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
class TakesFourDescriptors(PackedRing):
    def _descriptors(self, slot: int, available: int, room: int) -> list[Descriptor]:
        found = super()._descriptors(slot, available, room)
        if len(found) > 4:
            raise GuestError("too many descriptors")
        return found


class WithoutFastPath(PackedRing):
    """Lists of three descriptors are looked at one by one, as all others."""

    def _three(self, slot: int, available: int, hot: HotRegion) -> Chain | None:
        return None


@breaks("virtio14/PK4", device="blk", packed=True, logs="broke virtio.* a readable descriptor .* follows writable")
class TakesListsFromBehind(WithoutFastPath):
    def _descriptors(self, slot: int, available: int, room: int) -> list[Descriptor]:
        found = super()._descriptors(slot, available, room)
        buffer_id = found[-1][3]
        return [(address, length, flags, buffer_id) for address, length, flags, _ in reversed(found)]


@breaks("virtio14/PK5", device="blk", packed=True)
class TakesTheFirstId(WithoutFastPath):
    def _descriptors(self, slot: int, available: int, room: int) -> list[Descriptor]:
        found = super()._descriptors(slot, available, room)
        return [(address, length, flags, found[0][3]) for address, length, flags, _ in found]


@breaks("virtio14/PK5-indirect", packed=True, logs="broke virtio.* an id in a table")
class MindsIdsInATable(PackedRing):
    def _indirect(self, head: int, descriptors: list[Descriptor], memory: Memory) -> list[Descriptor]:
        [(address, length, _, _)] = descriptors
        if any(each_id for _, _, each_id, _ in read_table(memory, head, address, length)):
            raise GuestError("an id in a table")
        return super()._indirect(head, descriptors, memory)


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
