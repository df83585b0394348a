"""io_uring(7) in pure Python: asynchronous reads, writes and flushes.

::

    start ──▶ sqes ──▶ io_uring_enter() ──▶ kernel: at once, or in threads of its own
    done(result) ◀── serve ◀── ring readable ◀── cqes

A request costs some 7 µs, and one wake-up serves all that have ended meanwhile. A thread of ours costs three times
that, and takes the GIL twice. Two system calls are made through ctypes; the rest is loads and stores in shared memory.
"""

import contextlib
import ctypes
import errno
import mmap
import os
from collections.abc import Callable, Sequence

import trio

from vfiouser_virtio.barrier import TSO, full_barrier
from vfiouser_virtio.libc import last_error, libc
from vfiouser_virtio.pieces import iovec
from vfiouser_virtio.protocols.io_uring import (
    CQE_CODEC,
    OFF_SQ_RING,
    OFF_SQES,
    PARAMS,
    RESTRICTION_CODEC,
    SQE_CODEC,
    Features,
    FsyncFlags,
    Op,
    RegisterOp,
    RestrictionOp,
    SetupFlags,
    SqeFlags,
)

Done = Callable[[int], None]
"""Is told a request's result: bytes, or a negative errno."""

# The same numbers on every machine since Linux 5.1: they are newer than the last differences.
_IO_URING_SETUP, _IO_URING_ENTER, _IO_URING_REGISTER = 425, 426, 427
# linux/uio.h: the most segments of one readv or writev.
IOV_MAX = 1024

# Bytes of reads under way whose data the kernel copies in our thread. It does so at the end of any system call of ours,
# for all whose pages have come from the disk meanwhile: 128 reads of 1 MiB held up all devices for 28 ms in one go.
# The copies of the others are made by threads of the kernel's.
COPIED_BY_US = 2 << 20
# Bytes of a request that is tried within io_uring_enter(): there the kernel takes hold of all its pages for direct I/O,
# which took 66 ms for 1 GiB, and copies those of a write where its file system can without waiting.
LONGEST_INLINE = 2 << 20

_ASYNC = int(SqeFlags.ASYNC)
_syscall = libc.syscall
_syscall.restype = ctypes.c_long


