"""The split ring against what drivers do, and what they must not do (virtio 1.4, 2.7)."""

import os
import struct
from collections.abc import Callable

import pytest

from vfiouser_virtio.errors import AuthorError, GuestError, Unmapped
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.protocols.virtio.ring import DescFlags
from vfiouser_virtio.vring import RingFeatures, SplitRing, ring_areas

NEXT, WRITE, INDIRECT = DescFlags.NEXT, DescFlags.WRITE, DescFlags.INDIRECT
RAM, RAM_SIZE = 0x10_0000, 0x10_0000
DESC, AVAIL, USED, DATA = RAM, RAM + 0x1000, RAM + 0x2000, RAM + 0x8000


class Side:
    """The driver's side of one ring, byte by byte, so that it can do wrong."""

    def __init__(self, size: int = 8, *, event_idx: bool = False, indirect: bool = True) -> None:
        self.memory = GuestMemory()
        fd = os.memfd_create("ram")
        os.ftruncate(fd, RAM_SIZE)
        self.memory.map(RAM, RAM_SIZE, readable=True, writable=True, fd=fd, offset=0)
        self.ram = self.memory.writable(RAM, RAM_SIZE)[0]
        self.size = size
        self.avail_idx = 0
        features = RingFeatures(indirect=indirect, event_idx=event_idx)
        self.ring = SplitRing(size, self.memory, features)
        areas = ring_areas(size, features, DESC, AVAIL, USED)
        self.ring.bind(*(self.memory.writable(area.address, area.length)[0] for area in areas))

    def put(self, address: int, fmt: str, *values: int | bytes) -> None:
        struct.pack_into("<" + fmt, self.ram, address - RAM, *values)

    def get(self, address: int, fmt: str) -> tuple[int, ...]:
        return struct.unpack_from("<" + fmt, self.ram, address - RAM)

    def desc(
        self, index: int, address: int, length: int, flags: int = 0, following: int = 0, table: int = DESC
    ) -> None:
        self.put(table + 16 * index, "QIHH", address, length, flags, following)

    def offer(self, *heads: int) -> None:
        for head in heads:
            self.put(AVAIL + 4 + 2 * (self.avail_idx % self.size), "H", head)
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.put(AVAIL + 2, "H", self.avail_idx)

    def used(self) -> tuple[int, list[tuple[int, ...]]]:
        return self.get(USED + 2, "H")[0], [self.get(USED + 4 + 8 * slot, "II") for slot in range(self.size)]


@pytest.fixture
def side() -> Side:
    return Side()


def test_a_chain_of_both_kinds(side: Side) -> None:
    side.put(DATA, "4s", b"head")
    side.desc(3, DATA, 4, NEXT, 5)
    side.desc(5, DATA + 0x100, 10, NEXT | WRITE, 1)
    side.desc(1, DATA + 0x200, 1, WRITE)
    side.offer(3)
    (chain,) = side.ring.pop(10)
    assert (chain.readable.length, chain.writable.length) == (4, 11)
    assert chain.readable.read() == b"head"
    (status,) = chain.writable.take_last(1)
    status[0] = 0x55
    chain.writable.write(b"0123456789")
    chain.complete()
    assert side.used()[0] == 0  # not before it is published
    assert side.ring.publish()
    assert side.used()[0] == 1
    assert side.used()[1][0] == (3, 10)
    assert bytes(side.ram[0x8100:0x810A]) == b"0123456789"
    assert side.get(DATA + 0x200, "B") == (0x55,)


def test_chains_come_in_the_order_they_were_made_available(side: Side) -> None:
    for index in range(5):
        side.desc(index, DATA + 16 * index, 16)
    side.offer(4, 0, 2)
    assert [chain.head for chain in side.ring.pop(2)] == [4, 0]
    side.offer(1)
    assert [chain.head for chain in side.ring.pop(10)] == [2, 1]
    assert side.ring.pop(10) == []


