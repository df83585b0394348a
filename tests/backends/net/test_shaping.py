"""Delay, loss and the rest, on trio's clock of tests."""

from typing import Any

import pytest
import trio
import trio.testing
from support.net_device import Device, running
from support.packets import Packet

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Frame, Offload, frame_of
from vfiouser_virtio.backends.net.hub import HubNetdev
from vfiouser_virtio.backends.net.netdev import Counters, Does, FrameSink
from vfiouser_virtio.backends.net.null import NullNetdev
from vfiouser_virtio.backends.net.shaping import MAX_BYTES, MAX_FRAMES, Shaped
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.protocols.virtio.net import GsoType, HdrFlags


class Network(NullNetdev):
    """Netdev whose network is a `Device` as well."""

    def __init__(self) -> None:
        super().__init__()
        self.sink = Device()
        self.device: FrameSink = Device()
        self.closed = False

    def put(self, frame: Frame) -> bool:
        return self.sink.put(frame)

    async def wait_room(self) -> None:
        await self.sink.wait_room()

    async def run(self, device: FrameSink) -> None:
        self.device = device
        await trio.sleep_forever()

    def close(self) -> None:
        self.closed = True


def numbered(number: int, length: int = 60) -> Frame:
    return frame_of(number.to_bytes(4, "big").ljust(length, b"."))


def numbers(device: Device) -> list[int]:
    return [int.from_bytes(each[:4], "big") for each in device.taken()]


async def through(count: int, **shape: Any) -> tuple[list[int], Counters]:
    """Which of so many frames, one each millisecond, come out, in their order."""
    network, device = Network(), Device()
    shaped = Shaped(network, **shape)
    async with running(shaped, device):
        for number in range(count):
            assert shaped.put(numbered(number))
            await trio.sleep(0.001)
        await trio.sleep(10)
    return numbers(network.sink), shaped.counters


async def test_frames_are_delayed_in_both_directions(autojump_clock: trio.testing.MockClock) -> None:
    network, device = Network(), Device()
    shaped = Shaped(network, delay_ms=20)
    async with running(shaped, device):
        start = trio.current_time()
        memory = bytearray(numbered(1).tobytes())
        shaped.put(frame_of(memory))
        memory[:] = bytes(60)  # the guest's buffer is its own again
        await trio.sleep(0.005)
        network.device.put(numbered(2))
        network.device.put(numbered(3))
        await trio.sleep(0.1)
        assert numbers(network.sink) == [1]
        assert numbers(device) == [2, 3]
        assert network.sink.times == [pytest.approx(start + 0.02)]
        assert device.times == [pytest.approx(start + 0.025)] * 2


async def test_jitter_keeps_to_its_limits_and_lets_frames_overtake(autojump_clock: trio.testing.MockClock) -> None:
    network, device = Network(), Device()
    shaped = Shaped(network, delay_ms=20, jitter_ms=10)
    async with running(shaped, device):
        start = trio.current_time()
        for number in range(200):
            shaped.put(numbered(number))
        await trio.sleep(1)
    waits = [time - start for time in network.sink.times]
    assert 0.00999 < min(waits) < 0.012
    assert 0.028 < max(waits) < 0.03001
    got = numbers(network.sink)
    assert sorted(got) == list(range(200))
    assert got != sorted(got)


async def test_a_seed_says_which_frames_are_lost(autojump_clock: trio.testing.MockClock) -> None:
    first, counters = await through(1000, loss=10, seed=1)
    assert 850 < len(first) < 950
    assert counters.tx_drops.by_reason == {Drop.CHANCE: 1000 - len(first)}
    assert first == sorted(first)
    assert (await through(1000, loss=10, seed=1))[0] == first
    assert (await through(1000, loss=10, seed=2))[0] != first


async def test_other_options_do_not_change_which_frames_are_lost(autojump_clock: trio.testing.MockClock) -> None:
    alone, _ = await through(300, loss=10)
    others, _ = await through(300, loss=10, duplicate=20, delay_ms=5, jitter_ms=5, reorder=10)
    assert sorted(set(others)) == alone


