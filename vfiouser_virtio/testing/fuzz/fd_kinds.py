"""File descriptors to attach to messages, by name: what belongs there, and what does not."""

import fcntl
import mmap
import os
import select
import socket
from collections.abc import Callable

_MEMFD_SIZE = 0x40000
_FULL = (1 << 64) - 2


def make(kind: str, ram_fd: int) -> int:
    """A new descriptor, the caller's to close. Raises KeyError for an unknown kind."""
    return os.dup(ram_fd) if kind == "ram" else _MAKERS[kind]()


def _memfd(size: int, flags: int = os.MFD_ALLOW_SEALING, seals: int = 0) -> int:
    fd = os.memfd_create("fuzz", os.MFD_CLOEXEC | flags)
    os.ftruncate(fd, size)
    if seals:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _reopened(flags: int) -> int:
    fd = _memfd(_MEMFD_SIZE)
    try:
        return os.open(f"/proc/self/fd/{fd}", flags | os.O_CLOEXEC)
    finally:
        os.close(fd)


def _full(flags: int) -> int:
    fd = os.eventfd(0, flags | os.EFD_CLOEXEC)
    os.eventfd_write(fd, _FULL)
    return fd


def _pipe_end(keep: int) -> int:
    ends = os.pipe()
    os.close(ends[1 - keep])
    return ends[keep]


def _socket() -> int:
    ours, theirs = socket.socketpair()
    theirs.close()
    return ours.detach()


def _epoll() -> int:
    with select.epoll() as epoll:
        return os.dup(epoll.fileno())


_MAKERS: dict[str, Callable[[], int]] = {
    "memfd": lambda: _memfd(_MEMFD_SIZE),
    "memfd-small": lambda: _memfd(mmap.PAGESIZE // 2),
    "memfd-huge": lambda: _memfd((1 << 63) - mmap.PAGESIZE),  # sparse: nothing is allocated
    "memfd-unsealable": lambda: _memfd(_MEMFD_SIZE, flags=0),
    "memfd-sealed": lambda: _memfd(_MEMFD_SIZE, seals=fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL),
    "memfd-write-sealed": lambda: _memfd(_MEMFD_SIZE, seals=fcntl.F_SEAL_WRITE),
    "memfd-readonly": lambda: _reopened(os.O_RDONLY),
    "eventfd": lambda: os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC),
    "eventfd-blocking": lambda: os.eventfd(0, os.EFD_CLOEXEC),
    "eventfd-full": lambda: _full(os.EFD_NONBLOCK),
    "eventfd-full-blocking": lambda: _full(0),
    "eventfd-semaphore": lambda: os.eventfd(5, os.EFD_NONBLOCK | os.EFD_SEMAPHORE | os.EFD_CLOEXEC),
    "pipe-r": lambda: _pipe_end(0),
    "pipe-w": lambda: _pipe_end(1),
    "socket": _socket,
    "null": lambda: os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC),
    "zero": lambda: os.open("/dev/zero", os.O_RDWR | os.O_CLOEXEC),
    "directory": lambda: os.open("/", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC),
    "epoll": _epoll,
    "path-only": lambda: os.open("/dev/null", os.O_PATH | os.O_CLOEXEC),
}

KINDS = ("ram", *_MAKERS)
EVENTFDS = tuple(kind for kind in KINDS if kind.startswith("eventfd"))
