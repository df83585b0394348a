"""Eventfds shared with another process: reads and writes that never wait, whatever the file's flags are.

O_NONBLOCK belongs to the open file, so the other process can clear the flag between our look at it and our system
call; it can fill or empty the counter there as well. So no call here depends on either:

- `take` reads with preadv2(RWF_NOWAIT): the flag is that call's own (Linux 5.8).
- `signal` lets the kernel signal the eventfd, as it does at the end of an asynchronous request (io_submit(2),
  IOCB_FLAG_RESFD). write(2) waits while a counter is full, and takes no flag; eventfd_signal() in the kernel does not
  wait. The request that ends is a read of nothing from /dev/null, where the kernel has least to do (0.1 µs less than
  with an empty memfd). It costs 1 µs more than write(2), nearly all of it in the kernel.
"""

import contextlib
import ctypes
import errno
import os
import platform
import select
import struct
import threading
from collections.abc import Callable
from typing import Any, cast

# struct iocb of linux/aio_abi.h: aio_data, aio_key and aio_rw_flags (zero here), aio_lio_opcode, aio_reqprio,
# aio_fildes, aio_buf, aio_nbytes, aio_offset, aio_reserved2, aio_flags, aio_resfd.
_IOCB = struct.Struct("<QIIHhIQQqQII")
_IOCB_CMD_PREAD = 0
_IOCB_FLAG_RESFD = 1
_IO_EVENT_SIZE = 32
_DEV_NULL = os.makedev(1, 3)
# Requests in a context; the kernel makes room for twice as many. Of these, fs.aio-max-nr is 65536 for all processes.
_ENTRIES = 128

# io_setup, io_submit, io_getevents by machine; a machine that is not here signals from threads.
_NUMBERS = {"x86_64": (206, 209, 208), "aarch64": (0, 2, 4), "riscv64": (0, 2, 4)}
_NO_NUMBERS = (-1, -1, -1)

# What holds the GIL, because none of these calls waits, and to let go of it costs more than they do.
_library = ctypes.PyDLL(None, use_errno=True)


def _system_call(library: ctypes.PyDLL = _library) -> Callable[..., int]:
    function: Any = library["syscall"]  # an object of its own each time
    function.restype = ctypes.c_int
    return cast("Callable[..., int]", function)


# No argtypes: what is no int (in C) is converted already, as byref() and from_param() do. To convert four arguments
# costs 0.7 µs.
_submit = _system_call(ctypes.PyDLL(None))  # without errno, which costs 0.1 µs
_call = _system_call()

# More threads than this never wait for full eventfds: then the counters are read, which lets the threads go. A client
# would have to clear a flag and fill a counter within the same microsecond for each of them.
MOST_THREADS = 16


