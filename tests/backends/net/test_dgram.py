"""The dgram netdev, with real sockets."""

import errno
import os
import socket
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing
from support.net_sink import Sink

from vfiouser_virtio.backends.net import dgram
from vfiouser_virtio.backends.net.dgram import DgramNetdev
from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Frame, frame_of
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.errors import ConfigError, DeviceError
from vfiouser_virtio.protocols.virtio.net import NetFeature
from vfiouser_virtio.testing.driver import running

FRAME = bytes(range(60))


def pair(tmp_path: Path) -> tuple[DgramNetdev, DgramNetdev]:
    a, b = tmp_path / "a", tmp_path / "b"
    return DgramNetdev(local__path=a, remote__path=b), DgramNetdev(local__path=b, remote__path=a)


async def put(netdev: DgramNetdev, frame: Frame) -> None:
    with trio.fail_after(60):
        while not netdev.put(frame):
            await netdev.wait_room()


async def test_frames_of_all_lengths(tmp_path: Path, nursery: trio.Nursery) -> None:
    one, other = pair(tmp_path)
    here, there = Sink(), Sink()
    nursery.start_soon(one.run, here)
    nursery.start_soon(other.run, there)
    for count, length in enumerate([1, 14, 60, 1514, 65589, dgram.MAX_LENGTH], 1):
        data = os.urandom(length)
        await put(one, Frame([memoryview(data)[:10], memoryview(data)[10:]], length))
        assert (await there.wait_frames(count))[-1] == data
    assert one.counters.tx_packets == other.counters.rx_packets == 6
    one.close()
    other.close()
    assert list(tmp_path.iterdir()) == []


async def test_nothing_is_lost_where_both_are_there(tmp_path: Path, nursery: trio.Nursery) -> None:
    one, other = pair(tmp_path)
    sink = Sink(room=5)
    nursery.start_soon(other.run, sink)
    sent = 0
    while one.put(frame_of(b"%06d" % sent)):
        sent += 1
        await trio.testing.wait_all_tasks_blocked()
        assert sent < 100_000
    sink.more(100_000)
    await put(one, frame_of(b"%06d" % sent))
    assert [int(frame) for frame in await sink.wait_frames(sent + 1)] == list(range(sent + 1))
    one.close()
    other.close()


async def test_a_frame_that_waits_for_room_when_the_driver_leaves_is_counted(tmp_path: Path) -> None:
    one, other = pair(tmp_path)
    sink = Sink(room=0)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(other.run, sink)
        assert one.put(frame_of(FRAME))
        await trio.testing.wait_all_tasks_blocked()
        assert sink.refused
        nursery.cancel_scope.cancel()
    assert other.counters.rx_packets == 0
    assert other.counters.rx_drops.by_reason == {Drop.DRIVER_LEFT: 1}
    one.close()
    other.close()


@pytest.mark.parametrize("queues", [1, 2])
async def test_a_peer_that_reads_nothing_loses_frames_and_takes_no_core(tmp_path: Path, queues: int) -> None:
    """The kernel says that there is room, and takes no frame: `put` was called again and again."""
    calls = 0

    class Counting(DgramNetdev):
        def put(self, frame: Frame) -> bool:
            nonlocal calls
            calls += 1
            return super().put(frame)

    netdev = Counting(local__path=tmp_path / "a", remote__path=tmp_path / "b")
    net = Net(netdev=netdev, queues=queues)
    features = NetFeature.MQ.mask | NetFeature.CTRL_VQ.mask
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
        peer.bind(str(tmp_path / "b"))
        async with running(net, features=features) as driver:
            for number in range(10):
                queue = 1 + 2 * (number % queues)
                tokens = [driver.add(queue, [bytes(12) + FRAME]) for _ in range(100)]
                driver.kick(queue)
                for token in tokens:
                    await driver.wait(queue, token)
        counters = netdev.counters
        assert counters.tx_packets + counters.tx_dropped == 1000
        assert list(counters.tx_drops.by_reason) == [Drop.PEER_FULL]
        assert calls < 1200

        peer.setblocking(False)
        for _ in range(counters.tx_packets):
            assert peer.recv(1000) == FRAME
        with pytest.raises(BlockingIOError):
            peer.recv(1000)


async def test_once_it_reads_again_it_is_waited_for_again(tmp_path: Path) -> None:
    netdev = DgramNetdev(local__path=tmp_path / "a", remote__path=tmp_path / "b")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as peer:
        peer.bind(str(tmp_path / "b"))
        while not netdev.counters.tx_dropped:
            await put(netdev, frame_of(FRAME))
        peer.recv(1000)
        assert netdev.put(frame_of(FRAME))
        assert not netdev.put(frame_of(FRAME))
        assert netdev.counters.tx_dropped == 1
    netdev.close()


