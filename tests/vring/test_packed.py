"""The packed ring against what drivers do, and what they must not do (virtio 1.4, 2.8)."""

import os
import struct
from collections.abc import Callable
from typing import Any

import pytest

from vfiouser_virtio.errors import GuestError, Unmapped
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.protocols.virtio.ring import DescFlags, RingEventFlags
from vfiouser_virtio.vring import Chain, PackedRing, RingFeatures, make_ring, packed, ring_areas

NEXT, WRITE, INDIRECT, AVAIL, USED = (int(flag) for flag in DescFlags)
RAM, RAM_SIZE = 0x10_0000, 0x10_0000
# The largest ring just fits.
DESC, DRIVER, DEVICE, DATA = RAM, RAM + 0x8_0000, RAM + 0x8_0100, RAM + 0x9_0000
WRAP = 1 << 15


class Side:
    """The driver's side of one ring, byte by byte, so that it can do wrong."""

    def __init__(
        self, size: int = 8, *, event_idx: bool = False, indirect: bool = True, in_order: bool = False
    ) -> None:
        self.memory = GuestMemory()
        fd = os.memfd_create("ram")
        os.ftruncate(fd, RAM_SIZE)
        self.memory.map(RAM, RAM_SIZE, readable=True, writable=True, fd=fd, offset=0)
        self.ram = self.memory.writable(RAM, RAM_SIZE)[0]
        self.size = size
        self.slot, self.wrap = 0, True
        self.used_slot, self.used_wrap = 0, True
        features = RingFeatures(packed=True, indirect=indirect, event_idx=event_idx, in_order=in_order)
        self.ring = make_ring(size, self.memory, features)
        self.areas = ring_areas(size, features, DESC, DRIVER, DEVICE)
        self.ring.bind(*(self.memory.writable(area.address, area.length)[0] for area in self.areas))

    def put(self, address: int, fmt: str, *values: int | bytes) -> None:
        struct.pack_into("<" + fmt, self.ram, address - RAM, *values)

    def get(self, address: int, fmt: str) -> tuple[Any, ...]:
        return struct.unpack_from("<" + fmt, self.ram, address - RAM)

    def table(self, address: int, *entries: tuple[int, int, int]) -> None:
        """Address, length, flags; what else an entry has is ignored."""
        for number, (at, length, flags) in enumerate(entries):
            self.put(address + 16 * number, "QIHH", at, length, 0xDEAD, flags | AVAIL | NEXT | INDIRECT)

    def desc(self, slot: int, address: int, length: int, flags: int, buffer_id: int = 0) -> None:
        self.put(DESC + 16 * slot, "QIHH", address, length, buffer_id, flags)

    def offer(self, buffer_id: int, *pieces: tuple[int, int, int]) -> None:
        """A list of (address, length, flags), made available as the specification's example does: the first last."""
        first, marks = self.slot, 0
        for number, (address, length, flags) in enumerate(pieces):
            flags |= NEXT if number < len(pieces) - 1 else 0
            own = AVAIL if self.wrap else USED
            if number:
                flags |= own
            else:
                marks = flags | own
            self.desc(self.slot, address, length, flags, buffer_id if number == len(pieces) - 1 else 0xFFFF)
            self.slot += 1
            if self.slot == self.size:
                self.slot, self.wrap = 0, not self.wrap
        self.put(DESC + 16 * first + 14, "H", marks)

    def used(self, count: int = 1) -> tuple[int, int] | None:
        """(id, length) of the next used descriptor, whose list had ``count``."""
        _, length, buffer_id, flags = self.get(DESC + 16 * self.used_slot, "QIHH")
        if bool(flags & AVAIL) != self.used_wrap or bool(flags & USED) != self.used_wrap:
            return None
        assert bool(flags & WRITE) == bool(length)
        self.used_slot += count
        if self.used_slot >= self.size:
            self.used_slot, self.used_wrap = self.used_slot - self.size, not self.used_wrap
        return buffer_id, length

    def wish(self, flags: int, index: int = 0, wrap: bool = True) -> None:
        self.put(DRIVER, "HH", index | WRAP * wrap, flags)

    def pop(self) -> Chain:
        (chain,) = self.ring.pop(64)
        return chain


