"""Frames between two processes of ours; here both ends are in one."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing
from support.net_device import Device, running, send
from support.packets import UDP, Packet
from support.tunnels import Tunneled

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Frame, Offload, frame_of
from vfiouser_virtio.backends.net.netdev import MAX_FRAME, Does
from vfiouser_virtio.backends.net.wire import WireNetdev
from vfiouser_virtio.protocols.virtio.net import GsoType, HdrFlags

PACKET = Packet(bytes(range(256)) * 20)
GSO = frame_of(PACKET.build(partial=True), Offload(HdrFlags.NEEDS_CSUM, GsoType.TCPV4, 7, 1000, PACKET.transport, 16))
TUNNEL = Tunneled(PACKET, Packet(b"", protocol=UDP)).frame(1000)


def numbered(number: int, length: int = 60) -> Frame:
    return frame_of(number.to_bytes(4, "big").ljust(length, b"."))


@asynccontextmanager
async def wires(*devices: Device, keep: bool = False) -> AsyncIterator[tuple[WireNetdev, WireNetdev]]:
    one, other = (WireNetdev(end, "hub lan", keep=keep) for end in WireNetdev.pair())
    async with running(one, devices[0]), running(other, devices[1]):
        yield one, other
    one.close()
    other.close()
    one.close()  # and again


async def arrived(device: Device, count: int) -> None:
    while len(device.frames) < count:
        await trio.lowlevel.checkpoint()


def copying(room: int = 1 << 30, does: Does | None = None) -> Device:
    """A device that keeps frames: what it is given is one buffer, used again and again."""
    device = Device(room) if does is None else Device(room, does)

    def keep(frame: Frame) -> None:
        device.frames[-1] = frame.copy()

    device.answer = keep
    return device


async def test_frames_go_both_ways_with_their_offloads() -> None:
    near, far = copying(), copying()
    async with wires(near, far) as (one, other):
        assert one.put(Frame([memoryview(b"ab"), memoryview(b"cd")], 4))
        assert one.put(GSO)
        assert one.put(TUNNEL)
        assert other.put(numbered(1))
        await arrived(far, 3)
        await arrived(near, 1)
        assert [(each.tobytes(), each.offload) for each in far.frames] == [
            (b"abcd", None),
            (GSO.tobytes(), GSO.offload),
            (TUNNEL.tobytes(), TUNNEL.offload),
        ]
        assert near.taken() == [numbered(1).tobytes()]
        assert (one.counters.tx_packets, other.counters.rx_packets) == (3, 3)
        assert one.describe() == "hub lan"


async def test_a_packet_that_is_cut_into_many_segments_leaves_others_their_turns() -> None:
    segments, far = 1000, copying(does=Does(0))
    packet = Packet(bytes(64 * segments))
    offload = Offload(HdrFlags.NEEDS_CSUM, GsoType.TCPV4, 0, 64, packet.transport, 16)
    async with wires(copying(), far) as (one, _):
        one.put(frame_of(packet.build(partial=True), offload))
        seen = most = 0
        with trio.fail_after(60):
            while seen < segments:
                await trio.lowlevel.checkpoint()
                before, seen = seen, len(far.frames)
                most = max(most, seen - before)
    assert most < 256


async def test_offloads_that_the_device_does_not_take_are_done_where_it_is() -> None:
    far = copying(does=Does(0))
    async with wires(copying(), far) as (one, other):
        one.put(GSO)
        one.put(frame_of(GSO.tobytes(), GSO.offload and GSO.offload._replace(gso_size=0)))
        one.put(numbered(2))
        await arrived(far, 7)
        assert far.taken() == [*(each.build(partial=False) for each in PACKET.cut(1000)), numbered(2).tobytes()]
        assert other.counters.rx_drops.by_reason == {Drop.BAD_OFFLOAD: 1}


async def test_the_longest_frame_and_one_of_very_many_pieces_go_through() -> None:
    far = copying()
    async with wires(copying(), far) as (one, _):
        await send(one, frame_of(bytes(MAX_FRAME)))
        await arrived(far, 1)
        piece = memoryview(b"x")
        await send(one, Frame([piece] * 2000, 2000))
        await arrived(far, 2)
        assert far.taken() == [bytes(MAX_FRAME), b"x" * 2000]


async def test_a_device_without_room_holds_the_other_end_up() -> None:
    far = copying(room=0)
    async with wires(copying(), far) as (one, _):
        sent = 0
        while one.put(numbered(sent, 1000)):
            sent += 1
            await trio.lowlevel.checkpoint()
        assert sent > 10
        with trio.move_on_after(0):
            await one.wait_room()
            pytest.fail("there is no room")
        far.make_room(1 << 30)
        await one.wait_room()
        await send(one, numbered(sent, 1000))
        await arrived(far, sent + 1)
        assert [int.from_bytes(each[:4], "big") for each in far.taken()] == list(range(sent + 1))


async def test_what_has_no_whole_header_is_no_frame() -> None:
    """Of another process whose guest has taken it over: such a frame had fewer bytes than none."""
    end, theirs = WireNetdev.pair()
    wire, device = WireNetdev(end, "wire", keep=True), copying()
    async with running(wire, device):
        for size in (1, 23, 24):
            theirs.send(bytes(size))
        theirs.send(bytes(24) + b"abcd")
        await arrived(device, 1)
        assert device.taken() == [b"abcd"]
        assert wire.counters.rx_drops.by_reason == {Drop.MALFORMED: 3}
    wire.close()
    theirs.close()


@pytest.mark.parametrize("keep", [False, True])
async def test_what_comes_before_there_is_a_driver(keep: bool) -> None:
    one, other = (WireNetdev(end, "wire", keep=keep) for end in WireNetdev.pair())
    for number in range(3):
        assert one.put(numbered(number))
    device = copying()
    async with running(other, device):
        assert one.put(numbered(3))
        await arrived(device, 4 if keep else 1)
        assert len(device.frames) == (4 if keep else 1)
        assert other.counters.rx_drops.by_reason == ({} if keep else {Drop.NO_DRIVER: 3})
    one.close()
    other.close()


async def test_the_link_is_down_when_the_other_end_is_closed() -> None:
    one, other = (WireNetdev(end, "wire") for end in WireNetdev.pair())
    async with running(one, Device()) as nursery:
        assert one.link
        nursery.start_soon(one.wait_link)
        other.close()
        await one.wait_link()
        assert not one.link
        assert one.put(numbered(1))
        assert one.counters.tx_dropped == 1
        one.close()
        assert one.put(numbered(1))
        assert one.counters.tx_drops.by_reason == {Drop.NO_PEER: 2}
