"""Resets of a block device while requests are under way, and memory that goes away."""

import errno
import fcntl
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.blk_device import (
    FLUSH,
    IN,
    IOERR,
    OK,
    OUT,
    SIZE,
    WRITE_ZEROES,
    Recorder,
    both_memories,
    header,
    status,
)

from vfiouser_virtio.backends import disk_image, file
from vfiouser_virtio.backends.block import Aio
from vfiouser_virtio.backends.direct import page_buffer
from vfiouser_virtio.backends.file import FileBackend
from vfiouser_virtio.backends.io_uring import IoUring
from vfiouser_virtio.backends.ram import RamBackend
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.blk_requests import MAX_TASKS, Planner
from vfiouser_virtio.errors import DeviceError
from vfiouser_virtio.protocols.virtio import blk
from vfiouser_virtio.testing.driver import RAM_BASE, DeviceNeedsReset, Driver, running
from vfiouser_virtio.testing.raw.ring import WRITE
from vfiouser_virtio.virtio.options import Size

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


@pytest.mark.parametrize(("segments", "most"), [(1, MAX_TASKS), (300, MAX_TASKS // 5)])
async def test_requests_that_have_a_task_each_are_bounded_and_all_are_served(segments: int, most: int) -> None:
    """A reset cancels all of them in one round of the loop, for which all devices wait."""
    backend = Recorder()
    backend.gate = trio.Event()
    queues, count = 4, 80
    async with running(Blk(backend=backend, num_queues=queues)) as driver:
        at, into, ends = driver.alloc(header(IN)), driver.alloc(512), driver.alloc(1)
        request = [(at, 16, 0), *[(into, 512, WRITE)] * segments, (ends, 1, WRITE)]
        tokens = [
            (queue, driver.add_raw(queue, request, indirect=segments > 1))
            for queue in range(queues)
            for _ in range(count)
        ]
        for queue in range(queues):
            driver.kick(queue)
        await trio.testing.wait_all_tasks_blocked()
        assert most <= len(backend.calls) <= most + queues
        backend.gate.set()
        for queue, token in tokens:
            assert status(await driver.wait(queue, token)) == OK
        assert len(backend.calls) == len(tokens)


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
        gate.wait(60)
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
    data = os.urandom(file.BOUNCE + 512)
    parts = [data[:first], data[first:1024], data[1024:]]
    copies: list[int] = []

    def counted(size: int) -> memoryview:
        copies.append(size)
        return page_buffer(size)

    monkeypatch.setattr(file, "page_buffer", counted)
    device = Blk(path=image, aio=aio, cache="none")
    async with running(device) as driver:

        def align() -> None:
            driver.alloc(-(driver.alloc(0) + len(header(IN))) % 512)  # the data comes behind a header

        backend = device.backend
        assert isinstance(backend, FileBackend)
        opened = [int(name) for name in os.listdir("/proc/self/fd") if Path(f"/proc/self/fd/{name}").exists()]
        mine = [fd for fd in opened if os.path.samestat(os.fstat(fd), image.stat())]
        assert [bool(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT) for fd in mine] == [True]
        align()
        assert status(await driver.request([header(OUT, 8), *parts], [1])) == OK
        align()
        used = await driver.request([header(IN, 8)], [*map(len, parts), 1])
        assert (status(used), b"".join(used.data[:-1])) == (OK, data)
        assert copies == ([] if first == 512 else [file.BOUNCE] * 2)
        assert status(await driver.request([header(FLUSH)], [1])) == OK
        zeroes = blk.SEGMENT_CODEC.pack(8, 8, 0)
        assert status(await driver.request([header(WRITE_ZEROES), zeroes], [1])) == OK
    assert image.read_bytes()[4096 : 4096 + len(data)] == bytes(4096) + data[4096:]


async def test_direct_io_needs_whole_blocks(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a disk whose blocks are larger than a sector."""
    monkeypatch.setattr(disk_image, "bypass_page_cache", lambda _: 4096)
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

    monkeypatch.setattr(disk_image, "bypass_page_cache", refuse)
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


async def test_memory_that_goes_away_before_the_task_has_begun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pin holds from the moment the chain is taken: what is written to the disk is never a hole's zeros."""
    backend = Recorder()
    holds = []
    async with running(Blk(backend=backend)) as driver:
        assert isinstance(driver.device, Blk)
        plan = Planner.plan

        def plan_then_unmap(planner: Planner, request: Any) -> Any:
            made = plan(planner, request)
            # Runs in the round of the scheduler in which the request's task is started, or before it.
            trio.lowlevel.current_trio_token().run_sync_soon(lambda: holds.append(driver.ram.unmap()))
            monkeypatch.setattr(Planner, "plan", plan)
            return made

        monkeypatch.setattr(Planner, "plan", plan_then_unmap)
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