async def test_all_is_lost_or_nothing(autojump_clock: trio.testing.MockClock) -> None:
    assert (await through(50, loss=100))[0] == []
    assert (await through(50))[0] == list(range(50))


async def test_duplicates_follow_their_originals(autojump_clock: trio.testing.MockClock) -> None:
    got, _ = await through(1000, duplicate=10)
    assert 1050 < len(got) < 1150
    assert got == sorted(got)
    assert (await through(20, duplicate=100))[0] == sorted([*range(20)] * 2)


async def test_some_frames_come_before_those_that_are_delayed(autojump_clock: trio.testing.MockClock) -> None:
    got, _ = await through(1000, reorder=10, delay_ms=5)
    assert sorted(got) == list(range(1000))
    # Those that wait keep their order; the others have overtaken five.
    ahead = [number for place, number in enumerate(got) if number > place]
    assert 60 < len(ahead) < 140


async def test_the_rate_is_kept(autojump_clock: trio.testing.MockClock) -> None:
    network, device = Network(), Device()
    shaped = Shaped(network, rate=8, delay_ms=10)  # a byte in a microsecond
    async with running(shaped, device):
        start = trio.current_time()
        for number in range(3):
            shaped.put(numbered(number, 1000))
        await trio.sleep(1)
        shaped.put(numbered(3, 500))
        await trio.sleep(1)
    times = [time - start for time in network.sink.times]
    assert times == [pytest.approx(each) for each in (0.011, 0.012, 0.013, 1.0105)]


async def test_what_one_driver_left_takes_no_time_of_the_next(autojump_clock: trio.testing.MockClock) -> None:
    network, device = Network(), Device()
    shaped = Shaped(network, rate=0.8)  # a byte in ten microseconds
    async with running(shaped, device):
        for number in range(1000):
            shaped.put(numbered(number, 1000))
            network.device.put(numbered(number, 1000))
    async with running(shaped, device):
        start = trio.current_time()
        shaped.put(numbered(7, 1000))
        network.device.put(numbered(7, 1000))
        await trio.sleep(1)
    assert numbers(network.sink) == numbers(device) == [7]
    assert network.sink.times == device.times == [pytest.approx(start + 0.01)]


async def test_what_waits_is_bounded(autojump_clock: trio.testing.MockClock) -> None:
    network, device = Network(), Device()
    shaped = Shaped(network, delay_ms=3_600_000)
    async with running(shaped, device):
        for number in range(MAX_FRAMES + 10):
            assert shaped.put(numbered(number))
        assert shaped.counters.tx_dropped == 10
        big = frame_of(bytes(1 << 16))
        for _ in range(300):
            network.device.put(big)
        assert shaped.counters.rx_dropped == 300 - MAX_BYTES // (1 << 16)
    # None waits for the next driver.
    assert shaped.counters.tx_drops.by_reason == {Drop.QUEUE_FULL: 10, Drop.DRIVER_LEFT: MAX_FRAMES}
    waited = MAX_BYTES // (1 << 16)
    assert shaped.counters.rx_drops.by_reason == {Drop.QUEUE_FULL: 300 - waited, Drop.DRIVER_LEFT: waited}
    async with running(shaped, device):
        await trio.sleep(7200)
    assert not network.sink.frames
    assert not device.frames


async def test_who_has_no_room_is_waited_for(autojump_clock: trio.testing.MockClock) -> None:
    network, device = Network(), Device(room=1)
    shaped = Shaped(network, delay_ms=1)
    async with running(shaped, device):
        for number in range(3):
            network.device.put(numbered(number))
        await trio.sleep(1)
        assert numbers(device) == [0]
        device.make_room(5)
        await trio.sleep(1)
        assert numbers(device) == [1, 2]


async def test_a_frame_that_waits_for_room_when_the_driver_leaves_is_counted(
    autojump_clock: trio.testing.MockClock,
) -> None:
    network, device = Network(), Device(room=1)
    shaped = Shaped(network, delay_ms=1)
    async with running(shaped, device):
        for number in range(3):
            network.device.put(numbered(number))
        await trio.sleep(1)
        assert numbers(device) == [0]
    assert shaped.counters.rx_drops.by_reason == {Drop.DRIVER_LEFT: 2}


