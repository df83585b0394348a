"""Received packets of UDP tunnels (virtio 1.4, 5.1.9.4): only what was negotiated, and then as it must be.

The peer sends packets of a tunnel that are to be cut.
"""

from collections.abc import Sequence

from vfiouser_virtio.protocols.virtio.net import CtrlGuestOffloads, GsoType, HdrFlags, NetFeature
from vfiouser_virtio.testing.conformance.checks import SHOULD
from vfiouser_virtio.testing.conformance.net import frames
from vfiouser_virtio.testing.conformance.net import tunnel_frames as tunnels
from vfiouser_virtio.testing.conformance.net.control import OFFLOADS, offloads
from vfiouser_virtio.testing.conformance.net.declare import peer_check
from vfiouser_virtio.testing.conformance.net.driver import ConformanceDriver, ReceivedFrame
from vfiouser_virtio.testing.conformance.net.receive import SECTION
from vfiouser_virtio.testing.conformance.net.traffic import RECEIVED, TrafficWay
from vfiouser_virtio.testing.conformance.net.transmit import SEGMENT
from vfiouser_virtio.testing.conformance.net.tunnel_transmit import HOST, HOST_CSUM, both_ways
from vfiouser_virtio.testing.conformance.verdicts import FrameLost, NotApplicable, note

_F = NetFeature
_INNER = (_F.GUEST_CSUM, _F.GUEST_TSO4, _F.GUEST_TSO6, _F.GUEST_USO4, _F.GUEST_USO6)
_GUEST = (*_INNER, _F.GUEST_UDP_TUNNEL_GSO)
"""What a driver needs to receive packets of tunnels that it is to segment (5.1.3.1)."""
_GUEST_CSUM = (*_GUEST, _F.GUEST_UDP_TUNNEL_GSO_CSUM)
_CTRL = (_F.CTRL_VQ, _F.CTRL_GUEST_OFFLOADS)