@pytest.mark.parametrize("event_idx", [False, True])
def test_indexes_wrap(event_idx: bool) -> None:
    side = Side(4, event_idx=event_idx)
    for index in range(4):
        side.desc(index, DATA, 8, WRITE)
    for turn in range(0x10010):
        side.offer(turn % 4)
        (chain,) = side.ring.pop(4)
        chain.complete(turn % 8)
        side.ring.publish()
    assert side.used()[0] == 0x10
    assert (side.ring.last_avail, side.ring.used_idx) == (0x10, 0x10)


def test_an_indirect_table_after_direct_descriptors(side: Side) -> None:
    table = DATA + 0x1000
    side.put(DATA, "8s", b"abcdefgh")
    side.desc(0, DATA, 2, NEXT, 1)
    # "The device MUST ignore the write-only flag in the descriptor that refers to an indirect table."
    side.desc(1, table, 48, INDIRECT | WRITE)
    side.desc(0, DATA + 2, 3, NEXT, 2, table)
    side.desc(2, DATA + 5, 3, NEXT, 1, table)
    side.desc(1, DATA + 0x100, 4, WRITE, 0, table)
    side.offer(0)
    (chain,) = side.ring.pop(1)
    assert chain.readable.read() == b"abcdefgh"
    assert chain.writable.length == 4


def test_buffers_of_no_length_are_nothing(side: Side) -> None:
    side.desc(0, 0xDEAD_BEEF_0000, 0, NEXT, 1)
    side.desc(1, DATA, 3)
    side.offer(0)
    (chain,) = side.ring.pop(1)
    assert chain.readable.length == 3


# Each function sets up one thing that a driver must not do; the message must name what is wrong.
def bad_head(side: Side) -> None:
    side.offer(8)


def bad_next(side: Side) -> None:
    side.desc(0, DATA, 4, NEXT, 8)
    side.offer(0)


def self_loop(side: Side) -> None:
    side.desc(0, DATA, 4, NEXT, 0)
    side.offer(0)


def long_loop(side: Side) -> None:
    for index in range(8):
        side.desc(index, DATA, 4, NEXT, (index + 1) % 8)
    side.offer(0)


def readable_after_writable(side: Side) -> None:
    side.desc(0, DATA, 4, NEXT | WRITE, 1)
    side.desc(1, DATA, 4)
    side.offer(0)


def same_head_twice(side: Side) -> None:
    side.desc(0, DATA, 4)
    side.offer(0, 0)


def index_jump(side: Side) -> None:
    side.put(AVAIL + 2, "H", 9)


def index_backwards(side: Side) -> None:
    side.put(AVAIL + 2, "H", 0xFFFF)


def hole(side: Side) -> None:
    side.desc(0, RAM + RAM_SIZE - 2, 4)
    side.offer(0)


def wrapping_address(side: Side) -> None:
    side.desc(0, (1 << 64) - 1, 4)
    side.offer(0)


def too_long(side: Side) -> None:
    side.desc(0, DATA, 0xFFFF_FFFF)
    side.offer(0)


def nested_indirect(side: Side) -> None:
    side.desc(0, DATA, 16, INDIRECT)
    side.desc(0, DATA + 0x100, 16, INDIRECT, 0, DATA)
    side.offer(0)


def indirect_with_next(side: Side) -> None:
    side.desc(0, DATA, 16, INDIRECT | NEXT, 1)
    side.offer(0)


def empty_indirect(side: Side) -> None:
    side.desc(0, DATA, 0, INDIRECT)
    side.offer(0)


def odd_indirect(side: Side) -> None:
    side.desc(0, DATA, 24, INDIRECT)
    side.offer(0)


def huge_indirect(side: Side) -> None:
    side.desc(0, DATA, 16 * 1025, INDIRECT)
    side.offer(0)


def indirect_loop(side: Side) -> None:
    side.desc(0, DATA, 32, INDIRECT)
    side.desc(0, DATA, 1, NEXT, 1, DATA)
    side.desc(1, DATA, 1, NEXT, 0, DATA)
    side.offer(0)


