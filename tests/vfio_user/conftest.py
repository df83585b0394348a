"""A server with an `EchoDevice` on a real socket, and clients that speak to it byte by byte."""

import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import pytest
import trio
from support.connecting import connecting
from support.dispatching import Send
from support.echo_device import EchoDevice

from vfiouser_virtio.fds import close_all
from vfiouser_virtio.testing.raw.client import RawClient
from vfiouser_virtio.vfio_user import Client, Listener, Server, listen_path
from vfiouser_virtio.vfio_user import connect as connect_to
from vfiouser_virtio.vfio_user.server.dispatch import Response, dispatch
from vfiouser_virtio.vfio_user.server.version import Negotiated
from vfiouser_virtio.vfio_user.wire.connection import Message


@pytest.fixture
def device() -> EchoDevice:
    """What the server serves."""
    return EchoDevice()


@pytest.fixture
def listener(tmp_path: Path) -> Iterator[Listener]:
    """A listening socket in a directory of its own."""
    with listen_path(tmp_path / "vu.sock") as listener:
        yield listener


@pytest.fixture
def qemu_listener(nursery: trio.Nursery, device: EchoDevice, listener: Listener) -> Listener:
    """A listening socket with a server behind it."""
    nursery.start_soon(Server(device).serve, listener)
    return listener


@pytest.fixture
def connect(listener: Listener) -> Iterator[Callable[[], RawClient]]:
    """Connect a new client; all are closed at the end."""
    with connecting(listener.name) as connect:
        yield connect


@pytest.fixture
async def client(
    nursery: trio.Nursery, device: EchoDevice, listener: Listener, connect: Callable[[], RawClient]
) -> AsyncIterator[RawClient]:
    """A client that has negotiated QEMU's version, of a server that runs."""
    nursery.start_soon(Server(device).serve, listener)
    client = connect()
    await client.version()
    yield client
    client.close()


@pytest.fixture
def open_fds() -> Callable[[], int]:
    """How many file descriptors this process has."""
    return lambda: len(os.listdir("/proc/self/fd"))


@pytest.fixture
def server(nursery: trio.Nursery, device: EchoDevice, listener: Listener) -> str:
    """The path of a server that runs, and does REGION_WRITE_MULTI."""
    nursery.start_soon(Server(device, write_multiple=True).serve, listener)
    return listener.name


@pytest.fixture
async def echo(server: str) -> AsyncIterator[Client]:
    """A client with the default options."""
    async with connect_to(server) as client:
        yield client


@pytest.fixture
def send(device: EchoDevice) -> Send:
    def send(command: int, payload: bytes = b"", fds: tuple[int, ...] = (), **negotiated: object) -> Response:
        agreed = Negotiated(max_msg_fds=int(str(negotiated.get("max_msg_fds", 16))),
                            write_multiple=bool(negotiated.get("write_multiple")))  # fmt: skip
        return dispatch(device, Message(1, command, 0, 0, memoryview(payload), list(fds)), agreed)

    return send


@pytest.fixture
def eventfds() -> Iterator[Callable[[int], tuple[int, ...]]]:
    made: list[int] = []

    def make(count: int) -> tuple[int, ...]:
        made.extend(os.eventfd(0, os.EFD_NONBLOCK) for _ in range(count))
        return tuple(made[-count:])

    yield make
    close_all(made)
