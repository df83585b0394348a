"""Connecting to the server's UNIX socket, with retries while its backlog is full ("Socket Disconnection Behavior")."""

import os
import socket

import trio

from vfiouser_virtio.errors import ConfigError

_PAUSE = 0.01  # seconds between two tries while the server's backlog is full: no poll tells when it is not


class ConnectError(ConfigError):
    """Socket without a listener."""


async def open_socket(target: str | os.PathLike[str] | socket.socket, timeout: float) -> tuple[socket.socket, str]:
    """A connected socket, and its name for messages; ConnectError after ``timeout`` seconds in a full backlog."""
    if isinstance(target, socket.socket):
        return target, f"fd {target.fileno()}"
    path = os.fspath(target)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        with trio.move_on_after(timeout):
            while True:
                try:
                    sock.connect(path)
                except BlockingIOError:
                    await trio.sleep(_PAUSE)
                else:
                    return sock, path
        raise ConnectError(f"cannot connect to '{path}': too many clients wait there already")
    except OSError as error:
        sock.close()
        raise ConnectError(f"cannot connect to '{path}': {error.strerror or error}") from None
    except BaseException:
        sock.close()
        raise
