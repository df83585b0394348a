"""Disks in a file and in RAM: the same contents by the same operations, at once or with patience."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import trio

from vfiouser_virtio.backends import file as file_module
from vfiouser_virtio.backends import vectored
from vfiouser_virtio.backends.block import BlockBackend
from vfiouser_virtio.backends.file import FileBackend
from vfiouser_virtio.backends.ram import RamBackend
from vfiouser_virtio.errors import DeviceError
from vfiouser_virtio.pieces import Pieces

SIZE = 1 << 20


def _image(folder: Path, size: int = SIZE) -> Path:
    path = folder / "disk.img"
    path.write_bytes(os.urandom(size))
    return path


@pytest.fixture(params=["file", "ram", "tmpfs"])
def backend(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[BlockBackend]:
    made: BlockBackend
    if request.param == "ram":
        made = RamBackend(SIZE, os.urandom(SIZE))
    elif request.param == "file":
        made = FileBackend(_image(tmp_path))
    else:
        # A memfd is a file of tmpfs, which knows neither RWF_NOWAIT nor ZERO_RANGE.
        fd = os.memfd_create("disk")
        os.write(fd, os.urandom(SIZE))
        made = FileBackend(Path(f"/proc/self/fd/{fd}"))
        os.close(fd)
    yield made
    made.close()


async def _read(backend: BlockBackend, offset: int, *lengths: int) -> bytes:
    segments = [memoryview(bytearray(length)) for length in lengths]
    if not backend.read_nowait(offset, segments):
        await backend.read(offset, segments)
    return b"".join(segments)


async def _write(backend: BlockBackend, offset: int, *parts: bytes) -> None:
    segments = [memoryview(part) for part in parts]
    if not backend.write_nowait(offset, segments):
        await backend.write(offset, segments)


async def test_write_and_read(backend: BlockBackend) -> None:
    await _write(backend, 512, b"abc", b"", b"de" * 1000)
    assert await _read(backend, 512, 1, 2002) == b"abc" + b"de" * 1000
    if not backend.flush_nowait():
        await backend.flush()


async def test_patient_operations(backend: BlockBackend) -> None:
    data = os.urandom(SIZE)
    await backend.write(0, [memoryview(data)[:1], memoryview(data)[1:]])
    await backend.flush()
    target = memoryview(bytearray(SIZE))
    await backend.read(0, [target[:77777], target[77777:]])
    assert bytes(target) == data


async def test_more_segments_than_one_call_takes(backend: BlockBackend) -> None:
    data = os.urandom(3000 * 16)
    parts = [data[at : at + 16] for at in range(0, len(data), 16)]
    await _write(backend, 4096, *parts)
    assert await _read(backend, 4096, *[16] * 3000) == data


@pytest.mark.parametrize("unmap", [False, True])
@pytest.mark.parametrize(("offset", "length"), [(0, SIZE), (512, 512), (3584, 8704), (4096, 8192), (1 << 19, 1 << 19)])
async def test_write_zeroes(backend: BlockBackend, offset: int, length: int, unmap: bool) -> None:
    before = await _read(backend, 0, SIZE)
    if not backend.write_zeroes_nowait(offset, length, unmap):
        await backend.write_zeroes(offset, length, unmap)
    assert await _read(backend, 0, SIZE) == before[:offset] + bytes(length) + before[offset + length :]
    assert backend.size == SIZE


async def test_discard_touches_nothing_else(backend: BlockBackend) -> None:
    before = await _read(backend, 0, SIZE)
    ranges = [(8192, 4096), (512, 1024)]
    if not backend.discard_nowait(ranges):
        await backend.discard(ranges)
    after = await _read(backend, 0, SIZE)
    assert after[:512] + after[1536:8192] + after[12288:] == before[:512] + before[1536:8192] + before[12288:]


async def test_discard_frees_space_of_the_host(tmp_path: Path) -> None:
    path = _image(tmp_path)
    backend = FileBackend(path)
    assert backend.can_discard
    await backend.flush()
    before = path.stat().st_blocks
    await backend.discard([(0, SIZE)])
    assert path.stat().st_blocks < before
    assert path.stat().st_size == SIZE
    backend.close()


async def test_resize(backend: BlockBackend) -> None:
    before = await _read(backend, 0, SIZE)
    await backend.resize(SIZE // 2 + 512)
    await backend.resize(2 * SIZE)
    assert backend.size == 2 * SIZE
    kept = SIZE // 2 + 512
    assert await _read(backend, 0, 2 * SIZE) == before[:kept] + bytes(2 * SIZE - kept)


async def test_growth_from_outside_is_seen_by_refresh(tmp_path: Path) -> None:
    path = _image(tmp_path)
    backend = FileBackend(path)
    os.truncate(path, 2 * SIZE)
    assert backend.size == SIZE
    assert await backend.refresh() == backend.size == 2 * SIZE
    backend.close()


async def test_a_file_that_was_cut_is_an_error(tmp_path: Path) -> None:
    path = _image(tmp_path)
    backend = FileBackend(path)
    os.truncate(path, SIZE // 2)
    with pytest.raises(OSError, match="cut from outside") as caught:
        await _read(backend, SIZE // 2 - 512, 1024)
    assert caught.value.errno == errno.EIO
    backend.close()


def _backwards(memory: memoryview) -> Pieces:
    """All of it in sectors, the last one first."""
    starts = list(range(0, len(memory), 512))[::-1]
    return Pieces(memory, starts, [512] * len(starts))


async def test_pieces_are_segments(backend: BlockBackend) -> None:
    data = os.urandom(20 * 512)
    source = _backwards(memoryview(data))
    target = memoryview(bytearray(len(data)))
    await backend.write(1024, source)
    assert await _read(backend, 1024, len(data)) == b"".join(source)
    await backend.read(1024, _backwards(target))
    assert target == data
    target[:] = bytes(len(data))
    assert not backend.read_nowait(1024, _backwards(target)) or target == data


def test_pieces_at_once(tmp_path: Path) -> None:
    path = _image(tmp_path)
    backend = FileBackend(path, aio="inline")
    data = os.urandom(20 * 512)
    assert backend.write_nowait(1024, _backwards(memoryview(data)))
    assert path.read_bytes()[1024:][: len(data)] == b"".join(_backwards(memoryview(data)))
    backend.close()
    target = memoryview(bytearray(len(data)))
    with path.open("rb") as file:
        assert vectored.preadv(file.fileno(), _backwards(target), 1024) == len(data)
        assert target == data
        with pytest.raises(OSError, match="Bad file descriptor"):
            vectored.pwritev(file.fileno(), _backwards(target), 0)


async def test_what_is_not_cached_is_left_to_a_thread(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def short(fd: int, segments: object, offset: int, flags: int = 0) -> int:
        assert flags == os.RWF_NOWAIT
        return 512

    def miss(fd: int, segments: object, offset: int, flags: int = 0) -> int:
        raise BlockingIOError(errno.EAGAIN, "not cached")

    monkeypatch.setattr(file_module, "keeps_nowait", lambda _: True)
    buffer = memoryview(bytearray(4096))
    for call in (short, miss):
        monkeypatch.setattr(file_module, "preadv", call)
        backend = FileBackend(_image(tmp_path))
        assert not backend.read_nowait(0, [buffer])
        assert not backend.read_nowait(0, [memoryview(bytearray(file_module.AT_ONCE + 1))])
        backend.close()


async def test_short_transfers_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _image(tmp_path)
    backend = FileBackend(path)
    module: Any = file_module
    preadv, pwritev = module.preadv, module.pwritev
    calls: list[int] = []

    def little(call: Callable[..., int]) -> Callable[..., int]:
        # 700 bytes at a time: ends inside of segments, and between them.
        def some(fd: int, segments: list[memoryview], offset: int) -> int:
            calls.append(offset)
            return call(fd, [segments[0][:700]], offset)

        return some

    monkeypatch.setattr(file_module, "preadv", little(preadv))
    monkeypatch.setattr(file_module, "pwritev", little(pwritev))
    data = os.urandom(5000)
    await backend.write(1024, [memoryview(data)[:1400], memoryview(data)[1400:]])
    assert path.read_bytes()[1024:6024] == data
    target = [memoryview(bytearray(10)), memoryview(bytearray(4990))]
    await backend.read(1024, target)
    assert b"".join(target) == data
    assert len(calls) == 8 + 9
    backend.close()


async def test_zeros_are_written_where_fallocate_knows_nothing(
    backend: BlockBackend, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fallocate(_fd: int, mode: int, _offset: int, _length: int) -> None:
        modes.append(mode)
        raise OSError(errno.EOPNOTSUPP, "not supported")

    modes: list[int] = []
    monkeypatch.setattr(file_module, "fallocate", fallocate)
    await backend.write_zeroes(512, SIZE - 1024, True)
    assert await _read(backend, 512, SIZE - 1024) == bytes(SIZE - 1024)
    assert any(await _read(backend, 0, 512))


@pytest.mark.parametrize("first_readonly", [False, True])
@pytest.mark.parametrize("second_readonly", [False, True])
def test_one_writer_or_many_readers(tmp_path: Path, first_readonly: bool, second_readonly: bool) -> None:
    path = _image(tmp_path)
    first = FileBackend(path, readonly=first_readonly)
    if first_readonly and second_readonly:
        FileBackend(path, readonly=True).close()
    else:
        with pytest.raises(DeviceError, match="in use"):
            FileBackend(path, readonly=second_readonly)
    first.close()
    FileBackend(path).close()


def test_what_is_no_disk(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "fifo")
    for name, message in (
        ("nothing", "no such file"),
        ("empty", "truncate -s"),
        ("fifo", "neither a regular file nor a block device"),
        (".", "directory"),
        ("/proc/self/mem", "^/proc/self/mem cannot be read as a disk: Invalid argument"),
    ):
        with pytest.raises(DeviceError, match=message) as caught:
            FileBackend(tmp_path / name, readonly=name in ("fifo", "/proc/self/mem"))
        assert "\n" not in str(caught.value)


async def test_failed_disks_leak_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    path = _image(tmp_path)
    holder = FileBackend(path)
    before = os.listdir("/proc/self/fd")
    for name in ("empty", "disk.img", "."):
        with pytest.raises(DeviceError):
            FileBackend(tmp_path / name)
    assert os.listdir("/proc/self/fd") == before
    holder.close()


async def test_large_ram_requests_let_others_run() -> None:
    backend = RamBackend(64 << 20)
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await trio.lowlevel.checkpoint()

    data = memoryview(os.urandom(32 << 20))
    assert not backend.write_nowait(0, [data])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(count)
        await backend.write(0, [data])
        nursery.cancel_scope.cancel()
    assert turns >= 4
    assert await _read(backend, 0, len(data)) == data
    backend.close()


async def test_a_discard_of_many_ranges_of_ram_lets_others_run() -> None:
    """16 of 32 MiB each took 33 ms in one go."""
    backend = RamBackend(32 << 20, b"x" * 8192)
    assert not backend.discard_nowait([(0, 32 << 20), (0, 512)])
    assert await _read(backend, 0, 1) == b"x"
    assert backend.discard_nowait([(4096, 16 << 20), (0, 16 << 20)])
    assert await _read(backend, 0, 8192) == bytes(8192)
    backend.close()


def test_ram_content_must_fit() -> None:
    with pytest.raises(DeviceError):
        RamBackend(512, bytes(513))
    with pytest.raises(DeviceError):
        RamBackend(1 << 62)
