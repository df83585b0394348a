"""Packets of a driver on the network (virtio 1.4, 5.1.9.2), as a peer sees them that does no work of the sender's."""

from vfiouser_virtio.protocols.virtio.net import ETH_HLEN, HdrFlags, NetFeature
from vfiouser_virtio.testing.conformance.net import frames
from vfiouser_virtio.testing.conformance.net.declare import peer_check
from vfiouser_virtio.testing.conformance.net.driver import ConformanceDriver, Header
from vfiouser_virtio.testing.conformance.net.traffic import SENT, SentPacket, TrafficWay
from vfiouser_virtio.testing.conformance.net.transmit import LIES, PAYLOAD, SECTION, UNKNOWN_FLAG, segmented
from vfiouser_virtio.testing.conformance.verdicts import FrameLost, expect, fail, note


@peer_check(
    "virtio14/NX5",
    section=SECTION,
    observe="packets with bit 7 of flags, and with csum_start but without NEEDS_CSUM: the frames at the peer",
    features=(NetFeature.CSUM,),
)
async def nx5(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """A packet arrives as it was sent: unknown flags are ignored, and so are csum_start and csum_offset."""
    try:
        way = await out(driver, peer, NetFeature.CSUM)
    except FrameLost as error:
        fail(str(error))
    sent = frames.frame(frames.BROADCAST, 200)
    for header in (Header(), Header(UNKNOWN_FLAG), Header(csum_start=34, csum_offset=16)):
        found = await way.carry(SentPacket(sent, header))
        note([each.data for each in found] == [sent], f"{header}: {len(found)} frames arrive, or other bytes")


@peer_check(
    "virtio14/NX6",
    section=SECTION,
    observe="packets to be segmented whose hdr_len is right, 0, 1, 0xffff: the segments at a peer without GUEST_TSO4",
    features=(NetFeature.CSUM, NetFeature.HOST_TSO4),
)
async def nx6(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Segmentation does not depend on hdr_len, and loses nothing."""
    way = await out(driver, peer, NetFeature.CSUM, NetFeature.HOST_TSO4)
    sent = frames.tcp(frames.BROADCAST, PAYLOAD, partial=True)
    for hdr_len in (frames.HEADERS, *LIES):
        found = await way.carry(SentPacket(sent, segmented(hdr_len)))
        payload = b"".join(frames.tcp_payload(each.data) for each in found)
        note(
            payload == frames.tcp_payload(sent), f"hdr_len {hdr_len:#x}: {len(payload):#x} of {PAYLOAD:#x} bytes arrive"
        )
        note(all(frames.is_complete(each.data) for each in found), f"hdr_len {hdr_len:#x}: a checksum is wrong")


@peer_check(
    "virtio14/NX7",
    section="Device configuration layout",
    observe="a packet of mtu bytes, the peer's where that is less, and an Ethernet header: one frame at that peer",
    features=(NetFeature.MTU,),
    peer_features=(NetFeature.MRG_RXBUF,),
)
async def nx7(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """With MTU, packets of up to mtu bytes are forwarded, and not fragmented."""
    way = await out(driver, peer, NetFeature.MTU)
    mtu = await driver.number("mtu")
    if peer.offers(NetFeature.MTU):
        mtu = min(mtu, await peer.number("mtu"))
    sent = frames.frame(frames.BROADCAST, mtu + ETH_HLEN)
    found = await way.carry(sent)
    expect([each.data for each in found] == [sent], f"a packet of mtu, {mtu} bytes: {len(found)} frames arrive")


@peer_check(
    "virtio14/NX8",
    section=SECTION,
    observe="a packet with NEEDS_CSUM: its checksum at a peer without GUEST_CSUM",
    features=(NetFeature.CSUM,),
)
async def nx8(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """The checksum from csum_start on is completed, and stored at csum_offset."""
    way = await out(driver, peer, NetFeature.CSUM)
    sent = frames.tcp(frames.BROADCAST, 101, partial=True)
    header = Header(HdrFlags.NEEDS_CSUM, csum_start=frames.TCP_AT, csum_offset=frames.TCP_CHECK)
    found = await way.carry(SentPacket(sent, header))
    complete = frames.completed(sent, frames.TCP_AT, frames.TCP_CHECK)
    expect([each.data for each in found] == [complete], f"{len(found)} frames arrive, or without a right checksum")


async def out(driver: ConformanceDriver, peer: ConformanceDriver, *features: NetFeature) -> TrafficWay:
    """From the device to a peer that has negotiated no offload, and so gets frames as they are on a wire."""
    mergeable = NetFeature.MRG_RXBUF
    await peer.start(*([mergeable] if peer.offers(mergeable) else []), room=8192, buffers=12)
    await driver.start(*features)
    return await TrafficWay.open(driver, peer, to=frames.BROADCAST, rule=SENT)
