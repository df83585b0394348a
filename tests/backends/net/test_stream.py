"""The stream netdev, with real sockets."""

import os
import socket
import struct
from pathlib import Path

import pytest
import trio
from support.net_sink import Sink

from vfiouser_virtio.backends.net import stream
from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Frame, frame_of
from vfiouser_virtio.backends.net.stream import StreamNetdev
from vfiouser_virtio.errors import ConfigError, DeviceError

FRAME = bytes(range(60))


def pair(tmp_path: Path) -> tuple[StreamNetdev, StreamNetdev]:
    server = StreamNetdev(addr__path=tmp_path / "s", server=True)
    return server, StreamNetdev(addr__path=tmp_path / "s")


async def linked(netdev: StreamNetdev, up: bool = True) -> None:
    with trio.fail_after(60):
        while netdev.link is not up:
            await netdev.wait_link()


async def put(netdev: StreamNetdev, frame: Frame) -> None:
    with trio.fail_after(60):
        while not netdev.put(frame):
            await netdev.wait_room()


async def test_frames_of_all_lengths_both_ways(tmp_path: Path, nursery: trio.Nursery) -> None:
    server, client = pair(tmp_path)
    here, there = Sink(), Sink()
    nursery.start_soon(server.run, here)
    nursery.start_soon(client.run, there)
    await linked(server)
    lengths = [14, 60, 1514, 65589, stream.MAX_LENGTH, 1]
    for length in lengths:
        # As a guest's: in several pieces.
        data = os.urandom(length)
        await put(client, Frame([memoryview(data)[:10], memoryview(data)[10:]], length))
        await put(server, frame_of(data))
        assert (await here.wait_frames(1))[-1] == data
        assert (await there.wait_frames(1))[-1] == data
        here.frames.clear()
        there.frames.clear()
    assert client.counters.tx_packets == server.counters.rx_packets == len(lengths)
    assert client.counters.tx_bytes == server.counters.rx_bytes == sum(lengths)
    client.close()
    server.close()
    assert list(tmp_path.iterdir()) == []


async def test_frames_in_pieces_and_many_at_once(tmp_path: Path, nursery: trio.Nursery) -> None:
    server = StreamNetdev(addr__path=tmp_path / "s", server=True)
    sink = Sink()
    nursery.start_soon(server.run, sink)
    peer = await trio.open_unix_socket(tmp_path / "s")
    wire = (struct.pack(">I", 60) + FRAME) * 3 + struct.pack(">I", 0)
    for byte in wire:
        await peer.send_all(bytes([byte]))
        await trio.testing.wait_all_tasks_blocked()
    assert await sink.wait_frames(3) == [FRAME] * 3
    await peer.send_all((struct.pack(">I", 60) + FRAME) * 5000)
    assert len(await sink.wait_frames(5003)) == 5003
    await peer.aclose()
    server.close()


async def test_the_end_of_a_frame_needs_no_other_frame(nursery: trio.Nursery) -> None:
    """It waited for one: a guest that waits for an answer sent the end of its packet with the next try only."""
    ours, theirs = socket.socketpair()
    ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    with ours:
        netdev = StreamNetdev(addr__type="fd", addr__str=ours.fileno())
    nursery.start_soon(netdev.run, Sink())
    peer = trio.SocketStream(trio.socket.from_stdlib_socket(theirs))
    for _ in range(3):
        data = os.urandom(60000)
        await put(netdev, frame_of(data))
        received = b""
        with trio.fail_after(60):
            while len(received) < 4 + len(data):
                received += await peer.receive_some()
        assert received == struct.pack(">I", len(data)) + data
    await peer.aclose()
    netdev.close()


@pytest.mark.parametrize("length", [0, 1])
async def test_a_peer_that_sends_many_short_frames_holds_nothing_up(length: int, nursery: trio.Nursery) -> None:
    """What was read at once was handed over at once: 50,000 of them, for 0.1 s."""
    ours, theirs = socket.socketpair()
    with ours:
        netdev = StreamNetdev(addr__type="fd", addr__str=ours.fileno())
    count, rounds = 8000, 0
    theirs.setblocking(False)
    assert theirs.send((struct.pack(">I", length) + bytes(length)) * count) == count * (4 + length)
    theirs.send(struct.pack(">I", 60) + FRAME)

    async def others() -> None:
        nonlocal rounds
        while True:
            rounds += 1
            await trio.lowlevel.checkpoint()

    nursery.start_soon(others)
    sink = Sink()
    nursery.start_soon(netdev.run, sink)
    assert await sink.wait_frame(count if length else 0) == FRAME
    assert rounds >= count // 256
    theirs.close()
    netdev.close()


async def test_a_driver_that_leaves_in_the_middle_of_a_frame_costs_none(tmp_path: Path) -> None:
    """The connection outlives it, and so does what of a frame has come."""
    server = StreamNetdev(addr__path=tmp_path / "s", server=True)
    peer = await trio.open_unix_socket(tmp_path / "s")
    wire = struct.pack(">I", 60) + FRAME
    full = Sink(room=1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run, full)
        await peer.send_all(wire + wire + wire[:30])  # the second one waits for room, the third is half there
        await full.wait_frames(1)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    sink = Sink()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(server.run, sink)
        assert await sink.wait_frames(1) == [FRAME]
        await peer.send_all(wire[30:])
        assert await sink.wait_frames(2) == [FRAME, FRAME]
        nursery.cancel_scope.cancel()
    assert server.link
    await peer.aclose()
    server.close()


