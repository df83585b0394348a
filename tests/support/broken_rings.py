"""Broken virtqueues (see `support.broken`)."""

from typing import Any

import pytest
from support.broken import around, breaks
from support.faithful import answer_register

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC, DescFlags
from vfiouser_virtio.virtio import Transport
from vfiouser_virtio.vring import SplitRing, split
from vfiouser_virtio.vring.chain import Writable

# ---- queue reset -------------------------------------------------------------------------------------------------


@breaks("virtio14/QR1")
def only_says_that_the_queue_is_reset(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Transport, "reset_queue", lambda _self, _index: None)
    answer_register(patch, "queue_enable", lambda _cfg, _original: 0)


@breaks("virtio14/QR2")
def goes_on_where_the_old_queue_was(patch: pytest.MonkeyPatch) -> None:
    indexes: list[tuple[int, int]] = []

    def reset(original: Any, self: Transport, index: int) -> Any:
        ring = self.device.queues[index]._ring
        if ring is not None:
            indexes.append((ring.last_avail, ring.used_idx))
        return original(self, index)

    def make(original: Any, self: SplitRing, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        if indexes:
            self.last_avail, self.used_idx = indexes.pop()

    around(patch, Transport, "reset_queue", reset)
    around(patch, SplitRing, "__init__", make)


@breaks("virtio14/QR3")
def keeps_the_old_addresses(patch: pytest.MonkeyPatch) -> None:
    names = ("size", "desc", "driver", "device")
    kept: dict[str, int] = {}

    def reset(original: Any, self: Transport, index: int) -> Any:
        kept.update((name, getattr(self.device.queues[index], name)) for name in names)
        return original(self, index)

    def enable(original: Any, self: Transport, index: int) -> None:
        for name, value in kept.items():
            setattr(self.device.queues[index], name, value)
        original(self, index)

    around(patch, Transport, "reset_queue", reset)
    around(patch, Transport, "enable_queue", enable)


# ---- descriptors -------------------------------------------------------------------------------------------------


@breaks("virtio14/MF1")
def takes_four_descriptors(patch: pytest.MonkeyPatch) -> None:
    def chain(original: Any, self: SplitRing, head: int) -> Any:
        found = original(self, head)
        if len(found.ranges) > 4:
            raise GuestError("too many descriptors")
        return found

    around(patch, SplitRing, "_chain", chain)


@breaks("virtio14/SD1", device="blk")
def writes_to_the_request(patch: pytest.MonkeyPatch) -> None:
    def store(original: Any, self: SplitRing, *arguments: Any) -> Any:
        for chain, _written in self._pushed:
            self.memory.writable(chain.ranges[0][0], 1)[0][0] ^= 0xFF
        return original(self, *arguments)

    around(patch, SplitRing, "store_used", store)


@breaks("virtio14/SI1")
def minds_write_on_a_table(patch: pytest.MonkeyPatch) -> None:
    def indirect(original: Any, self: SplitRing, head: int, descriptor: Any) -> Any:
        if descriptor[2] & DescFlags.WRITE:
            raise GuestError("WRITE on a table")
        return original(self, head, descriptor)

    around(patch, SplitRing, "_indirect", indirect)


@breaks("virtio14/SI2")
def takes_tables_alone(patch: pytest.MonkeyPatch) -> None:
    def indirect(original: Any, self: SplitRing, head: int, descriptor: Any) -> Any:
        if not DESC_CODEC.unpack_from(self.desc_bytes, DESC_CODEC.size * head)[2] & DescFlags.INDIRECT:
            raise GuestError("a table behind other descriptors")
        return original(self, head, descriptor)

    around(patch, SplitRing, "_indirect", indirect)


# ---- used ring ---------------------------------------------------------------------------------------------------


@breaks("virtio14/UR1")
def moves_the_index_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(split, "_pack_used", lambda *_: None)  # and the element much later: never


@breaks("virtio14/UR2")
def counts_what_it_has_not_written(patch: pytest.MonkeyPatch) -> None:
    def write(_original: Any, self: Writable, data: bytes) -> None:
        half = len(data) // 2
        self.take(len(data))[0][:half] = data[:half]
        self.written += len(data)

    around(patch, Writable, "write", write)


@breaks("virtio14/UR2-readable", device="console")
def counts_what_it_has_read(patch: pytest.MonkeyPatch) -> None:
    around(patch, SplitRing, "push", lambda original, self, chain, written: original(self, chain, written + 4))


# ---- notifications -----------------------------------------------------------------------------------------------


@breaks("virtio14/UN1")
def never_interrupts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SplitRing, "interrupt_due", lambda _self: False)


@breaks("virtio14/UN1-flags", "virtio14/UN2-silent")
def always_interrupts(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(SplitRing, "interrupt_due", lambda _self: True)


@breaks("virtio14/UN2")
def obeys_flags_with_event_idx(patch: pytest.MonkeyPatch) -> None:
    def due(original: Any, self: SplitRing) -> bool:
        return not self._avail[0] & 1 and bool(original(self))

    around(patch, SplitRing, "interrupt_due", due)


@breaks("virtio14/AN1")
def sets_flags_with_event_idx(patch: pytest.MonkeyPatch) -> None:
    def suppress(self: SplitRing) -> None:
        self._used_words[0] = 1

    patch.setattr(SplitRing, "suppress_notifications", suppress)


@breaks("virtio14/AN2")
def minds_spurious_notifications(patch: pytest.MonkeyPatch) -> None:
    def notify(original: Any, self: Transport, index: int) -> None:
        if index >= len(self.device.queues):
            self.needs_reset(GuestError(f"queue {index} was notified"))
        original(self, index)

    around(patch, Transport, "notify_queue", notify)
