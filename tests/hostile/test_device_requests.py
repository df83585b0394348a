"""Requests of each device type that no driver should send, and that are no bug that another product is known for."""

import struct

import pytest
from support.hostile import Rings, attacked, both_rings
from support.hostile_requests import (
    CONTROL,
    FRAME,
    READ,
    RX,
    SECTORS,
    TX,
    WRITE_OUT,
    blk_header,
    blk_segment,
    net_header,
    one_byte_each,
    request,
    status_of,
)

from vfiouser_virtio.devices.blk_requests import MAX_DISCARD_SEGMENTS
from vfiouser_virtio.protocols.virtio import console
from vfiouser_virtio.protocols.virtio.blk import BlkFeature, BlkStatus, RequestType
from vfiouser_virtio.protocols.virtio.console import Event
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.protocols.virtio.net import CtrlClass, CtrlMac, CtrlMq, CtrlRx
from vfiouser_virtio.testing.raw.ring import WRITE
from vfiouser_virtio.transports.pci import DEVICE, VIRTIO_BAR


@both_rings
async def test_a_header_of_one_byte_descriptors_and_a_status_apart(rings: Rings) -> None:
    """A block request in 16 + 512 + 1 descriptors of a byte."""
    async with attacked("blk", rings, size=64) as attack:
        assert await status_of(attack, one_byte_each(blk_header(READ)), [1, 510, 1, 1]) == BlkStatus.OK
        done = await request(attack, [blk_header(RequestType.GET_ID)], [1] * 20 + [1])
        assert done is not None
        assert done[1][-1] == b"\0"


@pytest.mark.parametrize("readable", [[], [b""], [bytes(15)]], ids=["missing", "empty", "short"])
async def test_a_header_that_is_missing_or_short(readable: list[bytes]) -> None:
    """There is no request: the device needs a reset, whose fault that is, is said."""
    async with attacked("blk") as attack:
        assert await request(attack, readable, [513]) is None


async def test_a_header_in_a_writable_buffer() -> None:
    """The device does not read what it is to write."""
    async with attacked("blk") as attack:
        assert await request(attack, [], [16, 512, 1]) is None


async def test_a_request_without_room_for_its_status() -> None:
    """No writable byte at all."""
    async with attacked("blk") as attack:
        assert await request(attack, [blk_header(WRITE_OUT), bytes(512)], []) is None


@both_rings
async def test_a_status_spread_over_several_descriptors(rings: Rings) -> None:
    """Its last byte is the status, whatever is in front of it."""
    async with attacked("blk", rings) as attack:
        for writable in ([513], [512, 1], [256, 257], [1, 512]):
            assert await status_of(attack, [blk_header(READ)], writable) == BlkStatus.OK
        assert await status_of(attack, [blk_header(RequestType.FLUSH)], [1, 1, 1]) == BlkStatus.OK


async def test_sectors_and_lengths_beyond_the_disk() -> None:
    """The last sector and one more; part of a sector; sums that overflow."""
    async with attacked("blk") as attack:
        for sector, length, expected in (
            (SECTORS - 1, 512, BlkStatus.OK), (SECTORS - 1, 1024, BlkStatus.IOERR), (SECTORS, 0, BlkStatus.OK),
            (SECTORS + 1, 0, BlkStatus.IOERR), (0, 1, BlkStatus.IOERR), (0, 513, BlkStatus.IOERR),
            ((1 << 64) - 1, 512, BlkStatus.IOERR), (1 << 55, 512, BlkStatus.IOERR), (1 << 63, 1024, BlkStatus.IOERR),
        ):  # fmt: skip
            room = [length, 1] if length else [1]
            assert await status_of(attack, [blk_header(READ, sector)], room) == expected, (sector, length)
            data = [bytes(length)] if length else []
            assert await status_of(attack, [blk_header(WRITE_OUT, sector), *data], [1]) == expected


