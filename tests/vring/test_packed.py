"""The packed ring against what drivers do, and what they must not do (virtio 1.4, 2.8)."""

from collections.abc import Callable

import pytest
from support.packed_side import AVAIL, DATA, DESC, INDIRECT, NEXT, RAM, RAM_SIZE, USED, WRITE, Side

from vfiouser_virtio.errors import GuestError, Unmapped
from vfiouser_virtio.vring import PackedRing, packed


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


def test_after_a_reset_of_the_queue_the_ring_has_no_chain(side: Side) -> None:
    side.offer(1, (DATA, 16, WRITE))
    chain = side.pop()
    side.ring.kill()
    assert not side.ring.in_flight
    chain.writable.write(b"late")
    chain.complete()
    assert side.get(DATA, "4s") == (bytes(4),)


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
