"""Removing names from the file system: by this process, or, where a sandbox does not let it, by another one.

In the sandbox of ``serve --sandbox`` that other process (`serving.sandbox_remover`) has a list of what it may remove,
and is told so one by one: a right of Landlock would be one to remove any file of a folder.
"""

import errno
import os
import socket
import threading
from contextlib import suppress
from typing import NamedTuple

from vfiouser_virtio.briefly import TIMEOUT_S

MAX_REQUEST = 4097
"""Bytes: one that says what it is, and a path (PATH_MAX)."""
FILE, FOLDER = b"f", b"d"

_LOCK = threading.Lock()


class _Remover(NamedTuple):
    pid: int
    socket: socket.socket


_REMOVERS: list[_Remover] = []
"""None, or one."""


def remove_file(path: str | os.PathLike[str]) -> None:
    """As os.unlink(); in a sandbox only for what `host_access.HostAccess.removes` named. Raises OSError."""
    if not _asked_for(FILE, path):
        os.unlink(path)


def remove_folder(path: str | os.PathLike[str]) -> None:
    """As os.rmdir(); likewise, of `host_access.HostAccess.removes_folders`. Raises OSError."""
    if not _asked_for(FOLDER, path):
        os.rmdir(path)


def remove_by(pid: int, sock: socket.socket) -> None:
    """From now on names are removed by our child ``pid``, by way of a SOCK_SEQPACKET: one path, one errno."""
    sock.settimeout(TIMEOUT_S)
    _REMOVERS.append(_Remover(pid, sock))


def end_remover() -> None:
    """Nothing more is to be removed: the process that did it ends. Returns when it has, or half a second later."""
    with _LOCK:
        while _REMOVERS:
            remover = _REMOVERS.pop()
            with remover.socket as sock:
                try:
                    sock.shutdown(socket.SHUT_WR)
                    while sock.recv(1):
                        pass
                except OSError:
                    return  # its file system hangs
            with suppress(ChildProcessError):
                os.waitpid(remover.pid, 0)


def _asked_for(kind: bytes, path: str | os.PathLike[str]) -> bool:
    """Whether there is another process for it, which has removed it then."""
    with _LOCK:
        if not _REMOVERS:
            return False
        sock = _REMOVERS[0].socket
        try:
            sock.send(kind + os.fsencode(os.path.abspath(path)))
            if not (answer := sock.recv(1)):
                raise ConnectionResetError(errno.ECONNRESET, "the process that removes files has died")
        except OSError:  # or its file system hangs: what it may answer later is not for another file
            sock.close()
            _REMOVERS.clear()
            raise
    if answer[0]:
        raise OSError(answer[0], os.strerror(answer[0]), os.fspath(path))
    return True
