"""Headers of received packets (virtio 1.4, 5.1.9.4): only what was negotiated, and then as it must be.

The peer sends packets whose checksum, or segmentation, is left to whoever has negotiated it.
"""

from vfiouser_virtio.protocols.virtio.net import CtrlGuestOffloads, GsoType, HdrFlags, NetFeature
from vfiouser_virtio.testing.conformance.checks import SHOULD
from vfiouser_virtio.testing.conformance.net import frames
from vfiouser_virtio.testing.conformance.net.declare import peer_check
from vfiouser_virtio.testing.conformance.net.driver import ConformanceDriver, Header, ReceivedFrame
from vfiouser_virtio.testing.conformance.net.receive import SECTION
from vfiouser_virtio.testing.conformance.net.traffic import RECEIVED, SentPacket, TrafficWay
from vfiouser_virtio.testing.conformance.net.transmit import PAYLOAD, segmented
from vfiouser_virtio.testing.conformance.verdicts import FrameLost, NotApplicable, expect, note

_CSUM, _TSO = (NetFeature.CSUM,), (NetFeature.CSUM, NetFeature.HOST_TSO4)
_GUEST_CSUM, _GUEST_TSO = (NetFeature.GUEST_CSUM,), (NetFeature.GUEST_CSUM, NetFeature.GUEST_TSO4)
PARTIAL = Header(HdrFlags.NEEDS_CSUM, csum_start=frames.TCP_AT, csum_offset=frames.TCP_CHECK)
"""Header of a frame of `frames.tcp` whose checksum is partial."""


