"""Block backend on a raw file or a block device of the host: data goes straight between it and the caller's buffers.

Reads that the page cache can answer are done at once (preadv2 with RWF_NOWAIT, where the file system takes it). Other
reads, writes and flushes go through io_uring; what it cannot do, or where it is not allowed, the disk's own `Workers`.
On a file system that is not known to keep NOWAIT (FUSE, NFS) nothing is tried at once: a hung one delays only itself.
"""

import errno
import os
import stat
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import trio

from vfiouser_virtio.backends.block import Aio, Cancel, Done, Range, Segments
from vfiouser_virtio.backends.direct import is_aligned, page_buffer
from vfiouser_virtio.backends.disk_image import bypass_cache, lock_image, open_image, size_of, watch_size
from vfiouser_virtio.backends.io_uring import IOV_MAX, IoUring
from vfiouser_virtio.backends.nowait import keeps_nowait
from vfiouser_virtio.backends.vectored import preadv, pwritev
from vfiouser_virtio.backends.workers import Workers
from vfiouser_virtio.errors import DeviceError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.libc import fallocate
from vfiouser_virtio.pieces import copy_into, total
from vfiouser_virtio.protocols.io_uring import Op

# Even cached data takes its time to copy (110 µs for 1 MiB): more than this is left to the kernel's threads.
AT_ONCE = 2 << 20
# linux/falloc.h
KEEP_SIZE, PUNCH_HOLE, ZERO_RANGE = 0x01, 0x02, 0x10
# What a file system, or a block device, answers for a mode of fallocate that it does not know.
_UNSUPPORTED = {errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL, errno.ENODEV}
# Seconds between two looks at the size where the kernel does not tell of changes: of a block device.
_LOOK_PERIOD = 1.0
_ZEROS = page_buffer(1 << 20).toreadonly()
BOUNCE = 1 << 20
"""Bytes of a buffer of ours that a thread uses for data that is not aligned for direct I/O."""


