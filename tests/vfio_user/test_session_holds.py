"""Replies that must wait, and what waits behind them; the twin socket."""

import errno
import os
import socket
import struct
from collections.abc import Callable

import pytest
import trio
import trio.testing
from support.echo_device import EchoDevice
from support.qemu_messages import (
    Connect,
    header,
    read,
    until,
    write,
)

from vfiouser_virtio import holds
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.testing.raw.client import RawClient
from vfiouser_virtio.vfio_device import Hold
from vfiouser_virtio.vfio_user import Listener, Server
from vfiouser_virtio.vfio_user.server import session

# Holds


async def test_a_hold_delays_its_reply_and_all_that_comes_later(client: RawClient, device: EchoDevice) -> None:
    device.hold = hold = Hold()
    await client.send(client.request(3, struct.pack("<IIQQ", 24, 0, 0, 1 << 30)))
    await client.send(client.request(10, write(4, 0, b"x"), flags=0x10))
    await client.send(client.request(9, read(4, 0, 1)))
    await client.send(client.request(13))
    await client.silence()
    assert device.names() == ["connected", "dma_unmap"]
    hold.finish()
    assert [(await client.receive()).command for _ in range(3)] == [3, 9, 13]
    assert device.names() == ["connected", "dma_unmap", "region_write", "region_read", "reset"]
    assert (await client.call(9, read(4, 0, 1))).body[-1:] == b"x"


async def test_holds_behind_a_hold(client: RawClient, device: EchoDevice) -> None:
    holds = [Hold() for _ in range(3)]
    device.reset = lambda: holds[len(done)]
    done: list[int] = []
    for _ in range(3):
        await client.send(client.request(13))
        await client.send(client.request(9, read(4, 0, 1)))
    for hold in holds:
        await client.silence(0.02)
        done.append(1)
        hold.finish()
        assert [(await client.receive()).command for _ in range(2)] == [13, 9]


async def test_a_hold_that_has_ended_holds_nothing(client: RawClient, device: EchoDevice) -> None:
    device.hold = Hold()
    device.hold.finish()
    assert (await client.call(13)).flags == 1


async def test_a_hold_without_reply_still_holds(client: RawClient, device: EchoDevice) -> None:
    device.hold = hold = Hold()
    await client.send(client.request(13, flags=0x10))
    await client.send(client.request(9, read(4, 0, 1)))
    await client.silence()
    hold.finish()
    assert (await client.receive()).command == 9
    await client.silence()