@peer_check(
    "virtio14/NR4",
    section=SECTION,
    observe="flags of packets whose sender has left the checksum open, and of others",
    peer_features=_CSUM,
)
async def nr4(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Without GUEST_CSUM flags is 0."""
    for each in await _carry(driver, peer, (), _CSUM, *_partial(), frames.tcp(frames.BROADCAST, 99)):
        note(each.header.flags == 0, f"flags is {each.header.flags:#x}")


@peer_check(
    "virtio14/NR4-sum",
    section=SECTION,
    keyword=SHOULD,
    observe="the checksum of a packet whose sender has left it open",
    peer_features=_CSUM,
)
async def nr4_sum(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Without GUEST_CSUM packets are fully checksummed."""
    found = await _carry(driver, peer, (), _CSUM, *_partial())
    expect(len(found) == 1 and frames.is_complete(found[0].data), f"{len(found)} arrive, or with a wrong checksum")


@peer_check(
    "virtio14/NR5",
    section=SECTION,
    observe="gso_type of what arrives of a packet that is to be segmented, with GUEST_CSUM alone",
    features=_GUEST_CSUM,
    peer_features=_TSO,
)
async def nr5(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Without GUEST_TSO4, TSO6, UFO and USO gso_type is NONE."""
    for each in await _carry(driver, peer, _GUEST_CSUM, _TSO, *_large()):
        note(each.header.gso_type == GsoType.NONE, f"gso_type is {each.header.gso_type:#x}")


async def _unsegmented(driver: ConformanceDriver, peer: ConformanceDriver) -> list[ReceivedFrame]:
    """Packets of a kind that the driver is to segment. Raises NotApplicable where the device does it itself."""
    found = await _carry(driver, peer, _GUEST_TSO, _TSO, *_large())
    whole = [each for each in found if each.header.gso_type]
    if not whole:
        raise NotApplicable("the device segments what it receives")
    return whole


@peer_check(
    "virtio14/NR6",
    section=SECTION,
    observe="flags and gso_size of packets with GUEST_TSO4 whose gso_type is TCPV4",
    features=_GUEST_TSO,
    peer_features=_TSO,
)
async def nr6(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Where gso_type is not NONE, flags has NEEDS_CSUM, and gso_size says the size of segments."""
    for each in await _unsegmented(driver, peer):
        note(bool(each.header.flags & HdrFlags.NEEDS_CSUM), f"flags is {each.header.flags:#x}, without NEEDS_CSUM")
        note(each.header.gso_size > 0, "gso_size is 0")


@peer_check(
    "virtio14/NR6-hdr-len",
    section=SECTION,
    keyword=SHOULD,
    observe="hdr_len of packets with GUEST_TSO4 whose gso_type is TCPV4",
    features=_GUEST_TSO,
    peer_features=_TSO,
)
async def nr6_hdr_len(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """With GUEST_TSO4, hdr_len is not less than the length of all headers."""
    for each in await _unsegmented(driver, peer):
        note(each.header.hdr_len >= frames.HEADERS, f"hdr_len is {each.header.hdr_len}, headers have {frames.HEADERS}")


@peer_check(
    "virtio14/NR7",
    section=SECTION,
    observe="with GUEST_CSUM: complete the checksum as csum_start and csum_offset say, or take it as it is",
    features=_GUEST_CSUM,
    peer_features=_CSUM,
)
async def nr7(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """With NEEDS_CSUM, the sum from csum_start on, stored at csum_offset, makes a fully checksummed packet."""
    found = await _carry(driver, peer, _GUEST_CSUM, _CSUM, *_partial())
    expect(len(found) == 1, f"{len(found)} packets arrive")
    [(_, header, data, _, _)] = found
    if header.flags & HdrFlags.NEEDS_CSUM:
        data = frames.completed(data, header.csum_start, header.csum_offset)
    where = f"csum_start {header.csum_start:#x}, csum_offset {header.csum_offset:#x}, flags {header.flags:#x}"
    expect(frames.is_complete(data), f"the checksum is wrong: {where}")


@peer_check(
    "virtio14/NR8",
    section=SECTION,
    observe="flags of packets with GUEST_CSUM, and without RSC_EXT and UDP tunnels",
    features=_GUEST_CSUM,
    peer_features=_CSUM,
)
async def nr8(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """flags has no bit that was not negotiated, such as RSC_INFO."""
    for each in await _carry(driver, peer, _GUEST_CSUM, _CSUM, *_partial(), frames.tcp(frames.BROADCAST, 99)):
        unknown = each.header.flags & ~int(HdrFlags.NEEDS_CSUM | HdrFlags.DATA_VALID)
        note(not unknown, f"flags is {each.header.flags:#x}")


@peer_check(
    "virtio14/NO3",
    section="Device Operation / Control Virtqueue / Offloads State Configuration / Setting Offloads State",
    observe="with GUEST_CSUM: flags and checksum of a packet after GUEST_OFFLOADS_SET with 0",
    features=(NetFeature.CTRL_VQ, NetFeature.CTRL_GUEST_OFFLOADS, *_GUEST_CSUM),
    peer_features=_CSUM,
)
async def no3(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """An offload that the driver has turned off is used no more."""
    way = await _way(driver, peer, (NetFeature.CTRL_VQ, NetFeature.CTRL_GUEST_OFFLOADS, *_GUEST_CSUM), _CSUM)
    await driver.ok(CtrlGuestOffloads.SET, bytes(8))
    for each in await way.carry(*_partial()):
        note(not each.header.flags & HdrFlags.NEEDS_CSUM, f"flags is {each.header.flags:#x}")
        note(frames.is_complete(each.data), "the checksum is wrong")


def _partial() -> tuple[SentPacket, ...]:
    return (SentPacket(frames.tcp(frames.BROADCAST, 99, partial=True), PARTIAL),)


def _large() -> tuple[SentPacket, ...]:
    return (SentPacket(frames.tcp(frames.BROADCAST, PAYLOAD, partial=True), segmented()),)


async def _way(
    driver: ConformanceDriver,
    peer: ConformanceDriver,
    features: tuple[NetFeature, ...],
    peer_features: tuple[NetFeature, ...],
) -> TrafficWay:
    await driver.start(*features)
    await peer.start(*peer_features)
    return await TrafficWay.open(peer, driver, to=frames.BROADCAST)


async def _carry(
    driver: ConformanceDriver,
    peer: ConformanceDriver,
    features: tuple[NetFeature, ...],
    peer_features: tuple[NetFeature, ...],
    *packets: SentPacket | bytes,
) -> list[ReceivedFrame]:
    """What arrives of packets of the peer, with these features negotiated here and there.

    Raises FrameLost for nothing: what is lost may be so by the peer, which is not the device that is looked at.
    """
    way = await _way(driver, peer, features, peer_features)
    found = await way.carry(*packets)
    if not found:
        raise FrameLost("nothing arrives of a packet of the peer whose checksum is partial", RECEIVED)
    return found