class IoUring:
    """Ring for ``entries`` requests at a time. Raises OSError where the kernel, or a container, refuses one.

    ``never_inline``: no request is tried within io_uring_enter(), where a file system that does not know NOWAIT would
    block us. It costs a wake-up of a thread of the kernel's even for what is in the page cache.
    """

    def __init__(self, entries: int = 256, *, never_inline: bool = False) -> None:
        self._sqe_flags = _ASYNC if never_inline else 0
        self._to_copy = 0
        params = bytearray(PARAMS.build(_request(entries)))
        pointer = (ctypes.c_char * len(params)).from_buffer(params)
        self._fd = _syscall(_IO_URING_SETUP, entries, pointer)
        if self._fd < 0:
            raise last_error()
        answer = PARAMS.parse(bytes(params))
        try:
            if answer.features & (wanted := Features.SINGLE_MMAP | Features.NODROP) != wanted:  # Linux 5.5
                raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
            self._restrict()
        except OSError:
            os.close(self._fd)
            raise
        sq, cq = answer.sq_off, answer.cq_off
        size = max(sq.array + 4 * answer.sq_entries, cq.cqes + CQE_CODEC.size * answer.cq_entries)
        self._ring = mmap.mmap(self._fd, size, offset=OFF_SQ_RING)
        self._sqes = mmap.mmap(self._fd, SQE_CODEC.size * answer.sq_entries, offset=OFF_SQES)
        # Typed items: one aligned load or store each.
        words = self._words = memoryview(self._ring).cast("I")
        self._sq_tail, self._cq_head, self._cq_tail = sq.tail // 4, cq.head // 4, cq.tail // 4
        self._sq_mask, self._cq_mask = words[sq.ring_mask // 4], words[cq.ring_mask // 4]
        self._cqes = cq.cqes
        for entry in range(answer.sq_entries):  # the indirection is not needed: entry n is sqe n
            words[sq.array // 4 + entry] = entry
        self._submitted = words[self._sq_tail]
        self._entries: int = answer.sq_entries
        self._next_tag = 1
        self._reaping = False
        self._draining: trio.CancelScope | None = None
        """Wait for the last requests at the end of `serve`."""
        self._under_way: dict[int, tuple[Done, object, int]] = {}  # by tag; with what it adds to _to_copy

    def _restrict(self) -> None:
        """Let it take what is used here and nothing else: a request is no system call, and no seccomp filter sees it.

        A ring could open files and connect sockets for who has got hold of the process.
        """
        allowed = [(RestrictionOp.SQE_OP, op) for op in Op] + [(RestrictionOp.SQE_FLAGS_ALLOWED, _ASYNC)]
        rules = b"".join(RESTRICTION_CODEC.pack(kind, value, 0, 0, 0, 0) for kind, value in allowed)
        for op, argument, count in ((RegisterOp.RESTRICTIONS, rules, len(allowed)), (RegisterOp.ENABLE_RINGS, None, 0)):
            if _syscall(_IO_URING_REGISTER, self._fd, int(op), argument, count) < 0:
                raise last_error()

    @property
    def has_room(self) -> bool:
        """Whether one more request can be started."""
        return len(self._under_way) < self._entries

    @property
    def busy(self) -> bool:
        """Whether the kernel may be using buffers of a request."""
        return bool(self._under_way)

    def start(
        self,
        op: Op,
        fd: int,
        offset: int,
        segments: Sequence[memoryview],
        done: Done,
        *,
        length: int = 0,
        copies: bool = True,
    ) -> int:
        """Start `Op.READV` or `Op.WRITEV` of at most `IOV_MAX` segments, or a fdatasync; returns a tag for `cancel`.

        The segments are kept until ``done`` has been called, which is before this returns if the kernel has had all it
        needs. ``length`` is that of all segments, in bytes; ``copies``: it is not direct I/O (see `COPIED_BY_US`).
        Raises OSError when the kernel takes no more.
        """
        if op == Op.FSYNC:
            return self._enter(op, fd, 0, 0, 0, int(FsyncFlags.DATASYNC), (done, None, 0))
        vector = iovec(segments)
        address, _ = vector.buffer_info()
        by_us = 0
        sqe_flags = _ASYNC if length > LONGEST_INLINE else 0
        if op == Op.READV and copies:
            if self._to_copy + length <= COPIED_BY_US:
                by_us = length
            else:
                sqe_flags = _ASYNC
        return self._enter(op, fd, offset, address, len(segments), 0, (done, (vector, segments), by_us), sqe_flags)

    def cancel(self, tag: int) -> None:
        """Ask the kernel to give a request up: then it ends with -ECANCELED. What is on its way to the disk goes on."""
        if tag in self._under_way:
            with contextlib.suppress(OSError):  # then it goes on, too
                self._enter(Op.ASYNC_CANCEL, -1, 0, tag, 0, 0, (_ignore, None, 0))

    def _enter(
        self,
        op: Op,
        fd: int,
        offset: int,
        address: int,
        length: int,
        flags: int,
        request: tuple[Done, object, int],
        sqe_flags: int = 0,
    ) -> int:
        tag = self._next_tag
        self._next_tag += 1
        at = SQE_CODEC.size * (self._submitted & self._sq_mask)
        SQE_CODEC.pack_into(
            self._sqes, at, op, self._sqe_flags | sqe_flags, 0, fd, offset, address, length, flags, tag, 0, 0, 0
        )
        self._submitted = (self._submitted + 1) & 0xFFFF_FFFF
        if not TSO:
            full_barrier()  # the entry is stored before the index that shows it
        self._words[self._sq_tail] = self._submitted
        self._under_way[tag] = request
        self._to_copy += request[2]
        while _syscall(_IO_URING_ENTER, self._fd, 1, 0, 0, None, 0) != 1:
            error = last_error()
            if error.errno != errno.EINTR:  # EAGAIN, EBUSY: the kernel is short of memory
                self._to_copy -= self._under_way.pop(tag)[2]
                self._submitted = (self._submitted - 1) & 0xFFFF_FFFF
                self._words[self._sq_tail] = self._submitted  # it has not looked at the entry
                raise error
        if not self._reaping:
            self.reap()  # what was in the page cache is there already
        return tag

    def reap(self) -> bool:
        """Call ``done`` of all requests that have ended, and may start others; whether there were any."""
        self._reaping, found = True, False
        try:
            while ended := self._ended():
                found = True
                for user_data, result in ended:
                    done, _, copied = self._under_way.pop(user_data)
                    self._to_copy -= copied
                    done(result)
        finally:
            self._reaping = False
        if self._draining is not None and not self._under_way:
            self._draining.cancel()  # `start` and `cancel` reap, too: nothing may be left that would wake `serve`
        return found

    def _ended(self) -> list[tuple[int, int]]:
        """Tags and results that the kernel has told since the last call."""
        words = self._words
        head, tail = words[self._cq_head], words[self._cq_tail]
        if head == tail:
            return []
        if not TSO:
            full_barrier()  # the index is loaded before the entries that it shows
        ended = []
        while head != tail:
            user_data, result, _ = CQE_CODEC.unpack_from(
                self._ring, self._cqes + CQE_CODEC.size * (head & self._cq_mask)
            )
            ended.append((user_data, result))
            head = (head + 1) & 0xFFFF_FFFF
        if not TSO:
            full_barrier()  # the entries are loaded before the kernel may use them again
        words[self._cq_head] = head
        return ended

    async def serve(self) -> None:
        """Call `reap` whenever there is something, until cancelled; then until nothing is under way."""
        try:
            while True:
                await trio.lowlevel.wait_readable(self._fd)
                self.reap()
        finally:
            while self._under_way:
                with trio.CancelScope(shield=True) as self._draining:
                    await trio.lowlevel.wait_readable(self._fd)
                self.reap()
            self._draining = None

    def close(self) -> None:
        """Give the ring back. Nothing may be under way."""
        self._words.release()
        self._ring.close()
        self._sqes.close()
        os.close(self._fd)


def _request(entries: int) -> dict[str, object]:
    """`PARAMS` for io_uring_setup()."""
    nothing = {"sq_entries": 0, "sq_thread_cpu": 0, "sq_thread_idle": 0, "features": 0, "wq_fd": 0, "resv": [0] * 3}
    offsets = dict.fromkeys(
        ("head", "tail", "ring_mask", "ring_entries", "flags", "dropped", "array", "overflow", "cqes"), 0
    ) | {"resv1": 0, "user_addr": 0}
    return nothing | {
        "flags": SetupFlags.CQSIZE | SetupFlags.CLAMP | SetupFlags.R_DISABLED,
        "cq_entries": 2 * entries,
        "sq_off": offsets,
        "cq_off": offsets,
    }


def _ignore(_: int) -> None:
    """Callback of a cancel request, whose own result is not needed."""
