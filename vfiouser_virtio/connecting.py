"""Connecting of stream sockets: by this process, or, where a sandbox does not let it, by another one.

In the sandbox of ``serve --sandbox`` there is such a process (`serving.sandbox_connector`) for each address, which
connects to that one and hands the socket over: a right to connect would be one to any socket, or to any host.
"""

import errno
import os
import socket
import threading
from contextlib import suppress
from typing import Any, NamedTuple, TypeAlias

from vfiouser_virtio.briefly import TIMEOUT_S

SocketName: TypeAlias = tuple[Any, ...] | str
"""What bind(2) and connect(2) take, as Python has it."""
StreamAddress: TypeAlias = tuple[socket.AddressFamily, SocketName]

CONNECT_TIMEOUT_S = 5.0
"""Seconds that a peer has to answer."""


class _Connector(NamedTuple):
    pid: int
    socket: socket.socket
    lock: threading.Lock


_CONNECTORS: dict[StreamAddress, _Connector] = {}


def connect_stream(address: StreamAddress) -> socket.socket:
    """A connection, in a sandbox only to what `host_access.HostAccess.connects` named.

    To be called in a thread: it waits up to `CONNECT_TIMEOUT_S`. Raises OSError.
    """
    connector = _CONNECTORS.get(address)
    if connector is None:
        return connect_directly(address)
    with connector.lock:
        connector.socket.send(b"c")
        answer, fds, _flags, _sender = socket.recv_fds(connector.socket, 1, 1)
    if not answer:
        raise ConnectionResetError(errno.ECONNRESET, "the process that connects has died")
    if answer[0]:
        raise OSError(answer[0], os.strerror(answer[0]))
    if not fds:  # it came, and there was no number for it here
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
    return socket.socket(fileno=fds[0])


def connect_directly(address: StreamAddress) -> socket.socket:
    """A connection that this process makes itself. Raises OSError."""
    family, where = address
    peer = socket.socket(family, socket.SOCK_STREAM)
    try:
        peer.settimeout(CONNECT_TIMEOUT_S)
        peer.connect(where)
    except OSError:
        peer.close()
        raise
    return peer


def connect_by(address: StreamAddress, pid: int, sock: socket.socket) -> None:
    """From now on connections to it come from our child ``pid``: a SOCK_SEQPACKET, an errno each, 0 with a socket."""
    sock.settimeout(2 * CONNECT_TIMEOUT_S)
    _CONNECTORS[address] = _Connector(pid, sock, threading.Lock())


def end_connectors() -> None:
    """No more connections: the processes that made them end. One that waits for a peer does so a little later."""
    while _CONNECTORS:
        _address, connector = _CONNECTORS.popitem()
        with connector.socket as sock, suppress(OSError):
            sock.settimeout(TIMEOUT_S)
            sock.shutdown(socket.SHUT_WR)
            while sock.recv(1):
                pass
            os.waitpid(connector.pid, 0)
