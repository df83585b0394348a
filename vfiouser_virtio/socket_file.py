"""UNIX sockets that are bound to a path: room for the name, a dead program's socket in the way, mode, and removal."""

import contextlib
import errno
import os
import socket
import stat
from pathlib import Path

from vfiouser_virtio.removal import remove_file

MAX_PATH = 107
"""Bytes of a socket's path: ``sun_path`` has 108, the last is NUL (unix(7))."""


class SocketFile:
    """File of the socket that is bound to ``path`` now. Raises OSError where there is none."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._status = os.lstat(path)

    def remove(self) -> None:
        """Remove it, unless another file has its name now, or none. Raises OSError where the directory does not let us.

        It asks a file system, which may hang: see `briefly`.
        """
        try:
            if os.path.samestat(self._status, os.lstat(self.path)):
                remove_file(self.path)
        except FileNotFoundError:
            pass


def bind_path(sock: socket.socket, path: str | os.PathLike[str]) -> SocketFile:
    """Bind an unbound UNIX socket to ``path``, for our user alone (mode 0600), whatever the umask.

    A socket on which no program listens any more is replaced: see `remove_stale`. Raises OSError as that and bind(2);
    a file that it has made is removed then.
    """
    remove_stale(path, sock.type)
    # The mode of the unbound socket is what bind() gives to the file, less the umask: never a moment too open.
    os.fchmod(sock.fileno(), 0o600)
    sock.bind(os.fspath(path))
    try:
        file = SocketFile(path)
        os.chmod(path, 0o600)  # a umask that takes away from the owner
    except OSError:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise
    return file


def remove_stale(path: str | os.PathLike[str], kind: int = socket.SOCK_STREAM) -> None:
    """Remove a dead program's socket, of this ``kind``; nothing where there is no file.

    Raises OSError: EADDRINUSE where a program has it open, EEXIST for what is no socket.
    """
    try:
        mode = os.lstat(path).st_mode
    except FileNotFoundError:
        return
    if not stat.S_ISSOCK(mode):
        raise OSError(errno.EEXIST, "something that is not a socket has that name")
    with socket.socket(socket.AF_UNIX, kind) as probe:
        probe.setblocking(False)
        number = probe.connect_ex(os.fspath(path))
    if number == errno.ECONNREFUSED:
        os.unlink(path)
    elif number != errno.ENOENT:  # 0; EAGAIN from a full backlog; EPROTOTYPE, of another kind
        raise OSError(errno.EADDRINUSE, "another program listens there")
