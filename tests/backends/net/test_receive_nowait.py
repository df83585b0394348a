"""Frames that are taken in a call while the netdev's task waits for them, as a transmit queue does that is polled."""

import os
import socket
import struct
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass

import pytest
import trio
from support.net_buffers import RX, add
from support.net_cable import MAC, a_frame
from support.net_namespace import NetNamespace
from support.net_sink import Sink
from support.net_tap import GUEST, GUEST_MAC, HEADERS, PORT, new_tap

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.stream import StreamNetdev
from vfiouser_virtio.backends.net.tap import TapNetdev
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.protocols.virtio.features import mask_of
from vfiouser_virtio.protocols.virtio.net import HDR_CODEC, NetFeature
from vfiouser_virtio.testing.driver import Driver, running
from vfiouser_virtio.virtio import polling

TX = 1
FRAME = bytes(range(60))


def on_wire(*frames: bytes) -> bytes:
    return b"".join(struct.pack(">I", len(frame)) + frame for frame in frames)


# ---- stream ----------------------------------------------------------------------------------------------------------


@dataclass
class Ends:
    """A netdev that waits for input, and its other end."""

    netdev: StreamNetdev
    peer: socket.socket
    sink: Sink


@asynccontextmanager
async def waiting(sink: Sink) -> AsyncIterator[Ends]:
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ours:
        netdev = StreamNetdev(addr__type="fd", addr__str=ours.fileno())
    async with trio.open_nursery() as nursery:
        nursery.start_soon(netdev.run, sink)
        await trio.testing.wait_all_tasks_blocked()
        yield Ends(netdev, theirs, sink)
        nursery.cancel_scope.cancel()
    theirs.close()
    netdev.close()


async def test_frames_of_a_stream_are_handed_over_in_the_call() -> None:
    async with waiting(Sink()) as ends:
        assert not ends.netdev.receive_nowait()
        for count in range(1, 4):
            ends.peer.send(on_wire(*[FRAME] * count))
            assert ends.netdev.receive_nowait()
            assert [frame.tobytes() for frame in ends.sink.frames] == [FRAME] * count
            assert not ends.netdev.receive_nowait()
            ends.sink.frames.clear()
        assert (ends.netdev.counters.rx_packets, ends.netdev.counters.rx_bytes) == (6, 360)
        ends.peer.send(on_wire(FRAME))
        assert await ends.sink.wait_frames(1) == [FRAME]  # the task still waits, too


async def test_half_a_frame_is_for_the_task() -> None:
    async with waiting(Sink()) as ends:
        ends.peer.send(on_wire(FRAME) + on_wire(FRAME[::-1])[:30])
        assert ends.netdev.receive_nowait()
        assert len(ends.sink.frames) == 1
        ends.peer.send(on_wire(FRAME[::-1])[30:])
        assert not ends.netdev.receive_nowait()
        assert await ends.sink.wait_frames(2) == [FRAME, FRAME[::-1]]
        await trio.testing.wait_all_tasks_blocked()
        ends.peer.send(on_wire(FRAME))
        assert ends.netdev.receive_nowait()
        assert len(ends.sink.frames) == 3


async def test_what_there_is_no_room_for_waits_in_the_task() -> None:
    frames = [bytes([number]) * 60 for number in range(5)]
    async with waiting(Sink(room=2)) as ends:
        ends.peer.send(on_wire(*frames[:4]))
        assert ends.netdev.receive_nowait()
        assert [frame.tobytes() for frame in ends.sink.frames] == frames[:2]
        ends.peer.send(on_wire(frames[4]))
        assert not ends.netdev.receive_nowait()
        ends.sink.more(3)
        assert await ends.sink.wait_frames(5) == frames


async def test_a_call_takes_a_bounded_number_of_frames() -> None:
    async with waiting(Sink()) as ends:
        ends.peer.send(on_wire(*[FRAME] * 1000))
        assert ends.netdev.receive_nowait()
        assert 64 <= len(ends.sink.frames) < 500
        assert await ends.sink.wait_frames(1000) == [FRAME] * 1000


@pytest.mark.parametrize("last", [b"", struct.pack(">I", 1 << 30)], ids=["leaves", "no length"])
async def test_a_peer_that_ends_is_noticed_by_the_task(last: bytes) -> None:
    async with waiting(Sink()) as ends:
        if last:
            ends.peer.send(last)
        else:
            ends.peer.close()
        assert ends.netdev.receive_nowait() is bool(last)
        with trio.fail_after(60):
            while ends.netdev.link:
                await ends.netdev.wait_link()
        assert not ends.netdev.receive_nowait()


# ---- tap -------------------------------------------------------------------------------------------------------------


@pytest.fixture
def tap(namespace: NetNamespace) -> Iterator[TapNetdev]:
    made = new_tap(namespace)
    namespace.ip("link set tap7 mtu 9000")
    yield made
    made.close()


