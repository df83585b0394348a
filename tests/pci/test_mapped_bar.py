"""BARs that a client maps: accesses by messages and by memory are the same bytes, and no client keeps a hold of us."""

import errno
import fcntl
import gc
import os
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from support.frames import AREAS, PAGE, SIZE, Frames
from support.pci import IDENTITY, Client, open_fds

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.pci import BarKind, BarMapping, PciFunction, mapped_bar
from vfiouser_virtio.protocols.vfio_user import RegionFlags
from vfiouser_virtio.vfio_device import AnswerLater, Buffer, Hold, RegionInfo
from vfiouser_virtio.vfio_user import Server, listen_path
from vfiouser_virtio.vfio_user.client import Client as VfioUserClient
from vfiouser_virtio.vfio_user.client import connect


@pytest.fixture
def frames() -> Iterator[Frames]:
    made = Frames()
    made.function.connected(Client())
    yield made
    made.function.disconnected()
    made.mapping.close()


@pytest.mark.parametrize(
    "areas",
    [
        [(1, PAGE)],
        [(0, PAGE + 1)],
        [(0, 0)],
        [(PAGE, -PAGE)],
        [(0, SIZE + PAGE)],
        [(2 * PAGE, PAGE), (0, PAGE)],
        [(0, 2 * PAGE), (PAGE, PAGE)],
    ],
)
def test_areas_are_whole_pages_in_order(areas: list[tuple[int, int]]) -> None:
    with pytest.raises(ValueError, match="expected whole pages"):
        BarMapping(SIZE, areas=areas)


def test_what_cannot_be_mapped() -> None:
    with pytest.raises(ValueError, match="I/O"):
        mapped_bar(BarMapping(SIZE), kind=BarKind.IO)
    with pytest.raises(ValueError, match="power of two"):
        mapped_bar(BarMapping(3 * PAGE))


def test_a_client_is_told_what_it_may_map(frames: Frames) -> None:
    info = frames.function.region_info(2)
    assert info.flags == RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP
    numbers = [2, 0, *(number for area in AREAS for number in area)]
    body = b"".join(value.to_bytes(4 if at < 2 else 8, "little") for at, value in enumerate(numbers))
    assert info.capabilities == ((1, 1, body),)
    assert info.fds == (frames.mapping.fd,)
    whole = Frames(areas=None).function.region_info(2)
    assert (whole.flags & RegionFlags.MMAP, whole.capabilities) == (RegionFlags.MMAP, ())


