"""The buffers of a chain, however they are cut (message framing: virtio 1.4, 2.7.4)."""

import os
import struct

import pytest
from benchmarks.rings import load

from vfiouser_virtio.errors import AuthorError, GuestError
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.protocols.virtio.ring import DescFlags
from vfiouser_virtio.vring import Chain, Readable, RingFeatures, Writable, make_ring, ring_areas
from vfiouser_virtio.vring.chain import DISOWNED

NEXT, WRITE, INDIRECT, AVAIL, _ = (int(flag) for flag in DescFlags)


def pieces(*lengths: int) -> tuple[bytearray, list[memoryview]]:
    """Numbered bytes, and views of them that are cut like this."""
    whole = bytearray(range(sum(lengths)))
    view, views, at = memoryview(whole), [], 0
    for length in lengths:
        views.append(view[at : at + length])
        at += length
    return whole, views


def readable(*lengths: int) -> Readable:
    _, views = pieces(*lengths)
    return Readable.of(views, sum(lengths), len(lengths))


def writable(*lengths: int) -> tuple[bytearray, Chain]:
    whole, views = pieces(*lengths)
    layout = [number for length in lengths for number in (0, length, 0, 0)]
    ring = make_ring(8, GuestMemory(), RingFeatures())
    return whole, Chain.of(ring, 0, layout, 0, sum(lengths), None, segments=([], views))


CUTS = [(10,), (1,) * 10, (4, 6), (6, 4), (3, 3, 4), (9, 1), (1, 9)]


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("first", [0, 1, 4, 6, 9, 10])
def test_reading(cut: tuple[int, ...], first: int) -> None:
    part = readable(*cut)
    assert part.read(first) == bytes(range(first))
    assert part.length == 10 - first
    assert b"".join(part.take(10 - first)) == bytes(range(first, 10))
    assert (part.length, part.segments, part.read()) == (0, [], b"")
    with pytest.raises(GuestError, match="0x1 more readable bytes, its buffer has 0x0"):
        part.take(1)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("last", [0, 1, 4, 10])
@pytest.mark.parametrize("first", [0, 2, 6])
def test_writing(cut: tuple[int, ...], last: int, first: int) -> None:
    whole, chain = writable(*cut)
    part: Writable = chain.writable
    assert b"".join(part.take_last(last)) == bytes(range(10 - last, 10))
    if first + last > 10:
        with pytest.raises(AuthorError, match=f"{first:#x} bytes, where .* has room for {10 - last:#x} more"):
            part.write(b"x" * first)
        assert (part.length, part.written, bytes(whole)) == (10 - last, 0, bytes(range(10)))
        return
    part.write(b"x" * first)
    assert bytes(whole) == b"x" * first + bytes(range(first, 10))
    assert (part.length, part.written, chain.room) == (10 - first - last, first, 10)
    touched = chain.touched()
    assert {place for begin, end in touched for place in range(begin, end)} == {
        *range(first),
        *range(10 - last, 10),
    }
    with pytest.raises(GuestError):
        part.take_last(11 - first - last)
    part.write(b"y" * part.length)
    assert bytes(whole) == b"x" * first + b"y" * (10 - first - last) + bytes(range(10 - last, 10))


@pytest.mark.parametrize("kind", ["split", "packed"])
@pytest.mark.parametrize(("shape", "room"), [("1", 4096), ("3", 2049), ("indirect", 2049)])
@pytest.mark.parametrize("taken", ["nothing", "last", "all"])
def test_no_chain_is_completed_with_more_than_its_room(kind: str, shape: str, room: int, taken: str) -> None:
    """The driver would take what its memory held before for what the device has written."""
    ring, offer = load(kind, shape, event_idx=False)
    for written in (-1, room + 1, 1 << 32, room, 0, None):
        offer(1)
        [chain] = ring.pop(1)
        if taken == "last":
            chain.writable.take_last(1)
        elif taken == "all":
            chain.writable.take(room)
        if written is not None and not 0 <= written <= room:
            with pytest.raises(AuthorError, match=f"has room for {room:#x} bytes"):
                chain.complete(written)
            written = 0
        chain.complete(written)
        ring.publish()
        assert not ring.in_flight


def test_a_chain_that_was_completed_has_no_room() -> None:
    ring, offer = load("split", "1", event_idx=False)
    offer(1)
    [chain] = ring.pop(1)
    chain.complete()
    for use in (
        lambda: chain.writable.take(1),
        lambda: chain.writable.take_last(1),
        lambda: chain.writable.write(b"x"),
    ):
        with pytest.raises(AuthorError, match="0x1 bytes"):
            use()
    with pytest.raises(AuthorError, match="completed twice"):
        chain.complete()