async def test_a_hold_expires(client: RawClient, device: EchoDevice, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(holds, "HOLD_TIMEOUT", 0.05)
    expired: list[bool] = []
    device.hold = hold = Hold(2, lambda: expired.append(True))
    await client.send(client.request(13))
    await until(lambda: expired)
    hold.finish()
    await client.silence()  # one piece of work is not all of it
    hold.finish()
    assert (await client.receive()).command == 13


async def test_fds_of_messages_behind_a_hold_are_not_lost(
    client: RawClient, device: EchoDevice, open_fds: Callable[[], int]
) -> None:
    before = open_fds()
    device.hold = hold = Hold()
    eventfd = os.eventfd(0)
    await client.send(client.request(13))
    await client.send(client.request(8, struct.pack("<5I", 20, 0x24, 2, 0, 1)), [eventfd])
    await until(lambda: open_fds() == before + 2)
    hold.finish()
    assert [(await client.receive()).command for _ in range(2)] == [13, 8]
    assert len(device.irqs) == 1
    os.close(eventfd)


async def test_a_client_that_goes_during_a_hold_leaves_nothing(
    client: RawClient, device: EchoDevice, connect: Connect, open_fds: Callable[[], int]
) -> None:
    before = open_fds()
    device.hold = hold = Hold()
    eventfd = os.eventfd(0)
    await client.send(client.request(13))
    await client.send(client.request(8, struct.pack("<5I", 20, 0x24, 2, 0, 1)), [eventfd])
    os.close(eventfd)
    await until(lambda: open_fds() == before + 1)
    client.close()
    await until(lambda: "disconnected" in device.names())
    following = connect()
    await following.send(following.request(1, struct.pack("<HH", 0, 0)))
    await following.silence()  # the work of the first client has not ended
    hold.finish()
    assert (await following.receive()).command == 1
    assert device.names() == ["connected", "reset", "disconnected", "connected"]
    assert open_fds() == before  # one client less, one more


async def test_reading_stops_when_too_much_waits_behind_a_hold(
    client: RawClient, device: EchoDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(session, "MAX_BACKLOG", 1 << 20)
    device.hold = hold = Hold()
    device.regions[0] = bytearray(1 << 20)
    await client.send(client.request(13))
    payload = client.request(10, write(0, 0, bytes(60_000)), flags=0x10)
    data, sent, still = payload * 100, 0, 0  # 6 MB
    with trio.fail_after(60):
        while sent < len(data) and (sent < 1 << 20 or still < 50):
            await trio.testing.wait_all_tasks_blocked()  # all that can be read has been
            try:
                sent += client.socket.send(data[sent:])
                still = 0
            except BlockingIOError:
                still += 1
    assert sent < 4 << 20, "nothing stops the reading: a backlog, and what the kernel keeps, is less"
    hold.finish()
    whole = sent // len(payload)
    assert whole >= 15
    await until(lambda: device.names().count("region_write") >= whole)


# DMA requests of ours while the client waits


async def test_dma_replies_are_never_held(client: RawClient, device: EchoDevice, nursery: trio.Nursery) -> None:
    device.hold = hold = Hold()
    await client.send(client.request(13))
    await until(lambda: "reset" in device.names())
    found: list[bytes] = []

    async def work() -> None:
        assert device.client is not None
        found.append(await device.client.dma_read(0x1000, 4))
        hold.finish()

    nursery.start_soon(work)
    asked = await client.receive()
    assert (asked.command, asked.flags, asked.body) == (11, 0, struct.pack("<QQ", 0x1000, 4))
    await client.send(header(asked.id, 11, 36, 1) + asked.body + b"abcd")
    assert (await client.receive()).command == 13
    assert found == [b"abcd"]


async def test_a_client_that_goes_fails_the_dma_under_way(
    client: RawClient, device: EchoDevice, nursery: trio.Nursery
) -> None:
    errors: list[PeerError] = []

    async def work(count: int) -> None:
        assert device.client is not None
        with pytest.raises(PeerError) as caught:
            await device.client.dma_read(0, count)
        errors.append(caught.value)

    for count in (4, 32768, 32768):  # one is under way, the others wait for room
        nursery.start_soon(work, count)
    await client.receive()
    client.close()
    await until(lambda: len(errors) == 3)
    assert {error.errno for error in errors} == {errno.ENOTCONN}


@pytest.mark.parametrize("message", [header(5, 11, 16, 1), header(5, 11, 16, 0x21, 14), header(0, 2, 16, 1)])
async def test_a_reply_that_nobody_waits_for(client: RawClient, message: bytes) -> None:
    for _ in range(3):
        await client.send(message)
    assert (await client.call(13)).flags == 1


# Twin socket


async def test_twin_socket(
    qemu_listener: Listener,
    connect: Connect,
    device: EchoDevice,
    nursery: trio.Nursery,
    open_fds: Callable[[], int],
) -> None:
    client = connect()
    before = open_fds()
    reply = await client.capabilities(max_msg_fds=8, twin_socket={"supported": True}, unknown="x" * 40)
    assert b'"twin_socket":{"supported":true,"fd_index":0}' in reply.body
    (fd,) = reply.fds
    twin = RawClient(socket.socket(fileno=fd))
    found: list[bytes] = []

    async def work() -> None:
        assert device.client is not None
        found.append(await device.client.dma_read(0x2000, 3))
        await device.client.dma_write(0x3000, b"xyz")
        found.append(b"written")

    nursery.start_soon(work)
    asked = await twin.receive()
    assert (await client.call(13)).flags == 1  # the other socket goes on meanwhile
    await twin.send(header(asked.id, 11, 35, 1) + asked.body + b"abc")
    asked = await twin.receive()
    assert (asked.command, asked.body) == (12, struct.pack("<QQ", 0x3000, 3) + b"xyz")
    await twin.send(header(asked.id, 12, 32, 1) + asked.body[:16])
    await until(lambda: found == [b"abc", b"written"])
    twin.close()
    await client.no_more()  # without it we could not reach the memory
    client.close()
    await until(lambda: "disconnected" in device.names())
    assert open_fds() == before - 1  # ours


async def test_replies_on_the_twin_socket_leave_others_their_turns(
    nursery: trio.Nursery,
    device: EchoDevice,
    listener: Listener,
    connect: Connect,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Thousands come with one recvmsg(2), and none of them need be an answer to anything."""
    nursery.start_soon(Server(device).serve, listener)
    reply = await connect().capabilities(twin_socket={"supported": True}, unknown="x" * 40)
    twin = RawClient(socket.socket(fileno=reply.fds[0]))
    looks = 0

    def clock() -> float:  # each look at it says that it is time
        nonlocal looks
        looks += 1
        return float("inf")

    monkeypatch.setattr(session, "perf_counter", clock)
    await twin.send(header(1, 11, 16, 1) * 1000)
    with trio.fail_after(60):
        while looks < 1000:
            before = looks
            await trio.lowlevel.checkpoint()
            assert looks <= before + 3
    twin.close()


async def test_no_twin_socket_unless_offered(client: RawClient, device: EchoDevice, nursery: trio.Nursery) -> None:
    assert device.client is not None
    nursery.start_soon(device.client.dma_write, 0, b"x")
    asked = await client.receive()
    assert asked.command == 12
    await client.send(header(asked.id, 12, 16, 1))


async def test_a_request_on_the_twin_socket_is_the_end(
    qemu_listener: Listener, connect: Connect, device: EchoDevice
) -> None:
    client = connect()
    reply = await client.capabilities(twin_socket={"supported": True}, unknown="x" * 40)
    twin = RawClient(socket.socket(fileno=reply.fds[0]))
    await twin.send(twin.request(13))
    await client.no_more()
    twin.close()
    assert "reset" not in device.names()
