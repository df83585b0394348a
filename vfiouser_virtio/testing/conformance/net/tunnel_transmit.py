"""Transmission of packets in UDP tunnels (virtio 1.4, 5.1.9.2), as a peer sees it that does no work of the sender's."""

from collections.abc import Sequence

from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.protocols.virtio.net import GSO_UDP_TUNNEL, GsoType, HdrFlags, NetFeature
from vfiouser_virtio.testing.conformance.net import frames
from vfiouser_virtio.testing.conformance.net import tunnel_frames as tunnels
from vfiouser_virtio.testing.conformance.net.declare import peer_check
from vfiouser_virtio.testing.conformance.net.driver import COMPLETE, ConformanceDriver, Header, ReceivedFrame
from vfiouser_virtio.testing.conformance.net.traffic import SentPacket, TrafficWay
from vfiouser_virtio.testing.conformance.net.transmit import PAYLOAD, SECTION, segmented
from vfiouser_virtio.testing.conformance.net.transmit_traffic import out
from vfiouser_virtio.testing.conformance.verdicts import Failed, FrameLost, fail, note

_F = NetFeature
HOST = (_F.CSUM, _F.HOST_TSO4, _F.HOST_TSO6, _F.HOST_USO, _F.HOST_UDP_TUNNEL_GSO)
"""What a driver needs to send packets in tunnels (5.1.3.1)."""
HOST_CSUM = (*HOST, _F.HOST_UDP_TUNNEL_GSO_CSUM)
_NOWHERE = {"outer_th_offset": 0xFFFF, "inner_nh_offset": 0xFFFF}
_PLAIN_CHECKSUM = Header(HdrFlags.NEEDS_CSUM, csum_start=frames.TCP_AT, csum_offset=frames.TCP_CHECK)


