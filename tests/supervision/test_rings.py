"""Rings with a journal: death between any two lines of what the device does, and another one goes on.

The driver's side is `testing.raw`, which finds a buffer that comes back twice, or was never given.
"""

import os
import random

import pytest
from support.amounts import Amounts
from support.killing import NEVER, Killed, killing

from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.supervision.journal import Journal, make_journal
from vfiouser_virtio.supervision.packed import JournaledPackedRing
from vfiouser_virtio.supervision.split import JournaledSplitRing
from vfiouser_virtio.testing.raw.packed import RawPackedRing, packed_areas
from vfiouser_virtio.testing.raw.ring import INDIRECT, WRITE, RawRing, Segment, lay_out
from vfiouser_virtio.testing.raw.split import RawSplitRing, split_areas
from vfiouser_virtio.vring import Chain, RingFeatures, ring_areas

RAM, RAM_SIZE = 0x10_0000, 0x4_0000
RINGS, TABLES, DATA = RAM, RAM + 0x1_0000, RAM + 0x2_0000
SIZE = 4

# Where a death leaves something half done: in the journal, and in the used ring.
_WHERE = ("supervision/", "_store")


class Ram:
    """Guest memory of a `RawRing`."""

    def __init__(self, view: memoryview) -> None:
        self._view = view

    def read(self, address: int, count: int, /) -> bytes:
        return bytes(self._view[address - RAM : address - RAM + count])

    def write(self, address: int, data: bytes, /) -> None:
        self._view[address - RAM : address - RAM + len(data)] = data


class Game:
    """A driver and a device on one ring; the device can be killed, and another one takes its place."""

    def __init__(self, features: RingFeatures) -> None:
        self.memory = GuestMemory()
        fd = os.memfd_create("ram", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, RAM_SIZE)
        self.memory.map(RAM, RAM_SIZE, readable=True, writable=True, fd=fd, offset=0)
        self.ram = Ram(self.memory.writable(RAM, RAM_SIZE)[0])
        self.features = features
        areas = packed_areas(SIZE) if features.packed else split_areas(SIZE)
        self.addresses, _ = lay_out(RINGS, areas)
        kind = RawPackedRing if features.packed else RawSplitRing
        self.driver: RawRing = kind(self.ram, SIZE, self.addresses)
        self.journal_fd = make_journal()
        self.ring = self.new_ring()
        self.held: list[Chain] = []
        self.given = self.taken = 0

    def close(self) -> None:
        os.close(self.journal_fd)
        self.memory.retire()

    def new_ring(self) -> JournaledSplitRing | JournaledPackedRing:
        make = JournaledPackedRing if self.features.packed else JournaledSplitRing
        ring = make(SIZE, self.memory, self.features)
        ring.journal = Journal(self.journal_fd, [SIZE]).queues[0]
        areas = ring_areas(SIZE, self.features, *self.addresses)
        ring.bind(*(self.memory.writable(area.address, area.length)[0] for area in areas))
        return ring

    # ---- the driver ----------------------------------------------------------------------------------------------

    def give(self, count: int, *, table: bool) -> None:
        segments: list[Segment] = [(DATA + 0x100 * n, 0x40, WRITE if n else 0) for n in range(count)]
        if table:
            at = TABLES + 0x100 * (self.given % 64)
            self.ram.write(at, self.driver.table(segments))
            segments = [(at, 16 * count, INDIRECT)]
        if len(segments) <= self.driver.free:
            self.driver.add(segments)
            self.given += 1

    def take(self) -> None:
        while self.driver.take_used() is not None:
            self.taken += 1

    # ---- the device ----------------------------------------------------------------------------------------------

    def recover(self) -> None:
        self.ring = self.new_ring()
        self.held = []
        self.ring.recover()

    def work(self, rng: random.Random) -> None:
        """Take what there is, complete some of it in any order, and show that."""
        while self.ring.again:
            self.held += self.ring.retake(8)
        popped = self.ring.pop(rng.randint(1, SIZE))
        if popped and rng.random() < 0.3 and self.ring.undo_pop(popped[-1]):
            popped.pop()
        self.held += popped
        for chain in rng.sample(self.held, rng.randint(0, len(self.held))):
            self.held.remove(chain)
            chain.complete(rng.randint(0, min(chain.room, 0x40)))
        self.ring.publish()

    def singles(self, rng: random.Random) -> None:
        taken = self.ring.pop_singles(SIZE, 0)
        done = taken[: rng.randint(0, len(taken))]
        self.ring.completed += [number for head, _, _ in done for number in (head, 0)]
        self.ring.undo_singles(taken[len(done) :])
        self.ring.publish()


def play(features: RingFeatures, seed: int, most: int) -> int:
    """A game in which processes of the device are killed after up to so many lines; how many lines the longest had."""
    rng = random.Random(seed)
    game = Game(features)
    longest, resuming, turns = 0, False, 0
    try:
        while turns < 8 or game.taken < game.given:
            turns += 1
            assert turns < 200, f"{game.given - game.taken} buffers do not come back"
            if turns < 8:
                for _ in range(rng.randint(0, 3)):
                    game.give(rng.randint(1, 3), table=features.indirect and rng.random() < 0.4)
            after = rng.randint(1, most) if turns < 40 and rng.random() < 0.8 else NEVER
            with killing(after, *_WHERE) as lines:
                try:
                    if resuming:
                        game.recover()
                        resuming = False
                    if rng.random() < 0.7 or game.held or game.ring.again:
                        game.work(rng)
                    else:
                        game.singles(rng)
                except Killed:
                    resuming = True
            longest = max(longest, lines())
            if rng.random() < 0.7:
                game.take()
        assert not game.driver.pending
        if not resuming:
            assert not game.ring.in_flight
            assert game.ring.journal.in_flight() == []
    finally:
        game.close()
    return longest


KINDS = {
    "split": RingFeatures(),
    "split, indirect, event_idx": RingFeatures(indirect=True, event_idx=True),
    "split, in order": RingFeatures(in_order=True),
    "packed": RingFeatures(packed=True),
    "packed, indirect, event_idx": RingFeatures(packed=True, indirect=True, event_idx=True),
    "packed, in order": RingFeatures(packed=True, in_order=True),
}


@pytest.mark.parametrize("features", KINDS.values(), ids=KINDS)
def test_death_between_any_two_lines(features: RingFeatures, amounts: Amounts) -> None:
    """Again and again, so in recovering from the last death, too."""
    longest = play(features, 0, NEVER)
    for seed in range(amounts.ring_deaths):
        play(features, seed, longest)
