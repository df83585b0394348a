"""Raw clients of a test's own server."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from vfiouser_virtio.testing.raw.client import RawClient


@contextmanager
def connecting(path: str) -> Iterator[Callable[[], RawClient]]:
    """What connects a new client to the socket each time it is called; all are closed at the end of the block."""
    with ExitStack() as stack:

        def connect() -> RawClient:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.connect(path)
            client = RawClient(sock)
            stack.callback(client.close)
            return client

        yield connect
