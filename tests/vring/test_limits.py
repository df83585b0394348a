"""What a driver can make a ring do at once: descriptors, look-ups and pieces are counted, not seconds."""

import importlib
import os
import struct
from collections.abc import Sized

import pytest

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.memory import GuestMemory, HotRegion
from vfiouser_virtio.protocols.virtio.ring import DescFlags
from vfiouser_virtio.vring import Chain, Ring, RingFeatures, make_ring, ring_areas
from vfiouser_virtio.vring.descriptors import MAX_CHAIN, MAX_PIECES, POP_BUDGET, make_chain
from vfiouser_virtio.vring.shadow import COPY, MAX_COPIES, NoRoom, Shadow

descriptors_module = importlib.import_module("vfiouser_virtio.vring.descriptors")
shadow_module = importlib.import_module("vfiouser_virtio.vring.shadow")

NEXT, WRITE, INDIRECT, AVAIL = (int(flag) for flag in tuple(DescFlags)[:4])
RAM, RAM_SIZE = 0x10_0000, 0x40_0000
DESC, DRIVER, DEVICE, TABLE, DATA = RAM, RAM + 0x8_0000, RAM + 0xA_0000, RAM + 0x10_0000, RAM + 0x30_0000
SIZE = 8192

kinds = pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])


class Bench:
    """A ring of 8192 entries whose chains are laid out one behind the other."""

    def __init__(self, packed: bool) -> None:
        self.packed = packed
        memory = GuestMemory()
        fd = os.memfd_create("ram")
        os.ftruncate(fd, RAM_SIZE)
        memory.map(RAM, RAM_SIZE, readable=True, writable=True, fd=fd, offset=0)
        self.ram = memory.writable(RAM, RAM_SIZE)[0]
        features = RingFeatures(packed=packed, indirect=True)
        self.ring: Ring = make_ring(SIZE, memory, features)
        areas = ring_areas(SIZE, features, DESC, DRIVER, DEVICE)
        self.ring.bind(*(memory.writable(area.address, area.length)[0] for area in areas))
        self.next = self.offered = 0
        self.table = TABLE

    def put(self, address: int, fmt: str, *values: int) -> None:
        struct.pack_into("<" + fmt, self.ram, address - RAM, *values)

    def entries(self, address: int, count: int, *, table: bool) -> None:
        """So many writable descriptors of 8 bytes, linked."""
        for number in range(count):
            flags = WRITE if number == count - 1 or (table and self.packed) else WRITE | NEXT
            if self.packed:
                last = (0, flags) if table else (self.offered, flags | AVAIL)
            else:
                last = flags, (address - DESC) // 16 + number + 1 if not table else number + 1
            self.put(address + 16 * number, "QIHH", DATA, 8, *last)

    def offer(self, direct: int = 0, indirect: int = 0) -> None:
        """One chain: descriptors of its own, then (split only both) a table of so many."""
        head = self.next
        self.entries(DESC + 16 * head, direct, table=False)
        if indirect:
            self.entries(self.table, indirect, table=True)
            if direct:
                self.put(DESC + 16 * (head + direct - 1) + 12, "HH", WRITE | NEXT, head + direct)
            link = (self.offered, INDIRECT | AVAIL) if self.packed else (INDIRECT, 0)
            self.put(DESC + 16 * (head + direct), "QIHH", self.table, 16 * indirect, *link)
            self.table += 16 * indirect
        if not self.packed:
            self.put(DRIVER + 4 + 2 * self.offered, "H", head)
            self.put(DRIVER + 2, "H", self.offered + 1)
        self.offered += 1
        self.next += direct + bool(indirect)


@kinds
@pytest.mark.parametrize("shape", ["direct", "indirect"])
def test_a_chain_has_1024_descriptors_at_most_however_large_the_queue(packed: bool, shape: str) -> None:
    bench = Bench(packed)
    bench.offer(**{shape: MAX_CHAIN})
    bench.offer(**{shape: MAX_CHAIN + 1})
    (chain,) = bench.ring.pop(1)
    assert len(chain.writable.segments) == MAX_CHAIN == 1024
    with pytest.raises(GuestError, match=r"0x401|4010 bytes|more than 0x400"):
        bench.ring.pop(1)


def test_a_table_behind_other_descriptors_counts_as_well() -> None:
    bench = Bench(False)
    bench.offer(direct=4, indirect=MAX_CHAIN - 4)
    bench.offer(direct=4, indirect=MAX_CHAIN - 3)
    (chain,) = bench.ring.pop(1)
    assert chain.room == 8 * MAX_CHAIN
    with pytest.raises(GuestError, match="more than 0x400 descriptors"):
        bench.ring.pop(1)


