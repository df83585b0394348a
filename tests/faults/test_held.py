"""Faults of rings and interrupts where nothing can wait, and where one buffer meets several of them."""

import os
from collections.abc import Callable
from typing import NamedTuple

import pytest
import trio
import trio.testing

from vfiouser_virtio.dma import SharedMemory
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.interrupts import FaultyInterrupts
from vfiouser_virtio.faults.later import MAX_PENDING, Timer
from vfiouser_virtio.faults.packed import FaultyPackedRing
from vfiouser_virtio.faults.rings import FaultyRing, RingPlace, RingSeams
from vfiouser_virtio.faults.split import FaultySplitRing
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.testing.raw.packed import RawPackedRing
from vfiouser_virtio.testing.raw.ring import WRITE, RawRing
from vfiouser_virtio.testing.raw.split import RawSplitRing
from vfiouser_virtio.vring import Chain, RingFeatures, ring_areas

RAM, RAM_SIZE, SIZE = 0x10_0000, 0x10_0000, 8
ADDRESSES = RAM, RAM + 0x1000, RAM + 0x2000


class Sides(NamedTuple):
    ring: FaultyRing
    driver: RawRing
    plan: FaultPlan
    late: list[RingPlace]
    """What was stored by itself."""

    def offer(self, count: int) -> list[Chain]:
        for number in range(count):
            self.driver.add([(RAM + 0x8000 + 64 * number, 64, WRITE)])
        return self.ring.pop(SIZE)

    def used(self, limit: int = 2 * SIZE) -> list[int]:
        """The ids that the driver is told of, whether it knows them or not."""
        assert isinstance(self.driver, RawPackedRing | RawSplitRing)
        if isinstance(self.driver, RawSplitRing):
            return [self.driver.used_element(index)[0] for index in range(self.driver.used_idx)]
        found = []
        for ahead in range(limit):
            if (each := self.driver.used(ahead)) is None:
                break
            found.append(each[0])
        return found


@pytest.fixture(params=["split", "packed"])
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def made(kind: str, *faults: str, seed: int = 1, waiting: list[Callable[[], None]] | None = None) -> Sides:
    """A ring of a device where nothing can wait, or what does is in ``waiting``."""

    def later(_seconds: float, callback: Callable[[], None]) -> bool:
        if waiting is not None:
            waiting.append(callback)
        return waiting is not None

    late: list[RingPlace] = []
    memory, ram = GuestMemory(), SharedMemory(RAM_SIZE, address=RAM)
    assert ram.fd is not None
    memory.map(RAM, RAM_SIZE, readable=True, writable=True, fd=os.dup(ram.fd), offset=0)
    features = RingFeatures(packed=kind == "packed")
    ring = (FaultyPackedRing if kind == "packed" else FaultySplitRing)(SIZE, memory, features)
    ring.bind(*(memory.writable(each.address, each.length)[0] for each in ring_areas(SIZE, features, *ADDRESSES)))
    plan = FaultPlan(faults, seed=seed)
    ring.arm(plan, 0, RingSeams(later, lambda: None, late.extend))
    driver = (RawPackedRing if kind == "packed" else RawSplitRing)(ram, SIZE, ADDRESSES)
    return Sides(ring, driver, plan, late)


@pytest.mark.parametrize("fault", ["used-late:time=0", "used-out-of-order:time=0", "used-storm:time=0"])
def test_what_cannot_wait_is_given_back_at_once(fault: str, kind: str) -> None:
    at = made(kind, fault)
    chains = at.offer(4)
    for count, chain in enumerate(chains, 1):
        chain.complete(4)
        at.ring.publish()
        assert at.used() == [each.head for each in chains[:count]]
    assert not at.ring.in_flight
    assert len(at.plan.log.entries) == 4


@pytest.mark.parametrize("seed", range(8))
def test_each_names_another_that_is_not_done(seed: int, kind: str) -> None:
    """The slowest of four is named once at most, however its neighbours are drawn, and is given back in the end."""
    at = made(kind, "used-id-of-another", seed=seed)
    chains = at.offer(4)
    for chain in (*chains[1:], chains[0]):
        chain.complete(4)
        at.ring.publish()
    told = at.used()
    assert len(told) == 4
    assert set(told) <= {chain.head for chain in chains}
    # Once too early, once when it is done: no buffer is named a third time.
    assert max(told.count(head) for head in told) <= 2


