"""Files that this program writes where a user says: logs, captures, traces."""

import errno
import fcntl
import mmap
import os
import re
import select
import stat
from collections.abc import Callable
from pathlib import Path

from vfiouser_virtio.fds import reopened

_STANDARD = {"/dev/stdin": 0, "/dev/stdout": 1, "/dev/stderr": 2}
# What a shell makes of `>(gzip >x)` is /dev/fd/63.
_OWN = re.compile(r"/(?:dev|proc/self)/fd/([0-9]{1,9})")


def write_report(path: str | Path, text: str) -> None:
    """Write a text for whoever may read the folder, as any program does: through a link, too. Raises OSError."""
    fd = open_output(path, mode=0o666, links=True)
    try:
        write_all(fd, text.encode(errors="backslashreplace"))
    finally:
        os.close(fd)


def open_output(path: str | Path, *, append: bool = False, mode: int = 0o600, links: bool = False) -> int:
    """As `open_file`; /dev/stdout, /dev/stderr and /dev/fd/N are descriptors that this program was started with.

    What they stand for is neither emptied nor read. Raises OSError, with a text for users.
    """
    name = os.fspath(path)
    own = _OWN.fullmatch(name)
    number = int(own[1]) if own else _STANDARD.get(name)
    if number is None:
        return open_file(path, append=append, mode=mode, links=links)
    if not _is_given(number):
        raise OSError(errno.EBADF, f"descriptor {number} was not given to this program, or not for writing")
    return reopened(number, os.O_WRONLY)


def open_file(
    path: str | Path, *, append: bool = False, keep: bool = False, mode: int = 0o600, links: bool = False
) -> int:
    """Descriptor, non-blocking, to write to a file; one that is not there is made, by default for its owner only.

    A regular file is emptied, except with ``keep``; ``append`` is for several writers. Raises OSError, with a text for
    users. O_NONBLOCK: a FIFO without a reader is an error instead of a server that hangs. O_NOFOLLOW,
    unless there may be ``links``: where others may write to the folder, one of theirs would have us write to any file
    of ours.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    flags |= (0 if links else os.O_NOFOLLOW) | (os.O_APPEND if append else 0)
    try:
        fd = os.open(path, flags, mode)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, "is a symbolic link: name the file itself") from None
        if error.errno == errno.ENXIO:
            raise OSError(error.errno, "is a FIFO that nobody reads, or a socket: start its reader first") from None
        raise
    if not keep:
        try:
            if stat.S_ISREG(os.fstat(fd).st_mode):
                os.ftruncate(fd, 0)
        except OSError:
            os.close(fd)
            raise
    return fd


def write_all(fd: int, data: bytes | memoryview, *, patience_ms: int | None = None) -> None:
    """Write all of it, also to a descriptor that is non-blocking.

    Waits for its reader, with ``patience_ms`` not longer. Raises OSError.
    """
    rest = memoryview(data)
    while rest:
        try:
            rest = rest[os.write(fd, rest) :]
        except BlockingIOError:
            if not wait_writable(fd, patience_ms):
                raise OSError(errno.EAGAIN, "what is written to it is not read") from None


def wait_writable(fd: int, milliseconds: int | None) -> bool:
    """Wait until something can be written, or has gone wrong; with ``milliseconds`` not longer. Whether it is so."""
    poll = select.poll()
    poll.register(fd, select.POLLOUT)
    return bool(poll.poll(milliseconds))


class LimitedLines:
    """Limit of a file of lines: ``write`` gets them until they are ``limit`` bytes, then ``last``, and no more.

    A client that connects and leaves again and again, or a guest in a loop, must not fill the host's disk. What forked
    processes write counts, too, however often a device's is started again: all have the file.
    """

    def __init__(self, write: Callable[[str], object], limit: int, last: str) -> None:
        self._write = write
        self._limit = limit
        self._last = last
        # Shared with forked processes. Two that add at the same moment may lose one line's bytes: no harm.
        self._written = memoryview(mmap.mmap(-1, mmap.PAGESIZE)).cast("Q")

    @property
    def ended(self) -> bool:
        """Whether no more is written."""
        return self._written[0] >= self._limit

    def __call__(self, text: str) -> None:
        if self.ended:
            return
        self._written[0] += len(text.encode(errors="backslashreplace"))
        self._write(text)
        if self._written[0] >= self._limit:
            self._write(f"{self._last}\n")


def _is_given(fd: int) -> bool:
    """Whether it was open for writing when the program was started: what the program opens is not inheritable.

    Without that, a number that the shell has not opened may be a disk image's, or a client's socket.
    """
    try:
        writable = fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE in (os.O_WRONLY, os.O_RDWR)
        return writable and os.get_inheritable(fd)
    except OSError:
        return False