@peer_check(
    "virtio14/NU1",
    section=SECTION,
    observe="a packet whose gso_type has both UDP_TUNNEL_IPV4 and UDP_TUNNEL_IPV6: none of it arrives",
    features=HOST,
)
async def nu1(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """A packet with both tunnel bits in gso_type is not accepted."""
    await _not_accepted(driver, peer, HOST, tunnels.packet(gso_type=GsoType.TCPV4 | GSO_UDP_TUNNEL))


@peer_check(
    "virtio14/NU2",
    section=SECTION,
    observe="packets with UDP_TUNNEL_IPV4 without NEEDS_CSUM, with DATA_VALID, and with nothing else in gso_type",
    features=HOST,
)
async def nu2(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """A packet of a tunnel without NEEDS_CSUM, with DATA_VALID, or with gso_type NONE beside it is not accepted."""
    for packet in (
        tunnels.packet(flags=0),
        tunnels.packet(flags=HdrFlags.NEEDS_CSUM | HdrFlags.DATA_VALID),
        tunnels.packet(gso_type=GsoType.UDP_TUNNEL_IPV4),
    ):
        await _not_accepted(driver, peer, HOST, packet)


@peer_check(
    "virtio14/NU3",
    section=SECTION,
    observe="packets with UDP_TUNNEL_CSUM, but without a tunnel: one to be segmented, one with NEEDS_CSUM alone",
    features=HOST_CSUM,
)
async def nu3(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """A packet with UDP_TUNNEL_CSUM and without a tunnel bit in gso_type is not accepted."""
    sent = frames.tcp(frames.BROADCAST, PAYLOAD, partial=True)
    for header in (segmented(), _PLAIN_CHECKSUM):
        wrong = header._replace(flags=header.flags | HdrFlags.UDP_TUNNEL_CSUM)
        await _not_accepted(driver, peer, HOST_CSUM, SentPacket(sent, wrong))


@peer_check(
    "virtio14/NU4",
    section=SECTION,
    observe="packets without a tunnel whose outer_th_offset and inner_nh_offset are 0xffff: what arrives",
    features=HOST,
)
async def nu4(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Without a tunnel bit in gso_type, outer_th_offset and inner_nh_offset are not used."""
    way = await out(driver, peer, *HOST)
    complete, partial = (frames.tcp(frames.BROADCAST, PAYLOAD, partial=open_) for open_ in (False, True))
    for sent, header in ((complete, COMPLETE), (partial, _PLAIN_CHECKSUM), (partial, segmented())):
        found = await way.carry(SentPacket(sent, header._replace(**_NOWHERE)))
        arrived = b"".join(frames.tcp_payload(each.data) for each in found)
        note(
            arrived == frames.tcp_payload(sent) and all(frames.is_complete(each.data) for each in found),
            f"flags {header.flags:#x}, gso_type {header.gso_type:#x}: {len(arrived):#x} of {PAYLOAD:#x} bytes arrive, "
            "or with a wrong checksum",
        )


@peer_check(
    "virtio14/NU5",
    section=SECTION,
    observe="a packet of a tunnel without outer checksum: lengths, checksums and payload of the segments",
    features=HOST,
)
async def nu5(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """A packet of a tunnel is cut into segments with the headers of both levels, and nothing is lost."""
    for each in await _segments(driver, peer, HOST, tunnels.packet()):
        wrong = tunnels.wrong(each.data)
        note(not wrong, f"a segment of {len(each.data):#x} bytes: {', '.join(wrong)}")


@peer_check(
    "virtio14/NU6",
    section=SECTION,
    observe="a packet of a tunnel with UDP_TUNNEL_CSUM: the outer checksums of the segments",
    features=HOST_CSUM,
)
async def nu6(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """With UDP_TUNNEL_CSUM the outer UDP checksum of each segment is completed."""
    for each in await _segments(driver, peer, HOST_CSUM, tunnels.packet(checksum=True)):
        seen = tunnels.outer_checksum(each.data)
        note(
            seen != 0 and tunnels.outer_is_complete(each.data),
            f"the outer UDP checksum of a segment of {len(each.data):#x} bytes is {seen:#06x}, which is wrong",
        )


@peer_check(
    "virtio14/NU7",
    section="Device Operation",
    observe="with HOST_UDP_TUNNEL_GSO, and without GUEST_UDP_TUNNEL_GSO: plain frames both ways",
    features=HOST,
)
async def nu7(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """With HOST_UDP_TUNNEL_GSO alone, the headers of both directions have outer_th_offset and inner_nh_offset."""
    await both_ways(driver, peer, HOST)


async def both_ways(driver: ConformanceDriver, peer: ConformanceDriver, features: Sequence[NetFeature]) -> None:
    """With these features, plain frames are as they were sent: their headers have the length that they must have."""
    size = "with this feature a header has 24 bytes"
    try:
        away = await out(driver, peer, *features)
        back = await TrafficWay.open(peer, driver, to=frames.BROADCAST)
    except FrameLost as error:
        fail(f"{error}; {size}")
    sent = frames.frame(frames.BROADCAST, 200)
    for way, where in ((away, "peer"), (back, "device")):
        found = await way.carry(sent)
        note(
            [each.data for each in found] == [sent],
            f"{len(found)} frames from or to the {where}, or other bytes; {size}",
        )


async def _segments(
    driver: ConformanceDriver, peer: ConformanceDriver, features: Sequence[NetFeature], packet: SentPacket
) -> list[ReceivedFrame]:
    """What arrives of a packet at a peer that segments nothing. Raises Failed where something of it is lost."""
    way = await out(driver, peer, *features)
    found = await way.carry(packet)
    arrived = b"".join(tunnels.payload(each.data) for each in found)
    if arrived != tunnels.payload(packet.data):
        fail(f"{len(found)} segments arrive, with {len(arrived):#x} bytes of {PAYLOAD:#x}, or other ones")
    return found


async def _not_accepted(
    driver: ConformanceDriver, peer: ConformanceDriver, features: Sequence[NetFeature], packet: SentPacket
) -> None:
    """Notes where anything of a packet arrives. A device that needs a reset has not accepted it, either."""
    way = await out(driver, peer, *features)
    try:
        found = await way.carry(packet)
    except Failed:
        if await driver.bench.get("device_status") & DeviceStatus.NEEDS_RESET:
            return
        raise
    header = packet.header
    note(not found, f"flags {header.flags:#x}, gso_type {header.gso_type:#x}: {len(found)} frames arrive")
