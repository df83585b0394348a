"""io_uring from Python: the real kernel, real files, and every way in which a request ends."""

import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import trio
import trio.testing

import vfiouser_virtio.backends.io_uring
from vfiouser_virtio.backends import file, nowait
from vfiouser_virtio.backends.file import FileBackend
from vfiouser_virtio.backends.io_uring import COPIED_BY_US, LONGEST_INLINE, IoUring
from vfiouser_virtio.backends.vectored import preadv
from vfiouser_virtio.protocols.io_uring import SQE_CODEC, Op, SqeFlags

SIZE = 1 << 20


@pytest.fixture
async def ring() -> AsyncIterator[IoUring]:
    ring = IoUring(8)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ring.serve)
        yield ring
        nursery.cancel_scope.cancel()
    ring.close()


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    path = tmp_path / "disk"
    path.write_bytes(os.urandom(SIZE))
    return path


async def result_of(ring: IoUring, op: Op, fd: int, offset: int, segments: list[memoryview]) -> int:
    ended = trio.Event()
    results = []

    def done(result: int) -> None:
        results.append(result)
        ended.set()

    ring.start(op, fd, offset, segments, done)
    with trio.fail_after(60):
        await ended.wait()
    [result] = results
    return result


async def test_segments_are_filled_in_order(ring: IoUring, disk: Path) -> None:
    buffers = [bytearray(size) for size in (1, 4095, 8192, 3)]
    with disk.open("rb") as file:
        assert await result_of(ring, Op.READV, file.fileno(), 100, [memoryview(b) for b in buffers]) == 12291
    assert b"".join(buffers) == disk.read_bytes()[100 : 100 + 12291]


async def test_read_only_views_are_written(ring: IoUring, disk: Path) -> None:
    with disk.open("r+b") as file:
        segments = [memoryview(b"abc"), memoryview(bytearray(b"defg")).toreadonly()]
        assert await result_of(ring, Op.WRITEV, file.fileno(), 10, segments) == 7
        assert await result_of(ring, Op.FSYNC, file.fileno(), 0, []) == 0
    assert disk.read_bytes()[10:17] == b"abcdefg"


async def test_a_failure_is_an_errno(ring: IoUring, disk: Path) -> None:
    with disk.open("rb") as file:
        assert await result_of(ring, Op.WRITEV, file.fileno(), 0, [memoryview(b"x")]) == -errno.EBADF
        assert await result_of(ring, Op.READV, file.fileno(), SIZE, [memoryview(bytearray(1))]) == 0


async def test_many_more_requests_than_entries_one_after_another(ring: IoUring, disk: Path) -> None:
    content = disk.read_bytes()
    left, finished = list(range(1000)), trio.Event()
    under_way = 0
    with disk.open("rb") as file:

        def begin() -> None:
            nonlocal under_way
            while left and ring.has_room:
                number = left.pop()
                buffer = bytearray(512)
                under_way += 1

                def done(result: int, number: int = number, buffer: bytearray = buffer) -> None:
                    nonlocal under_way
                    under_way -= 1
                    assert result == 512
                    assert buffer == content[number * 512 : number * 512 + 512]
                    begin()
                    if not left and not under_way:
                        finished.set()

                ring.start(Op.READV, file.fileno(), number * 512, [memoryview(buffer)], done)

        begin()
        with trio.fail_after(60):
            await finished.wait()
    assert not ring.busy


