"""`vfiouser_virtio.testing.raw`: what its rings and its client see and refuse; that they can lie is used elsewhere."""

import os
import socket
import struct
from collections.abc import Callable, Iterator

import pytest
import trio
import trio.testing

from vfiouser_virtio.dma import SharedMemory
from vfiouser_virtio.testing.raw.bring_up import enable_queue, negotiate
from vfiouser_virtio.testing.raw.client import MAX_MESSAGE_SIZE, RawClient, raw_message
from vfiouser_virtio.testing.raw.packed import AVAIL, DESC, USED, RawPackedRing, packed_areas
from vfiouser_virtio.testing.raw.ring import WRITE, RawRing, RingFullError, lay_out
from vfiouser_virtio.testing.raw.split import RawSplitRing, split_areas


@pytest.fixture
def ram() -> Iterator[SharedMemory]:
    with SharedMemory(1 << 16) as ram:
        yield ram


def split(ram: SharedMemory, size: int) -> RawSplitRing:
    return RawSplitRing(ram, size, lay_out(ram.address, split_areas(size))[0])


def packed(ram: SharedMemory, size: int) -> RawPackedRing:
    return RawPackedRing(ram, size, lay_out(ram.address, packed_areas(size))[0])


def use(ring: RawRing, name: int, number: int, length: int) -> None:
    """What a device does to give back the ``number``-th buffer, each of two descriptors."""
    if isinstance(ring, RawSplitRing):
        ring.ram.write(ring.device + 4 + 8 * (number % ring.size), struct.pack("<II", name, length))
        ring.ram.write(ring.device + 2, struct.pack("<H", number + 1 & 0xFFFF))
    else:
        slot, wrap = 2 * number % ring.size, not 2 * number // ring.size % 2
        ring.ram.write(ring.desc + 16 * slot, DESC.pack(0, length, name, AVAIL | USED if wrap else 0))


@pytest.mark.parametrize("make", [split, packed])
def test_chains_go_there_and_back(ram: SharedMemory, make: Callable[[SharedMemory, int], RawRing]) -> None:
    ring = make(ram, 4)
    segments = [(0x1000, 16, 0), (0x2000, 512, WRITE)]
    for number in range(0, 12, 2):
        names = [ring.add(segments), ring.add(segments)]
        assert len({*names}) == 2
        assert ring.free == 0
        with pytest.raises(RingFullError, match="more than 4 entries"):
            ring.add(segments)
        assert ring.take_used() is None
        for name, which in zip(reversed(names), (number, number + 1), strict=True):  # in any order
            use(ring, name, which, which)
            assert ring.take_used() == (name, which)
        assert ring.free == 4
    ring.add(segments)
    use(ring, 3, 12, 0)
    with pytest.raises(LookupError, match="buffer 0x3 comes back, which the device does not have"):
        ring.take_used()


def test_parts_are_aligned() -> None:
    (desc, driver, device), end = lay_out(0x1001, split_areas(3))
    assert (desc, driver, device, end) == (0x1010, 0x1040, 0x104C, 0x104C + 30)


def test_a_bring_up() -> None:
    assert [value for name, value in negotiate(1 << 32 | 5) if name == "driver_feature"] == [5, 1]
    assert [value for name, value in negotiate(1 << 32) if name == "device_status"] == [1, 3, 11]
    assert [*enable_queue(7, (1, 2, 3))] == [
        ("queue_select", 7),
        ("queue_desc", 1),
        ("queue_driver", 2),
        ("queue_device", 3),
        ("queue_enable", 1),
    ]


async def test_messages_in_pieces() -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)  # shows what was one piece
    with theirs:
        theirs.settimeout(10)
        client = RawClient(ours)
        await client.send(b"abcdef", [0], cuts=[2, 9, 4, 0])
        pieces = [socket.recv_fds(theirs, 9, 1) for _ in range(3)]
        assert [data for data, *_ in pieces] == [b"ab", b"cd", b"ef"]
        assert [len(fds) for _, fds, *_ in pieces] == [1, 0, 0]
        os.close(pieces[0][1][0])
        client.close()


async def test_replies() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        client = RawClient(ours)
        theirs.sendall(raw_message(9, b"xyz", message_id=5, flags=1))
        reply = await client.receive()
        assert (reply.id, reply.command, reply.flags, reply.error, reply.body) == (5, 9, 1, 0, b"xyz")
        for size in (15, MAX_MESSAGE_SIZE + 1):
            theirs.sendall(raw_message(9, size=size))
            with pytest.raises(ValueError, match=f"a message of {size:#x} bytes"):
                await client.receive()
        client.close()


async def test_fds_of_half_a_message_are_closed() -> None:
    ours, theirs = socket.socketpair()
    client = RawClient(ours)
    before = len(os.listdir("/proc/self/fd"))
    socket.send_fds(theirs, [raw_message(9, size=17)], [0])
    theirs.close()
    with pytest.raises(EOFError):
        await client.receive()
    assert len(os.listdir("/proc/self/fd")) == before - 1  # theirs
    client.close()


async def test_a_server_that_does_not_answer(autojump_clock: trio.testing.MockClock) -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        client = RawClient(ours)
        with pytest.raises(trio.TooSlowError):
            await client.receive()
        client.close()
