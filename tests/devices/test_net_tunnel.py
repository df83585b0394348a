"""UDP tunnel segmentation of the network device (virtio 1.4, 5.1.9.2, 5.1.9.4): longer headers, what they may say."""

from dataclasses import replace

import pytest
from support.net_cable import Cable, a_frame
from support.net_packets import CSUM, tcp_packet, tso
from support.packets import UDP, Packet
from support.tunnels import Tunneled

from vfiouser_virtio.backends.net.frame import Offload, frame_of
from vfiouser_virtio.backends.net.netdev import Does
from vfiouser_virtio.backends.net.offload import finish
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.devices.net_steering import RssConfig
from vfiouser_virtio.protocols.virtio.features import mask_of
from vfiouser_virtio.protocols.virtio.net import (
    HDR_TUNNEL_CODEC,
    CtrlClass,
    CtrlGuestOffloads,
    GsoType,
    HashReport,
    HdrFlags,
    NetFeature,
)
from vfiouser_virtio.testing.driver import Driver, running
from vfiouser_virtio.virtio import DeviceError

both_memories = pytest.mark.parametrize("private", [False, True], ids=["mapped", "messages"])
RX, TX = 0, 1
HOST = mask_of(
    (
        NetFeature.CSUM,
        NetFeature.HOST_TSO4,
        NetFeature.HOST_TSO6,
        NetFeature.HOST_ECN,
        NetFeature.HOST_USO,
        NetFeature.HOST_UDP_TUNNEL_GSO,
    )
)
GUEST = mask_of(
    (
        NetFeature.GUEST_CSUM,
        NetFeature.GUEST_TSO4,
        NetFeature.GUEST_TSO6,
        NetFeature.GUEST_USO4,
        NetFeature.GUEST_USO6,
        NetFeature.GUEST_UDP_TUNNEL_GSO,
    )
)
HOST_CSUM, GUEST_CSUM = NetFeature.HOST_UDP_TUNNEL_GSO_CSUM.mask, NetFeature.GUEST_UDP_TUNNEL_GSO_CSUM.mask

PACKET = Tunneled(Packet(bytes(range(250)) * 20, flags=0x18, identification=9), Packet(b"", protocol=UDP))
SILENT = replace(PACKET, checksum=False)


def tunnel_net(cable: Cable) -> Net:
    return Net(
        netdev=cable, hash=True, host_tunnel=True, host_tunnel_csum=True, guest_tunnel=True, guest_tunnel_csum=True
    )


def header(offload: Offload, buffers: int = 0, value: int = 0, report: int = 0) -> bytes:
    return HDR_TUNNEL_CODEC.pack(*offload[:6], buffers, value, report, 0, *offload[6:])


NOTHING = header(Offload(0, 0, 0, 0, 0, 0))


async def send(driver: Driver, *packets: bytes) -> None:
    tokens = [driver.add(TX, [packet]) for packet in packets]
    driver.kick(TX)
    for token in tokens:
        await driver.wait(TX, token)


async def receive(driver: Driver, cable: Cable, packet: Tunneled, count: int) -> list[bytes]:
    """What is in the driver's buffers when this packet has come."""
    tokens = [driver.add(RX, [], [9000]) for _ in range(count)]
    driver.kick(RX)
    await cable.deliver(packet.frame(1000))
    used = [await driver.wait(RX, token) for token in tokens]
    return [each.data[0][: each.written] for each in used]


# ---- from the driver -------------------------------------------------------------------------------------------------


@both_memories
@pytest.mark.parametrize("packet", [PACKET, SILENT], ids=["csum", "no-csum"])
async def test_a_packet_of_a_tunnel_goes_out_whole_or_is_cut(private: bool, packet: Tunneled) -> None:
    net = tunnel_net(cable := Cable())
    data, offload = packet.build(partial=True), packet.offload(1000)
    async with running(net, private=private, features=HOST | HOST_CSUM) as driver:
        await send(driver, header(offload) + data, NOTHING + a_frame(60), header(CSUM) + tcp_packet(500))
        assert await cable.wait_sent(3) == [data, a_frame(60), tcp_packet(500)]
        assert [frame.offload for frame in cable.sent] == [offload, None, CSUM]
        cable.does = Does(0)
        await send(driver, header(offload) + data)
        parts = [part.build(partial=False) for part in packet.cut(1000)]
        assert (await cable.wait_sent(3 + len(parts)))[3:] == parts
        queue = net.transmitter.queues[0]
        assert (queue.gso_packets, queue.gso_packets_noseg, queue.gso_segments) == (2, 1, 5)
        assert queue.drops == 0


