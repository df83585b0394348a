"""Process that removes the sockets of a sandboxed one in the end, in a sandbox of its own that lets it do nothing else.

::

    the device's process ── f/run/vm/console.sock ──▶ remover: is it on the list, and still the same file?
      may not unlink             ◀── 0, or errno ──     may unlink in /run/vm

The sockets of a process that is killed stay where they are, as without a sandbox: the next one may have made new ones
of the same names already.
"""

import errno
import os
import socket
from collections.abc import Callable
from pathlib import Path

from vfiouser_virtio.host_access import HostAccess
from vfiouser_virtio.removal import FILE, FOLDER, MAX_REQUEST, remove_by
from vfiouser_virtio.serving.sandbox_helper import start_helper


def start_remover(access: HostAccess, give_up: Callable[[HostAccess], None]) -> None:
    """From now on `removal` has what ``access`` names removed by another process, which has called ``give_up``.

    Raises as `start_helper`.
    """
    named = {FILE + os.fsencode(os.path.abspath(path)): path for path in access.removes}
    named |= {FOLDER + os.fsencode(os.path.abspath(path)): path for path in access.removes_folders}
    there = {key: status for key, path in named.items() if (status := _status(path)) is not None}

    def serve(sock: socket.socket) -> None:
        while request := sock.recv(MAX_REQUEST):
            sock.send(bytes([_remove(request, named, there)]))

    rights = HostAccess(removes=access.removes, removes_folders=access.removes_folders)
    remove_by(*start_helper("remover", rights, give_up, serve))


def _status(path: Path) -> os.stat_result | None:
    try:
        return path.lstat()
    except OSError:
        return None


def _remove(request: bytes, named: dict[bytes, Path], there: dict[bytes, os.stat_result]) -> int:
    """0, or an errno."""
    before = there.get(request)
    if before is None:
        return errno.EPERM
    path = named[request]
    try:
        if not os.path.samestat(before, path.lstat()):
            return errno.EPERM  # another file has its name now
        if request.startswith(FOLDER):
            path.rmdir()
        else:
            path.unlink()
    except OSError as error:
        return error.errno or errno.EIO
    return 0