def test_counts_below_zero_are_no_counts() -> None:
    with pytest.raises(GuestError):
        readable(4).take(-1)
    with pytest.raises(GuestError):
        writable(4)[1].writable.take_last(-1)


@pytest.mark.parametrize("kind", ["split", "packed"])
@pytest.mark.parametrize(("shape", "cut"), [("1", [4096]), ("3", [16, 2048, 1]), ("indirect", [16, 2048, 1])])
def test_chains_of_all_shapes_are_alike(kind: str, shape: str, cut: list[int]) -> None:
    """The hurried ways to make a chain and the thorough one give the same."""
    ring, offer = load(kind, shape, event_idx=False)
    offer(5)
    for number, chain in enumerate(ring.pop(64)):
        assert [length for _, length in chain.ranges] == cut
        assert chain.ranges[0][0] == 0x20_0000 + 4096 * number
        assert chain.writable_from == len(cut) // 2
        views = [*chain.readable.segments, *chain.writable.segments]
        assert [len(view) for view in views] == cut
        assert [view.readonly for view in views] == [True] * (len(cut) // 2) + [False] * (len(cut) - len(cut) // 2)
        assert chain.readable.length == sum(cut[:-2])
        assert chain.writable.length == chain.room == sum(cut[-2:])
        assert (chain.writable.written, chain.writable.taken_last, chain.stale, chain.ring) == (0, 0, False, ring)
        views[-1][0] = number + 1
        [last] = ring.memory.readable(*chain.ranges[-1])
        assert last[0] == number + 1


@pytest.mark.parametrize("first_readable", [True, False])
@pytest.mark.parametrize(
    ("sizes", "count"), [((5,), 0), ((5,), 1), ((5, 6, 7), 1), ((5, 6, 7), 2), ((5, 6, 7), 3), ((5, 6), 1)]
)
def test_parts_are_made_once_whichever_is_asked_for_first(
    sizes: tuple[int, ...], count: int, first_readable: bool
) -> None:
    ring, _ = load("split", "1", event_idx=False)
    begin = ring.memory.hot[0]
    layout = [number for index, size in enumerate(sizes) for number in (begin + 64 * index, size, 0, 0)]
    chain = Chain.of(ring, 0, layout, count, sum(sizes[count:]), ring.memory.hot)
    if not first_readable:
        assert chain.writable is chain.writable
    parts = chain.readable, chain.writable
    assert [len(view) for view in parts[0].segments] == list(sizes[:count])
    assert [len(view) for view in parts[1].segments] == list(sizes[count:])
    assert (parts[0].length, parts[1].length) == (sum(sizes[:count]), chain.room)
    if sizes[count:]:
        parts[1].write(b"x")
    assert (chain.readable, chain.writable) == parts
    assert chain.touched() == ([(0, 1), (chain.room, chain.room)] if sizes[count:] else [(0, 0)])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("direct", [False, True])
@pytest.mark.parametrize("sizes", [(1 << 31, 1 << 31, 1), (0xFFFF_FFFF, 2), (1 << 30,) * 5])
def test_no_chain_is_longer_than_4_gib(packed: bool, direct: bool, sizes: tuple[int, ...]) -> None:
    """The hurried ways look at that as well; it takes a region of more than that to be asked."""
    memory = GuestMemory()
    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 6 << 30)  # all of it a hole
    memory.map(0, 6 << 30, readable=True, writable=True, fd=fd, offset=0)
    features = RingFeatures(packed=packed, indirect=True)
    ring = make_ring(8, memory, features)
    areas = ring_areas(8, features, 0, 0x1000, 0x2000)
    ring.bind(*(memory.writable(area.address, area.length)[0] for area in areas))
    [ram] = memory.writable(0, 0x1_0000)
    table, last = 0 if direct else 0x8000, len(sizes) - 1
    for number, size in enumerate(sizes):
        flags = NEXT * (number < last) + WRITE + (AVAIL if packed else 0)
        rest = (1, flags) if packed else (flags, number + 1)
        struct.pack_into("<QIHH", ram, table + 16 * number, 0x1_0000, size, *rest)
    if not direct:
        rest = (1, INDIRECT | AVAIL) if packed else (INDIRECT, 0)
        struct.pack_into("<QIHH", ram, 0, table, 16 * len(sizes), *rest)
    if not packed:
        ram[0x1000 + 2] = 1
    with pytest.raises(GuestError, match=r"more than 2\^32"):
        ring.pop(1)


def test_a_chain_that_was_disowned_leaves_nothing_behind() -> None:
    """Another chain has taken its place: completing it is void, and is not remembered either."""
    for _ in range(3):
        _, chain = writable(4)
        chain.disown()
        assert chain.ring is DISOWNED
        chain.writable.write(b"late")
        chain.complete()
    assert DISOWNED.completed == []