class _Requests(dict[int, object]):
    """By eventfd number the argument that io_submit() wants. It depends on the number only, so it is kept."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: list[object] = []
        self._empty = -1

    def __missing__(self, fd: int) -> object:
        if self._empty < 0:
            self._empty = _empty_file()
        request = ctypes.create_string_buffer(
            _IOCB.pack(0, 0, 0, _IOCB_CMD_PREAD, 0, self._empty, 0, 0, 0, 0, _IOCB_FLAG_RESFD, fd)
        )
        self._kept.append(request)
        return self.setdefault(fd, ctypes.byref(ctypes.c_void_p(ctypes.addressof(request))))


def _empty_file() -> int:
    """A file without a byte, of which a read ends at once."""
    with contextlib.suppress(OSError):
        # Before it is opened: in a chroot something else may be there, which waits when it is opened.
        if os.stat("/dev/null").st_rdev == _DEV_NULL:
            return os.open("/dev/null", os.O_RDONLY | os.O_CLOEXEC)
    return os.memfd_create("vfiouser-virtio: nothing", os.MFD_CLOEXEC)


class Signaller:
    """Signalling of eventfds by asynchronous I/O; ``numbers`` are those of io_setup, io_submit and io_getevents.

    Threads write where there is none: on another machine, in a kernel without CONFIG_AIO, behind a seccomp filter, and
    where fs.aio-max-nr is used up. One serves all threads of a process, and after fork() the child's.
    """

    __slots__ = (
        "_context",
        "_events",
        "_getevents",
        "_lock",
        "_requests",
        "_setup",
        "_submit",
        "_writing",
    )

    def __init__(self, numbers: tuple[int, int, int]) -> None:
        self._setup, self._submit, self._getevents = numbers
        # 0 is none, and io_submit's answer to it EINVAL; so it is in a child after fork()
        self._context: object = ctypes.c_ulong.from_param(0)
        self._lock = threading.Lock()
        self._events = ctypes.create_string_buffer(_IO_EVENT_SIZE * 8 * _ENTRIES)
        self._requests = _Requests()
        self._writing: set[int] = set()

    def signal(self, fd: int) -> None:
        """Add 1 to an eventfd without ever waiting; a counter that is full (2⁶⁴ - 1) keeps its event.

        Raises OSError when ``fd`` is closed (EBADF) or is no eventfd (EINVAL).
        """
        if _submit(self._submit, self._context, 1, self._requests[fd]) != 1:
            self._signal_again(fd)

    def _signal_again(self, fd: int) -> None:
        """Whatever io_submit() lacked: room for its answers, a context, or the permission to use it."""
        with self._lock:
            if self._try(fd):
                return
            number = ctypes.get_errno()
            if number == errno.EAGAIN:  # once in some 250 calls: the answers were not read
                _call(self._getevents, self._context, 0, 8 * _ENTRIES, self._events, None)
            elif number == errno.EINVAL and is_eventfd(fd):
                made = ctypes.c_ulong(0)  # as io_setup() wants it
                if _call(self._setup, _ENTRIES, ctypes.byref(made)) == 0:
                    self._context = ctypes.c_ulong.from_param(made.value)
            if self._try(fd):
                return
            number = ctypes.get_errno()
        if number == errno.EBADF or not is_eventfd(fd):
            raise OSError(number, os.strerror(number))
        self._signal_from_thread(fd)

    def _try(self, fd: int) -> bool:
        return bool(_call(self._submit, self._context, 1, self._requests[fd]) == 1)

    def _signal_from_thread(self, fd: int) -> None:
        poll = select.poll()
        poll.register(fd, select.POLLOUT)
        if not poll.poll(0):
            return  # full: its event has not been read yet
        with self._lock:
            if len(self._writing) >= MOST_THREADS:
                for copy in self._writing:
                    take(copy)
            copy = os.dup(fd)  # the caller may close its own
            self._writing.add(copy)
        threading.Thread(target=self._write, args=(copy,), name="eventfd", daemon=True).start()

    def _write(self, fd: int) -> None:
        with contextlib.suppress(OSError):
            os.eventfd_write(fd, 1)
        with self._lock:
            self._writing.discard(fd)
            os.close(fd)


signal = Signaller(_NUMBERS.get(platform.machine(), _NO_NUMBERS)).signal
"""`Signaller.signal` of this process."""


# ---- reading ---------------------------------------------------------------------------------------------------------


# What was counted does not matter: all threads read it to the same place. To make one each time takes 0.8 µs.
_COUNTERS = [bytearray(8)]
_NOWAIT: int = getattr(os, "RWF_NOWAIT", 0)


def take(fd: int) -> bool:
    """Whether an eventfd has counted anything, which it forgets (one of it, with EFD_SEMAPHORE).

    Never waits. Raises OSError, EOPNOTSUPP where not `can_take`.
    """
    try:
        os.preadv(fd, _COUNTERS, -1, _NOWAIT)  # -1: where it stands, as read(2); an eventfd cannot seek
    except BlockingIOError:
        return False
    return True


def can_take() -> bool:
    """Whether this kernel (Linux 5.8) and C library can read an eventfd without waiting."""
    if not _NOWAIT:
        return False
    fd = os.eventfd(1, os.EFD_CLOEXEC)
    try:
        return take(fd)
    except (OSError, NotImplementedError):
        return False
    finally:
        os.close(fd)


def is_eventfd(fd: int) -> bool:
    """Whether ``fd`` is an eventfd, by what the kernel calls it in /proc; asks no other process, so it never waits."""
    try:
        return os.readlink(f"/proc/self/fd/{fd}").startswith("anon_inode:[eventfd]")
    except OSError:
        return False


CAN_TAKE = can_take()
"""`can_take`, found out once."""
