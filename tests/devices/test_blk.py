"""The block device as a driver sees it, over shared and private memory; data is checked on the host's side."""

import errno
import fcntl
import logging
import os
import struct
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from vfiouser_virtio.backends import file
from vfiouser_virtio.backends.block import Range, Segments
from vfiouser_virtio.backends.file import Aio, FileBackend
from vfiouser_virtio.backends.io_uring import IoUring
from vfiouser_virtio.backends.ram import RamBackend
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.blk_requests import MAX_DISCARD_SEGMENTS, MAX_RANGE_SECTORS
from vfiouser_virtio.errors import DeviceError
from vfiouser_virtio.protocols.virtio import blk
from vfiouser_virtio.protocols.virtio.blk import BlkFeature
from vfiouser_virtio.testing.driver import RAM_BASE, DeviceNeedsReset, Driver, Used, running
from vfiouser_virtio.testing.raw.ring import WRITE
from vfiouser_virtio.virtio.options import Duration, Size

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, SECURE_ERASE = 0, 1, 4, 8, 11, 13, 14
OK, IOERR, UNSUPP = 0, 1, 2
SIZE = 1 << 20
SECTORS = SIZE // 512

both_memories = pytest.mark.parametrize("private", [False, True], ids=["shared", "private"])


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "disk.img"
    path.write_bytes(os.urandom(SIZE))
    return path


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, sectors, flags)


def status(used: Used) -> int:
    return used.data[-1][-1]


class Recorder(RamBackend):
    """A RAM disk that tells what it was asked for, and can be made to fail or to take its time."""

    def __init__(self, size: int = SIZE, *, readonly: bool = False) -> None:
        super().__init__(size, readonly=readonly)
        self.calls: list[str] = []
        self.fail: OSError | None = None
        self.gate: trio.Event | None = None

    async def _enter(self, name: str) -> None:
        self.calls.append(name)
        if self.gate is not None:
            await self.gate.wait()
        if self.fail is not None:
            raise self.fail

    def read_nowait(self, offset: int, segments: Segments) -> bool:
        return False

    async def read(self, offset: int, segments: Segments) -> None:
        await self._enter("read")
        super().read_nowait(offset, segments)

    def write_nowait(self, offset: int, segments: Segments) -> bool:
        return False

    async def write(self, offset: int, segments: Segments) -> None:
        await self._enter("write")
        super().write_nowait(offset, segments)

    def flush_nowait(self) -> bool:
        return False

    async def flush(self) -> None:
        await self._enter("flush")

    def discard_nowait(self, ranges: Sequence[Range]) -> bool:
        self.calls.append("discard")
        return True

    def write_zeroes_nowait(self, offset: int, length: int, unmap: bool) -> bool:
        self.calls.append(f"write zeroes, unmap {unmap}")
        return super().write_zeroes_nowait(offset, length, unmap)


# ---- data ----------------------------------------------------------------------------------------------------------


@both_memories
@pytest.mark.parametrize("indirect", [False, True])
@pytest.mark.parametrize("medium", ["file", "ram"])
async def test_write_then_read(image: Path, private: bool, indirect: bool, medium: str) -> None:
    device = Blk(path=image) if medium == "file" else Blk(size=Size(SIZE))
    data = os.urandom(8192)
    async with running(device, private=private) as driver:
        used = await driver.request([header(OUT, 3), data[:5000], data[5000:]], [1], indirect=indirect)
        assert (status(used), used.written) == (OK, 1)
        used = await driver.request([header(FLUSH)], [1])
        assert (status(used), used.written) == (OK, 1)
        if medium == "file":
            assert image.read_bytes()[1536 : 1536 + 8192] == data
        for sizes in ([8192, 1], [8193], [100, 8091, 2], [4096, 4096, 1]):
            used = await driver.request([header(IN, 3)], sizes, indirect=indirect)
            assert (status(used), used.written) == (OK, 8193)
            assert b"".join(used.data)[:-1] == data
    if medium == "file":
        assert image.stat().st_size == SIZE


@both_memories
async def test_framing_means_nothing(image: Path, private: bool) -> None:
    """2.7.4.1: the header in descriptors of one byte, data in the header's last one, the status behind the data."""
    data = os.urandom(512)
    async with running(Blk(path=image), private=private) as driver:
        request = header(OUT, 7) + data
        used = await driver.request([*(bytes([byte]) for byte in request[:15]), request[15:]], [1])
        assert (status(used), used.written) == (OK, 1)
        assert image.read_bytes()[7 * 512 :][:512] == data
        used = await driver.request([bytes([byte]) for byte in header(IN, 7)], [513])
        assert (used.data[0], used.written) == (data + b"\0", 513)
        # Empty descriptors anywhere.
        used = await driver.request([b"", header(IN, 7), b""], [0, 512, 0, 1])
        assert (used.data[1], status(used), used.written) == (data, OK, 513)


