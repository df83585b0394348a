"""Raw clients of a test's own server."""

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

import trio

from vfiouser_virtio.testing.raw.client import RawClient


def raw_client(path: str) -> RawClient:
    """A client that has connected, and is to be closed. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.connect(path)
    except OSError:
        sock.close()
        raise
    return RawClient(sock)


async def wait_unserved(path: str) -> None:
    """Until nobody listens at this socket any more."""
    with trio.fail_after(60):
        while True:
            try:
                raw_client(path).close()
            except OSError:
                return
            await trio.sleep(0.01)


@contextmanager
def connecting(path: str) -> Iterator[Callable[[], RawClient]]:
    """What connects a new client to the socket each time it is called; all are closed at the end of the block."""
    with ExitStack() as stack:

        def connect() -> RawClient:
            client = raw_client(path)
            stack.callback(client.close)
            return client

        yield connect