def indirect_out_of_bounds(side: Side) -> None:
    side.desc(0, DATA, 32, INDIRECT)
    side.desc(0, DATA, 1, NEXT, 2, DATA)
    side.offer(0)


def indirect_in_a_hole(side: Side) -> None:
    side.desc(0, RAM + RAM_SIZE - 16, 32, INDIRECT)
    side.offer(0)


WRONG: dict[Callable[[Side], None], str] = {
    bad_head: "names descriptor 0x8",
    bad_next: "links to 0x8",
    self_loop: "loop",
    long_loop: "loop",
    readable_after_writable: "follows writable",
    same_head_twice: "in flight",
    index_jump: "avail.idx is 0x9",
    index_backwards: "avail.idx is 0xffff",
    hole: "no memory is mapped",
    wrapping_address: "no memory",
    too_long: "no memory",
    nested_indirect: "inside an indirect",
    indirect_with_next: "NEXT",
    empty_indirect: "table of 0x0",
    odd_indirect: "table of 0x18",
    huge_indirect: "table of 0x4010",
    indirect_loop: "loop",
    indirect_out_of_bounds: "entry 0x2 of 0x2",
    indirect_in_a_hole: "no memory",
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_what_a_driver_must_not_do(wrong: Callable[[Side], None], side: Side) -> None:
    before = bytes(side.ram[0x2000:0x3000])
    wrong(side)
    with pytest.raises(GuestError, match=WRONG[wrong]):
        side.ring.pop(8)
    assert bytes(side.ram[0x2000:0x3000]) == before


def test_indirect_needs_the_feature() -> None:
    side = Side(indirect=False)
    side.desc(0, DATA, 16, INDIRECT)
    side.offer(0)
    with pytest.raises(GuestError, match="not negotiated"):
        side.ring.pop(1)


def test_a_descriptor_is_copied_before_it_is_checked(side: Side) -> None:
    side.desc(0, DATA, 4)
    side.offer(0)
    (chain,) = side.ring.pop(1)
    side.desc(0, 0xDEAD_0000, 0xFFFF_FFFF, WRITE)
    side.put(DATA, "4s", b"same")
    assert chain.readable.read() == b"same"
    assert chain.writable.length == 0


def test_more_than_the_buffer_holds_is_the_guests_fault(side: Side) -> None:
    side.desc(0, DATA, 4, NEXT, 1)
    side.desc(1, DATA, 4, WRITE)
    side.offer(0)
    (chain,) = side.ring.pop(1)
    with pytest.raises(GuestError, match="0x5 more readable"):
        chain.readable.read(5)
    with pytest.raises(GuestError, match="0x5 more writable"):
        chain.writable.take(5)
    with pytest.raises(GuestError, match="0x5 more writable"):
        chain.writable.take_last(5)
    with pytest.raises(AuthorError, match="0x5 bytes, where the driver's buffer has room for 0x4"):
        chain.writable.write(b"12345")


def test_completing_twice_is_a_bug_of_the_device(side: Side) -> None:
    side.desc(0, DATA, 4)
    side.offer(0)
    (chain,) = side.ring.pop(1)
    chain.complete()
    with pytest.raises(AuthorError, match="twice"):
        chain.complete()


def test_after_a_reset_of_the_queue_a_chain_is_dead(side: Side) -> None:
    side.desc(0, DATA, 4, WRITE)
    side.offer(0)
    (chain,) = side.ring.pop(1)
    side.ring.kill()
    before = bytes(side.ram)
    assert chain.readable.length == 0
    chain.writable.write(b"late")
    chain.complete()
    assert bytes(side.ram) == before


def test_after_a_reset_of_the_queue_the_ring_has_no_chain(side: Side) -> None:
    """Each refers to the ring: what is left of a reset would go only when Python looks for garbage."""
    side.desc(0, DATA, 4, WRITE)
    side.offer(0)
    (chain,) = side.ring.pop(1)
    side.ring.kill()
    assert not side.ring.in_flight
    chain.complete()


def test_a_chain_notices_that_its_memory_went(side: Side) -> None:
    side.desc(0, DATA, 4, WRITE)
    side.offer(0)
    (chain,) = side.ring.pop(1)
    side.memory.unmap(RAM, RAM_SIZE)
    chain.stale = True  # what Queue.memory_changed does
    with pytest.raises(Unmapped, match="no memory is mapped"):
        chain.writable.write(b"late")


# ---- notifications --------------------------------------------------------------------------------------------------


def test_flags_suppress_interrupts_and_kicks(side: Side) -> None:
    side.desc(0, DATA, 4)
    for no_interrupt in (1, 0):
        side.put(AVAIL, "H", no_interrupt)
        side.offer(0)
        side.ring.suppress_notifications()
        assert side.get(USED, "H") == (1,)
        (chain,) = side.ring.pop(1)
        chain.complete()
        assert side.ring.publish() is not bool(no_interrupt)
        assert side.ring.request_notification() is False
        assert side.get(USED, "H") == (0,)
    side.offer(0)
    assert side.ring.request_notification() is True


def test_event_idx_interrupts_only_when_used_event_is_passed() -> None:
    side = Side(8, event_idx=True)
    for index in range(8):
        side.desc(index, DATA, 4)

    def complete(count: int) -> bool:
        side.offer(*range(count))
        for chain in side.ring.pop(8):
            chain.complete()
        return side.ring.publish()

    def wait_for(index: int) -> None:
        side.put(AVAIL + 4 + 2 * 8, "H", index & 0xFFFF)

    wait_for(0)
    assert complete(1)  # 0 -> 1 passes 0
    assert not complete(1)  # 1 -> 2: still at 0
    wait_for(4)
    assert not complete(2)  # 2 -> 4
    assert complete(3)  # 4 -> 7 passes 4
    side.put(AVAIL, "H", 1)  # "MUST ignore flags bit 0"
    wait_for(7)
    assert complete(1)
    for _ in range(0xFFF8 // 8 - 1):
        complete(8)
    assert side.ring.used_idx == 0xFFF8
    wait_for(0xFFFF)
    assert complete(8)  # passes 0xffff and wraps
    wait_for(0x4000)
    assert not complete(8)


def test_event_idx_asks_for_kicks_through_avail_event() -> None:
    side = Side(8, event_idx=True)
    side.desc(0, DATA, 4)
    side.ring.suppress_notifications()
    assert side.get(USED, "H") == (0,)  # AN1: flags stay 0
    side.offer(0)
    side.ring.pop(1)
    assert side.ring.request_notification() is False
    assert side.get(USED + 4 + 8 * 8, "H") == (1,)


def test_what_no_driver_can_have_meant_is_no_buffer(side: Side) -> None:
    """Memory of a ring that firmware has left in DRIVER_OK may be used for something else by now."""
    ring = side.ring
    assert not ring.offers_buffer()
    side.desc(3, DATA, 4, WRITE)
    side.offer(3)
    assert ring.offers_buffer()
    for offset, fmt, value in ((0, "H", 2), (2, "H", 0x8948), (4, "H", 8)):
        (before,) = side.get(AVAIL + offset, fmt)
        side.put(AVAIL + offset, fmt, value)
        assert not ring.offers_buffer(), hex(value)
        side.put(AVAIL + offset, fmt, before)
    for wrong in ((RAM - 8, 4, WRITE), (DATA, 0, WRITE), (DATA, 4, 0x10), (RAM, 1 << 32, 0)):
        side.desc(3, *wrong[:1], min(wrong[1], 0xFFFF_FFFF), wrong[2])
        assert not ring.offers_buffer(), wrong
    without = Side(indirect=False)
    without.desc(0, DATA, 16, INDIRECT)
    without.offer(0)
    assert not without.ring.offers_buffer()