async def test_reads_give_each_request_its_own_data(image: Path) -> None:
    """Many at once, cached or not, over several queues: nothing is mixed up, and every request comes back."""
    content = image.read_bytes()
    async with running(Blk(path=image, num_queues=4)) as driver:
        with image.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, SIZE, os.POSIX_FADV_DONTNEED)
        for turn in range(20):
            tokens = []
            for number in range(48):
                sector = (turn * 131 + number * 37) % (SECTORS - 8)
                tokens.append((number % 4, sector, driver.add(number % 4, [header(IN, sector)], [4096, 1])))
            for queue in range(4):
                driver.kick(queue)
            for queue, sector, token in tokens:
                used = await driver.wait(queue, token)
                assert (status(used), used.data[0]) == (OK, content[sector * 512 :][:4096])


async def test_writes_of_a_burst_all_arrive(image: Path) -> None:
    pieces = [os.urandom(4096) for _ in range(60)]
    async with running(Blk(path=image)) as driver:
        tokens = [driver.add(0, [header(OUT, 8 * at), piece], [1]) for at, piece in enumerate(pieces)]
        driver.kick(0)
        for token in tokens:
            assert status(await driver.wait(0, token)) == OK
    assert image.read_bytes()[: 60 * 4096] == b"".join(pieces)


@both_memories
async def test_get_id(private: bool) -> None:
    async with running(Blk(size=Size(SIZE), serial="disk-0815"), private=private) as driver:
        used = await driver.request([header(GET_ID)], [20, 1])
        assert (used.data[0], status(used), used.written) == (b"disk-0815".ljust(20, b"\0"), OK, 21)
        # Room for less; room for more, where there is a gap in front of the status.
        used = await driver.request([header(GET_ID)], [4, 1])
        assert (used.data[0], status(used), used.written) == (b"disk", OK, 5)
        used = await driver.request([header(GET_ID)], [100, 1])
        assert (used.data[0][:9], status(used), used.written) == (b"disk-0815", OK, 20)


@both_memories
@pytest.mark.parametrize("flags", [0, 1])
async def test_write_zeroes(image: Path, private: bool, flags: int) -> None:
    before = image.read_bytes()
    async with running(Blk(path=image), private=private) as driver:
        used = await driver.request([header(WRITE_ZEROES), segment(3, 24, flags)], [1])
        assert (status(used), used.written) == (OK, 1)
        used = await driver.request([header(IN, 3)], [24 * 512, 1])
        assert used.data[0] == bytes(24 * 512)
    assert image.read_bytes() == before[:1536] + bytes(24 * 512) + before[27 * 512 :]


async def test_discard_frees_the_file_s_blocks(image: Path) -> None:
    async with running(Blk(path=image)) as driver:
        await driver.request([header(FLUSH)], [1])
        blocks = image.stat().st_blocks
        used = await driver.request([header(DISCARD), segment(0, 64), segment(1024, 1024)], [1])
        assert (status(used), used.written) == (OK, 1)
        assert image.stat().st_blocks < blocks
        assert image.stat().st_size == SIZE


# ---- what must not be done -----------------------------------------------------------------------------------------