@kinds
@pytest.mark.parametrize(("shape", "cost"), [("direct", 1), ("indirect", 8)])
def test_one_pop_is_bounded_in_descriptors_and_the_next_goes_on(packed: bool, shape: str, cost: int) -> None:
    bench, each, chains = Bench(packed), 200, 40
    for _ in range(chains):
        bench.offer(**{shape: each})
    bursts: list[int] = []
    while taken := bench.ring.pop(64):
        bursts.append(len(taken))
        for chain in taken:
            chain.complete(0)
        bench.ring.publish()
    assert sum(bursts) == chains
    assert max(bursts) * each <= POP_BUDGET * cost + each
    assert min(bursts[:-1]) * each >= POP_BUDGET * cost * 0.9


@kinds
def test_chains_of_one_descriptor_are_taken_64_at_once(packed: bool) -> None:
    bench = Bench(packed)
    for _ in range(100):
        bench.offer(direct=1)
    assert [len(bench.ring.pop(64)) for _ in range(2)] == [64, 36]


class ManyPieces:
    """Memory in which every buffer lies in ``pieces`` of it; counts the look-ups."""

    hot: HotRegion = (1, 0, memoryview(b""), memoryview(b""), 0)

    def __init__(self, pieces: int) -> None:
        self.pieces = pieces
        self.look_ups = 0

    def readable(self, address: int, length: int) -> list[memoryview]:
        self.look_ups += 1
        return [memoryview(b"x")] * self.pieces

    writable = readable


@pytest.mark.parametrize("flags", [0, WRITE])
def test_four_gigabytes_are_refused_before_they_are_looked_up(flags: int) -> None:
    memory = ManyPieces(1)
    with pytest.raises(GuestError, match="more than 2\\^32"):
        make_chain(None, memory, 0, [(0, 0xC000_0000, flags, 0)] * 3)
    assert memory.look_ups == 0


@pytest.mark.parametrize("flags", [0, WRITE])
def test_pieces_are_bounded_for_all_of_a_chain(flags: int) -> None:
    memory = ManyPieces(100)
    with pytest.raises(GuestError, match="pieces of memory"):
        make_chain(None, memory, 0, [(0, 8, flags, 0)] * MAX_CHAIN)
    assert memory.look_ups == MAX_PIECES // 100 + 1


async def test_copies_of_a_chain_are_counted_once_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """A chain of 1023 buffers without a file descriptor that the device leaves as they are, and a status byte."""
    looked_at = 0

    def counting(things: Sized) -> int:
        nonlocal looked_at
        looked_at += 1
        return len(things)

    class Counted(Chain):
        __slots__ = ()

        def touched(self) -> list[tuple[int, int]]:
            nonlocal looked_at
            looked_at += len(self.ranges)
            return super().touched()

    class Client:
        name, uid = "x", None

        async def dma_read(self, address: int, count: int) -> bytes:
            return bytes(count)

        async def dma_write(self, address: int, data: bytes | bytearray | memoryview) -> None:
            sent.append((address, bytes(data)))

    sent: list[tuple[int, bytes]] = []
    monkeypatch.setattr(shadow_module, "len", counting, raising=False)
    monkeypatch.setattr(descriptors_module, "Chain", Counted)
    memory = GuestMemory()
    memory.attach(Client())
    memory.map(RAM, RAM_SIZE, readable=True, writable=True, fd=None, offset=0)
    shadow = Shadow(memory)
    shadow.begin()
    ring = make_ring(8, memory, RingFeatures())
    chain = make_chain(ring, shadow, 7, [(RAM + 64 * number, 8, WRITE, 0) for number in range(MAX_CHAIN)])
    shadow.claim(7)
    chain.writable.take_last(1)[0][0] = 2
    assert shadow.claims
    for address, data in shadow.written(chain):
        await memory.write(address, data)
    shadow.forget([7])
    assert sent == [(RAM + 64 * (MAX_CHAIN - 1) + 7, b"\2")]
    assert not shadow.claims
    assert looked_at <= 4 * MAX_CHAIN


def test_copies_count_for_what_they_take_however_small_they_are() -> None:
    """Chains of single bytes took 210 MB of memory where copies had 256 KiB, and Python's search for garbage 0.15 s."""
    memory = GuestMemory()
    memory.map(RAM, RAM_SIZE, readable=True, writable=True, fd=None, offset=0)
    shadow = Shadow(memory)
    descriptors = [(RAM + number, 1, WRITE, 0) for number in range(MAX_CHAIN)]
    taken = MAX_COPIES // ((1 + COPY) * MAX_CHAIN)
    for head in range(taken):
        make_chain(None, shadow, head, descriptors)
        shadow.claim(head)
    with pytest.raises(NoRoom):
        make_chain(None, shadow, taken, descriptors)
    shadow.begin()
    for head in range(taken):
        shadow.forget([head])
    shadow.begin()
    for number in range(1000):  # nothing of it is left
        make_chain(None, shadow, number, descriptors[:1])
        shadow.claim(number)
        shadow.forget([number])
