"""Network devices as their driver has them, over every carrier: frames both ways, queue pairs, commands, link."""

import os

import pytest
import trio
import trio.testing
from support.net_cable import MAC, PEER, Cable, a_frame

from vfiouser_virtio.backends.net.frame import Offload
from vfiouser_virtio.backends.net.hub import HubNetdev
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.guest import VirtioDevice, bound
from vfiouser_virtio.guest.drivers.net import NetHeader, NetInterface
from vfiouser_virtio.protocols.virtio.net import Ack, CtrlRx, GsoType, HdrFlags, NetFeature
from vfiouser_virtio.transports import Loopback
from vfiouser_virtio.virtio import Offer

BROADCAST = b"\xff" * 6
PAIRS = 3


@pytest.fixture
def cable() -> Cable:
    return Cable()


@pytest.fixture
def virtio_device(cable: Cable) -> Net:
    return Net(netdev=cable, mac=MAC.hex(":"), queues=PAIRS)


async def the_frame(guest: NetInterface, pair: int = 0) -> bytes:
    with trio.fail_after(60):
        return (await guest.receive(pair=pair)).data


async def test_frames_of_all_lengths_both_ways(virtio_guest: VirtioDevice, cable: Cable) -> None:
    guest: NetInterface = virtio_guest.driver_data
    assert (guest.mac, guest.pairs) == (MAC, PAIRS)
    for seed, length in enumerate([14, 60, 1514, 2036, 2037, 9014, 65549]):
        frame = a_frame(length, seed=seed)
        with trio.fail_after(60):
            await guest.send(frame, pieces=1 + seed % 3, pair=seed % PAIRS)
        assert cable.sent[-1].tobytes() == frame
        assert cable.sent[-1].offload is None
        await cable.deliver(frame)
        assert await the_frame(guest) == frame


async def test_offload_headers_go_through_as_they_are(virtio_guest: VirtioDevice, cable: Cable) -> None:
    guest: NetInterface = virtio_guest.driver_data
    # A UDP datagram over IPv4 whose checksum is to be completed.
    ip = bytes.fromhex("4500002c00010000401100000a0000010a000002")
    frame = MAC + PEER + b"\x08\0" + ip + bytes.fromhex("0001000200180000") + os.urandom(16)
    offload = Offload(HdrFlags.NEEDS_CSUM, GsoType.NONE, 0, 0, 34, 6)
    with trio.fail_after(60):
        await guest.send(frame, NetHeader(*offload[:6]))
    assert cable.sent[-1].offload is not None
    assert cable.sent[-1].offload[4:6] == (34, 6)
    await cable.deliver(frame, offload=offload)
    with trio.fail_after(60):
        received = await guest.receive()
    assert received.data == frame
    assert received.header.flags == HdrFlags.NEEDS_CSUM
    assert received.header[4:6] == (34, 6)


async def test_a_header_that_lies_costs_the_frame_and_no_more(virtio_guest: VirtioDevice, cable: Cable) -> None:
    guest: NetInterface = virtio_guest.driver_data
    with trio.fail_after(60):
        for header in (
            NetHeader(HdrFlags.NEEDS_CSUM, 0, 0, 0, 60000, 6),
            NetHeader(HdrFlags.NEEDS_CSUM, GsoType.TCPV4, 0, 0, 34, 16),
            NetHeader(0, 0x77, 0, 1),
        ):
            await guest.send(a_frame(100), header)
        await guest.send(a_frame(101))
    assert [frame.length for frame in cable.sent] == [101]


async def test_the_filter_does_what_the_driver_says(virtio_guest: VirtioDevice, cable: Cable) -> None:
    guest: NetInterface = virtio_guest.driver_data
    strange, group = bytes.fromhex("520000000001"), bytes.fromhex("01005e000001")
    with trio.fail_after(60):
        assert await guest.set_addresses([], []) == Ack.OK
        for length, to in enumerate((strange, group, BROADCAST, MAC), 60):
            await cable.deliver(a_frame(length, to=to))
        assert [len(await the_frame(guest)) for _ in range(2)] == [62, 63]
        assert await guest.set_addresses([strange], [group]) == Ack.OK
        for length, to in enumerate((strange, group), 60):
            await cable.deliver(a_frame(length, to=to))
        assert [len(await the_frame(guest)) for _ in range(2)] == [60, 61]
        assert await guest.set_addresses([], []) == Ack.OK
        assert await guest.set_rx_mode(CtrlRx.PROMISC, True) == Ack.OK
        await cable.deliver(a_frame(64, to=strange))
        assert len(await the_frame(guest)) == 64
        assert await guest.set_rx_mode(0x77, True) == Ack.ERR