@dataclass
class Host:
    """The host's end of an interface, and the receive buffers of the guest's driver."""

    namespace: NetNamespace
    driver: Driver
    tokens: list[int]

    def send(self, text: bytes) -> None:
        with self.namespace.run(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as host:
            host.sendto(text, (GUEST, PORT))

    async def arrived(self) -> list[bytes]:
        """What of it the driver has so far; the host's kernel sends packets of its own, too."""
        frames: list[bytes] = []
        count = 0
        while self.tokens and self.driver.is_used(RX, self.tokens[0]):
            used = await self.driver.wait(RX, self.tokens.pop(0))
            data = b"".join(used.data)[: used.written]
            if count:
                frames[-1] += data
            else:
                *_, count = HDR_CODEC.unpack_from(data)
                frames.append(data[HDR_CODEC.size :])
            count -= 1
        return [each[HEADERS:] for each in frames if each[12:14] == b"\x08\x00" and each[23] == socket.IPPROTO_UDP]


@asynccontextmanager
async def guest_on(tap: TapNetdev, namespace: NetNamespace, buffers: int = 64) -> AsyncIterator[Host]:
    """With a driver whose buffers have been looked at, and netdev's task waiting."""
    features = mask_of((NetFeature.MRG_RXBUF, NetFeature.GUEST_CSUM))
    async with running(Net(netdev=tap, mac=GUEST_MAC.hex(":")), features=features) as driver:
        host = Host(namespace, driver, add(driver, *[1526] * buffers))
        for text in (b"first", b"second"):
            host.send(text)
            with trio.fail_after(60):
                while text not in await host.arrived():
                    await trio.sleep(0.01)
        await trio.testing.wait_all_tasks_blocked(0.01)
        yield host


def take(tap: TapNetdev) -> int:
    """Calls until nothing more comes."""
    calls = 0
    while tap.queues[0].receive_nowait():
        calls += 1
    return calls


async def test_frames_of_an_interface_are_handed_over_in_the_call(namespace: NetNamespace, tap: TapNetdev) -> None:
    async with guest_on(tap, namespace) as host:
        for count in (1, 3, 10):
            texts = [b"%d of %d" % (number, count) for number in range(count)]
            for text in texts:
                host.send(text)
            assert take(tap) > 0
            assert await host.arrived() == texts


async def test_a_frame_for_which_there_are_too_few_buffers_is_for_the_task_and_stays_in_order(
    namespace: NetNamespace, tap: TapNetdev
) -> None:
    async with guest_on(tap, namespace, buffers=8) as host:
        texts = [b"short", b"long" * 2000, b"behind it"]
        for text in texts:
            host.send(text)
        assert take(tap) > 0
        arrived = await host.arrived()
        assert arrived == texts[:1]
        host.tokens += add(host.driver, *[1526] * 64)
        with trio.fail_after(60):
            while len(arrived) < 3:
                await trio.sleep(0.01)
                arrived += await host.arrived()
        assert arrived == texts


async def test_a_driver_that_leaves_before_the_task_had_its_turn(namespace: NetNamespace, tap: TapNetdev) -> None:
    async with guest_on(tap, namespace, buffers=8) as host:
        host.send(b"long" * 2000)
        assert take(tap) > 0
        await host.driver.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert tap.counters.rx_drops.by_reason == {Drop.DRIVER_LEFT: 1}


async def test_without_buffers_nothing_is_taken(namespace: NetNamespace, tap: TapNetdev) -> None:
    async with guest_on(tap, namespace) as host:
        for _ in range(80):
            host.send(b"fill")
        take(tap)
        await trio.testing.wait_all_tasks_blocked(0.01)
        assert not tap.queues[0].receive_nowait()
        arrived = await host.arrived()
        host.tokens += add(host.driver, *[1526] * 64)
        with trio.fail_after(60):
            while len(arrived) < 80:
                await trio.sleep(0.01)
                arrived += await host.arrived()
        assert arrived == [b"fill"] * 80


# ---- a device --------------------------------------------------------------------------------------------------------


class Counted(StreamNetdev):
    """Counts the calls that have brought something."""

    taken = 0

    def receive_nowait(self) -> bool:
        took = super().receive_nowait()
        self.taken += took
        return took


async def test_a_transmit_queue_that_is_polled_brings_the_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """No task has its turn between an answer and the driver's buffer."""
    monkeypatch.setattr(polling, "BUDGET", 30.0)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1})
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    with ours:
        netdev = Counted(addr__type="fd", addr__str=ours.fileno())

    def answer() -> None:
        """While the device leaves the CPU to others."""
        with suppress(BlockingIOError):
            theirs.send(theirs.recv(4096))

    monkeypatch.setattr(os, "sched_yield", answer)
    with theirs:
        async with running(Net(netdev=netdev, mac=MAC.hex(":"))) as driver:
            for number in range(20):
                frame = a_frame(60 + number)
                [token] = add(driver, 1526)
                await driver.request([bytes(HDR_CODEC.size) + frame], [], queue=TX)
                with suppress(BlockingIOError):
                    if not driver.is_used(RX, token):
                        theirs.send(theirs.recv(4096))  # before the device has learnt to poll
                used = await driver.wait(RX, token)
                assert used.data[0][HDR_CODEC.size : used.written] == frame
    assert netdev.taken >= 10