@both_memories
@pytest.mark.parametrize(
    ("out", "room", "expected"),
    [
        ([header(IN, SECTORS)], 512, IOERR),
        ([header(IN, SECTORS - 1)], 1024, IOERR),
        ([header(IN, (1 << 64) - 1)], 512, IOERR),
        ([header(IN, (1 << 64) - 1)], 1024, IOERR),
        ([header(IN, 1 << 55)], 512, IOERR),
        ([header(IN)], 511, IOERR),
        ([header(IN)], 513, IOERR),
        ([header(OUT, SECTORS - 1), bytes(1024)], 0, IOERR),
        ([header(OUT), bytes(700)], 0, IOERR),
        ([header(DISCARD)], 0, IOERR),
        ([header(DISCARD), segment(0, 8)[:-1]], 0, IOERR),
        ([header(DISCARD), segment(0, 8) + b"\0"], 0, IOERR),
        ([header(DISCARD), segment(SECTORS, 1)], 0, IOERR),
        ([header(DISCARD), segment((1 << 64) - 1, 1)], 0, IOERR),
        ([header(DISCARD), segment(0, 8), segment(SECTORS - 4, 8)], 0, IOERR),
        ([header(DISCARD), segment(0, MAX_RANGE_SECTORS + 1)], 0, IOERR),
        ([header(DISCARD), segment(0, 1) * (MAX_DISCARD_SEGMENTS + 1)], 0, IOERR),
        ([header(DISCARD), segment(0, 8, flags=1)], 0, UNSUPP),
        ([header(DISCARD), segment(0, 8), segment(0, 8, flags=1 << 31)], 0, UNSUPP),
        ([header(WRITE_ZEROES), segment(0, 8, flags=2)], 0, UNSUPP),
        ([header(WRITE_ZEROES), segment(0, 8, flags=3)], 0, UNSUPP),
        ([header(WRITE_ZEROES), segment(0, 8), segment(8, 8)], 0, IOERR),
        ([header(WRITE_ZEROES), segment(SECTORS - 1, 2)], 0, IOERR),
        ([header(SECURE_ERASE), segment(0, 8)], 0, UNSUPP),
        ([header(2)], 0, UNSUPP),
        ([header(15), bytes(512)], 0, UNSUPP),
        ([header(0xFFFF_FFFF)], 512, UNSUPP),
    ],
)
async def test_refused(image: Path, private: bool, out: list[bytes], room: int, expected: int) -> None:
    before = image.read_bytes()
    async with running(Blk(path=image), private=private) as driver:
        used = await driver.request(out, [room, 1] if room else [1])
        assert status(used) == expected
        # Only what was really written counts (2.7.8.2), so that a driver never takes old bytes for data.
        assert used.written == (0 if room else 1)
        assert status(await driver.request([header(IN)], [512, 1])) == OK
    assert image.read_bytes() == before


async def test_no_data_is_a_request_too(image: Path) -> None:
    async with running(Blk(path=image)) as driver:
        for kind in (IN, OUT):
            used = await driver.request([header(kind, SECTORS)], [1])
            assert (status(used), used.written) == (OK, 1)


@both_memories
@pytest.mark.parametrize(
    ("out", "in_"),
    [([], [1]), ([header(IN)[:-1]], [512, 1]), ([header(IN)], []), ([header(OUT), bytes(512)], []), ([], [16, 512, 1])],
    ids=["no header", "short header", "no status", "write without status", "header where we write"],
)
async def test_broken_requests_need_a_reset(private: bool, out: list[bytes], in_: list[int]) -> None:
    async with running(Blk(size=Size(SIZE)), private=private) as driver:
        with pytest.raises(DeviceNeedsReset):
            await driver.request(out, in_)
        assert driver.config_interrupts == 1
        await driver.reset()
        driver.probe()
        assert status(await driver.request([header(IN)], [512, 1])) == OK


@both_memories
async def test_read_only(image: Path, private: bool) -> None:
    before = image.read_bytes()
    image.chmod(0o444)
    async with running(Blk(path=image, readonly=True), private=private) as driver:
        assert driver.offered & BlkFeature.RO.mask
        assert not driver.offered & (BlkFeature.DISCARD.mask | BlkFeature.WRITE_ZEROES.mask)
        used = await driver.request([header(OUT), bytes(512)], [1])
        assert (status(used), used.written) == (IOERR, 1)
        assert status(await driver.request([header(DISCARD), segment(0, 8)], [1])) == UNSUPP
        assert status(await driver.request([header(WRITE_ZEROES), segment(0, 8)], [1])) == UNSUPP
        assert status(await driver.request([header(FLUSH)], [1])) == OK
        assert (await driver.request([header(IN)], [512, 1])).data[0] == before[:512]
    assert image.read_bytes() == before


# ---- the write cache (5.2.6.2) ---------------------------------------------------------------------------------------

WCE_OFFSET = 32


@pytest.mark.parametrize(
    ("features", "writeback", "stable"),
    [
        (BlkFeature.FLUSH.mask | BlkFeature.CONFIG_WCE.mask, True, False),
        (BlkFeature.FLUSH.mask | BlkFeature.CONFIG_WCE.mask, False, True),
        (BlkFeature.FLUSH.mask, True, False),
        (BlkFeature.FLUSH.mask, False, True),
        (BlkFeature.CONFIG_WCE.mask, True, True),
        (0, True, True),
    ],
)
@pytest.mark.parametrize("write", [[header(OUT), bytes(512)], [header(WRITE_ZEROES), segment(0, 1)]])
async def test_stable_writes_are_flushed(features: int, writeback: bool, stable: bool, write: list[bytes]) -> None:
    backend = Recorder()
    async with running(Blk(backend=backend, writeback=writeback), features=features) as driver:
        assert status(await driver.request(write, [1])) == OK
        assert (backend.calls[-1] == "flush") is stable
        backend.calls.clear()
        await driver.request([header(IN)], [512, 1])
        assert backend.calls == ["read"]
        await driver.request([header(FLUSH)], [1])
        assert backend.calls == ["read", "flush"]


