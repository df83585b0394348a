"""Memory of a client: giving parts of it away, and serving it by message."""

import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vfiouser_virtio.fds import F_GET_SEALS, F_SEAL_SHRINK
from vfiouser_virtio.protocols.vfio_user import HEADER_CODEC, Command
from vfiouser_virtio.vfio_user import DmaBuffer, DmaRegion, PrivateMemory, SharedMemory
from vfiouser_virtio.vfio_user.client.dma import DmaServer, Mapping
from vfiouser_virtio.vfio_user.wire.connection import Message

BASE, SIZE = 0x1_0000_0000, 0x1000
READ, WRITE = Command.DMA_READ, Command.DMA_WRITE


@pytest.fixture(params=[SharedMemory, PrivateMemory])
def region(request: pytest.FixtureRequest) -> Iterator[DmaRegion]:
    with request.param(SIZE) as region:
        yield region


def test_a_region(region: DmaRegion) -> None:
    assert (region.address, region.size, len(region.view)) == (BASE, SIZE, SIZE)
    region.at(BASE + SIZE - 4, 4)[:] = b"last"
    assert bytes(region.view[-4:]) == b"last"
    for address, size in ((BASE - 1, 1), (BASE, SIZE + 1), (BASE + SIZE, 1), (BASE, -1)):
        with pytest.raises(IndexError, match=f"0x{address:x}"):
            region.at(address, size)


def test_shared_memory_is_a_sealed_file() -> None:
    with SharedMemory(SIZE, address=0) as region:
        assert region.fd is not None
        assert region.address == 0
        assert fcntl.fcntl(region.fd, F_GET_SEALS) & F_SEAL_SHRINK
        with mmap.mmap(region.fd, SIZE) as other:
            other[:2] = b"hi"
        kept = region.at(0, 2)
        assert bytes(kept) == b"hi"
    assert region.fd is None
    region.close()
    assert bytes(kept) == b"hi"


def test_a_closed_region_has_no_file_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    with SharedMemory(SIZE) as region:
        region.alloc(16)
        assert len(os.listdir("/proc/self/fd")) > before
    assert len(os.listdir("/proc/self/fd")) == before


def test_buffers_are_aligned_and_empty(region: DmaRegion) -> None:
    region.view[:] = b"\xff" * SIZE
    for align in (1, 16, 64, 1024):
        buffer = region.alloc(10, align)
        assert buffer.address % align == 0
        assert bytes(buffer.view) == bytes(10)
        buffer.view[:2] = b"ab"
        assert bytes(region.at(buffer.address, 2)) == b"ab"


def test_alignment_is_of_the_address() -> None:
    with PrivateMemory(SIZE, address=0x1004) as region:
        assert region.alloc(1, 64).address == 0x1040


def test_no_room(region: DmaRegion) -> None:
    all_of_it = region.alloc(SIZE)
    with pytest.raises(MemoryError, match="0x1 free"):
        region.alloc(1)
    region.free(all_of_it)
    region.alloc(1)
    with pytest.raises(MemoryError):
        region.alloc(SIZE)


@pytest.mark.parametrize(("size", "align"), [(0, 16), (-1, 16), (1, 0), (1, 3), (1, -2)])
def test_what_cannot_be_allocated(size: int, align: int) -> None:
    with pytest.raises(ValueError, match="cannot allocate"):
        PrivateMemory(SIZE).alloc(size, align)


def test_what_cannot_be_freed() -> None:
    region = PrivateMemory(SIZE)
    buffer = region.alloc(16)
    region.free(buffer)
    for wrong in (buffer, DmaBuffer(BASE - 16, buffer.view), DmaBuffer(BASE + SIZE, buffer.view)):
        with pytest.raises(ValueError, match="not allocated"):
            region.free(wrong)