@pytest.fixture
def side() -> Side:
    return Side()


def test_it_is_what_the_features_ask_for(side: Side) -> None:
    assert type(side.ring) is PackedRing
    assert [(area.length, area.write, area.align) for area in side.areas] == [
        (128, True, 16),
        (4, False, 4),
        (4, True, 4),
    ]


def test_a_list_of_both_kinds(side: Side) -> None:
    side.put(DATA, "4s", b"head")
    side.offer(0x1234, (DATA, 4, 0), (DATA + 0x100, 10, WRITE), (DATA + 0x200, 1, WRITE))
    chain = side.pop()
    assert chain.head == 0x1234  # of the last descriptor
    assert chain.ranges == [(DATA, 4), (DATA + 0x100, 10), (DATA + 0x200, 1)]
    assert (chain.readable.length, chain.writable.length, chain.writable_from) == (4, 11, 1)
    assert chain.readable.read() == b"head"
    (status,) = chain.writable.take_last(1)
    status[0] = 0x55
    chain.writable.write(b"0123456789")
    before = bytes(side.ram[:0x80])
    chain.complete()
    assert bytes(side.ram[:0x80]) == before  # not before it is published
    assert side.ring.publish()
    # One used descriptor for the list; its address and the other descriptors are not touched.
    assert side.get(DESC, "Q") == (DATA,)
    assert bytes(side.ram[16:0x80]) == before[16:]
    assert side.used(3) == (0x1234, 10)
    assert side.get(DATA + 0x100, "10s") == (b"0123456789",)
    assert side.get(DATA + 0x200, "B") == (0x55,)


def test_used_descriptors_follow_each_other_in_the_order_of_completion(side: Side) -> None:
    side.offer(1, (DATA, 16, WRITE))
    side.offer(2, (DATA + 16, 16, 0), (DATA + 32, 16, WRITE))
    side.offer(3, (DATA + 48, 16, WRITE))
    first, second, third = side.ring.pop(64)
    assert [chain.head for chain in (first, second, third)] == [1, 2, 3]
    second.complete(5)
    third.complete(0)
    assert side.ring.unpublished_chains == [second, third]
    side.ring.publish()
    assert (side.used(2), side.used(1)) == ((2, 5), (3, 0))
    assert side.used() is None
    first.complete(16)
    side.ring.publish()
    assert side.used() == (1, 16)
    assert side.ring.in_flight == {}


@pytest.mark.parametrize("size", [1, 2, 3, 7, 32])
@pytest.mark.parametrize("event_idx", [False, True])
def test_round_and_round(size: int, event_idx: bool) -> None:
    side = Side(size, event_idx=event_idx)
    for turn in range(20 * size + 3):
        count = 1 + turn % min(size, 3)
        side.offer(turn & 0xFFFF, *[(DATA + 16 * number, 8, WRITE) for number in range(count)])
        assert side.ring.has_available()
        chain = side.pop()
        assert chain.head == turn & 0xFFFF
        assert chain.writable.length == 8 * count
        assert not side.ring.has_available()
        chain.complete(turn % 8)
        side.ring.publish()
        assert side.used(count) == (turn & 0xFFFF, turn % 8)


@pytest.mark.parametrize("size", [5, 32768])
def test_all_of_them_at_once(size: int) -> None:
    side = Side(size)
    for turn in range(3):
        for number in range(size):
            side.offer(number ^ 0x8001, (DATA, 1, WRITE))
        chains = side.ring.pop(1 << 16)
        assert [chain.head for chain in chains] == [number ^ 0x8001 for number in range(size)]
        for chain in chains:
            chain.complete(1)
        side.ring.publish()
        assert all(side.used() == (number ^ 0x8001, 1) for number in range(size)), turn


