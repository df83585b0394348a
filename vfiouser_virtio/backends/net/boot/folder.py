"""Folder whose regular files are given out, read-only: never anything outside of it, whatever name is asked for."""

import errno
import os
import stat
import weakref
from pathlib import Path

from vfiouser_virtio.errors import DeviceError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.libc import RESOLVE_BENEATH, openat2

# O_NONBLOCK: of a FIFO it is enough to see that it is one. O_NOCTTY: a terminal is not to become ours.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


class ServedFile:
    """Regular file that is being read. It is closed when neither its reader nor a thread that still reads refers to it.

    A thread may have been left behind with it, on a file system that hangs.
    """

    def __init__(self, fd: int, size: int) -> None:
        self._fd = fd
        self.size = size
        """Bytes, as of its opening."""
        weakref.finalize(self, close_all, [fd])

    def read(self, offset: int, count: int) -> bytes:
        """Fewer bytes than asked for only at the end. May wait: for threads. Raises OSError."""
        data = b""
        while len(data) < count and (piece := os.pread(self._fd, count - len(data), offset + len(data))):
            data += piece
        return data


class Folder:
    """Folder to `open` files of; the one that is at ``path`` now. Raises DeviceError where there is none."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._fd = os.open(path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise DeviceError(f"tftp={path}: {error.strerror}") from None
        weakref.finalize(self, close_all, [self._fd])
        try:
            os.close(openat2(self._fd, b".", os.O_PATH | os.O_CLOEXEC, RESOLVE_BENEATH))
        except OSError as error:
            raise DeviceError(
                f"tftp={path}: {error.strerror}: openat2(2) is needed to stay inside, of Linux 5.6 or newer"
            ) from None

    def open(self, name: bytes) -> ServedFile:
        """The regular file of that name, which may begin with slashes, and lie in a folder below.

        Symbolic links are followed as far as they stay inside. May wait for the file system: for threads.
        Raises OSError: PermissionError also for a name that leads outside, and for what is no regular file.
        """
        try:
            fd = openat2(self._fd, name.lstrip(b"/") or b".", _FLAGS, RESOLVE_BENEATH)
        except OSError as error:
            # ENXIO: a socket.
            if error.errno in (errno.EXDEV, errno.ELOOP, errno.ENXIO):
                raise PermissionError(errno.EACCES, "it leads out of the folder, or is no regular file") from None
            raise
        try:
            status = os.fstat(fd)
        except OSError:
            close_all([fd])
            raise
        if not stat.S_ISREG(status.st_mode):
            close_all([fd])
            raise PermissionError(errno.EACCES, "it is no regular file")
        return ServedFile(fd, status.st_size)