@given(
    st.lists(
        st.tuples(
            st.integers(0, SIZE - 1) | st.sampled_from([PAGE - 3, 2 * PAGE - 3, 4 * PAGE - 3, 6 * PAGE - 3]),
            st.binary(min_size=1, max_size=16) | st.just(bytes(range(256)) * (3 * PAGE // 256)),
        ),
        max_size=20,
    )
)
def test_messages_reach_both_kinds_of_pages(writes: list[tuple[int, bytes]]) -> None:
    frames, model = Frames(), bytearray(SIZE)
    frames.function.connected(Client())
    for offset, data in writes:
        part = data[: SIZE - offset]
        frames.function.region_write(2, offset, part)
        model[offset : offset + len(part)] = part
        assert frames.function.region_read(2, offset, len(part)) == part
    for offset, size in AREAS:
        assert frames.mapping.view[offset : offset + size] == model[offset : offset + size]
        assert frames.trapped[offset : offset + size] == bytes(size)
    assert frames.function.region_read(2, 0, SIZE) == model
    for _, offset, count in frames.trapped_accesses:
        assert not any(start < offset + count and offset < start + size for start, size in AREAS)
    frames.mapping.close()


def test_without_handlers_the_rest_is_zero_and_keeps_nothing() -> None:
    function = PciFunction(IDENTITY)
    function.add_bar(5, mapped_bar(BarMapping(2 * PAGE, areas=[(PAGE, PAGE)]), kind=BarKind.MEM32))
    function.connected(Client())
    function.region_write(5, PAGE - 2, b"abcd")
    assert function.region_read(5, PAGE - 2, 4) == b"\0\0cd"
    function.disconnected()


def test_an_access_that_is_answered_later_and_lies_in_both_kinds_of_pages() -> None:
    """What is a simulator's beside memory that is ours: the rest of the access must not be lost with the wait."""
    holds: list[Hold] = []
    written: list[tuple[int, bytes]] = []

    def read(offset: int, count: int) -> bytes:
        holds.append(Hold())
        raise AnswerLater(holds[-1], lambda: bytes([offset // PAGE]) * count)

    def write(offset: int, data: Buffer) -> None:
        written.append((offset, bytes(data)))
        holds.append(Hold())
        raise AnswerLater(holds[-1])

    mapping = BarMapping(4 * PAGE, areas=[(PAGE, PAGE)])
    bar = mapped_bar(mapping, read=read, write=write)
    with pytest.raises(AnswerLater) as taken:
        bar.write(PAGE - 2, b"ab" + b"m" * PAGE + b"cd")
    assert written == [(PAGE - 2, b"ab"), (2 * PAGE, b"cd")]
    assert bytes(mapping.view[PAGE : 2 * PAGE]) == b"m" * PAGE
    with pytest.raises(AnswerLater) as asked:
        bar.read(PAGE - 2, PAGE + 4)
    for number, hold in enumerate(holds):
        assert (taken.value.hold.done, asked.value.hold.done) == (number >= 2, False)
        hold.finish()
    assert asked.value.hold.done
    assert asked.value.data == b"\0\0" + b"m" * PAGE + b"\2\2"
    mapping.close()


def test_a_client_can_neither_shrink_nor_grow_it(frames: Frames) -> None:
    """Either way of access to a page that is not there any more would be a SIGBUS."""
    fd = os.dup(frames.function.region_info(2).fds[0])
    for size in (0, PAGE, SIZE - 1, SIZE + 1, 2 * SIZE):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    with pytest.raises(PermissionError):
        os.posix_fallocate(fd, 0, SIZE + PAGE)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, 1033, 0x0008)  # F_SEAL_WRITE would end the device's own mapping of the next client
    os.close(fd)


@pytest.mark.parametrize("kept", [True, False])
def test_the_next_client_has_memory_of_its_own(kept: bool) -> None:
    frames = Frames(kept=kept)
    view = frames.mapping.view
    frames.function.connected(Client())
    view[PAGE : PAGE + 4] = b"kept"
    old = os.dup(frames.function.region_info(2).fds[0])
    os.pwrite(old, b"old!", 4 * PAGE)
    frames.function.disconnected()
    frames.function.connected(Client())
    new = frames.function.region_info(2).fds[0]
    expected = (b"kept", b"old!") if kept else (bytes(4), bytes(4))
    assert (bytes(view[PAGE : PAGE + 4]), bytes(view[4 * PAGE : 4 * PAGE + 4])) == expected
    os.pwrite(old, b"evil", PAGE)
    assert os.pread(new, 4, PAGE) == expected[0]
    view[PAGE : PAGE + 4] = b"next"
    assert (os.pread(old, 4, PAGE), os.pread(new, 4, PAGE)) == (b"evil", b"next")
    os.close(old)
    frames.function.disconnected()
    frames.mapping.close()


def test_a_client_that_maps_nothing_costs_no_copy_and_none_leaves_a_descriptor() -> None:
    before = open_fds()
    frames = Frames()
    first = frames.mapping.fd
    for _ in range(3):
        frames.function.connected(Client())
        frames.function.disconnected()
    assert frames.mapping.fd == first
    assert os.fstat(first).st_blocks == 0, "its pages are had when they are written"
    for _ in range(3):
        frames.function.connected(Client())
        frames.function.region_info(2)
        frames.function.disconnected()
    assert len(open_fds() - before) == 1
    del frames
    gc.collect()
    assert open_fds() == before


def test_no_client_comes_where_the_last_one_cannot_be_shut_out(frames: Frames, monkeypatch: pytest.MonkeyPatch) -> None:
    frames.mapping.view[PAGE : PAGE + 4] = b"kept"
    frames.function.region_info(2)
    frames.function.disconnected()

    def refuse(*_: object) -> int:
        raise OSError(errno.EMFILE, "Too many open files")

    with monkeypatch.context() as patched:
        patched.setattr(os, "memfd_create", refuse)
        with pytest.raises(PeerError, match=r"BAR 2: the client before has mapped it.*Too many open files") as error:
            frames.function.connected(Client())
        assert error.value.errno == errno.EMFILE
    frames.function.connected(Client())
    assert bytes(frames.mapping.view[PAGE : PAGE + 4]) == b"kept"


@asynccontextmanager
async def mapped(frames: Frames, tmp_path: Path) -> AsyncIterator[VfioUserClient]:
    path = tmp_path / "bar.sock"
    with trio.fail_after(60), listen_path(path) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Server(frames.function).serve, listener)
            async with connect(path) as client:
                yield client
            nursery.cancel_scope.cancel()


async def test_our_client_maps_and_trapped_pages_stay_messages(tmp_path: Path) -> None:
    frames = Frames()
    async with mapped(frames, tmp_path) as client:
        first = await client.bar_map(2, PAGE, PAGE)
        second = await client.bar_map(2, 4 * PAGE + 8, 16)
        first[:5] = b"hello"
        frames.mapping.view[4 * PAGE + 8 : 4 * PAGE + 13] = b"world"
        assert (bytes(frames.mapping.view[PAGE : PAGE + 5]), bytes(second[:5])) == (b"hello", b"world")
        assert await client.region_read(2, PAGE - 2, 7) == b"\0\0hello"
        assert frames.trapped_accesses == [("read", PAGE - 2, 2)]
        for offset, size in ((0, PAGE), (PAGE, PAGE + 1), (2 * PAGE - 1, 2), (SIZE, 1), (PAGE, 0)):
            with pytest.raises(PeerError, match="cannot be mapped") as error:
                await client.bar_map(2, offset, size)
            assert error.value.errno == errno.EOPNOTSUPP
        with pytest.raises(PeerError, match="cannot be mapped"):
            await client.bar_map(7, 0, PAGE)
    assert bytes(first[:5]) == b"hello", "mapped for as long as there is a view"


async def test_a_file_that_is_shorter_than_its_region_is_not_mapped(tmp_path: Path) -> None:
    memfd = os.memfd_create("short")
    os.ftruncate(memfd, PAGE)
    short = RegionInfo(RegionFlags.READ | RegionFlags.WRITE | RegionFlags.MMAP, SIZE, fds=(memfd,))
    frames = Frames(areas=None)
    frames.function.shown = short
    async with mapped(frames, tmp_path) as client:
        await client.bar_map(2, 0, PAGE)
        with pytest.raises(PeerError, match="its file ends at 0x1000") as error:
            await client.bar_map(2, PAGE, 1)
        assert error.value.errno == errno.EPROTO
    os.close(memfd)
