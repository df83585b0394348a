"""Broken virtqueues (see `support.broken`)."""

import os
from typing import Any

from support.broken import breaks, breaks_by_fault

from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC, DescFlags
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.transports.common_cfg import CommonCfg
from vfiouser_virtio.virtio import Virtqueue
from vfiouser_virtio.virtio.binding import BoundRing
from vfiouser_virtio.vring import Area, Ring, RingState, SplitRing
from vfiouser_virtio.vring.descriptors import Descriptor, Memory

# ---- queue reset -------------------------------------------------------------------------------------------------


@breaks("virtio14/QR1")
class OnlySaysThatTheQueueIsReset(CommonCfg):
    def _set_queue_reset(self, value: int) -> None:
        self._read_exact[COMMON_CFG_OFFSETS["queue_enable"]] = lambda: 0


@breaks("virtio14/QR2", logs="broke virtio.* avail.idx is 0x0, but only 0x10 entries can follow 0x3")
class GoesOnWhereTheOldQueueWas(Virtqueue):
    before: RingState | None = None

    def reset(self) -> None:
        self.before = self.state().ring
        super().reset()

    def _new_ring(self, areas: list[Area]) -> BoundRing:
        bound = super()._new_ring(areas)
        if self.before is not None:
            bound.ring.restore(self.before._replace(buffers=(), completed=()))
        return bound


@breaks("virtio14/QR3")
class KeepsTheOldAddresses(Virtqueue):
    kept: dict[str, int] | None = None

    def reset(self) -> None:
        if self.enabled:
            self.kept = {name: getattr(self, name) for name in ("size", "desc", "driver", "device")}
        super().reset()

    def enable(self) -> None:
        self.configure(**self.kept or {})
        super().enable()


# ---- descriptors -------------------------------------------------------------------------------------------------


@breaks("virtio14/MF1", logs="broke virtio.* too many descriptors")
class TakesFourDescriptors(SplitRing):
    def _descriptors(self, head: int, memory: Memory) -> list[Descriptor]:
        found = super()._descriptors(head, memory)
        if len(found) > 4:
            raise GuestError("too many descriptors")
        return found


def write_to_requests(ring: Ring, used: list[int]) -> None:
    """The first byte of each chain that is about to be shown as used, whether it may be written or not."""
    for head in used[::2]:
        ring.memory.writable(ring.in_flight[head].ranges[0][0], 1)[0][0] ^= 0xFF


@breaks("virtio14/SD1", device="blk")
class WritesToTheRequest(SplitRing):
    def _store(self, used: list[int]) -> None:
        write_to_requests(self, used)
        super()._store(used)


@breaks("virtio14/SI1", logs="broke virtio.* WRITE on a table")
class MindsWriteOnATable(SplitRing):
    def _indirect(self, head: int, descriptor: Descriptor, memory: Memory) -> list[Descriptor]:
        if descriptor[2] & DescFlags.WRITE:
            raise GuestError("WRITE on a table")
        return super()._indirect(head, descriptor, memory)


@breaks("virtio14/SI2", logs="broke virtio.* a table behind other descriptors")
class TakesTablesAlone(SplitRing):
    def _indirect(self, head: int, descriptor: Descriptor, memory: Memory) -> list[Descriptor]:
        if not DESC_CODEC.unpack_from(self.parts[0], DESC_CODEC.size * head)[2] & DescFlags.INDIRECT:
            raise GuestError("a table behind other descriptors")
        return super()._indirect(head, descriptor, memory)


# ---- used ring ---------------------------------------------------------------------------------------------------


@breaks("virtio14/UR2")
class CountsWhatItHasNotWritten(Rng):
    async def run(self) -> None:
        async for chain in self.requestq:
            length = chain.writable.length
            chain.writable.write(os.urandom(length // 2))
            chain.complete(length)


def backwards(used: list[int]) -> list[int]:
    """Pairs of head and length, the last one first."""
    return [value for place in range(len(used) - 2, -1, -2) for value in used[place : place + 2]]


breaks_by_fault("virtio14/RQ1", "used-len-short")  # an entropy device must give a byte or more
breaks_by_fault("virtio14/UR1", "used-idx-early:time=3600s")
breaks_by_fault("virtio14/UR2-readable", "used-len-long", device="console")
breaks_by_fault("virtio14/RB2", "used-out-of-order:every=2", in_order=True)

# ---- notifications -----------------------------------------------------------------------------------------------


breaks_by_fault("virtio14/UN1", "interrupt-lost")
breaks_by_fault("virtio14/UN1-flags", "interrupt-unwanted")
breaks_by_fault("virtio14/UN2-silent", "interrupt-unwanted")
breaks_by_fault("virtio14/AN1", "used-flags-set")


@breaks("virtio14/UN2")
class ObeysFlagsWithEventIdx(SplitRing):
    def interrupt_due(self) -> bool:
        return not self.parts[1][0] & 1 and super().interrupt_due()


@breaks("virtio14/AN2", logs=r"broke virtio.* queue \d+ was notified")
class MindsSpuriousNotifications(VirtioPci):
    def _notified(self, index: int, data: Any) -> None:
        if index >= len(self.core.queues):
            self.core.needs_reset(GuestError(f"queue {index} was notified"))
        super()._notified(index, data)


class Deaf(VirtioPci):
    """Some notifications go unheard; with ``poll="off"`` nobody looks at the rings without one."""

    def hears(self, index: int, data: Any) -> bool:
        raise NotImplementedError

    def _notified(self, index: int, data: Any) -> None:
        if self.hears(index, data):
            super()._notified(index, data)


@breaks("virtio14/ND1", notification_data=True, poll="off")
class KnowsNoNotificationsOf32Bits(Deaf):
    def hears(self, index: int, data: Any) -> bool:
        return len(data) == 2


@breaks("virtio14/ND2", notif_config_data=True, poll="off")
class KnowsItsQueuesByTheirIndexes(Deaf):
    def hears(self, index: int, data: Any) -> bool:
        return int.from_bytes(data[:2], "little") == index