def test_twice_of_one_that_was_named_before(kind: str) -> None:
    """The driver has made it available again by then, and that one is given back as well."""
    at = made(kind, "used-id-of-another:at=1", "used-twice:at=2")
    first, other = at.offer(2)
    first.complete(4)
    at.ring.publish()
    assert at.driver.take_used() == (other.head, 4)
    again = next(chain for _ in range(SIZE) for chain in at.offer(1) if chain.head == other.head)
    for chain in (other, again):
        chain.complete(4)
        at.ring.publish()
    assert list(at.ring.in_flight.values()).count(again) == 0
    assert [entry["n"] for entry in at.plan.log.entries] == [1, 2]


def test_each_buffer_is_counted_by_all_faults(kind: str) -> None:
    """Of those that are due at one buffer the first happens, and the others go on as if they were alone."""
    at = made(kind, "used-never:at=1+3", "used-len-long:at=3+4", "used-late:at=1", "used-id-of-another:at=1+5")
    chains = at.offer(5)
    for chain in chains:
        chain.complete(4)
        at.ring.publish()
    did = [(entry["fault"], entry["n"]) for entry in at.plan.log.entries]
    # Of the fifth there is another in flight: what used-never has kept is completed, so there is none.
    assert did == [("used-late", 1), ("used-never", 3), ("used-len-long", 4)]


def test_what_is_rewritten_later_is_said(kind: str) -> None:
    """It is sent then to a driver whose memory takes messages."""
    waiting: list[Callable[[], None]] = []
    at = made(kind, "used-rewritten:at=2:id=77:len=78", waiting=waiting)
    chains = at.offer(3)
    for chain in chains:
        chain.complete(4)
        at.ring.publish()
    assert at.used() == [chain.head for chain in chains]
    assert not at.late
    [come] = waiting
    come()
    assert at.used() == [chains[0].head, 77, chains[2].head]
    [(part, offset, length)] = at.late
    stored = bytes(at.ring.parts[part][offset : offset + length])
    assert (length, stored[:6] if kind == "packed" else stored) == (
        (8, b"\x4e\0\0\0\x4d\0") if kind == "packed" else (8, b"\x4d\0\0\0\x4e\0\0\0")
    )


class Sink:
    def __init__(self) -> None:
        self.sent = 0

    def queue_interrupt(self, index: int) -> None:
        assert index == 0
        self.sent += 1

    def config_interrupt(self) -> None:
        raise NotImplementedError


async def test_storms_without_end_are_bounded(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """Each of 5000 interrupts becomes a thousand, as it is by default; four of them at the same time."""
    monkeypatch.setattr("vfiouser_virtio.faults.later.MAX_REPEATED", 4)
    timer, sink = Timer(), Sink()
    plan = FaultPlan(["interrupt-storm"], seed=1)

    async def work() -> None:
        faulty = FaultyInterrupts(sink, plan, timer)
        for _ in range(5000):
            faulty.queue_interrupt(0)
        assert sink.sent == 5000
        await trio.sleep(10)
        assert sink.sent == 5000 + 4 * 999
        faulty.queue_interrupt(0)  # those have ended
        await trio.sleep(10)

    await timer.serve(work)
    assert sink.sent == 5000 + 4 * 999 + 1000
    assert len(plan.log.entries) == 5001


async def test_more_late_interrupts_than_can_wait(autojump_clock: trio.testing.MockClock) -> None:
    timer, sink = Timer(), Sink()

    async def work() -> None:
        faulty = FaultyInterrupts(sink, FaultPlan(["interrupt-late:time=1s"]), timer)
        for _ in range(MAX_PENDING + 7):
            faulty.queue_interrupt(0)
        assert sink.sent == 7
        await trio.sleep(2)

    await timer.serve(work)
    assert sink.sent == MAX_PENDING + 7


def test_interrupts_are_counted_by_all_faults() -> None:
    plan = FaultPlan(["interrupt-late:at=2+4", "interrupt-lost:at=1+2", "interrupt-wrong-vector:at=3:to=0"])
    faulty = FaultyInterrupts(sink := Sink(), plan, Timer())
    for _ in range(4):
        faulty.queue_interrupt(0)
    did = [(entry["fault"], entry["n"]) for entry in plan.log.entries]
    assert did == [("interrupt-lost", 1), ("interrupt-lost", 2), ("interrupt-wrong-vector", 3), ("interrupt-late", 4)]
    assert sink.sent == 2
