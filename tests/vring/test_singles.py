"""Buffers of one descriptor that are taken without a chain for each: `pop_singles` of both kinds of ring."""

import os
from typing import NamedTuple

import pytest

from vfiouser_virtio.dma import SharedMemory
from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.testing.raw.packed import RawPackedRing
from vfiouser_virtio.testing.raw.ring import INDIRECT, WRITE, RawRing, Segment
from vfiouser_virtio.testing.raw.split import RawSplitRing
from vfiouser_virtio.vring import Ring, RingFeatures, Single, make_ring, ring_areas

RAM, RAM_SIZE = 0x10_0000, 0x10_0000
ADDRESSES = DESC, DRIVER, DEVICE = RAM, RAM + 0x1000, RAM + 0x2000
DATA, SIZE = RAM + 0x8000, 8


class Sides(NamedTuple):
    ring: Ring
    driver: RawRing

    def add(self, *buffers: tuple[int, int]) -> list[int]:
        """Buffers of one descriptor each, by offset and flags; their ids."""
        return [self.driver.add([(DATA + offset, 64, flags)]) for offset, flags in buffers]

    def used(self) -> list[tuple[int, int]]:
        found = []
        while (each := self.driver.take_used()) is not None:
            found.append(each)
        return found


def complete(ring: Ring, singles: list[Single], written: int) -> None:
    """Show these to the driver."""
    for head, _, _ in singles:
        ring.completed += head, written
    ring.publish()


@pytest.fixture(params=["split", "packed"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def made(kind: str, *, in_order: bool = False) -> Sides:
    memory = GuestMemory()
    ram = SharedMemory(RAM_SIZE, address=RAM)
    assert ram.fd is not None
    memory.map(RAM, RAM_SIZE, readable=True, writable=True, fd=os.dup(ram.fd), offset=0)
    features = RingFeatures(packed=kind == "packed", indirect=True, event_idx=False, in_order=in_order)
    ring = make_ring(SIZE, memory, features)
    areas = ring_areas(SIZE, features, *ADDRESSES)
    ring.bind(*(memory.writable(area.address, area.length)[0] for area in areas))
    driver_class = RawPackedRing if kind == "packed" else RawSplitRing
    return Sides(ring, driver_class(ram, SIZE, ADDRESSES))


def test_they_are_taken_in_order_and_the_rest_is_offered_again(kind: str) -> None:
    sides = made(kind)
    ring = sides.ring
    for lap in range(5):  # three times five of eight: round the end of the ring
        ids = sides.add(*((64 * number, WRITE) for number in range(5)))
        singles = ring.pop_singles(4, WRITE)
        assert [head for head, _, _ in singles] == ids[:4]
        assert [length for _, _, length in singles] == [64] * 4
        first = singles[0][1]
        assert [start - first for _, start, _ in singles] == [0, 64, 128, 192]
        assert bytes(ring.memory.hot[2][first : first + 64]) == bytes(64)
        ring.undo_singles(singles[2:])
        complete(ring, singles[:2], lap)
        assert sides.used() == [(head, lap) for head in ids[:2]]
        rest = ring.pop_singles(64, WRITE)
        assert [head for head, _, _ in rest] == ids[2:]
        assert not ring.has_available()
        complete(ring, rest, 64)
        assert len(sides.used()) == 3
        assert not ring.in_flight
        assert ring.outstanding == 0


@pytest.mark.parametrize(
    "other",
    [
        (DATA + 128, 64, 0),
        (DATA + 128, 0, WRITE),
        (RAM + RAM_SIZE - 32, 64, WRITE),
        (RAM - 1, 64, WRITE),
        ((1 << 64) - 32, 64, WRITE),
        (DATA, 16, INDIRECT),
    ],
    ids=["other direction", "empty", "beyond", "before", "round", "table"],
)
def test_it_ends_before_another_kind(kind: str, other: Segment) -> None:
    sides = made(kind)
    sides.add((0, WRITE))
    sides.driver.add([other])
    sides.add((64, WRITE))
    singles = sides.ring.pop_singles(64, WRITE)
    assert len(singles) == 1
    assert sides.ring.pop_singles(64, WRITE) == []
    assert sides.ring.has_available()


def test_a_list_of_two_is_left_to_chains(kind: str) -> None:
    sides = made(kind)
    sides.driver.add([(DATA, 12, 0), (DATA + 64, 64, 0)])
    assert sides.ring.pop_singles(64, 0) == []
    [chain] = sides.ring.pop(64)
    assert chain.readable.length == 76


def test_in_order_is_left_to_chains(kind: str) -> None:
    sides = made(kind, in_order=True)
    sides.add((0, 0))
    assert sides.ring.pop_singles(64, 0) == []
    [chain] = sides.ring.pop(64)
    assert not sides.ring.undo_pop(chain)


def test_a_buffer_in_flight_is_no_single_and_a_fault_for_chains() -> None:
    sides = made("split")
    assert isinstance(sides.driver, RawSplitRing)
    [head] = sides.add((0, WRITE))
    sides.driver.offer(head)
    singles = sides.ring.pop_singles(64, WRITE)
    assert [each for each, _, _ in singles] == [head]
    with pytest.raises(GuestError, match="again while it is in flight"):
        sides.ring.pop(64)


def test_more_than_the_ring_has_is_a_fault_for_chains() -> None:
    sides = made("split")
    assert isinstance(sides.driver, RawSplitRing)
    sides.add((0, WRITE))
    sides.driver.offer(*[0] * SIZE)
    assert sides.ring.pop_singles(64, WRITE) == []
    with pytest.raises(GuestError, match="entries can follow"):
        sides.ring.pop(64)


def test_a_chain_that_was_taken_last_goes_back(kind: str) -> None:
    sides = made(kind)
    ids = sides.add(*((64 * number, 0) for number in range(3)))
    first, last = sides.ring.pop(2)
    assert not sides.ring.undo_pop(first)
    assert sides.ring.undo_pop(last)
    assert not sides.ring.undo_pop(last)
    assert [head for head, _, _ in sides.ring.pop_singles(64, 0)] == ids[1:]
    last.complete(0)  # of no effect
    first.complete(0)
    sides.ring.publish()
    assert sides.used() == [(ids[0], 0)]


def test_a_chain_does_not_go_back_when_a_later_one_is_used(kind: str) -> None:
    """Its place is not the one before the next: that one's buffer would be taken again while the driver has it."""
    sides = made(kind)
    ids = sides.add(*((64 * number, 0) for number in range(3)))
    first, second, last = sides.ring.pop(3)
    last.complete(0)
    sides.ring.publish()
    assert not sides.ring.undo_pop(second)
    assert sides.ring.pop(64) == []
    second.complete(0)
    first.complete(0)
    sides.ring.publish()
    assert sides.used() == [(head, 0) for head in reversed(ids)]
    again = sides.add((0, 0))
    assert [chain.head for chain in sides.ring.pop(64)] == again


def test_a_list_goes_back_whole_behind_one_that_is_used() -> None:
    sides = made("packed")
    sides.add((0, 0))
    head = sides.driver.add([(DATA, 16, 0), (DATA + 64, 64, WRITE)])
    first, second = sides.ring.pop(64)
    first.complete(0)
    sides.ring.publish()
    assert sides.ring.undo_pop(second)
    [again] = sides.ring.pop(64)
    assert (again.head, again.slots) == (head, 2)