async def test_the_driver_switches_the_cache() -> None:
    backend = Recorder()
    async with running(Blk(backend=backend)) as driver:
        for value, calls in ((0, ["write", "flush"]), (1, ["write"])):
            driver.core.write_config(WCE_OFFSET, bytes([value]))
            assert driver.config(WCE_OFFSET, 1) == value
            backend.calls.clear()
            assert status(await driver.request([header(OUT), bytes(512)], [1])) == OK
            assert backend.calls == calls
        driver.core.write_config(WCE_OFFSET, b"\0")
        await driver.reset()
        assert driver.config(WCE_OFFSET, 1) == 1
        assert not driver.config_interrupts


async def test_nothing_else_in_the_configuration_can_be_written() -> None:
    async with running(Blk(size=Size(SIZE)), features=BlkFeature.FLUSH.mask) as driver:
        before = driver.core.read_config(0, 96)
        driver.core.write_config(0, b"\xff" * 96)
        driver.core.write_config(WCE_OFFSET, b"\0")  # not negotiated
        assert driver.core.read_config(0, 96) == before


# ---- failures and delays of the host ---------------------------------------------------------------------------------


@both_memories
async def test_errors_of_the_host(private: bool, caplog: pytest.LogCaptureFixture) -> None:
    backend = Recorder()
    async with running(Blk(backend=backend), private=private) as driver:
        backend.fail = OSError(errno.EIO, "the disk is on fire")
        for out, room in (([header(IN, 8)], 512), ([header(OUT, 8), bytes(512)], 0), ([header(FLUSH)], 0)) * 2:
            used = await driver.request(out, [room, 1] if room else [1])
            assert (status(used), used.written) == (IOERR, 0 if room else 1)
        errors = [record.getMessage() for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 3
        assert "EIO" in errors[0]
        assert "IN at offset 0x1000" in errors[0]
        backend.fail = None
        assert status(await driver.request([header(IN)], [512, 1])) == OK


async def test_a_write_that_cannot_be_made_stable_fails() -> None:
    backend = Recorder()

    async def no_flush() -> None:
        raise OSError(errno.EIO, "no flush")

    backend.flush = no_flush  # one failure among operations that work
    async with running(Blk(backend=backend, writeback=False)) as driver:
        assert status(await driver.request([header(OUT), bytes(512)], [1])) == IOERR


@both_memories
async def test_a_cut_file_is_an_error_of_the_host(image: Path, private: bool) -> None:
    device = Blk(path=image)
    device.refresh = trio.lowlevel.checkpoint  # the watch must not be faster
    async with running(device, private=private) as driver:
        os.truncate(image, 512)
        used = await driver.request([header(IN, 0)], [1024, 1])
        assert (status(used), used.written) == (IOERR, 0)


async def test_a_slow_request_holds_up_nothing() -> None:
    """Others of its queue, of other queues and of other devices overtake it."""
    backend = Recorder()
    async with running(Blk(backend=backend, num_queues=2)) as slow, running(Blk(size=Size(SIZE))) as other:
        backend.gate = gate = trio.Event()
        stuck = [slow.add(queue, [header(IN)], [512, 1]) for queue in (0, 1) for _ in range(20)]
        slow.kick(0)
        slow.kick(1)
        await trio.testing.wait_all_tasks_blocked()
        backend.gate = None
        for queue in (0, 1):
            assert status(await slow.request([header(IN)], [512, 1], queue=queue)) == OK
            assert status(await slow.request([header(GET_ID)], [20, 1], queue=queue)) == OK
        assert status(await other.request([header(OUT), bytes(512)], [1])) == OK
        assert slow.core.read_config(0, 8) == struct.pack("<Q", SECTORS)
        assert not any(slow.is_used(number // 20, token) for number, token in enumerate(stuck))
        gate.set()
        for number, token in enumerate(stuck):
            assert status(await slow.wait(number // 20, token)) == OK


async def test_delay(autojump_clock: trio.testing.MockClock) -> None:
    async with running(Blk(size=Size(SIZE), delay=Duration(2.0))) as driver:
        start = trio.current_time()
        tokens = [driver.add(0, [header(IN, number)], [512, 1]) for number in range(10)]
        driver.kick(0)
        for token in tokens:
            assert status(await driver.wait(0, token)) == OK
        assert 2.0 <= trio.current_time() - start < 2.5


# ---- resets and memory that goes away --------------------------------------------------------------------------------


async def _stuck(driver: Driver, backend: Recorder, out: list[bytes], in_: list[int]) -> tuple[int, trio.Event]:
    backend.gate = trio.Event()
    token = driver.add(0, out, in_)
    driver.kick(0)
    await trio.testing.wait_all_tasks_blocked()
    assert backend.calls
    return token, backend.gate


@both_memories
async def test_reset_with_requests_under_way(private: bool) -> None:
    backend = Recorder()
    async with running(Blk(backend=backend), private=private) as driver:
        await _stuck(driver, backend, [header(IN)], [512, 1])
        await driver.reset()
        backend.gate = None
        driver.probe()
        assert status(await driver.request([header(IN)], [512, 1])) == OK


def without_io_uring(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a container's seccomp filter does."""

    def refused(*, never_inline: bool) -> IoUring:
        raise PermissionError(errno.EPERM, "io_uring_setup")

    monkeypatch.setattr(file, "IoUring", refused)


async def test_reset_waits_for_system_calls_under_way(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """RS2: the reset is complete only when the kernel can no longer touch the buffers."""
    without_io_uring(monkeypatch)
    begun, gate = threading.Event(), threading.Event()
    fdatasync = os.fdatasync

    def slow(fd: int) -> None:
        begun.set()
        gate.wait(10)
        fdatasync(fd)

    monkeypatch.setattr(os, "fdatasync", slow)
    async with running(Blk(path=image)) as driver:
        driver.add(0, [header(FLUSH)], [1])
        driver.kick(0)
        while not begun.is_set():
            await trio.sleep(0.001)
        hold = driver.core.write_status(0)
        assert hold is not None
        await trio.sleep(0.02)
        assert not hold.done
        assert driver.status
        gate.set()
        done = trio.Event()
        hold.when_done(done.set)
        with trio.fail_after(60):
            await done.wait()
        assert driver.status == 0
        driver.probe()
        assert status(await driver.request([header(IN)], [512, 1])) == OK


@pytest.mark.parametrize("what", ["reset", "unmap"])
async def test_io_uring_requests_under_way_are_waited_for(
    image: Path, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """The same where no task of ours does the request: what the kernel has not ended holds the reset, or the unmap."""
    slow = threading.Event()
    reap = IoUring.reap
    monkeypatch.setattr(IoUring, "reap", lambda ring: reap(ring) if slow.is_set() else time.sleep(0.001))
    before = image.read_bytes()[:4096]
    async with running(Blk(path=image)) as driver:
        driver.add(0, [header(OUT), b"\x55" * 4096], [1])
        driver.kick(0)
        with trio.fail_after(60):
            while not driver.core.queues[0].at_work:
                await trio.sleep(0.001)
        hold = driver.core.write_status(0) if what == "reset" else driver.ram.unmap()
        assert hold is not None
        await trio.sleep(0.02)
        assert not hold.done
        slow.set()
        done = trio.Event()
        hold.when_done(done.set)
        with trio.fail_after(60):
            await done.wait()
        if what == "unmap":
            driver.ram.map()
        else:
            assert driver.status == 0
            driver.probe()
        used = await driver.request([header(IN)], [4096, 1])
        assert status(used) == OK
        # A reset gives the request up: that may have come before the kernel has begun it.
        assert used.data[0] == b"\x55" * 4096 or (what == "reset" and used.data[0] == before)


@pytest.mark.parametrize("aio", ["io_uring", "threads", "inline"])
@pytest.mark.parametrize("pieces", [1, 30])
async def test_each_way_of_doing_what_may_block(image: Path, aio: Aio, pieces: int) -> None:
    data = [os.urandom(512 * (1 + number % 3)) for number in range(pieces)]
    length = sum(map(len, data))
    async with running(Blk(path=image, aio=aio)) as driver:
        assert status(await driver.request([header(OUT, 7), *data], [1])) == OK
        assert status(await driver.request([header(FLUSH)], [1])) == OK
        used = await driver.request([header(IN, 7)], [*map(len, data), 1])
        assert (status(used), b"".join(used.data[:-1])) == (OK, b"".join(data))
    assert image.read_bytes()[7 * 512 : 7 * 512 + length] == b"".join(data)


@pytest.mark.parametrize("aio", ["io_uring", "threads", "inline"])
@pytest.mark.parametrize("first", [512, 8, 1], ids=["aligned", "half-aligned", "unaligned"])
async def test_past_the_page_cache(image: Path, aio: Aio, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However the guest's buffers lie; the last one is larger than what is copied at a time."""
    os.truncate(image, 4 << 20)
    data = os.urandom(file._BOUNCE + 512)
    parts = [data[:first], data[first:1024], data[1024:]]
    copies: list[int] = []
    transfer_copies = FileBackend._transfer_copies

    def counted(backend: FileBackend, call: Callable[..., int], offset: int, left: list[memoryview]) -> None:
        copies.append(offset)
        transfer_copies(backend, call, offset, left)

    monkeypatch.setattr(FileBackend, "_transfer_copies", counted)
    device = Blk(path=image, aio=aio, cache="none")
    async with running(device) as driver:

        def align() -> None:
            driver.alloc(-(driver._heap + len(header(IN))) % 512)  # the data comes behind a header

        backend = device.backend
        assert isinstance(backend, FileBackend)
        assert fcntl.fcntl(backend._fd, fcntl.F_GETFL) & os.O_DIRECT
        align()
        assert status(await driver.request([header(OUT, 8), *parts], [1])) == OK
        align()
        used = await driver.request([header(IN, 8)], [*map(len, parts), 1])
        assert (status(used), b"".join(used.data[:-1])) == (OK, data)
        assert copies == ([] if first == 512 else [4096] * 2)
        assert status(await driver.request([header(FLUSH)], [1])) == OK
        zeroes = blk.SEGMENT_CODEC.pack(8, 8, 0)
        assert status(await driver.request([header(WRITE_ZEROES), zeroes], [1])) == OK
    assert image.read_bytes()[4096 : 4096 + len(data)] == bytes(4096) + data[4096:]


async def test_direct_io_needs_whole_blocks(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a disk whose blocks are larger than a sector."""
    monkeypatch.setattr(file, "bypass_page_cache", lambda _: 4096)
    with pytest.raises(DeviceError, match=r"cache=none needs blocks of 4096 bytes with .*: logical-block-size=4096"):
        Blk(path=image, cache="none")
    async with running(Blk(path=image, cache="none", logical_block_size=4096)) as driver:
        used = await driver.request([header(OUT, 8), b"\x55" * 4096], [1])
        assert status(used) == OK
        assert status(await driver.request([header(OUT, 17), b"\x55" * 512], [1])) == IOERR
    assert image.read_bytes()[4096:8192] == b"\x55" * 4096
    assert b"\x55" * 512 not in image.read_bytes()[8192:]


def test_direct_io_is_for_files_that_have_it() -> None:
    with pytest.raises(DeviceError, match="cache=none is for path=FILE"):
        Blk(size=1 << 20, cache="none")


def test_a_file_system_without_direct_io_is_named(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int) -> int:
        raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))

    monkeypatch.setattr(file, "bypass_page_cache", refuse)
    with pytest.raises(DeviceError, match=r"cannot be used with cache=none \(Invalid argument\)"):
        Blk(path=image, cache="none")


async def test_without_io_uring(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    without_io_uring(monkeypatch)
    async with running(Blk(path=image)) as driver:
        assert status(await driver.request([header(OUT, 3), b"\x55" * 512], [1])) == OK
        assert status(await driver.request([header(FLUSH)], [1])) == OK
        used = await driver.request([header(IN, 3)], [512, 1])
        assert (status(used), used.data[0]) == (OK, b"\x55" * 512)
    assert image.read_bytes()[3 * 512 : 4 * 512] == b"\x55" * 512


async def test_memory_that_goes_away_waits_for_the_request() -> None:
    """DMA_UNMAP under a request: its hold ends after the data and the status are in place."""
    backend = Recorder()
    async with running(Blk(backend=backend)) as driver:
        token, gate = await _stuck(driver, backend, [header(IN)], [512, 1])
        hold = driver.ram.unmap()
        assert hold is not None
        await trio.testing.wait_all_tasks_blocked()
        assert not hold.done
        ended = trio.Event()
        hold.when_done(ended.set)
        gate.set()
        with trio.fail_after(60):
            await ended.wait()
        driver.ram.map()
        used = await driver.wait(0, token)
        assert (status(used), used.data[0], used.written) == (OK, bytes(512), 513)


async def test_memory_that_is_taken_away_fails_the_request() -> None:
    backend = Recorder()
    async with running(Blk(backend=backend)) as driver:
        token, _ = await _stuck(driver, backend, [header(OUT), b"\x55" * 512], [1])
        hold = driver.ram.unmap()
        assert hold is not None
        hold.expire()
        await trio.testing.wait_all_tasks_blocked()
        assert hold.done
        driver.ram.map()
        assert status(await driver.wait(0, token)) == IOERR
        target = memoryview(bytearray(512))
        RamBackend.read_nowait(backend, 0, [target])
        assert bytes(target) == bytes(512)
        backend.gate = None
        assert status(await driver.request([header(IN)], [512, 1])) == OK


async def test_memory_that_goes_away_before_the_task_has_begun() -> None:
    """The pin holds from the moment the chain is taken: what is written to the disk is never a hole's zeros."""
    backend = Recorder()
    holds = []
    async with running(Blk(backend=backend)) as driver:
        assert isinstance(driver.device, Blk)
        planner = driver.device._requests.planner
        plan = planner.plan

        def plan_then_unmap(request: Any) -> Any:
            made = plan(request)
            # Runs in the round of the scheduler in which the request's task is started, or before it.
            trio.lowlevel.current_trio_token().run_sync_soon(lambda: holds.append(driver.ram.unmap()))
            planner.plan = plan
            return made

        planner.plan = plan_then_unmap
        token = driver.add(0, [header(OUT), b"\x55" * 512], [1])
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        driver.ram.map()
        assert status(await driver.wait(0, token)) == OK
        target = memoryview(bytearray(512))
        RamBackend.read_nowait(backend, 0, [target])
        assert bytes(target) == b"\x55" * 512
    assert len(holds) == 1


@both_memories
async def test_the_map_changes_elsewhere_under_a_request(private: bool) -> None:
    """Another region comes and goes (a BAR of another device): nobody's business."""
    backend = Recorder()
    async with running(Blk(backend=backend), private=private) as driver:
        token, gate = await _stuck(driver, backend, [header(IN)], [512, 1])
        driver.memory.map(0x1_0000_0000, 4096, readable=True, writable=True, fd=None, offset=0)
        gate.set()
        assert status(await driver.wait(0, token)) == OK
        driver.memory.unmap(0x1_0000_0000, 4096)
        assert status(await driver.request([header(IN)], [512, 1])) == OK


async def test_a_buffer_that_is_not_memory() -> None:
    async with running(Blk(size=Size(SIZE))) as driver:
        place = driver.alloc(header(IN))
        token = driver.add_raw(0, [(place, 16, 0), (RAM_BASE - 4096, 512, WRITE), (driver.alloc(1), 1, WRITE)])
        driver.kick(0)
        with pytest.raises(DeviceNeedsReset):
            await driver.wait(0, token)


# ---- size ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("medium", ["file", "ram"])
async def test_resize(image: Path, medium: str) -> None:
    device = Blk(path=image) if medium == "file" else Blk(size=Size(SIZE))
    async with running(device) as driver:
        generation = driver.core.read_generation()
        await device.resize(2 * SIZE)
        assert driver.config_interrupts == 1
        assert driver.config(0, 8) == 2 * SECTORS
        assert driver.core.read_generation() != generation
        used = await driver.request([header(IN, 2 * SECTORS - 1)], [512, 1])
        assert (status(used), used.data[0]) == (OK, bytes(512))
        await device.resize(SIZE // 2)
        assert status(await driver.request([header(IN, SECTORS - 1)], [512, 1])) == IOERR
        with pytest.raises(DeviceError):
            await device.resize(1000)
    if medium == "file":
        assert image.stat().st_size == SIZE // 2


async def test_a_look_at_the_size_does_not_take_back_a_resize() -> None:
    looking, go_on = trio.Event(), trio.Event()

    class Slow(RamBackend):
        async def refresh(self) -> int:
            size = self.size
            looking.set()
            await go_on.wait()
            return size

    device = Blk(backend=Slow(SIZE))
    async with running(device) as driver, trio.open_nursery() as nursery:
        await looking.wait()
        nursery.start_soon(device.resize, 2 * SIZE)
        await trio.testing.wait_all_tasks_blocked()
        go_on.set()
        await driver.wait_config_interrupt()
        await trio.testing.wait_all_tasks_blocked()
        assert driver.config(0, 8) == 2 * SECTORS


async def test_a_file_that_grows_is_noticed(image: Path) -> None:
    async with running(Blk(path=image, logical_block_size=4096)) as driver:
        await trio.testing.wait_all_tasks_blocked()
        os.truncate(image, 2 * SIZE + 1000)
        await driver.wait_config_interrupt()
        assert driver.config(0, 8) == 2 * SECTORS


# ---- configuration -------------------------------------------------------------------------------------------------


def test_configuration() -> None:
    device = Blk(
        size=Size(SIZE),
        num_queues=3,
        logical_block_size=1024,
        physical_block_size=4096,
        min_io_size=Size(4096),
        opt_io_size=Size(65536),
        size_max=Size(8192),
    )
    config = device.config
    assert [config[name] for name in ("capacity", "blk_size", "physical_block_exp")] == [SECTORS, 1024, 2]
    assert [config[name] for name in ("min_io_size", "opt_io_size", "num_queues")] == [4, 64, 3]
    assert [config[name] for name in ("seg_max", "size_max", "wce")] == [254, 8192, 1]
    assert [config[name] for name in ("unused", "unused1", "zoned_unused2")] == [0, bytes(3), bytes(3)]
    assert [queue.max_size for queue in device.queues] == [256] * 3
    assert device.features & BlkFeature.MQ.mask
    assert device.features & BlkFeature.SIZE_MAX.mask
    assert device.features & BlkFeature.FLUSH.mask
    assert device.features & BlkFeature.CONFIG_WCE.mask
    assert device.config.size == 96
    assert device.driver_writes <= blk.Config().offsets.keys()
    device.close()


@pytest.mark.parametrize(("size", "seg_max"), [(1, 1), (3, 1), (64, 62), (32768, 1022)])
def test_the_queue_size_limits_a_request(size: int, seg_max: int) -> None:
    device = Blk(size=Size(SIZE), num_queues=2)
    device.resize_queues(size)
    assert device.config["seg_max"] == seg_max
    chosen = Blk(size=Size(SIZE), seg_max=7)
    chosen.resize_queues(size)
    assert chosen.config["seg_max"] == 7


def test_without_discard(image: Path) -> None:
    device = Blk(path=image, discard=False)
    assert not device.features & BlkFeature.DISCARD.mask
    assert device.features & BlkFeature.WRITE_ZEROES.mask
    assert device.config["write_zeroes_may_unmap"] == 0
    device.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "path=FILE or size=SIZE"),
        ({"path": Path("x"), "size": SIZE}, "only one"),
        ({"path": Path("/nonexistent")}, "no such file: /nonexistent"),
        ({"size": 1000}, "truncate -s 1024"),
        ({"size": 0}, "RAM disk"),
        ({"size": SIZE, "num_queues": 0}, "num-queues"),
        ({"size": SIZE, "logical_block_size": 256}, "logical-block-size"),
        ({"size": SIZE, "logical_block_size": 4096, "physical_block_size": 512}, "physical-block-size"),
        ({"size": SIZE, "serial": "x" * 21}, "serial"),
        ({"size": SIZE, "min_io_size": 1 << 40}, "min_io_size"),
        ({"size": SIZE, "seg_max": -1}, "seg_max"),
    ],
)
def test_options_that_cannot_be(options: dict[str, Any], message: str) -> None:
    with pytest.raises(DeviceError, match=message) as caught:
        Blk(**options)  # as a user could write them
    assert "\n" not in str(caught.value)


def test_a_failed_device_leaves_the_image_alone(image: Path) -> None:
    os.truncate(image, 1000)
    with pytest.raises(DeviceError, match="truncate -s 1024"):
        Blk(path=image)
    os.truncate(image, 1024)
    first = Blk(path=image)
    with pytest.raises(DeviceError, match="in use"):
        Blk(path=image)
    first.close()
    FileBackend(image).close()


@both_memories
@pytest.mark.parametrize("event", ["another region", "ram away for a moment"])
async def test_the_map_changes_between_two_chains_of_a_burst(private: bool, event: str) -> None:
    """QEMU changes the map whenever it likes; chains that were taken already are served all the same."""
    async with running(Blk(size=Size(SIZE), serial="x"), private=private) as driver:
        assert isinstance(driver.device, Blk)
        planner = driver.device._requests.planner
        plan = planner.plan

        def plan_then_change(request: Any) -> Any:
            planner.plan = plan
            if event == "another region":
                driver.memory.map(0x1_0000_0000, 4096, readable=True, writable=True, fd=None, offset=0)
            else:
                driver.ram.unmap()
                driver.ram.map()
            return plan(request)

        planner.plan = plan_then_change
        tokens = [driver.add(0, [header(GET_ID)], [20, 1]) for _ in range(3)]
        driver.kick(0)
        for token in tokens:
            assert status(await driver.wait(0, token)) == OK