@given(st.lists(st.tuples(st.integers(1, 700), st.sampled_from([1, 2, 16, 256]), st.integers(0, 100))))
def test_buffers_never_overlap_and_all_comes_back(steps: list[tuple[int, int, int]]) -> None:
    region = PrivateMemory(SIZE)
    held: list[DmaBuffer] = []
    for size, align, choice in steps:
        if choice < 40 and held:
            region.free(held.pop(choice % len(held)))
            continue
        try:
            buffer = region.alloc(size, align)
        except MemoryError:
            continue
        start, end = buffer.address, buffer.address + size
        assert start >= BASE
        assert end <= BASE + SIZE
        assert all(end <= other.address or other.address + len(other.view) <= start for other in held)
        held.append(buffer)
    for buffer in held:
        region.free(buffer)
    assert region.alloc(SIZE).address == BASE


# Serving


@pytest.fixture
def server() -> DmaServer:
    """Two regions that touch, and one far off for each single direction."""
    server = DmaServer()
    for address, readable, writable in (
        (BASE, True, True),
        (BASE + SIZE, True, True),
        (4 * BASE, True, False),
        (5 * BASE, False, True),
    ):
        server.mappings.append(Mapping(PrivateMemory(SIZE, address=address), readable, writable))
    return server


def ask(server: DmaServer, command: int, address: int, count: int, data: bytes = b"") -> tuple[int, bytes]:
    raw = server.answer(Message(77, command, 0, 0, struct.pack("<QQ", address, count) + data))
    message_id, answered, size, flags, error = HEADER_CODEC.unpack_from(raw)
    assert (message_id, answered, size) == (77, command, len(raw))
    assert flags == (0x21 if error else 1)
    assert not error or len(raw) == 16
    return error, raw[16:]


def test_reads_and_writes(server: DmaServer) -> None:
    assert ask(server, WRITE, BASE + 5, 3, b"abcX") == (0, struct.pack("<QQ", BASE + 5, 3))
    assert ask(server, READ, BASE + 4, 5) == (0, struct.pack("<QQ", BASE + 4, 5) + b"\0abc\0")


def test_a_range_may_cross_regions(server: DmaServer) -> None:
    ask(server, WRITE, BASE + SIZE - 2, 4, b"abcd")
    assert bytes(server.mappings[0].region.view[-2:]) == b"ab"
    assert bytes(server.mappings[1].region.view[:2]) == b"cd"
    assert ask(server, READ, BASE + SIZE - 2, 4)[1][16:] == b"abcd"


@pytest.mark.parametrize(
    ("command", "address", "count", "data", "expected"),
    [
        (READ, BASE, 0, b"", 0),
        (READ, BASE + 2 * SIZE - 1, 2, b"", errno.ENODEV),
        (READ, BASE - 1, 1, b"", errno.ENODEV),
        (READ, (1 << 64) - 1, 2, b"", errno.ENODEV),
        (READ, 5 * BASE, 1, b"", errno.ENODEV),
        (WRITE, 4 * BASE, 1, b"x", errno.ENODEV),
        (WRITE, 5 * BASE, 1, b"x", 0),
        (READ, 4 * BASE, 1, b"", 0),
        (READ, BASE, (1 << 20) + 1, b"", errno.E2BIG),
        (READ, BASE, (1 << 64) - 1, b"", errno.E2BIG),
        (WRITE, BASE, 2, b"x", errno.E2BIG),
        (Command.REGION_READ, BASE, 1, b"", errno.ENOSYS),
        (99, 0, 0, b"", errno.ENOSYS),
    ],
)
def test_qemus_errnos(server: DmaServer, command: int, address: int, count: int, data: bytes, expected: int) -> None:
    assert ask(server, command, address, count, data)[0] == expected


def test_a_write_that_fails_writes_nothing(server: DmaServer) -> None:
    assert ask(server, WRITE, BASE + 2 * SIZE - 2, 4, b"abcd")[0] == errno.ENODEV
    assert not any(server.mappings[1].region.view)


def test_qemus_errnos_for_what_is_no_request(server: DmaServer) -> None:
    read = os.open("/dev/null", os.O_RDONLY)
    for message in (Message(1, READ, 0, 0, bytes(15)), Message(1, READ, 0, 0, bytes(16), [read])):
        assert HEADER_CODEC.unpack_from(server.answer(message))[4] == errno.EINVAL
    os.close(read)