async def test_hdr_len_tells_another_guest_the_truth() -> None:
    data, offload = PACKET.build(partial=True), PACKET.offload(1000)
    async with running(tunnel_net(cable := Cable()), features=HOST | HOST_CSUM) as driver:
        for said, handed_on in ((0, offload.hdr_len), (0xFFFF, len(data)), (offload.hdr_len + 4, offload.hdr_len + 4)):
            await send(driver, header(offload._replace(hdr_len=said)) + data)
            assert cable.sent[-1].offload == offload._replace(hdr_len=handed_on)


LIES = {
    "both tunnels": {"gso_type": GsoType.TCPV4 | 0x60},
    "no segmentation": {"gso_type": 0x20},
    "fragments": {"gso_type": 0x20 | GsoType.UDP},
    "ecn of udp": {"gso_type": 0xA5},
    "no csum": {"flags": 8},
    "data valid": {"flags": 3},
    "outer at 0": {"outer_th_offset": 0},
    "outer beyond": {"outer_th_offset": 0xFFFF},
    "outer in ip": {"outer_th_offset": PACKET.outer.network},
    "inner at 0": {"inner_nh_offset": 0},
    "inner is outer": {"inner_nh_offset": PACKET.outer.transport},
    "inner beyond": {"inner_nh_offset": 0xFFFF},
    "inner is csum_start": {"inner_nh_offset": PACKET.offload(1000).csum_start},
    "csum_start in outer": {"csum_start": PACKET.outer.transport, "csum_offset": 6},
    "csum_start beyond": {"csum_start": 0xFFFF},
    "gso of 0": {"gso_size": 0},
    "gso of 1": {"gso_size": 1},
    "ones": dict.fromkeys(Offload._fields, 0xFFFF) | {"flags": 0xFF, "gso_type": 0xFF},
}


@both_memories
@pytest.mark.parametrize("does", [Does(0xFF), Does(0)], ids=["whole", "cut"])
@pytest.mark.parametrize("lies", LIES.values(), ids=LIES.keys())
async def test_lies_of_a_header(
    private: bool, does: Does, lies: dict[str, int], caplog: pytest.LogCaptureFixture
) -> None:
    net = tunnel_net(cable := Cable(does))
    packet = header(PACKET.offload(1000)._replace(**lies)) + PACKET.build(partial=True)
    async with running(net, private=private, features=HOST | HOST_CSUM) as driver:
        await send(driver, packet, packet, NOTHING + a_frame(61))
        assert await cable.wait_sent(1) == [a_frame(61)]
        assert net.transmitter.queues[0].drop_malformed == 2
    assert caplog.text.count("the driver's packet is dropped") == 1


async def test_udp_tunnel_csum_where_it_must_not_be() -> None:
    """In a packet of no tunnel (5.1.9.2.2), and without its feature."""
    net = tunnel_net(cable := Cable())
    async with running(net, features=HOST) as driver:
        for offload in (Offload(8, 0, 0, 0, 0, 0), CSUM._replace(flags=9), tso(1000)._replace(flags=9)):
            await send(driver, header(offload) + tcp_packet(3000))
        await send(driver, header(PACKET.offload(1000)) + PACKET.build(partial=True))
        assert net.transmitter.queues[0].drop_malformed == 4
        await send(driver, header(SILENT.offload(1000)) + SILENT.build(partial=True))
        assert await cable.wait_sent(1) == [SILENT.build(partial=True)]


async def test_without_the_feature_no_tunnel_is_taken_and_its_flag_is_ignored() -> None:
    """ "The device MUST ignore flag bits that it does not recognize" (5.1.9.2.2)."""
    net = tunnel_net(cable := Cable())
    features = HOST & ~NetFeature.HOST_UDP_TUNNEL_GSO.mask | GUEST
    async with running(net, features=features) as driver:  # the header is the long one, for what is received
        await send(driver, header(SILENT.offload(1000)) + SILENT.build(partial=True))
        assert net.transmitter.queues[0].drop_malformed == 1
        await send(driver, header(CSUM._replace(flags=9)) + tcp_packet(500))
        assert [frame.offload for frame in cable.sent] == [CSUM]


# ---- to the driver ---------------------------------------------------------------------------------------------------


@both_memories
@pytest.mark.parametrize("packet", [PACKET, SILENT], ids=["csum", "no-csum"])
async def test_a_driver_gets_it_whole_with_the_places_of_its_headers(private: bool, packet: Tunneled) -> None:
    cable = Cable()
    async with running(tunnel_net(cable), private=private, features=GUEST | GUEST_CSUM) as driver:
        [whole] = await receive(driver, cable, packet, 1)
        assert whole == header(packet.offload(1000), 1) + packet.build(partial=True)


