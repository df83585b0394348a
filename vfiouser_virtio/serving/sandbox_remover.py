"""Process that removes the sockets of a sandboxed one in the end, in a sandbox of its own that lets it do nothing else.

::

    the device's process ── f/run/vm/console.sock ──▶ remover: is it on the list, and still the same file?
      may not unlink             ◀── 0, or errno ──     may unlink in /run/vm

It is forked by the process itself before that gives up its rights, and ends with it. The sockets of one that is killed
stay where they are, as without a sandbox: the next one may have made new ones of the same names already.
"""

import errno
import gc
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.host_access import HostAccess
from vfiouser_virtio.removal import FILE, FOLDER, MAX_REQUEST, remove_by

_READY = b"\0"
_MOST_WORDS = 1000


def start_remover(access: HostAccess, give_up: Callable[[HostAccess], None]) -> None:
    """From now on `removal` has what ``access`` names removed by another process, which has called ``give_up``.

    To be called where there is no other thread. Raises OSError where there is no process for it, ConfigError where it
    cannot give up its rights.
    """
    named = {FILE + os.fsencode(os.path.abspath(path)): path for path in access.removes}
    named |= {FOLDER + os.fsencode(os.path.abspath(path)): path for path in access.removes_folders}
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            raise
        if pid == 0:
            _run(theirs, named, access, give_up)
    if (answer := ours.recv(_MOST_WORDS)) != _READY:
        ours.close()
        os.waitpid(pid, 0)
        raise ConfigError(answer.decode(errors="replace") or "--sandbox: the process that removes its sockets has died")
    remove_by(pid, ours)


def _run(
    sock: socket.socket, named: dict[bytes, Path], access: HostAccess, give_up: Callable[[HostAccess], None]
) -> None:
    """What the process does; never returns."""
    try:
        signal.set_wakeup_fd(-1)  # of the event loop that we were forked in
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
            signal.signal(number, signal.SIG_IGN)  # for our parent: we end with it
        gc.disable()  # what was collected would be copied first
        null = os.open(os.devnull, os.O_RDWR)
        for fd in (0, 1, 2):
            os.dup2(null, fd)
        os.closerange(3, sock.fileno())
        os.closerange(sock.fileno() + 1, os.sysconf("SC_OPEN_MAX"))
        with suppress(OSError):
            Path("/proc/self/comm").write_text("remover")  # for top and ps
        there = {key: status for key, path in named.items() if (status := _status(path)) is not None}
        give_up(HostAccess(removes=access.removes, removes_folders=access.removes_folders))
        sock.send(_READY)
        while request := sock.recv(MAX_REQUEST):
            sock.send(bytes([_remove(request, named, there)]))
    except ConfigError as error:
        sock.send(str(error).encode()[:_MOST_WORDS])
    finally:
        os._exit(0)


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