async def test_discard_segments_of_any_count_and_alignment() -> None:
    """None, half of one, more than there may be, flags that are none, past the end; UNMAP where it is not allowed."""
    good = blk_segment(0, 8)
    async with attacked("blk") as attack:
        for kind in (RequestType.DISCARD, RequestType.WRITE_ZEROES):
            for data in ([], [good[:15]], [good, good[:8]], [good * (MAX_DISCARD_SEGMENTS + 1)], [b"x"]):
                assert await status_of(attack, [blk_header(kind), *data], [1]) == BlkStatus.IOERR
            for flags in (2, 4, 0x8000_0000, 0xFFFF_FFFF):
                assert await status_of(attack, [blk_header(kind), blk_segment(0, 8, flags)], [1]) == BlkStatus.UNSUPP
        assert await status_of(attack, [blk_header(RequestType.DISCARD), blk_segment(0, 8, 1)], [1]) != BlkStatus.OK


async def test_a_disk_without_the_features_that_requests_need() -> None:
    """Requests whose features the driver has not accepted: an answer, and never a crash."""
    async with attacked("blk", features=0) as attack:
        for kind in (*RequestType, 99):
            assert await request(attack, [blk_header(kind), blk_segment(0, 1)], [1])
        assert not attack.driver.features & BlkFeature.FLUSH.mask


async def test_lies_of_a_packets_header() -> None:
    """Offsets, lengths and kinds that contradict the packet: dropped, counted, and the next one goes through."""
    lies = [
        {"flags": 1, "csum_start": 0xFFFF}, {"flags": 1, "csum_offset": 0xFFFF}, {"gso_type": 1, "gso_size": 0},
        {"gso_type": 1, "gso_size": 1, "hdr_len": 0xFFFF}, {"gso_type": 0x81, "flags": 1, "gso_size": 1448},
        {"gso_type": 3}, {"gso_type": 0x60, "gso_size": 1}, {"gso_type": 0xFF}, {"flags": 0xFF}, {"hdr_len": 0xFFFF},
        {"num_buffers": 0xFFFF}, {"flags": 8, "gso_type": 0x21, "gso_size": 9, "csum_start": 20, "csum_offset": 2},
    ]  # fmt: skip
    async with attacked("net") as attack:
        attack.driver.offer(RX, [], [64])
        await attack.kick(RX)
        for lie in lies:
            assert await request(attack, [net_header(attack.driver.features, **lie) + FRAME], [], TX)


async def test_a_packet_in_a_writable_buffer_and_a_receive_buffer_to_be_read() -> None:
    """Both directions the wrong way round."""
    async with attacked("net") as attack:
        assert await request(attack, [], [100], TX)
    async with attacked("net") as attack:
        attack.put(attack.readable(bytes(100)), queue=RX)
        await attack.kick(RX)
        attack.driver.offer(TX, [net_header(attack.driver.features) + FRAME], [])
        await attack.kick(TX)
        await attack.settle()


@both_rings
async def test_receive_buffers_without_room_for_num_buffers(rings: Rings) -> None:
    """A frame over many buffers, of which there are too few, or the header does not fit into the first."""
    async with attacked("net", rings) as attack:
        for room in (24, 25, 1, 40):
            attack.driver.offer(RX, [], [room])
        await attack.kick(RX)
        attack.driver.offer(TX, [net_header(attack.driver.features) + FRAME * 4], [])
        await attack.kick(TX)
        await attack.settle()


def command(kind: int, number: int, data: bytes) -> bytes:
    return bytes([kind, number]) + data