@pytest.mark.parametrize("kind", ["split", "packed"])
@pytest.mark.parametrize("shape", ["3", "indirect"])
@pytest.mark.parametrize("looked_at", [False, True])
@pytest.mark.parametrize(("header", "data"), [("<IIQ", []), ("<12s", [4])])
def test_a_request_is_taken_apart_however_it_is_cut(
    kind: str, shape: str, looked_at: bool, header: str, data: list[int]
) -> None:
    """The usual cut goes another way than others, and than a chain whose parts somebody has looked at."""
    ring, offer = load(kind, shape, event_idx=False)
    offer(3)
    for chain in ring.pop(3):
        (first, size), (second, room), (last, _) = chain.ranges
        [written] = ring.memory.writable(first, size)
        written[:] = bytes(range(16))
        if looked_at:
            assert (chain.readable.length, chain.writable.length) == (16, 2049)
        codec = struct.Struct(header)
        fields, readable_, length, writable_, free = chain.take_request(codec)
        assert fields == codec.unpack_from(bytes(range(16)))
        assert ([len(view) for view in readable_], length) == (data, sum(data))
        assert b"".join(readable_) == bytes(range(16))[codec.size :]
        assert ([len(view) for view in writable_], free) == ([room], room)
        assert all(view.readonly for view in readable_)
        for wrong in (-1, room + 1):
            with pytest.raises(AuthorError, match="where the driver's buffer has room for"):
                chain.finish_request(9, wrong)
        writable_[0][0] = 7
        chain.finish_request(9, room)
        assert [ring.memory.readable(at, 1)[0][0] for at in (second, last)] == [7, 9]
        assert ring.completed[-2:] == [chain.head, room + 1]
        with pytest.raises(AuthorError):
            chain.take_request(codec)
        with pytest.raises(AuthorError, match="twice"):
            chain.finish_request(3)
        assert ring.memory.readable(last, 1)[0][0] == 9


@pytest.mark.parametrize("looked_at", [False, True])
def test_the_status_counts_only_without_a_gap_in_front_of_it(looked_at: bool) -> None:
    ring, offer = load("split", "3", event_idx=False)
    offer(3)
    for chain, filled in zip(ring.pop(3), (0, 511, 512), strict=True):
        if looked_at:
            assert chain.writable.length == chain.room
        *_, room = chain.take_request(struct.Struct("<16s"))
        chain.finish_request(0, filled)
        assert ring.completed[-1] == (filled + 1 if filled == room else filled)


@pytest.mark.parametrize("looked_at", [False, True])
def test_what_was_put_back_is_not_given_a_status(looked_at: bool) -> None:
    """Its buffer may be another chain by then, and the driver's again."""
    ring, offer = load("split", "3", event_idx=False)
    offer(1)
    [chain] = ring.pop(1)
    if looked_at:
        assert chain.writable.length == chain.room
    chain.take_request(struct.Struct("<16s"))
    (_, _), (_, _), (last, _) = chain.ranges
    ring.offer_again()
    chain.finish_request(9)
    assert ring.memory.readable(last, 1)[0][0] == 0
    assert ring.completed == []


def test_a_chain_that_has_no_room_is_not_given_a_status() -> None:
    ring, offer = load("split", "1", event_idx=False)
    offer(1)
    [(place, _)] = ring.pop(1)[0].ranges
    [data] = ring.memory.writable(place, 16)
    before = bytes(data)
    chain = Chain.of(ring, 0, (place, 16, 0, 0), 1, 0, ring.memory.hot)
    with pytest.raises(AuthorError, match="room for 0x0 bytes"):
        chain.finish_request(0x55)
    assert data == before


def test_a_request_without_a_header_or_a_status_is_refused() -> None:
    for kind in ("split", "packed"):
        ring, offer = load(kind, "3", event_idx=False)
        offer(1)
        [chain] = ring.pop(1)
        with pytest.raises(GuestError, match="a request needs 0x20 more readable bytes, its buffer has 0x10"):
            chain.take_request(struct.Struct("<32s"))
        ring, offer = load(kind, "1", event_idx=False)
        offer(1)
        [chain] = ring.pop(1)
        with pytest.raises(GuestError, match="a request needs 0x10 more readable bytes"):
            chain.take_request(struct.Struct("<IIQ"))