def test_the_limit_is_kept(side: Side) -> None:
    for number in range(4):
        side.offer(number, (DATA, 1, WRITE))
    assert [chain.head for chain in side.ring.pop(3)] == [0, 1, 2]
    assert [chain.head for chain in side.ring.pop(3)] == [3]
    assert side.ring.pop(3) == []


def test_an_indirect_table_is_used_from_end_to_end(side: Side) -> None:
    table = DATA + 0x1000
    side.put(DATA, "8s", b"abcdefgh")
    side.table(table, (DATA, 5, 0), (DATA + 5, 3, 0), (DATA + 0x100, 4, WRITE))
    # WRITE is reserved in the descriptor that names the table.
    side.offer(9, (table, 48, INDIRECT | WRITE))
    chain = side.pop()
    assert chain.head == 9
    assert chain.readable.read() == b"abcdefgh"
    chain.writable.write(b"1234")
    chain.complete()
    side.ring.publish()
    assert side.used(1) == (9, 4)


@pytest.mark.parametrize("flags", [0, WRITE])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 100])
def test_tables_of_all_lengths(side: Side, count: int, flags: int) -> None:
    table = DATA + 0x4000
    side.table(table, *[(DATA + 16 * number, number % 9, flags) for number in range(count)])
    side.offer(1, (table, 16 * count, INDIRECT))
    chain = side.pop()
    assert chain.ranges == [(DATA + 16 * number, number % 9) for number in range(count)]
    total = sum(number % 9 for number in range(count))
    assert (chain.readable.length, chain.writable.length) == ((0, total) if flags else (total, 0))
    assert chain.writable_from == (0 if flags else count)


def test_buffers_of_no_length_are_nothing(side: Side) -> None:
    side.offer(0, (0xDEAD_BEEF_0000, 0, 0), (DATA, 3, 0))
    assert side.pop().readable.length == 3


# ---- what a driver must not do -----------------------------------------------------------------------------------


def list_without_end(side: Side) -> None:
    for slot in range(8):
        side.desc(slot, DATA, 4, NEXT | AVAIL)


def list_into_what_is_not_available(side: Side) -> None:
    side.desc(0, DATA, 4, NEXT | AVAIL)
    side.desc(1, DATA, 4, 0)


def list_with_the_wrong_wrap_counter(side: Side) -> None:
    side.desc(0, DATA, 4, NEXT | AVAIL)
    side.desc(1, DATA, 4, USED)


def readable_after_writable(side: Side) -> None:
    side.offer(0, (DATA, 4, WRITE), (DATA, 4, 0))


def same_id_twice(side: Side) -> None:
    side.offer(7, (DATA, 4, WRITE))
    side.offer(7, (DATA, 4, WRITE))


def same_id_twice_in_a_list(side: Side) -> None:
    side.offer(7, (DATA, 4, WRITE))
    side.offer(7, (DATA, 4, 0), (DATA, 4, WRITE))


def hole(side: Side) -> None:
    side.offer(0, (RAM + RAM_SIZE - 2, 4, WRITE))


def wrapping_address(side: Side) -> None:
    side.offer(0, ((1 << 64) - 1, 4, WRITE))


def too_long(side: Side) -> None:
    side.offer(0, (DATA, 0xFFFF_FFFF, 0))


def indirect_in_a_list(side: Side) -> None:
    side.offer(0, (DATA, 4, 0), (DATA, 16, INDIRECT))


def list_behind_indirect(side: Side) -> None:
    side.offer(0, (DATA, 16, INDIRECT), (DATA, 4, 0))


def empty_indirect(side: Side) -> None:
    side.offer(0, (DATA, 0, INDIRECT))


def odd_indirect(side: Side) -> None:
    side.offer(0, (DATA, 24, INDIRECT))


