"""Broken virtqueues (see `support.broken`)."""

from collections.abc import Callable
from typing import Any

import pytest
from support.broken import around, breaks, only_notified_queues_are_served
from support.faithful import answer_register

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC, DescFlags
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.virtio import DeviceCore
from vfiouser_virtio.vring import Ring, SplitRing
from vfiouser_virtio.vring.chain import Writable

# ---- queue reset -------------------------------------------------------------------------------------------------


@breaks("virtio14/QR1")
def only_says_that_the_queue_is_reset(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(DeviceCore, "reset_queue", lambda _self, _index: None)
    answer_register(patch, "queue_enable", lambda _cfg, _original: 0)


@breaks("virtio14/QR2", logs="broke virtio.* avail.idx is 0x0, but only 0x10 entries can follow 0x3")
def goes_on_where_the_old_queue_was(patch: pytest.MonkeyPatch) -> None:
    indexes: list[tuple[int, int]] = []

    def reset(original: Any, self: DeviceCore, index: int) -> Any:
        bound = self.queues[index]._bound
        if bound is not None:
            assert isinstance(bound.ring, SplitRing)
            indexes.append((bound.ring.last_avail, bound.ring.used_idx))
        return original(self, index)

    def make(original: Any, self: SplitRing, *arguments: Any, **named: Any) -> None:
        original(self, *arguments, **named)
        if indexes:
            self.last_avail, self.used_idx = indexes.pop()

    around(patch, DeviceCore, "reset_queue", reset)
    around(patch, SplitRing, "__init__", make)


@breaks("virtio14/QR3")
def keeps_the_old_addresses(patch: pytest.MonkeyPatch) -> None:
    names = ("size", "desc", "driver", "device")
    kept: dict[str, int] = {}

    def reset(original: Any, self: DeviceCore, index: int) -> Any:
        kept.update((name, getattr(self.queues[index], name)) for name in names)
        return original(self, index)

    def enable(original: Any, self: DeviceCore, index: int) -> None:
        for name, value in kept.items():
            setattr(self.queues[index], name, value)
        original(self, index)

    around(patch, DeviceCore, "reset_queue", reset)
    around(patch, DeviceCore, "enable_queue", enable)


# ---- descriptors -------------------------------------------------------------------------------------------------


@breaks("virtio14/MF1", logs="broke virtio.* too many descriptors")
def takes_four_descriptors(patch: pytest.MonkeyPatch) -> None:
    def descriptors(original: Any, self: SplitRing, head: int, memory: Any) -> Any:
        found = original(self, head, memory)
        if len(found) > 4:
            raise GuestError("too many descriptors")
        return found

    around(patch, SplitRing, "_descriptors", descriptors)


def write_to_requests(ring: Ring, used: list[int]) -> None:
    """The first byte of each chain that is about to be shown as used, whether it may be written or not."""
    for head in used[::2]:
        ring.memory.writable(ring.in_flight[head].ranges[0][0], 1)[0][0] ^= 0xFF


@breaks("virtio14/SD1", device="blk")
def writes_to_the_request(patch: pytest.MonkeyPatch) -> None:
    def store(original: Any, self: SplitRing, used: list[int]) -> Any:
        write_to_requests(self, used)
        return original(self, used)

    around(patch, SplitRing, "_store", store)


@breaks("virtio14/SI1", logs="broke virtio.* WRITE on a table")
def minds_write_on_a_table(patch: pytest.MonkeyPatch) -> None:
    def indirect(original: Any, self: SplitRing, head: int, descriptor: Any, memory: Any) -> Any:
        if descriptor[2] & DescFlags.WRITE:
            raise GuestError("WRITE on a table")
        return original(self, head, descriptor, memory)

    around(patch, SplitRing, "_indirect", indirect)


@breaks("virtio14/SI2", logs="broke virtio.* a table behind other descriptors")
def takes_tables_alone(patch: pytest.MonkeyPatch) -> None:
    def indirect(original: Any, self: SplitRing, head: int, descriptor: Any, memory: Any) -> Any:
        if not DESC_CODEC.unpack_from(self.parts[0], DESC_CODEC.size * head)[2] & DescFlags.INDIRECT:
            raise GuestError("a table behind other descriptors")
        return original(self, head, descriptor, memory)

    around(patch, SplitRing, "_indirect", indirect)


@breaks("virtio14/RQ1")
def gives_nothing(patch: pytest.MonkeyPatch) -> None:
    """The used length is always 0, and an entropy device must give a byte or more."""
    around(
        patch,
        SplitRing,
        "_store",
        lambda original, self, used: original(self, [value * (at % 2 == 0) for at, value in enumerate(used)]),
    )


# ---- used ring ---------------------------------------------------------------------------------------------------


@breaks("virtio14/UR1")
def moves_the_index_first(patch: pytest.MonkeyPatch) -> None:
    def store(original: Any, self: SplitRing, used: list[int]) -> Any:
        before = bytes(self.parts[2])
        changed = original(self, used)
        self.parts[2][4:] = before[4:]  # and the elements much later: never
        return changed

    around(patch, SplitRing, "_store", store)


@breaks("virtio14/UR2")
def counts_what_it_has_not_written(patch: pytest.MonkeyPatch) -> None:
    def write(_original: Any, self: Writable, data: bytes) -> None:
        half = len(data) // 2
        self.take(len(data))[0][:half] = data[:half]
        self.written += len(data)

    around(patch, Writable, "write", write)


@breaks("virtio14/UR2-readable", device="console")
def counts_what_it_has_read(patch: pytest.MonkeyPatch) -> None:
    def store(original: Any, self: SplitRing, used: list[int]) -> Any:
        return original(self, [value + 4 * (place & 1) for place, value in enumerate(used)])

    around(patch, SplitRing, "_store", store)


def backwards(used: list[int]) -> list[int]:
    """Pairs of head and length, the last one first."""
    return [value for place in range(len(used) - 2, -1, -2) for value in used[place : place + 2]]


@breaks("virtio14/RB2", in_order=True)
def uses_buffers_backwards(patch: pytest.MonkeyPatch) -> None:
    around(patch, SplitRing, "_store", lambda original, self, used: original(self, backwards(used)))


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


@breaks("virtio14/AN2", logs=r"broke virtio.* queue \d+ was notified")
def minds_spurious_notifications(patch: pytest.MonkeyPatch) -> None:
    def notified(original: Any, self: VirtioPci, index: int, data: bytes) -> None:
        if index >= len(self.device.queues):
            self.core.needs_reset(GuestError(f"queue {index} was notified"))
        original(self, index, data)

    around(patch, VirtioPci, "_notified", notified)


@breaks("virtio14/ND1", notification_data=True)
def knows_no_notifications_of_32_bits(patch: pytest.MonkeyPatch) -> None:
    ignore(patch, lambda self, index, data: len(data) != 2)


@breaks("virtio14/ND2", notif_config_data=True)
def knows_its_queues_by_their_indexes(patch: pytest.MonkeyPatch) -> None:
    ignore(patch, lambda self, index, data: int.from_bytes(data[:2], "little") != index)


def ignore(patch: pytest.MonkeyPatch, which: Callable[[VirtioPci, int, bytes], bool]) -> None:
    """Notifications of this kind go unheard, and nobody looks at the rings without one."""
    only_notified_queues_are_served(patch)

    def notified(original: Any, self: VirtioPci, index: int, data: bytes) -> None:
        if not which(self, index, data):
            original(self, index, data)

    around(patch, VirtioPci, "_notified", notified)