class FileBackend:
    """Disk in the file or block device at ``path``, locked: shared when it is read-only, else exclusively.

    ``aio`` says how to do what may block. ``inline`` writes to the page cache at once: a disk of a file system that
    makes writers wait then holds up everything else of this process.
    ``direct``: data goes past the page cache (`direct`), and so nothing but an ``inline`` write is done at once.
    ``notes`` are lines about the file that its user should read.
    To make one asks the file's file system, and may wait for it; nothing else does that outside of threads.
    Raises DeviceError when there is no such file, it may not be opened like this, is no file, is empty, or is in use.
    """

    def __init__(self, path: Path, *, readonly: bool = False, aio: Aio = "io_uring", direct: bool = False) -> None:
        self.readonly = readonly
        self.path = path
        self._fd = open_image(path, readonly)
        try:
            self._size = size_of(self._fd)
            if self._size == 0:
                raise DeviceError(f"{path} is empty: make it as large as the disk, such as with truncate -s 64M {path}")
            self.notes = lock_image(self._fd, path, readonly)
            self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)
            self.block_size = max(os.fstat(self._fd).st_blksize, 512) if self._regular else 512
            self.can_discard = not readonly and self._can_punch()
            if os.pread(self._fd, 4, 0) == b"QFI\xfb":
                self.notes.append(f"{path} looks like qcow2, and is served as raw bytes: convert it with qemu-img")
            self.alignment = bypass_cache(self._fd, path) if direct else 0
            """With ``direct``: what offsets and lengths must be multiples of, in bytes."""
        except BaseException as error:
            close_all([self._fd])
            if isinstance(error, OSError):
                raise DeviceError(f"{path} cannot be read as a disk: {error.strerror}") from error
            raise
        nowait = keeps_nowait(self._fd)
        # A direct read has to wait for the disk, whatever it is told.
        self._nowait = {
            preadv: nowait and not direct,
            pwritev: not readonly and ((nowait and not direct) or aio == "inline"),
        }
        self._workers = Workers(path.name)
        self._changes = watch_size(self._fd) if self._regular else None
        self._writes_inline = aio == "inline"
        self._ring = _ring(never_inline=not nowait) if aio != "threads" else None

    @property
    def size(self) -> int:
        """Bytes, as of the last `refresh` or `resize`."""
        return self._size

    async def serve(self) -> None:
        if self._ring is None:
            await trio.sleep_forever()
        else:
            await self._ring.serve()

    def reap(self) -> bool:
        return self._ring is not None and self._ring.reap()

    def read_nowait(self, offset: int, segments: Segments) -> bool:
        return self._at_once(preadv, offset, segments)

    async def read(self, offset: int, segments: Segments) -> None:
        await self._workers.run(lambda: self._transfer(preadv, offset, segments))

    def start_read(self, offset: int, segments: Segments, done: Done) -> Cancel | None:
        return self._start(Op.READV, offset, segments, done)

    def write_nowait(self, offset: int, segments: Segments) -> bool:
        return self._at_once(pwritev, offset, segments, 0 if self._writes_inline else os.RWF_NOWAIT)

    async def write(self, offset: int, segments: Segments) -> None:
        await self._workers.run(lambda: self._transfer(pwritev, offset, segments))

    def start_write(self, offset: int, segments: Segments, done: Done) -> Cancel | None:
        return self._start(Op.WRITEV, offset, segments, done)

    def flush_nowait(self) -> bool:
        return self.readonly

    async def flush(self) -> None:
        await self._workers.run(lambda: os.fdatasync(self._fd))

    def start_flush(self, done: Done) -> Cancel | None:
        return self._start(Op.FSYNC, 0, (), done)

    def discard_nowait(self, ranges: Sequence[Range]) -> bool:
        return not ranges

    async def discard(self, ranges: Sequence[Range]) -> None:
        def work() -> None:
            for offset, length in ranges:
                # The device need not do anything, so what cannot be done is no error.
                self._allocate(PUNCH_HOLE, offset, length)

        await self._workers.run(work)

    def write_zeroes_nowait(self, offset: int, length: int, unmap: bool) -> bool:  # noqa: ARG002
        return not length

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        def work() -> None:
            for mode in (PUNCH_HOLE, ZERO_RANGE) if unmap else (ZERO_RANGE,):
                if self._allocate(mode, offset, length):
                    return
            for at in range(offset, offset + length, len(_ZEROS)):
                self._transfer(pwritev, at, [_ZEROS[: offset + length - at]])

        await self._workers.run(work)

    async def refresh(self) -> int:
        self._size = await self._workers.run(lambda: size_of(self._fd))
        return self._size

    async def wait_size_changed(self) -> None:
        if self._changes is None:
            await trio.sleep(_LOOK_PERIOD)
        else:
            await self._changes.wait()

    async def resize(self, size: int) -> None:
        await self._workers.run(lambda: os.ftruncate(self._fd, size))
        self._size = size

    def close(self) -> None:
        self._workers.close()
        if self._changes is not None:
            self._changes.close()
        if self._ring is not None:
            self._ring.close()
        close_all([self._fd])

    def _at_once(self, call: Callable[..., int], offset: int, segments: Segments, flags: int = os.RWF_NOWAIT) -> bool:
        if not self._nowait[call] or len(segments) > IOV_MAX or (length := total(segments)) > AT_ONCE:
            return False
        if self.alignment and not is_aligned(segments, self.alignment):
            return False
        try:
            # Fewer bytes than asked for: the rest is not in the page cache.
            return call(self._fd, segments, offset, flags) == length
        except BlockingIOError:
            return False
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                raise
            # tmpfs cannot do it at all, ext4 only reads.
            self._nowait[call] = False
            return False

    def _start(self, op: Op, offset: int, segments: Segments, done: Done) -> Cancel | None:
        ring = self._ring
        if ring is None or not ring.has_room or len(segments) > IOV_MAX:
            return None
        if self.alignment and not is_aligned(segments, self.alignment):
            return None  # a thread copies it, so that there are no more buffers of ours than threads
        length = total(segments)

        def ended(result: int) -> None:
            if result < 0:
                done(OSError(-result, os.strerror(-result)))
            elif result < length:
                # Cut short by a signal, by the end of a file that was cut, or by a full disk: the rest will tell.
                if not result or self._start(op, offset + result, _behind(segments, result), done) is None:
                    done(OSError(errno.EIO, f"{result:#x} of {length:#x} bytes at {offset:#x} of {self.path}"))
            else:
                done(None)

        try:
            copies = not self.alignment
            tag = ring.start(op, self._fd, offset, segments, ended, length=length, copies=copies)
            return partial(ring.cancel, tag)
        except OSError:  # the kernel takes no more at the moment
            return None

    def _transfer(self, call: Callable[..., int], offset: int, segments: Segments) -> None:
        """All of it, however often it takes. In a thread."""
        left = [segment for segment in segments if len(segment)]
        if self.alignment and not is_aligned(left, self.alignment):
            self._transfer_copies(call, offset, left)
            return
        while left:
            done = call(self._fd, left[:IOV_MAX], offset)
            if not done:
                raise OSError(errno.EIO, f"{self.path} ends at {offset:#x}: it was cut from outside")
            offset += done
            left = _behind(left, done)

    def _transfer_copies(self, call: Callable[..., int], offset: int, left: list[memoryview]) -> None:
        """`_transfer` by way of a buffer that is aligned for direct I/O."""
        length = total(left)
        if (offset | length) & (self.alignment - 1):
            what = f"not whole blocks of {self.alignment:#x} bytes, which {self.path} needs with cache=none"
            raise OSError(errno.EINVAL, what)
        bounce = page_buffer(min(length, BOUNCE))
        while left:
            part, left = _cut(left, BOUNCE)
            copy = bounce[: total(part)]
            if call is pwritev:
                copy_into([copy], b"".join(part))
            self._transfer(call, offset, [copy])
            if call is preadv:
                copy_into(part, copy)
            offset += len(copy)

    def _allocate(self, mode: int, offset: int, length: int) -> bool:
        """fallocate(); False where this mode is not supported."""
        while True:
            try:
                fallocate(self._fd, mode | KEEP_SIZE, offset, length)
            except InterruptedError:
                continue
            except OSError as error:
                if error.errno in _UNSUPPORTED:
                    return False
                raise
            return True

    def _can_punch(self) -> bool:
        # A hole behind the end of a regular file is none; a block device would refuse it for being there.
        return not self._regular or self._allocate(PUNCH_HOLE, self._size, self.block_size)


def _behind(segments: Segments, count: int) -> list[memoryview]:
    """What is left of the segments when ``count`` bytes of them are done."""
    return _cut(segments, count)[1]


def _cut(segments: Segments, count: int) -> tuple[list[memoryview], list[memoryview]]:
    """The first ``count`` bytes of the segments, or all, and the others."""
    front: list[memoryview] = []
    left = list(segments)
    while left and count >= len(left[0]):
        count -= len(left[0])
        front.append(left.pop(0))
    if left and count:
        front.append(left[0][:count])
        left[0] = left[0][count:]
    return front, left


def _ring(*, never_inline: bool) -> IoUring | None:
    try:
        return IoUring(never_inline=never_inline)
    except OSError:  # kernel.io_uring_disabled, a container's seccomp filter, no more locked memory
        return None