async def test_offloads_that_the_receiver_no_longer_takes_are_done(autojump_clock: trio.testing.MockClock) -> None:
    packet = Packet(bytes(3000))
    offload = Offload(HdrFlags.NEEDS_CSUM, GsoType.TCPV4, 0, 1000, packet.transport, 16)
    network, device = Network(), Device()
    shaped = Shaped(network, delay_ms=1)
    async with running(shaped, device):
        network.device.put(frame_of(packet.build(partial=True), offload))
        network.device.put(frame_of(packet.build(partial=True), offload._replace(gso_size=0)))
        device.does = Does(0)
        await trio.sleep(1)
        assert device.taken() == [each.build(partial=False) for each in packet.cut(1000)]
        assert shaped.counters.rx_drops.by_reason == {Drop.BAD_OFFLOAD: 1}


async def test_packets_that_are_cut_into_many_segments_leave_others_their_turns() -> None:
    network, segments = Network(), 1000
    network.sink.does = network.does = Does(0)
    shaped = Shaped(network, delay_ms=1)
    packet = Packet(bytes(64 * segments))
    frame = frame_of(
        packet.build(partial=True), Offload(HdrFlags.NEEDS_CSUM, GsoType.TCPV4, 0, 64, packet.transport, 16)
    )
    async with running(shaped, Device()):
        for _ in range(2):
            shaped.put(frame)
        seen = most = 0
        with trio.fail_after(60):
            while seen < 2 * segments:
                await trio.lowlevel.checkpoint()
                before, seen = seen, len(network.sink.frames)
                most = max(most, seen - before)
    assert most < 256


async def test_the_rest_is_the_other_netdevs(autojump_clock: trio.testing.MockClock) -> None:
    network = Network()
    network.does = Does.CSUM
    shaped = Shaped(network, delay_ms=10, jitter_ms=2.5, loss=1, rate=100, seed=7)
    assert shaped.describe() == "null with delay 10 ms, jitter 2.5 ms, loss 1 %, rate 100 Mbit/s, seed 7"
    assert Shaped(network).describe() == "null"
    assert shaped.does == Does.CSUM
    assert shaped.link
    assert shaped.counters is network.counters
    await shaped.wait_room()
    shaped.close()
    assert network.closed


async def test_a_port_of_a_hub_can_be_shaped(autojump_clock: trio.testing.MockClock) -> None:
    near, far = Device(), Device()
    shaped, other = Shaped(HubNetdev(hub="lan"), delay_ms=10), HubNetdev(hub="lan")
    async with running(shaped, near), running(other, far):
        shaped.put(frame_of(b"\xff" * 6 + b"\x52\0\0\0\0\1" + b"\x88\xb5"))
        await trio.sleep(0.1)
        other.put(frame_of(b"\x52\0\0\0\0\1" + b"\x52\0\0\0\0\2" + b"\x88\xb5"))
        await trio.sleep(0.1)
        assert len(near.frames) == len(far.frames) == 1


@pytest.mark.parametrize(
    ("shape", "what"),
    [
        ({"loss": 101}, "loss=101: expected 0 to 100"),
        ({"loss": float("nan")}, "loss=nan: expected 0 to 100"),
        ({"duplicate": -1}, "duplicate=-1"),
        ({"delay_ms": 1e12}, "delay-ms=1e\\+12: expected 0 to 3600000"),
        ({"delay_ms": float("inf")}, "delay-ms=inf"),
        ({"delay_ms": 1, "jitter_ms": 2}, "jitter-ms=2: more than delay-ms=1"),
        ({"reorder": 5}, "reorder=5: needs delay-ms"),
        ({"rate": -1}, "rate=-1"),
    ],
)
def test_numbers_out_of_range_are_said(shape: dict[str, Any], what: str) -> None:
    with pytest.raises(ConfigError, match=what):
        Shaped(NullNetdev(), **shape)