@pytest.mark.parametrize("base", [0, 0x2000_0000_0000], ids=["in-the-window", "where-DPDK-has-its-memory"])
@pytest.mark.parametrize("direct", [False, True])
def test_buffers_at_any_address_are_taken_the_fast_way(base: int, direct: bool) -> None:
    memory = GuestMemory()
    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 1 << 20)
    memory.map(base, 1 << 20, readable=True, writable=True, fd=fd, offset=0)
    ring = make_ring(8, memory, RingFeatures(indirect=True))
    areas = ring_areas(8, RingFeatures(indirect=True), base, base + 0x1000, base + 0x2000)
    ring.bind(*(memory.writable(area.address, area.length)[0] for area in areas))
    assert memory.hot[:2] == (base, base + (1 << 20))
    [ram] = memory.writable(base, 1 << 20)
    ram[0x5000:0x5010] = bytes(range(16))
    table = 0 if direct else 0x3000
    for at, (address, length, flags) in enumerate(
        [(0x5000, 16, NEXT), (0x6000, 512, NEXT | WRITE), (0x7000, 1, WRITE)]
    ):
        struct.pack_into("<QIHH", ram, table + 16 * at, base + address, length, flags, (at + 1) % 3)
    if not direct:
        struct.pack_into("<QIHH", ram, 0, base + table, 48, INDIRECT, 0)
    struct.pack_into("<HHH", ram, 0x1000, 0, 1, 0)
    [chain] = ring.pop(1)
    fields, _, _, room, free = chain.take_request(struct.Struct("<16s"))
    assert (fields, free) == ((bytes(range(16)),), 512)
    room[0][0] = 1
    chain.finish_request(2, 512)
    assert (ram[0x6000], ram[0x7000]) == (1, 2)
    memory.clear()


# ---- packets: `Chain.take_packet`, `Chain.fill` ----------------------------------------------------------------------

HEADER = struct.Struct("<HH")


def in_region(size: int, *, write: bool) -> tuple[bytearray, Chain]:
    """A chain with one buffer, in a memory of numbered bytes that begins at 0x1000."""
    memory = bytearray(range(100))
    view = memoryview(memory)
    region = (0x1000, 0x1000 + len(memory), view, view.toreadonly(), 0x1000)
    ring = make_ring(8, GuestMemory(), RingFeatures())
    return memory, Chain.of(ring, 0, [0x1010, size, 0, 0], 0 if write else 1, size if write else 0, region)


def test_a_packet_in_one_buffer() -> None:
    memory, chain = in_region(10, write=False)
    fields, segments, length = chain.take_packet(HEADER)
    assert fields == (0x1110, 0x1312)
    assert ([bytes(each) for each in segments], length) == ([bytes(memory[20:26])], 6)
    assert segments[0].readonly


@pytest.mark.parametrize("cut", CUTS)
def test_a_packet_in_any_buffers(cut: tuple[int, ...]) -> None:
    _, views = pieces(*cut)
    ring = make_ring(8, GuestMemory(), RingFeatures())
    layout = [number for length in cut for number in (0, length, 0, 0)]
    chain = Chain.of(ring, 0, layout, len(cut), 0, None, segments=(views, []))
    fields, segments, length = chain.take_packet(HEADER)
    assert fields == (0x0100, 0x0302)
    assert (b"".join(segments), length) == (bytes(range(4, 10)), 6)


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_packet_that_is_a_header_at_most(size: int) -> None:
    fields, segments, length = in_region(size, write=False)[1].take_packet(HEADER)
    assert (bool(fields), b"".join(segments), length) == (size == 4, b"", 0)


def test_no_packet_is_in_a_buffer_to_write_to() -> None:
    assert in_region(10, write=True)[1].take_packet(HEADER) == ((), (), 0)


def test_filling_one_buffer() -> None:
    memory, chain = in_region(10, write=True)
    chain.fill(b"ab", [memoryview(b"cde"), memoryview(b""), memoryview(b"f")], 6)
    assert memory[:0x10] + memory[0x16:] == bytes(range(0x10)) + bytes(range(0x16, 100))
    assert memory[0x10:0x16] == b"abcdef"
    assert chain.ring is None
    with pytest.raises(AuthorError):
        chain.fill(b"ab", [], 2)
    assert memory[0x10:0x16] == b"abcdef"


@pytest.mark.parametrize("cut", CUTS)
def test_filling_any_buffers(cut: tuple[int, ...]) -> None:
    whole, chain = writable(*cut)
    ring = chain.ring
    assert ring is not None
    chain.fill(b"ab", [memoryview(b"cde"), memoryview(b"f")], 6)
    assert whole == b"abcdef" + bytes(range(6, 10))
    assert ring.completed == [0, 6]


@pytest.mark.parametrize("in_one", [True, False])
def test_filling_more_than_there_is_room_for(in_one: bool) -> None:
    memory, chain = in_region(10, write=True) if in_one else writable(4, 6)
    before = bytes(memory)
    with pytest.raises(AuthorError, match="room for 0x"):
        chain.fill(b"", [memoryview(bytes(11))], 11)
    assert memory == before
