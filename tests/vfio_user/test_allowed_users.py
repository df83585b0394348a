"""Clients of users that are not allowed: refused before they are heard, whoever is being served."""

import logging
import os
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import trio
from support.echo_device import EchoDevice

from vfiouser_virtio.libvfio_user import LibraryListener
from vfiouser_virtio.testing.raw.client import RawClient
from vfiouser_virtio.vfio_user import Listener, ListenError, Server, from_fd

Connect = Callable[[], RawClient]
US = os.geteuid()
OTHER = 12345


@contextmanager
def as_other_user() -> Iterator[None]:
    """Block without an await in which we are another user, who may do the same with files."""
    if US != 0:
        pytest.skip("only root can connect as another user")
    os.seteuid(OTHER)
    try:
        yield
    finally:
        os.seteuid(US)


@pytest.fixture
def listener() -> Iterator[Listener]:
    """Without a file, so that its mode keeps no user out."""
    sock = socket.socket(socket.AF_UNIX)
    sock.bind("")  # unix(7): autobind
    sock.listen()
    with Listener(sock, "abstract") as listener:
        yield listener


@pytest.fixture
def connect(listener: Listener) -> Iterator[Connect]:
    clients: list[RawClient] = []

    def connect() -> RawClient:
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(listener.socket.getsockname())
        clients.append(RawClient(sock))
        return clients[-1]

    yield connect
    for client in clients:
        client.close()


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


async def test_who_is_not_allowed_is_refused_and_named(
    nursery: trio.Nursery, listener: Listener, connect: Connect, device: EchoDevice, caplog: pytest.LogCaptureFixture
) -> None:
    listener.allow_only([OTHER], "blk7")
    nursery.start_soon(Server(device).serve, listener)
    with trio.fail_after(60):
        await connect().no_more()
    assert warnings(caplog) == [f"blk7: refused a client, pid {os.getpid()} of uid {US}, whose user is not allowed"]
    assert [record.__dict__["device"] for record in caplog.records] == ["blk7"]  # by which lines are limited
    assert device.names() == []


async def test_users_on_one_socket(
    nursery: trio.Nursery, listener: Listener, connect: Connect, device: EchoDevice, caplog: pytest.LogCaptureFixture
) -> None:
    """Root is refused if it is not named; one who is refused disturbs no one who is served."""
    listener.allow_only([OTHER], "blk7")
    nursery.start_soon(Server(device).serve, listener)
    with as_other_user():
        theirs = connect()
    with trio.fail_after(60):
        assert (await theirs.version()).flags == 1
        await connect().no_more()
        assert (await theirs.call(13)).flags == 1
        with as_other_user():
            second = connect()
        await second.no_more()
    assert [f"uid {US}," in line for line in warnings(caplog)] == [True, False]
    assert "refused another client" in warnings(caplog)[1]
    assert device.names() == ["connected", "reset"]


async def test_a_listening_socket_that_another_process_has(
    nursery: trio.Nursery, listener: Listener, connect: Connect, device: EchoDevice, caplog: pytest.LogCaptureFixture
) -> None:
    with from_fd(os.dup(listener.socket.fileno())) as shared:
        shared.allow_only([US + 1], "blk7")
        nursery.start_soon(Server(device).serve, shared)
        with trio.fail_after(60):
            await connect().no_more()
            await connect().no_more()
        assert len(warnings(caplog)) == 2
        nursery.cancel_scope.cancel()


def test_a_connection_that_is_handed_over() -> None:
    ours, theirs = socket.socketpair()
    with theirs, from_fd(ours.detach()) as listener:
        listener.allow_only([US], "blk7")
        with pytest.raises(ListenError, match=rf"fd \d+: its client is of uid {US}, which is not allowed"):
            listener.allow_only([US + 1], "blk7")


def test_libvfio_user_has_no_such_choice(tmp_path: os.PathLike[str]) -> None:
    with LibraryListener(os.path.join(tmp_path, "a.sock")) as listener, pytest.raises(ListenError, match="--allow-uid"):
        listener.allow_only([US], "blk7")