async def test_the_length_of_no_frame_ends_the_connection(tmp_path: Path, nursery: trio.Nursery) -> None:
    server = StreamNetdev(addr__path=tmp_path / "s", server=True)
    sink = Sink()
    nursery.start_soon(server.run, sink)
    peer = await trio.open_unix_socket(tmp_path / "s")
    await peer.send_all(struct.pack(">I", 60) + FRAME + struct.pack(">I", stream.MAX_LENGTH + 1))
    with trio.fail_after(60):
        assert await peer.receive_some() == b""
    await peer.aclose()
    assert await sink.wait_frames(1) == [FRAME]
    again = await trio.open_unix_socket(tmp_path / "s")  # the next one is welcome
    await again.send_all(struct.pack(">I", 60) + FRAME)
    assert len(await sink.wait_frames(2)) == 2
    await again.aclose()
    server.close()


async def test_a_guest_that_takes_nothing_holds_up_its_peer_and_loses_nothing(
    tmp_path: Path, nursery: trio.Nursery
) -> None:
    server, client = pair(tmp_path)
    full, there = Sink(room=3), Sink()
    nursery.start_soon(server.run, full)
    nursery.start_soon(client.run, there)
    await linked(server)
    sent = 0
    while client.put(frame_of(b"%06d" % sent + bytes(60000))) and sent < 1000:
        sent += 1
        await trio.testing.wait_all_tasks_blocked()
    assert 3 < sent < 1000
    assert full.refused  # it was asked, and the frame was kept
    full.more(10_000)
    await put(client, frame_of(b"%06d" % sent + bytes(60000)))
    frames = await full.wait_frames(sent + 1)
    assert [int(frame[:6]) for frame in frames] == list(range(sent + 1))
    client.close()
    server.close()


async def test_without_a_peer_frames_are_dropped_and_counted(tmp_path: Path, nursery: trio.Nursery) -> None:
    server = StreamNetdev(addr__path=tmp_path / "s", server=True)
    nursery.start_soon(server.run, Sink())
    assert server.put(frame_of(FRAME))
    assert (server.counters.tx_packets, server.counters.tx_dropped) == (0, 1)
    assert not server.link
    peer = await trio.open_unix_socket(tmp_path / "s")
    await linked(server)
    await peer.aclose()
    await linked(server, up=False)
    assert server.put(frame_of(FRAME))
    assert server.counters.tx_drops.by_reason == {Drop.NO_PEER: 2}
    server.close()


async def test_a_client_connects_again(tmp_path: Path, nursery: trio.Nursery) -> None:
    client = StreamNetdev(addr__path=tmp_path / "s", reconnect_ms=1)  # nobody is there yet
    there = Sink()
    nursery.start_soon(client.run, there)
    for number in range(3):
        server = StreamNetdev(addr__path=tmp_path / "s", server=True)
        async with trio.open_nursery() as running:
            running.start_soon(server.run, Sink())
            await linked(client)
            await linked(server)
            await put(server, frame_of(FRAME))
            await there.wait_frames(number + 1)
            running.cancel_scope.cancel()
        server.close()
        await linked(client, up=False)
    client.close()


async def test_tcp_and_a_given_socket(nursery: trio.Nursery) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = StreamNetdev(addr__type="inet", addr__host="127.0.0.1", addr__port=port, server=True)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        client = StreamNetdev(addr__type="fd", addr__str=connection.fileno())
    here, there = Sink(), Sink()
    nursery.start_soon(server.run, here)
    nursery.start_soon(client.run, there)
    await put(client, frame_of(FRAME))
    assert await here.wait_frames(1) == [FRAME]
    assert "127.0.0.1" in server.describe()
    client.close()
    server.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "addr.type=unix needs addr.path"),
        ({"addr__type": "inet", "addr__host": "::1"}, "addr.type=inet needs addr.port"),
        ({"addr__path": Path("x"), "addr__port": 1}, "addr.port goes with addr.type=inet"),
        ({"addr__path": Path("x" * 108)}, "longer than 107 bytes"),
        ({"addr__type": "inet", "addr__host": "::1", "addr__port": 65536}, "not 0 to 65535"),
        ({"addr__path": Path("x"), "server": True, "reconnect_ms": 1}, "reconnect-ms=1 is for a client"),
        ({"addr__type": "fd", "addr__str": 0, "server": True}, "server=on listens"),
        ({"addr__type": "fd", "addr__str": 1 << 40}, "addr.str=1099511627776: not the number of a file descriptor"),
        ({"addr__type": "inet", "addr__host": "a..b", "addr__port": 1}, "addr: a..b:1: not a host's name"),
    ],
)
def test_mistakes(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        StreamNetdev(**options)  # type: ignore[arg-type] # of many types


def test_what_cannot_be_had(tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"stream unix:.*is its server there"):
        StreamNetdev(addr__path=tmp_path / "none")
    (tmp_path / "file").touch()
    with pytest.raises(DeviceError, match="not a socket"):
        StreamNetdev(addr__path=tmp_path / "file", server=True)
    with (tmp_path / "file").open() as file, pytest.raises(DeviceError, match="is no socket"):
        StreamNetdev(addr__type="fd", addr__str=file.fileno())
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as wrong, pytest.raises(DeviceError, match="SOCK_STREAM"):
        StreamNetdev(addr__type="fd", addr__str=wrong.fileno())
    with socket.socket() as alone, pytest.raises(DeviceError, match=r"fd .*not connected: a socket that is given"):
        StreamNetdev(addr__type="fd", addr__str=alone.fileno())
