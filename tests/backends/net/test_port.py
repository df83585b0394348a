"""A Python program at the other end of the cable."""

import inspect
import textwrap
from typing import Any

import pytest
import trio
import trio.testing
from support.net_device import Device, running
from support.packets import Packet, ones_complement_sum

from vfiouser_virtio.backends.net.drops import Drop
from vfiouser_virtio.backends.net.frame import Offload, frame_of
from vfiouser_virtio.backends.net.netdev import ALL, MAX_FRAME, Does
from vfiouser_virtio.backends.net.offload import BadOffload
from vfiouser_virtio.backends.net.port import QUEUE, NetPort
from vfiouser_virtio.protocols.virtio.net import GsoType, HdrFlags

FRAME = b"\xff" * 6 + b"\x52\0\0\0\0\1" + b"\x88\xb5hello"


async def test_the_guests_frames_are_iterated_over_and_are_copies() -> None:
    port = NetPort()
    async with running(port, Device()):
        memory = bytearray(FRAME)
        assert port.put(frame_of(memory))
        assert port.put(frame_of(FRAME + b"!"))
        memory[:] = bytes(len(memory))
        got = [(await anext(port)).tobytes() for _ in range(2)]
    assert got == [FRAME, FRAME + b"!"]
    assert (port.counters.tx_packets, port.counters.tx_bytes) == (2, 2 * len(FRAME) + 1)
    assert port.describe() == "port"


async def test_a_program_that_waits_gets_a_frame_when_it_comes_and_the_end_at_the_end() -> None:
    port = NetPort()
    got = []

    async def read() -> None:
        got.extend([frame.tobytes() async for frame in port])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(read)
        await trio.testing.wait_all_tasks_blocked()
        port.put(frame_of(FRAME))
        await trio.testing.wait_all_tasks_blocked()
        port.put(frame_of(FRAME))
        port.close()
    assert got == [FRAME] * 2


async def test_several_tasks_may_wait_for_frames() -> None:
    """The first one was forgotten when the second one came."""
    port, got = NetPort(), list[bytes]()

    async def read() -> None:
        got.extend([frame.tobytes() async for frame in port])

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(3):
                nursery.start_soon(read)
                await trio.testing.wait_all_tasks_blocked()
            port.put(frame_of(FRAME))
            await trio.testing.wait_all_tasks_blocked()
            port.close()
    assert got == [FRAME]


async def test_what_a_slow_program_has_not_read_is_bounded_and_counted() -> None:
    port = NetPort()
    for number in range(QUEUE + 3):
        assert port.put(frame_of(FRAME + bytes([number % 256])))
    assert port.counters.tx_drops.by_reason == {Drop.QUEUE_FULL: 3}
    assert (await anext(port)).tobytes() == FRAME + b"\0"


async def test_frames_are_sent_when_the_guest_has_room() -> None:
    port, device = NetPort(), Device(room=1)
    async with running(port, device) as nursery:
        assert await port.send(FRAME)
        nursery.start_soon(port.send, bytearray(FRAME))
        await trio.testing.wait_all_tasks_blocked()
        assert device.taken() == [FRAME]
        device.make_room(1)
        await trio.testing.wait_all_tasks_blocked()
        assert device.taken() == [FRAME]
    assert (port.counters.rx_packets, port.counters.rx_bytes) == (2, 2 * len(FRAME))


async def test_without_a_driver_frames_are_dropped() -> None:
    port = NetPort()
    assert not await port.send(FRAME)
    sent = []

    async def send() -> None:
        sent.append(await port.send(FRAME))

    async with trio.open_nursery() as nursery, running(port, Device(room=0)):
        nursery.start_soon(send)
        await trio.testing.wait_all_tasks_blocked()
        assert not sent
    assert sent == [False]
    assert port.counters.rx_drops.by_reason == {Drop.NO_DRIVER: 1, Drop.DRIVER_LEFT: 1}


async def test_offloads_are_done_for_a_driver_that_has_not_accepted_them() -> None:
    packet = Packet(bytes(3000))
    offload = Offload(HdrFlags.NEEDS_CSUM, GsoType.TCPV4, 0, 1000, packet.transport, 16)
    port, device = NetPort(), Device(does=Does(0))
    async with running(port, device):
        await port.send(packet.build(partial=True), offload)
        assert device.taken() == [each.build(partial=False) for each in packet.cut(1000)]
        device.does = ALL
        frame = frame_of(packet.build(partial=True), offload)
        await port.send(frame)
        assert device.frames == [frame]
        with pytest.raises(BadOffload):
            await port.send(FRAME, offload)
        with pytest.raises(ValueError, match="a frame of 0x10037 bytes, expected up to 0x10036"):
            await port.send(bytes(MAX_FRAME + 1))


async def test_the_example_answers_ping() -> None:
    assert NetPort.__doc__ is not None
    # From 3.13 on Python takes the indentation off docstrings.
    example = inspect.cleandoc(NetPort.__doc__).split("::\n", 1)[1].split("\n``does``", 1)[0]
    names: dict[str, Any] = {}
    exec(textwrap.dedent(example), names)  # what the documentation says, as it says it

    guest, other = b"\x52\0\0\0\0\1", names["MAC"]
    arp = b"\xff" * 6 + guest + b"\x08\x06" + bytes.fromhex("0001 0800 06 04 0001")
    arp += guest + bytes([10, 0, 0, 2]) + bytes(6) + bytes([10, 0, 0, 1])
    ip = bytes.fromhex("4500 0021 0001 0000 4001 0000") + bytes([10, 0, 0, 2, 10, 0, 0, 1])
    echo = other + guest + b"\x08\0" + ip + bytes.fromhex("0800 1234 0001 0001") + b"hello"

    port, device = NetPort(), Device(does=Does(0))
    async with running(port, device) as nursery:
        nursery.start_soon(names["answer_ping"], port)
        for data in (arp, echo, FRAME, arp[:-1] + b"\x09", b""):
            port.put(frame_of(data))
        await trio.testing.wait_all_tasks_blocked()
        found, reply = device.taken()
    assert found[:12] == guest + other
    assert found[20:22] == b"\0\2"
    assert found[22:42] == other + bytes([10, 0, 0, 1]) + guest + bytes([10, 0, 0, 2])
    assert reply[:12] == guest + other
    assert reply[26:34] == bytes([10, 0, 0, 1, 10, 0, 0, 2])
    assert reply[34:36] == b"\0\0"
    assert reply[38:] == echo[38:]
    assert ones_complement_sum(reply[34:]) == 0xFFFF