async def test_frames_go_to_the_pair_that_their_flow_was_sent_on(virtio_guest: VirtioDevice, cable: Cable) -> None:
    guest: NetInterface = virtio_guest.driver_data
    with trio.fail_after(60):
        for pairs, ack in ((0, Ack.ERR), (PAIRS + 1, Ack.ERR), (PAIRS, Ack.OK)):
            assert await guest.set_pairs(pairs) == ack
        for pair in range(PAIRS):
            ip = bytes.fromhex("4500001c000100004011000000000000") + bytes(4)
            there = ip[:12] + bytes([10, 0, 0, 1, 10, 0, 0, 2])
            back = ip[:12] + bytes([10, 0, 0, 2, 10, 0, 0, 1])
            ports = bytes([0, 10 + pair]), b"\0\x05"
            await guest.send(PEER + MAC + b"\x08\0" + there + ports[0] + ports[1] + b"\0\x08\0\0", pair=pair)
            answer = MAC + PEER + b"\x08\0" + back + ports[1] + ports[0] + b"\0\x08\0\0"
            await cable.deliver(answer)
            assert await the_frame(guest, pair) == answer


async def test_the_link_goes_down_and_comes_back(virtio_guest: VirtioDevice, virtio_device: Net, cable: Cable) -> None:
    guest: NetInterface = virtio_guest.driver_data
    changed = trio.Event()
    virtio_guest.on_config = changed.set
    assert await guest.link_is_up()
    virtio_device.set_link(False)
    with trio.fail_after(60):
        await changed.wait()
    assert not await guest.link_is_up()
    virtio_device.set_link(True)
    assert await guest.link_is_up()
    await cable.deliver(a_frame())
    assert await the_frame(guest) == a_frame()


@pytest.mark.virtio_carriers("loopback")
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_two_drivers_on_a_hub(packed: bool) -> None:
    """A segment of 64 KiB crosses whole, as the sender has left it."""
    macs = bytes.fromhex("520000000001"), bytes.fromhex("520000000002")
    devices = [Net(netdev=HubNetdev(hub="behaviour"), mac=mac.hex(":")) for mac in macs]
    offer = Offer(packed=packed)
    here, there = (Loopback(device, offer=offer) for device in devices)
    async with here, there, bound(here) as one, bound(there) as other:
        first: NetInterface = one.driver_data
        second: NetInterface = other.driver_data
        await trio.testing.wait_all_tasks_blocked()  # both devices run
        await first.send(BROADCAST + macs[0] + bytes(50))  # the hub learns
        assert len(await the_frame(second)) == 62
        payload = os.urandom(60000)
        ip = bytes.fromhex("4500ea88000100004006000000000000") + bytes(4)
        ip = ip[:12] + bytes([10, 0, 0, 2, 10, 0, 0, 1])
        tcp = bytes.fromhex("00500051000000010000000150100400") + bytes(4)
        segment = macs[0] + macs[1] + b"\x08\0" + ip + tcp + payload
        with trio.fail_after(60):
            await second.send(segment, NetHeader(HdrFlags.NEEDS_CSUM, GsoType.TCPV4, 54, 1448, 34, 16))
            received = await first.receive()
        assert received.data[54:] == payload
        assert received.header[:2] == (HdrFlags.NEEDS_CSUM, GsoType.TCPV4)
        assert received.header.gso_size == 1448
        assert received.buffers > 1


@pytest.mark.parametrize("virtio_feature_mask", [~NetFeature.MRG_RXBUF.mask])
async def test_a_driver_without_mergeable_buffers(virtio_guest: VirtioDevice, cable: Cable) -> None:
    guest: NetInterface = virtio_guest.driver_data
    assert not virtio_guest.has_feature(NetFeature.MRG_RXBUF)
    frame = a_frame(60000)
    await cable.deliver(frame)
    with trio.fail_after(60):
        received = await guest.receive()
    assert (received.data, received.buffers) == (frame, 1)