def huge_indirect(side: Side) -> None:
    side.offer(0, (DATA, 16 * 1025, INDIRECT))


def indirect_in_a_hole(side: Side) -> None:
    side.offer(0, (RAM + RAM_SIZE - 16, 32, INDIRECT))


def table_into_a_hole(side: Side) -> None:
    side.table(DATA + 0x1000, (DATA, 4, 0), (DATA, 4, 0), (RAM + RAM_SIZE - 2, 4, WRITE))
    side.offer(0, (DATA + 0x1000, 48, INDIRECT))


def table_backwards(side: Side) -> None:
    side.table(DATA + 0x1000, (DATA, 4, WRITE), (DATA, 4, 0))
    side.offer(0, (DATA + 0x1000, 32, INDIRECT))


WRONG: dict[Callable[[Side], None], str] = {
    list_without_end: "all 0x8 are in flight or in its list",
    list_into_what_is_not_available: "descriptor 0x1: the list goes on here",
    list_with_the_wrong_wrap_counter: "not available",
    readable_after_writable: "follows writable",
    same_id_twice: "0x7 was made available again",
    same_id_twice_in_a_list: "0x7 was made available again",
    hole: "no memory is mapped",
    wrapping_address: "no memory",
    too_long: "no memory",
    indirect_in_a_list: "in a list of 0x2",
    list_behind_indirect: "in a list of 0x2",
    empty_indirect: "table of 0x0",
    odd_indirect: "table of 0x18",
    huge_indirect: "table of 0x4010",
    indirect_in_a_hole: "no memory",
    table_into_a_hole: "no memory",
    table_backwards: "follows writable",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_what_a_driver_must_not_do(wrong: Callable[[Side], None], side: Side) -> None:
    wrong(side)
    before = bytes(side.ram)
    with pytest.raises(GuestError, match=WRONG[wrong]):
        side.ring.pop(8)
    assert bytes(side.ram) == before


def test_indirect_needs_the_feature() -> None:
    side = Side(indirect=False)
    side.offer(0, (DATA, 16, INDIRECT))
    with pytest.raises(GuestError, match="not negotiated"):
        side.ring.pop(1)


@pytest.mark.parametrize("count", [1, 2])
def test_more_than_the_ring_cannot_be_in_flight(count: int) -> None:
    side = Side(4)
    for number in range(4):
        side.offer(number, (DATA, 1, WRITE))
    assert len(side.ring.pop(64)) == 4
    side.offer(4, *[(DATA, 1, WRITE)] * count)  # over those that the device has not used
    with pytest.raises(GuestError, match="all 0x4"):
        side.ring.pop(64)


def test_a_driver_that_runs_ahead_within_one_look() -> None:
    side = Side(2)
    side.offer(1, (DATA, 1, WRITE))
    chain = side.pop()
    for slot in range(2):
        side.desc(slot, DATA, 1, WRITE | USED, 2 + slot)  # available in the next lap
    side.desc(1, DATA, 1, WRITE | AVAIL, 4)
    with pytest.raises(GuestError, match="all 0x2"):
        side.ring.pop(64)
    assert chain.writable.length == 1


def test_a_descriptor_with_both_or_neither_mark_is_nobodys(side: Side) -> None:
    for marks in 0, AVAIL | USED, USED:
        side.desc(0, DATA, 4, WRITE | marks)
        assert not side.ring.has_available()
        assert side.ring.pop(1) == []


def test_a_descriptor_is_copied_before_it_is_checked(side: Side) -> None:
    side.offer(3, (DATA, 4, 0))
    chain = side.pop()
    side.desc(0, 0xDEAD_0000, 0xFFFF_FFFF, WRITE, 4)
    side.put(DATA, "4s", b"same")
    assert chain.readable.read() == b"same"
    assert chain.writable.length == 0
    assert chain.head == 3


def test_a_chain_notices_that_its_memory_went(side: Side) -> None:
    side.offer(0, (DATA, 4, WRITE))
    chain = side.pop()
    side.memory.unmap(RAM, RAM_SIZE)
    chain.stale = True  # what Queue.memory_changed does
    with pytest.raises(Unmapped, match="no memory is mapped"):
        chain.writable.write(b"late")


def test_state_survives_a_change_of_place() -> None:
    side = Side(3)
    for number in range(4):
        side.offer(number, (DATA, 1, WRITE))
        chain = side.pop()
        chain.complete(1)
        side.ring.publish()
        assert side.used() == (number, 1)
        side.ring.bind(*(self_view(side, area.address, area.length) for area in side.areas))


def self_view(side: Side, address: int, length: int) -> memoryview:
    return side.memory.writable(address, length)[0]


# ---- notifications ---------------------------------------------------------------------------------------------------


def complete(side: Side, count: int) -> bool:
    """As many buffers of one descriptor; whether an interrupt is due."""
    for number in range(count):
        side.offer(number, (DATA, 1, WRITE))
    for chain in side.ring.pop(64):
        chain.complete(1)
    return side.ring.publish()


@pytest.mark.parametrize("event_idx", [False, True])
def test_flags_suppress_interrupts(event_idx: bool) -> None:
    side = Side(event_idx=event_idx)
    assert complete(side, 1)
    side.wish(RingEventFlags.DISABLE)
    assert not complete(side, 1)
    side.wish(RingEventFlags.ENABLE)
    assert complete(side, 1)
    side.wish(3)  # reserved: better an interrupt too many
    assert complete(side, 1)


def test_desc_means_nothing_without_event_idx(side: Side) -> None:
    side.wish(RingEventFlags.DESC, 7)
    assert complete(side, 1)


def test_interrupts_when_the_descriptor_is_passed() -> None:
    side = Side(5, event_idx=True)
    side.wish(RingEventFlags.DESC, 0)
    assert complete(side, 1)  # 0 is used
    assert not complete(side, 1)
    side.wish(RingEventFlags.DESC, 4)
    assert not complete(side, 2)
    assert complete(side, 1)  # 4
    side.wish(RingEventFlags.DESC, 0, wrap=True)  # of the lap before: long passed
    assert not complete(side, 1)  # 0 of the second lap
    side.wish(RingEventFlags.DESC, 3, wrap=False)
    assert complete(side, 4)  # 1 to 4
    side.wish(RingEventFlags.DESC, 4, wrap=True)
    assert complete(side, 5)
    side.wish(RingEventFlags.DESC, 0x7FFF)  # no such descriptor
    complete(side, 5)


def test_what_was_suppressed_is_not_made_up_for() -> None:
    side = Side(8, event_idx=True)
    side.wish(RingEventFlags.DISABLE)
    assert not complete(side, 3)
    side.wish(RingEventFlags.DESC, 1)  # passed while they were disabled: the driver looks after it has asked
    assert not complete(side, 1)
    side.wish(RingEventFlags.DESC, 4)
    assert complete(side, 1)


def test_how_we_ask_for_notifications_without_event_idx(side: Side) -> None:
    side.ring.suppress_notifications()
    assert side.get(DEVICE, "HH")[1] == RingEventFlags.DISABLE
    assert side.ring.request_notification() is False
    assert side.get(DEVICE, "HH")[1] == RingEventFlags.ENABLE
    side.offer(0, (DATA, 1, WRITE))
    assert side.ring.request_notification() is True


def test_how_we_ask_for_notifications_with_event_idx() -> None:
    side = Side(3, event_idx=True)
    side.ring.suppress_notifications()
    assert side.get(DEVICE, "HH")[1] == RingEventFlags.DISABLE
    for turn in range(7):
        assert side.ring.request_notification() is False
        wrap = turn // 3 % 2 == 0
        assert side.get(DEVICE, "HH") == (turn % 3 | WRAP * wrap, RingEventFlags.DESC)
        side.offer(turn, (DATA, 1, WRITE))
        assert side.ring.request_notification() is True
        side.pop().complete(1)
        side.ring.publish()
        assert side.used() == (turn, 1)


@pytest.mark.parametrize("event_idx", [False, True])
def test_nothing_is_available_while_all_are_in_flight(event_idx: bool) -> None:
    side = Side(2, event_idx=event_idx)
    for number in range(2):
        side.offer(number, (DATA, 1, WRITE))
    assert len(side.ring.pop(64)) == 2
    assert not side.ring.has_available()
    assert not side.ring.request_notification()


def test_data_of_notifications(side: Side) -> None:
    assert side.ring.may_be_next(0 | WRAP)
    assert side.ring.may_be_next(7)
    assert not side.ring.may_be_next(8 | WRAP)


# ---- in memory that is reached by messages ---------------------------------------------------------------------------


def copies(side: Side) -> list[bytearray]:
    return [bytearray(side.ram[area.address - RAM :][: area.length]) for area in side.areas]


def test_by_message() -> None:
    """The owner keeps copies: it fetches what `fetch_order` says, and sends what `store_used` and the words say."""
    side = Side(5, event_idx=True)
    ring = side.ring
    ring.bind(*(memoryview(copy) for copy in copies(side)))

    def fetch() -> None:
        for part in ring.fetch_order:
            ring.parts[part][:] = copies(side)[part]

    def take(part: int, offset: int, length: int) -> tuple[int, bytes]:
        return side.areas[part].address + offset, bytes(ring.parts[part][offset : offset + length])

    def send(address: int, data: bytes) -> None:
        side.put(address, f"{len(data)}s", data)

    for turn in range(12):
        fetch()
        assert not ring.has_available()
        assert not ring.request_notification()
        send(*take(*ring.notification_word))
        assert side.get(DEVICE, "HH")[1] == RingEventFlags.DESC
        side.wish(RingEventFlags.DISABLE)
        side.offer(10, (DATA, 4, WRITE))
        side.offer(11, (DATA + 4, 4, 0), (DATA + 8, 4, WRITE))
        side.offer(12, (DATA + 12, 4, WRITE))
        fetch()
        chains = ring.pop(64)
        assert [chain.head for chain in chains] == [10, 11, 12]
        written = turn % 4 + 1
        for chain in chains[::-1]:
            chain.complete(written)
        assert ring.unpublished_chains == chains[::-1]
        messages = [take(*place) for place in ring.store_used(2)]
        fetch()  # before they are sent: the ring is looked at once more
        assert not ring.has_available()
        # Nothing shows before the last message, and then everything.
        for message in messages:
            assert side.used() is None
            send(*message)
        assert [side.used(1), side.used(2)] == [(12, written), (11, written)]
        for place in ring.store_used():
            send(*take(*place))
        assert side.used(1) == (10, written)
        assert ring.interrupt_word == (1, 0, 4)
        ring.parts[1][:] = copies(side)[1]
        assert not ring.interrupt_due()


# ---- other machines --------------------------------------------------------------------------------------------------


def test_barriers_where_stores_and_loads_may_change_places(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the others need: flags, barrier, the rest of a descriptor; and buffers, barrier, the first used flags."""
    side = Side()
    events: list[tuple[str, ...]] = []

    def barrier() -> None:
        events.append(("barrier", "used" if side.get(DESC + 14, "H")[0] & USED else "not used"))

    monkeypatch.setattr(packed, "TSO", False)
    monkeypatch.setattr(packed, "full_barrier", barrier)
    side.offer(1, (DATA, 1, WRITE))
    side.offer(2, (DATA, 1, WRITE))
    chains = side.ring.pop(64)
    assert len(events) == 2
    for chain in chains:
        chain.complete(1)
    events.clear()
    side.ring.publish()
    assert events == [("barrier", "not used"), ("barrier", "used")]
