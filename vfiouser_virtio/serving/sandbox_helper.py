"""Process beside a sandboxed one that does one thing for it, in a sandbox of its own that lets it do nothing else.

It is forked by the process itself before that gives up its rights, and ends when that has ended.
"""

import gc
import os
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.host_access import HostAccess

_READY = b"\0"
_MOST_WORDS = 1000


def start_helper(
    name: str, rights: HostAccess, give_up: Callable[[HostAccess], None], serve: Callable[[socket.socket], None]
) -> tuple[int, socket.socket]:
    """A process that gives up all but ``rights``, and runs ``serve`` with its end of a SOCK_SEQPACKET.

    To be called where there is no other thread. Returns the process id, and our end. Raises OSError where there is no
    process for it, ConfigError where it cannot give up its rights.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        try:
            pid = os.fork()
        except OSError:
            ours.close()
            raise
        if pid == 0:
            _run(name, theirs, lambda: give_up(rights), serve)
    if (answer := ours.recv(_MOST_WORDS)) != _READY:
        ours.close()
        os.waitpid(pid, 0)
        raise ConfigError(answer.decode(errors="replace") or f"--sandbox: its process {name} has died")
    return pid, ours


def _run(name: str, sock: socket.socket, give_up: Callable[[], None], serve: Callable[[socket.socket], None]) -> None:
    """Never returns."""
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
            Path("/proc/self/comm").write_text(name)  # for top and ps
        give_up()
        sock.send(_READY)
        serve(sock)
    except ConfigError as error:
        sock.send(str(error).encode()[:_MOST_WORDS])
    finally:
        os._exit(0)
