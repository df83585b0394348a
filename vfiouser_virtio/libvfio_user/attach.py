"""Attaching a silent client: vfu_attach_ctx waits for its first message, non-blocking or not."""

import os
import socket
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager

TIMEOUT = 1.0
"""Seconds for the client's VERSION, during which nothing else happens in this process. QEMU sends it at once."""


@contextmanager
def hanging_up_after(path: str, seconds: float | None = None) -> Iterator[None]:
    """End connections to the socket ``path`` if the block takes longer than ``seconds`` (default `TIMEOUT`).

    From a thread, for the one that all calls of the library come from is inside of one. It calls nothing of it.
    """
    timer = threading.Timer(TIMEOUT if seconds is None else seconds, _hang_up, [path])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _hang_up(path: str) -> None:
    """Connection of the library before it has negotiated, of which it does not tell: found among our descriptors."""
    for name in os.listdir("/proc/self/fd"):
        try:
            if not stat.S_ISSOCK(os.fstat(int(name)).st_mode):
                continue
            with socket.socket(fileno=os.dup(int(name))) as sock:
                listens = sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
                if sock.family == socket.AF_UNIX and not listens and sock.getsockname() == path:
                    sock.shutdown(socket.SHUT_RDWR)
        except OSError:
            continue  # it was closed meanwhile