@pytest.mark.parametrize(
    "answer",
    [errno.ECONNREFUSED, errno.ENOPROTOOPT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENONET, errno.EACCES],
)
async def test_answers_of_the_network_end_nothing(
    answer: int, monkeypatch: pytest.MonkeyPatch, nursery: trio.Nursery
) -> None:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    netdev = DgramNetdev(local__type="fd", local__str=ours.detach())
    receive, answers = socket.socket.recvmsg_into, [answer] * 3

    def answered(self: socket.socket, *arguments: Any) -> Any:
        if answers:
            raise OSError(answers.pop(), "an answer")
        return receive(self, *arguments)

    monkeypatch.setattr(socket.socket, "recvmsg_into", answered)
    sink = Sink()
    nursery.start_soon(netdev.run, sink)
    with theirs:
        theirs.send(FRAME)
        assert await sink.wait_frames(1) == [FRAME]
    assert not answers
    netdev.close()


async def test_an_other_end_that_turns_away_ends_nothing(tmp_path: Path, nursery: trio.Nursery) -> None:
    """It connects elsewhere, with a frame unread: our next receive says ECONNRESET. The device was gone by it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    ours.bind(str(tmp_path / "ours"))
    netdev = DgramNetdev(local__type="fd", local__str=ours.detach())
    sink = Sink()
    nursery.start_soon(netdev.run, sink)
    with theirs, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as elsewhere:
        elsewhere.bind(str(tmp_path / "elsewhere"))
        assert netdev.put(frame_of(FRAME))
        theirs.connect(str(tmp_path / "elsewhere"))
        await trio.testing.wait_all_tasks_blocked()
        theirs.connect(str(tmp_path / "ours"))
        theirs.send(FRAME)
        assert await sink.wait_frames(1) == [FRAME]
    netdev.close()


async def test_where_nobody_is_frames_are_dropped_and_counted(tmp_path: Path, nursery: trio.Nursery) -> None:
    one = DgramNetdev(local__path=tmp_path / "a", remote__path=tmp_path / "b")
    sink = Sink()
    nursery.start_soon(one.run, sink)
    assert one.put(frame_of(FRAME))
    assert (one.counters.tx_packets, one.counters.tx_drops.by_reason) == (0, {Drop.NO_PEER: 1})
    other = DgramNetdev(local__path=tmp_path / "b", remote__path=tmp_path / "a")
    assert other.put(frame_of(FRAME))
    assert await sink.wait_frames(1) == [FRAME]
    other.close()
    one.close()


async def test_udp(nursery: trio.Nursery) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as a, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as b:
        a.bind(("127.0.0.1", 0))
        b.bind(("127.0.0.1", 0))
        ports = a.getsockname()[1], b.getsockname()[1]
    netdevs = [
        DgramNetdev(local__host="127.0.0.1", local__port=here, remote__host="127.0.0.1", remote__port=there)
        for here, there in (ports, ports[::-1])
    ]
    sinks = Sink(), Sink()
    for netdev, sink in zip(netdevs, sinks, strict=True):
        nursery.start_soon(netdev.run, sink)
    for netdev, sink in zip(netdevs, sinks[::-1], strict=True):
        await put(netdev, frame_of(FRAME))
        assert await sink.wait_frames(1) == [FRAME]
    for netdev in netdevs:
        netdev.close()


async def test_a_group_that_any_number_joins(nursery: trio.Nursery) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    netdevs = [DgramNetdev(remote__host="239.192.1.1", remote__port=port, local__host="127.0.0.1") for _ in range(3)]
    sinks = [Sink() for _ in netdevs]
    for netdev, sink in zip(netdevs, sinks, strict=True):
        nursery.start_soon(netdev.run, sink)
    await put(netdevs[0], frame_of(FRAME))
    for sink in sinks[1:]:
        assert await sink.wait_frames(1) == [FRAME]
    for netdev in netdevs:
        netdev.close()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "dgram needs the other end"),
        ({"remote__path": Path("x")}, "dgram needs an address of its own"),
        ({"local__path": Path("x"), "remote__host": "::1", "remote__port": 1}, "cannot send to"),
        ({"local__str": 0, "remote__path": Path("x")}, "there is no remote"),
        ({"local__path": Path("x"), "remote__host": "::1"}, "remote.type=inet needs remote.port"),
        ({"local__str": 1 << 40}, "local.str=1099511627776: not the number of a file descriptor"),
        (
            {"local__host": "::1", "local__port": 0, "remote__host": "127.0.0.1", "remote__port": 1},
            "local: ::1:0: Address family for hostname not supported",
        ),
        ({"local__host": "::1", "remote__host": "239.1.1.1", "remote__port": 1}, "local: ::1:0: Address family"),
    ],
)
def test_mistakes(options: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        DgramNetdev(**options)  # type: ignore[arg-type] # of many types


def test_an_address_in_use(tmp_path: Path) -> None:
    one, other = pair(tmp_path)
    with pytest.raises(DeviceError, match="another program listens there"):
        pair(tmp_path)
    one.close()
    other.close()


def test_a_given_socket_that_goes_nowhere() -> None:
    with socket.socket(type=socket.SOCK_DGRAM) as alone, pytest.raises(DeviceError, match=r"local: fd .*not connected"):
        DgramNetdev(local__type="fd", local__str=alone.fileno())