@peer_check(
    "virtio14/NP1",
    section="Device Operation",
    observe="with GUEST_UDP_TUNNEL_GSO, and without HOST_UDP_TUNNEL_GSO: plain frames both ways",
    features=_GUEST,
)
async def np1(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """With GUEST_UDP_TUNNEL_GSO alone, the headers of both directions have outer_th_offset and inner_nh_offset."""
    await both_ways(driver, peer, _GUEST)


@peer_check(
    "virtio14/NP2",
    section=SECTION,
    observe="gso_type of what arrives of a packet of a tunnel, with all of GUEST_TSO4, TSO6, USO4 and USO6",
    features=_INNER,
    peer_features=HOST,
)
async def np2(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Without GUEST_UDP_TUNNEL_GSO no tunnel bit is in gso_type, and no packet of a tunnel is to be segmented."""
    for each in await _carry(driver, peer, _INNER):
        note(each.header.gso_type == GsoType.NONE, f"gso_type is {each.header.gso_type:#x}")


@peer_check(
    "virtio14/NP3",
    section=SECTION,
    observe="gso_type of packets of a tunnel that are to be segmented, whose IP headers are both of version 4",
    features=_GUEST,
    peer_features=HOST,
)
async def np3(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """A packet of a tunnel that is to be segmented has the bit of its IP version in gso_type, beside its protocol."""
    for each in await _unsegmented(driver, peer, _GUEST):
        kind = each.header.gso_type
        note(kind == GsoType.TCPV4 | GsoType.UDP_TUNNEL_IPV4, f"gso_type is {kind:#x}")


@peer_check(
    "virtio14/NP4",
    section=SECTION,
    observe="outer_th_offset and inner_nh_offset of packets of a tunnel that are to be segmented",
    features=_GUEST,
    peer_features=HOST,
)
async def np4(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """outer_th_offset is where the outer UDP header is, and inner_nh_offset where the inner IP header is."""
    for each in await _unsegmented(driver, peer, _GUEST):
        outer, inner = each.header.outer_th_offset, each.header.inner_nh_offset
        note(outer == tunnels.UDP_AT, f"outer_th_offset is {outer:#x}, the outer UDP header at {tunnels.UDP_AT:#x}")
        note(inner == tunnels.INNER_AT, f"inner_nh_offset is {inner:#x}, the inner IP header at {tunnels.INNER_AT:#x}")


@peer_check(
    "virtio14/NP5",
    section=SECTION,
    observe="flags, gso_size, csum_start and csum_offset of packets of a tunnel that are to be segmented",
    features=_GUEST,
    peer_features=HOST,
)
async def np5(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """A packet of a tunnel has NEEDS_CSUM, which is of its inner checksum, and not DATA_VALID, and a gso_size."""
    for each in await _unsegmented(driver, peer, _GUEST):
        flags, _, _, gso_size, start, offset = each.header[:6]
        note(flags & (HdrFlags.NEEDS_CSUM | HdrFlags.DATA_VALID) == HdrFlags.NEEDS_CSUM, f"flags is {flags:#x}")
        note(0 < gso_size <= SEGMENT, f"gso_size is {gso_size:#x}, it was sent with {SEGMENT:#x}")
        note(
            (start, offset) == (tunnels.TCP_AT, frames.TCP_CHECK),
            f"csum_start {start:#x}, csum_offset {offset:#x}; the inner TCP header is at {tunnels.TCP_AT:#x}",
        )


@peer_check(
    "virtio14/NP5-hdr-len",
    section=SECTION,
    keyword=SHOULD,
    observe="hdr_len of packets of a tunnel that are to be segmented",
    features=_GUEST,
    peer_features=HOST,
)
async def np5_hdr_len(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """hdr_len of a packet of a tunnel is not less than the length of all headers, the inner TCP header included."""
    for each in await _unsegmented(driver, peer, _GUEST):
        hdr_len = each.header.hdr_len
        note(hdr_len >= tunnels.HEADERS, f"hdr_len is {hdr_len:#x}, headers have {tunnels.HEADERS:#x}")


@peer_check(
    "virtio14/NP6",
    section=SECTION,
    observe="flags of what arrives of packets of a tunnel whose outer checksum is left open, and of those without one",
    features=_GUEST,
    peer_features=HOST_CSUM,
)
async def np6(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Without GUEST_UDP_TUNNEL_GSO_CSUM flags has no UDP_TUNNEL_CSUM."""
    for checksum in (True, False):
        for each in await _carry(driver, peer, _GUEST, checksum=checksum):
            note(not each.header.flags & HdrFlags.UDP_TUNNEL_CSUM, f"flags is {each.header.flags:#x}")


@peer_check(
    "virtio14/NP7",
    section=SECTION,
    observe="outer UDP checksum of what arrives of a packet whose outer checksum is left open, without that feature",
    features=_GUEST,
    peer_features=HOST_CSUM,
)
async def np7(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Without GUEST_UDP_TUNNEL_GSO_CSUM the outer UDP checksum is zero, or complete."""
    for each in await _carry(driver, peer, _GUEST, checksum=True):
        note(_is_closed(each), f"the outer UDP checksum {tunnels.outer_checksum(each.data):#06x} is wrong")


@peer_check(
    "virtio14/NP8",
    section=SECTION,
    observe="outer UDP checksum of what arrives of a packet whose outer checksum is left open, with that feature",
    features=_GUEST_CSUM,
    peer_features=HOST_CSUM,
)
async def np8(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """With UDP_TUNNEL_CSUM the outer UDP checksum is that of the pseudo header; without it is zero, or complete."""
    for each in await _carry(driver, peer, _GUEST_CSUM, checksum=True):
        flags = each.header.flags
        is_open = bool(flags & HdrFlags.UDP_TUNNEL_CSUM)
        seen = tunnels.outer_checksum(each.data)
        right = tunnels.outer_is_partial(each.data) if is_open else _is_closed(each)
        note(right, f"flags is {flags:#x}, and the outer UDP checksum {seen:#06x} is wrong")


@peer_check(
    "virtio14/NP9",
    section=OFFLOADS,
    observe="gso_type of what arrives of a packet of a tunnel after GUEST_OFFLOADS_SET with all but the tunnels",
    features=(*_CTRL, *_GUEST),
    peer_features=HOST,
)
async def np9(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Where the driver has turned the offload of tunnels off, it receives none that are to be segmented."""
    way = await _way(driver, peer, (*_CTRL, *_GUEST))
    await driver.ok(CtrlGuestOffloads.SET, offloads(*_INNER))
    for each in await way.carry(tunnels.packet()):
        note(each.header.gso_type == GsoType.NONE, f"gso_type is {each.header.gso_type:#x}")


def _is_closed(received: ReceivedFrame) -> bool:
    """Whether the outer UDP checksum is none, or complete: it is so once the inner one is, which it covers."""
    header, data = received.header, received.data
    if header.flags & HdrFlags.NEEDS_CSUM:
        data = frames.completed(data, header.csum_start, header.csum_offset)
    return tunnels.outer_checksum(data) == 0 or tunnels.outer_is_complete(data)


async def _way(driver: ConformanceDriver, peer: ConformanceDriver, features: Sequence[NetFeature]) -> TrafficWay:
    await driver.start(*features)
    await peer.start(*(each for each in HOST_CSUM if peer.offers(each)))
    return await TrafficWay.open(peer, driver, to=frames.BROADCAST)


async def _carry(
    driver: ConformanceDriver, peer: ConformanceDriver, features: Sequence[NetFeature], *, checksum: bool = False
) -> list[ReceivedFrame]:
    """What arrives of a packet of a tunnel, with these features here.

    Raises FrameLost for nothing: what is lost may be so by the peer, which is not the device that is looked at.
    """
    found = await (await _way(driver, peer, features)).carry(tunnels.packet(checksum=checksum))
    if not found:
        raise FrameLost("nothing arrives of a packet of the peer that is of a tunnel", RECEIVED)
    return found


async def _unsegmented(
    driver: ConformanceDriver, peer: ConformanceDriver, features: Sequence[NetFeature]
) -> list[ReceivedFrame]:
    """Those that the driver is to segment. Raises NotApplicable where the device does it itself."""
    found = [each for each in await _carry(driver, peer, features) if each.header.gso_type & ~int(GsoType.ECN)]
    if not found:
        raise NotApplicable("the device segments what it receives")
    return found