async def test_commands_whose_counts_lie() -> None:
    """Tables of addresses, pairs of queues, modes: what does not fit changes nothing."""
    async with attacked("net") as attack:
        for each in (
            command(CtrlClass.MAC, CtrlMac.TABLE_SET, struct.pack("<I", 0xFFFF_FFFF) + bytes(6)),
            command(CtrlClass.MAC, CtrlMac.TABLE_SET, struct.pack("<I", 0x2AAA_AAAB) + bytes(6)),
            command(CtrlClass.MAC, CtrlMac.TABLE_SET, struct.pack("<I", 0)),
            command(CtrlClass.MAC, CtrlMac.TABLE_SET, struct.pack("<I6sI", 1, b"\1" * 6, 0)),
            command(CtrlClass.MAC, CtrlMac.ADDR_SET, b"\1" * 6),
            command(CtrlClass.MAC, CtrlMac.ADDR_SET, bytes(6)),
            command(CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, struct.pack("<H", 0)),
            command(CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, struct.pack("<H", 3)),
            command(CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, struct.pack("<H", 0x8000)),
            command(CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, struct.pack("<I", 1)),
            command(CtrlClass.RX, CtrlRx.PROMISC, b"\2"),
            command(CtrlClass.RX, 0xFF, b"\1"),
            command(CtrlClass.VLAN, 0, struct.pack("<H", 4096)),
            command(CtrlClass.GUEST_OFFLOADS, 0, struct.pack("<Q", (1 << 64) - 1)),
            command(0xFF, 0xFF, bytes(100)),
        ):
            done = await request(attack, [each], [1], CONTROL)
            assert done is not None
            assert done[1] == [b"\1"], each.hex()
        assert await request(attack, [command(CtrlClass.RX, CtrlRx.PROMISC, b"\1")], [], CONTROL) is None


async def test_emergency_writes() -> None:
    """At any time, of any width, also before a driver has said a word."""
    async with attacked("console", up=False) as attack:
        for width in (1, 2, 3, 4, 8):
            attack.driver.write(VIRTIO_BAR, DEVICE + 8, b"\xff" * width)
        await attack.settle()


async def test_control_messages_that_no_driver_sends() -> None:
    """Ports that there are not, events that are none, messages that are short."""
    async with attacked("console") as attack:
        for port, event, value in (
            (2, Event.PORT_READY, 1), (0xFFFF_FFFF, Event.PORT_OPEN, 1), (0, 0xFFFF, 0), (0, Event.PORT_ADD, 1),
            (0, Event.PORT_OPEN, 0xFFFF), (1, Event.PORT_READY, 0), (0, Event.DEVICE_READY, 0), (0, Event.RESIZE, 1),
        ):  # fmt: skip
            message = console.CONTROL.build({"id": port, "event": event, "value": value})
            assert await request(attack, [message], [], 3)
        for _ in range(5):
            assert await request(attack, one_byte_each(console.CONTROL.build({"id": 0, "event": 0, "value": 1})), [], 3)
        assert await request(attack, [b"short"], [], 3) is None


@both_rings
async def test_pages_of_a_balloon_that_are_none_of_its(rings: Rings) -> None:
    """Page numbers in holes, in rings, beyond all memory, odd lengths: what is not the guest's is not touched."""
    numbers = [0x50, 0x51, 2, 3, 0xFFFF_FFFF, 0x80, 0x60, 0x8000_0000]
    async with attacked("balloon", rings) as attack:
        data = b"".join(number.to_bytes(4, "little") for number in numbers)
        for queue in (0, 1):
            for each in (data, data[:7], data[:1], data * 50):
                assert await request(attack, [each], [], queue)
        for address, length in ((0x2000, 0x1000), (0x50000, 0x1000), (0x60000, 0x1000), (0x20001, 0x1001)):
            attack.put((address, length, WRITE), queue=4)
            await attack.kick(4)
            await attack.settle()
            await attack.performer.do_bring_up()


async def test_events_and_lights_that_no_driver_sends() -> None:
    """Buffers for events that are too short or to be read; status events of half an event, or thousands."""
    async with attacked("input") as attack:
        for segment in ((0x20000, 0, WRITE), (0x20000, 7, WRITE), (0x20000, 8, 0)):
            attack.put(segment, queue=0)
            await attack.kick(0)
            await attack.settle()
        for data in (b"x", bytes(9), b"\xff" * 8, b"\xff" * 0x2000):
            attack.put(attack.readable(data), queue=1)
            await attack.kick(1)
            await attack.settle()
        for offset in (0, 1, 2, 8, 0x80):
            for value in (b"\xff", b"\x11", b"\xff" * 4):
                attack.driver.write(VIRTIO_BAR, DEVICE + offset, value)
                await attack.driver.read(VIRTIO_BAR, DEVICE, 136)
        assert not await attack.status() & DeviceStatus.FAILED