async def test_what_waits_for_data_can_be_given_up(ring: IoUring) -> None:
    reader, writer = os.pipe()
    try:
        results: list[int] = []
        buffer = bytearray(10)
        tag = ring.start(Op.READV, reader, 0, [memoryview(buffer)], results.append)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert (results, ring.busy) == ([], True)
        ring.cancel(tag)
        with trio.fail_after(60):
            while ring.busy:
                await trio.sleep(0.001)
        assert results == [-errno.ECANCELED]
        os.write(writer, b"too late")
        assert buffer == bytes(10)
        ring.cancel(tag)  # it has ended: nothing happens
    finally:
        os.close(reader)
        os.close(writer)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The flags of the requests, as they go to the kernel."""
    flags: list[int] = []

    def pack_into(*values: Any) -> None:
        flags.append(values[3])
        SQE_CODEC.pack_into(*values)

    codec = SimpleNamespace(size=SQE_CODEC.size, pack_into=pack_into)
    monkeypatch.setattr(vfiouser_virtio.backends.io_uring, "SQE_CODEC", codec)
    return flags


async def test_what_the_kernel_copies_in_our_thread_is_bounded(ring: IoUring, submitted: list[int]) -> None:
    reader, writer = os.pipe()
    results: list[int] = []

    def start() -> int:
        segments = [memoryview(bytearray(10))]
        ring.start(Op.READV, reader, 0, segments, results.append, length=COPIED_BY_US // 2)
        return submitted.pop()

    async def end(count: int) -> None:
        os.write(writer, bytes(10 * count))
        with trio.fail_after(60):
            while ring.busy:
                await trio.sleep(0.001)

    try:
        assert [start() for _ in range(4)] == [0, 0, SqeFlags.ASYNC, SqeFlags.ASYNC]
        await end(4)
        assert start() == 0
        await end(1)
        assert results == [10] * 5
    finally:
        os.close(reader)
        os.close(writer)


@pytest.mark.parametrize("copies", [False, True], ids=["direct", "by the page cache"])
async def test_what_is_long_is_not_tried_within_the_system_call(
    ring: IoUring, submitted: list[int], copies: bool
) -> None:
    """1 GiB of direct I/O held up all devices for 66 ms."""
    null = os.open("/dev/null", os.O_RDWR)
    try:
        for op in (Op.READV, Op.WRITEV):
            for length in (LONGEST_INLINE, LONGEST_INLINE + 1):
                ring.start(op, null, 0, [memoryview(bytearray(10))], lambda _: None, length=length, copies=copies)
                with trio.fail_after(60):
                    while ring.busy:
                        await trio.sleep(0.001)
        assert submitted == 2 * [0, SqeFlags.ASYNC]
    finally:
        os.close(null)


async def test_serve_ends_only_when_nothing_is_under_way() -> None:
    ring = IoUring(4)
    reader, writer = os.pipe()
    results: list[int] = []
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ring.serve)
        ring.start(Op.READV, reader, 0, [memoryview(bytearray(10))], results.append)
        await trio.testing.wait_all_tasks_blocked(0.01)
        nursery.cancel_scope.cancel()
        with trio.CancelScope(shield=True):
            await trio.sleep(0.02)
            assert results == []
            os.write(writer, b"data")
    assert results == [4]
    ring.close()
    os.close(reader)
    os.close(writer)


async def test_a_request_beyond_the_file_fails_after_its_data(disk: Path) -> None:
    backend = FileBackend(disk)
    errors: list[OSError | None] = []
    os.truncate(disk, SIZE - 4096)
    buffer = bytearray(8192)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.serve)
        assert backend.start_read(SIZE - 8192, [memoryview(buffer)], errors.append) is not None
        with trio.fail_after(60):
            while not errors:
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    backend.close()
    assert isinstance(errors[0], OSError)
    assert errors[0].errno == errno.EIO
    assert buffer[:4096] == disk.read_bytes()[-4096:]


async def test_no_descriptor_is_left(disk: Path) -> None:
    before = set(os.listdir("/proc/self/fd"))
    backend = FileBackend(disk)
    backend.close()
    assert set(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("file_system", "at_once"), [(0xEF53, True), (0x65735546, False), (0x6969, False), (0, False)])
async def test_a_file_system_that_does_not_know_nowait_is_never_asked_inline(
    disk: Path, submitted: list[int], monkeypatch: pytest.MonkeyPatch, file_system: int, at_once: bool
) -> None:
    """As FUSE with direct I/O and a hung NFS: any call that is not in a thread of the kernel's, or of ours, waits."""
    monkeypatch.setattr(nowait, "file_system", lambda _: (file_system, 4096))
    inline: list[int] = []

    def counted(fd: int, segments: Any, offset: int, flags: int = 0) -> int:
        inline.append(flags)
        return preadv(fd, segments, offset, flags)

    monkeypatch.setattr(file, "preadv", counted)
    backend = FileBackend(disk)
    buffer = bytearray(4096)
    ended: list[OSError | None] = []
    backend.read_nowait(0, [memoryview(buffer)])
    async with trio.open_nursery() as nursery:
        nursery.start_soon(backend.serve)
        assert backend.start_read(0, [memoryview(buffer)], ended.append) is not None
        assert backend.start_flush(ended.append) is not None
        with trio.fail_after(60):
            while len(ended) < 2:
                await trio.sleep(0.001)
        nursery.cancel_scope.cancel()
    backend.close()
    assert ended == [None, None]
    assert buffer == disk.read_bytes()[:4096]
    assert submitted == [0 if at_once else 16] * 2
    assert inline == [os.RWF_NOWAIT] * at_once


async def test_a_ring_takes_nothing_but_reads_writes_and_flushes(ring: IoUring) -> None:
    """A seccomp filter does not see requests: a ring that opens files, or connects sockets, leads around it."""
    openat, path = 18, b"/proc/self/status\0"
    buffer = memoryview(bytearray(path))
    assert await result_of(ring, cast("Op", openat), -1, 0, [buffer]) == -errno.EACCES


async def test_the_end_does_not_wait_for_what_something_else_has_reaped() -> None:
    """As a reset does that gives requests up, and takes what has ended while `serve` waits for the last of them."""
    ring, scope, ended = IoUring(8), trio.CancelScope(), trio.Event()
    reader, writer = os.pipe()
    results: list[int] = []

    async def serve() -> None:
        with scope:
            await ring.serve()
        ended.set()

    def start() -> None:
        ring.start(Op.READV, reader, 0, [memoryview(bytearray(10))], results.append)

    try:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve)
            start()
            await trio.testing.wait_all_tasks_blocked()
            scope.cancel()
            await trio.testing.wait_all_tasks_blocked()
            os.write(writer, b"late")
            while not results:
                ring.reap()
            with trio.move_on_after(10) as too_long:
                await ended.wait()
            if too_long.cancelled_caught:  # wake it
                start()
                os.write(writer, b"more")
        assert not too_long.cancelled_caught
        assert results == [4]
    finally:
        ring.close()
        os.close(reader)
        os.close(writer)