async def test_with_a_hash_it_has_both() -> None:
    cable = Cable()
    more = mask_of((NetFeature.CTRL_VQ, NetFeature.HASH_REPORT))
    net = tunnel_net(cable)
    async with running(net, features=GUEST | GUEST_CSUM | more) as driver:
        net.control.settings.steering.set_hash(0x1FF, bytes(range(40)))
        [whole] = await receive(driver, cable, PACKET, 1)
        fields = HDR_TUNNEL_CODEC.unpack_from(whole)
        assert fields[7] != 0
        assert fields[8] == HashReport.UDPv4
        assert whole[:24] == header(PACKET.offload(1000), 1, fields[7], HashReport.UDPv4)


async def test_rss_without_reports_leaves_the_fields_of_the_hash_zero() -> None:
    net = tunnel_net(cable := Cable())
    async with running(net, features=GUEST | mask_of((NetFeature.CTRL_VQ, NetFeature.RSS))) as driver:
        net.control.settings.steering.set_rss(RssConfig(0, [0]), 0x1FF, bytes(range(40)), 1)
        await cable.wait_device()
        frame = frame_of(tcp_packet(500))
        assert net.receiver.steering.steer(frame)[2] == HashReport.TCPv4
        tokens = [driver.add(RX, [], [1000]) for _ in range(2)]
        driver.kick(RX)
        assert net.receiver.put(frame)
        assert net.receiver.put_burst([frame]) == 1
        for token in tokens:
            used = await driver.wait(RX, token)
            assert used.data[0][: used.written] == header(Offload(0, 0, 0, 0, 0, 0), 1) + tcp_packet(500)


@both_memories
async def test_for_a_driver_that_cannot_it_is_cut(private: bool) -> None:
    """Without UDP_TUNNEL_GSO_CSUM only those with an outer checksum."""
    cable = Cable()
    left = Offload(HdrFlags.NEEDS_CSUM, 0, PACKET.offload(1000).hdr_len, 0, PACKET.offload(1000).csum_start, 16)
    async with running(tunnel_net(cable), private=private, features=GUEST) as driver:
        got = await receive(driver, cable, PACKET, 5)
        assert [each[:24] for each in got] == [header(left, 1)] * 5
        for each, part in zip(got, PACKET.cut(1000), strict=True):
            (complete,) = finish(frame_of(each[24:], left), 0)
            assert complete.tobytes() == part.build(partial=False)
        [whole] = await receive(driver, cable, SILENT, 1)
        assert whole == header(SILENT.offload(1000), 1) + SILENT.build(partial=True)


async def test_for_a_driver_without_offloads_all_is_done() -> None:
    cable = Cable()
    async with running(tunnel_net(cable), features=0) as driver:
        got = await receive(driver, cable, PACKET, 5)
        assert got == [bytes(10) + b"\1\0" + part.build(partial=False) for part in PACKET.cut(1000)]


async def test_a_driver_changes_its_mind_while_it_runs() -> None:
    cable = Cable()
    net = tunnel_net(cable)
    more = mask_of((NetFeature.CTRL_VQ, NetFeature.CTRL_GUEST_OFFLOADS))
    async with running(net, features=GUEST | GUEST_CSUM | more) as driver:
        assert net.receiver.does & (Does.TUNNEL | Does.TUNNEL_CSUM) == Does.TUNNEL | Does.TUNNEL_CSUM
        command = bytes([CtrlClass.GUEST_OFFLOADS, CtrlGuestOffloads.SET])
        for bits, count in (((1, 7, 8, 54, 55), 5), ((1, 7, 8, 54, 55, 46, 47), 1)):
            offloads = sum(1 << bit for bit in bits).to_bytes(8, "little")
            used = await driver.request([command + offloads], [1], queue=2)
            assert used.data == [b"\0"]
            assert len(await receive(driver, cable, PACKET, count)) == count


# ---- offered ---------------------------------------------------------------------------------------------------------

TUNNEL_FEATURES = (
    NetFeature.HOST_UDP_TUNNEL_GSO,
    NetFeature.HOST_UDP_TUNNEL_GSO_CSUM,
    NetFeature.GUEST_UDP_TUNNEL_GSO,
    NetFeature.GUEST_UDP_TUNNEL_GSO_CSUM,
)


def test_offered_where_asked() -> None:
    assert not Net().features & mask_of(TUNNEL_FEATURES)
    assert Net(host_tunnel=True).features & mask_of(TUNNEL_FEATURES) == NetFeature.HOST_UDP_TUNNEL_GSO.mask
    assert Net(guest_tunnel=True).features & mask_of(TUNNEL_FEATURES) == NetFeature.GUEST_UDP_TUNNEL_GSO.mask
    assert tunnel_net(Cable()).features & mask_of(TUNNEL_FEATURES) == mask_of(TUNNEL_FEATURES)
    with pytest.raises(DeviceError, match="host-tunnel-csum=on: goes with host-tunnel=on"):
        Net(host_tunnel_csum=True)
    with pytest.raises(DeviceError, match="guest-tunnel-csum=on: goes with guest-tunnel=on"):
        Net(guest_tunnel_csum=True, host_tunnel=True)
