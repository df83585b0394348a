"""A server and its clients: one after another, a second one refused, and nothing left of those who went."""

import gc
import logging
import os
import socket
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import trio
import trio.testing
from support.echo_device import EchoDevice

from vfiouser_virtio import holds
from vfiouser_virtio.testing.raw.client import RawClient
from vfiouser_virtio.vfio_device import Hold
from vfiouser_virtio.vfio_user import Listener, Server, from_fd
from vfiouser_virtio.vfio_user.server.session import Session

Connect = Callable[[], RawClient]


async def until(condition: Callable[[], object]) -> None:
    with trio.fail_after(60):
        while not condition():
            await trio.sleep(0.001)


async def test_one_client_after_another_finds_the_devices_state(
    client: RawClient, device: EchoDevice, connect: Connect, open_fds: Callable[[], int]
) -> None:
    before = open_fds()
    for number in range(20):
        await client.call(10, bytes([number]) + bytes(7) + b"\4\0\0\0\1\0\0\0" + b"x")
        client.close()
        client = connect()  # at once: the server may not have noticed yet that the first one is gone
        await client.version()
        reply = await client.call(9, bytes([number]) + bytes(7) + b"\4\0\0\0\1\0\0\0")
        assert reply.body[16:] == b"x"
    assert open_fds() == before
    assert [name for name in device.names() if "connected" in name] == ["connected", "disconnected"] * 20 + [
        "connected"
    ]


async def test_a_second_client_is_refused_at_once_and_logged(
    client: RawClient, device: EchoDevice, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        second = connect()
        with trio.fail_after(60):
            await second.no_more()
    assert (await client.call(13)).flags == 1
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert len(lines) == 3
    assert f"refused another client, pid {os.getpid()}" in lines[0]
    assert device.names() == ["connected", "reset"]


async def test_a_client_that_says_nothing_is_a_client(
    nursery: trio.Nursery, listener: Listener, device: EchoDevice, connect: Connect
) -> None:
    nursery.start_soon(Server(device).serve, listener)
    silent = connect()
    await silent.silence()
    await connect().no_more()
    silent.close()
    await until(lambda: True)
    following = connect()
    assert (await following.version()).flags == 1
    assert device.names() == ["connected"]  # disconnected() only for who was connected


async def test_the_next_client_waits_until_the_last_ones_memory_is_free(
    client: RawClient, device: EchoDevice, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(holds, "HOLD_TIMEOUT", 0.05)
    expired: list[bool] = []
    device.disconnect_hold = hold = Hold(1, lambda: expired.append(True))
    client.close()
    await until(lambda: "disconnected" in device.names())
    following = connect()
    await following.send(following.request(1, bytes(4)))
    await until(lambda: expired)
    await following.silence()
    device.disconnect_hold = None
    hold.finish()
    assert (await following.receive()).command == 1


async def test_a_client_that_is_killed_amid_a_flood(
    client: RawClient, device: EchoDevice, connect: Connect, open_fds: Callable[[], int]
) -> None:
    before = open_fds()
    for number in range(10):
        await client.send(client.request(13) * 500)  # and reads none of the answers
        client.close()
        client = connect()
        assert (await client.version()).flags == 1
        assert device.names().count("disconnected") == number + 1
    assert open_fds() == before


async def test_after_a_bug_in_disconnected_there_is_no_other_client(
    client: RawClient, device: EchoDevice, connect: Connect, caplog: pytest.LogCaptureFixture
) -> None:
    def disconnected() -> None:
        raise RuntimeError("the bug")

    device.disconnected = disconnected
    client.close()
    with trio.fail_after(60):
        for _ in range(2):  # the device may have kept the first one's memory
            await connect().no_more()
    assert "the bug" in caplog.text
    assert f"refused pid {os.getpid()}: the device failed when the client before it left" in caplog.text
    assert [name for name in device.names() if name == "connected"] == ["connected"]


async def test_cancelling_tells_the_device_and_closes_everything(
    device: EchoDevice, listener: Listener, connect: Connect, open_fds: Callable[[], int]
) -> None:
    before = open_fds()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(Server(device).serve, listener)
        client = connect()
        await client.version()
        nursery.cancel_scope.cancel()
    assert device.names() == ["connected", "disconnected"]
    client.close()
    assert open_fds() == before


async def test_cancelling_does_not_wait_for_ever(
    device: EchoDevice, listener: Listener, connect: Connect, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("vfiouser_virtio.vfio_user.server.server.HOLD_TIMEOUT", 0.05)
    device.disconnect_hold = Hold()
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Server(device).serve, listener)
            await connect().version()
            nursery.cancel_scope.cancel()
    assert device.names() == ["connected", "disconnected"]


async def test_a_connection_that_somebody_else_accepted(
    device: EchoDevice, nursery: trio.Nursery, open_fds: Callable[[], int]
) -> None:
    before = open_fds()
    ours, theirs = socket.socketpair()
    with from_fd(theirs.detach()) as listener:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(Server(device, name="blk0").serve, listener)
            client = RawClient(ours)
            assert (await client.version()).flags == 1
            assert device.client is not None
            assert device.client.name == f"blk0 (pid {os.getpid()})"
            client.close()
            # serve() returns with its only client
    assert device.names() == ["connected", "disconnected"]
    assert open_fds() == before


async def test_nothing_of_a_session_waits_for_a_search_for_garbage(
    nursery: trio.Nursery, device: EchoDevice, listener: Listener, connect: Connect
) -> None:
    """A client that came again and again, with long messages, had the process grow by megabytes between two of them."""
    sessions: list[weakref.ref[Session]] = []

    def session(*arguments: Any, **more: Any) -> Session:
        made = Session(*arguments, **more)
        sessions.append(weakref.ref(made))
        return made

    nursery.start_soon(Server(device, session=session).serve, listener)
    client = connect()
    gc.disable()
    try:
        await client.version()
        client.close()
        await until(lambda: "disconnected" in device.names())
        device.client = None
        await trio.testing.wait_all_tasks_blocked()
        [left] = sessions
        assert left() is None
    finally:
        gc.enable()


async def test_one_process_serves_many_sockets(nursery: trio.Nursery, tmp_path: "os.PathLike[str]") -> None:
    from vfiouser_virtio.vfio_user import listen_path

    devices = [EchoDevice() for _ in range(5)]
    clients = []
    for number, device in enumerate(devices):
        listener = listen_path(os.fspath(tmp_path) + f"/{number}.sock")
        nursery.start_soon(Server(device).serve, listener)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(listener.name)
        clients.append((RawClient(sock), listener))
        await clients[-1][0].version()
    for client, _listener in clients:
        assert (await client.call(13)).flags == 1
    nursery.cancel_scope.cancel()
    for client, listener in clients:
        client.close()
        listener.close()
    assert [device.names()[:2] for device in devices] == [["connected", "reset"]] * 5
