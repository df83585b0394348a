"""Transmission by a network device that is alone (virtio 1.4, 5.1.9.2): headers that lie or mean nothing to it."""

from vfiouser_virtio.protocols.virtio.net import GsoType, HdrFlags, NetFeature
from vfiouser_virtio.testing.conformance.checks import ADVICE
from vfiouser_virtio.testing.conformance.net import frames
from vfiouser_virtio.testing.conformance.net.declare import net_check
from vfiouser_virtio.testing.conformance.net.driver import ConformanceDriver, Header

SECTION = "Device Operation / Packet Transmission"
UNKNOWN_FLAG = 0x80
"""A bit of ``flags`` that nothing defines."""
LIES = (0, 1, 0xFFFF)
"""Values of ``hdr_len`` that are not its length."""
SEGMENT = 500
PAYLOAD = 1200


def segmented(hdr_len: int = frames.HEADERS) -> Header:
    """Header of a frame of `frames.tcp` that is to be cut into segments of `SEGMENT` bytes."""
    return Header(HdrFlags.NEEDS_CSUM, GsoType.TCPV4, hdr_len, SEGMENT, frames.TCP_AT, frames.TCP_CHECK)


@net_check(
    "virtio14/NX1",
    section=SECTION,
    observe="packets with bit 7 of flags: their buffers are used, NEEDS_RESET is not set, the next packet is taken",
)
async def nx1(driver: ConformanceDriver) -> None:
    """Bits of flags that the device does not know are ignored."""
    await driver.start()
    await driver.send(frames.frame(frames.BROADCAST), Header(UNKNOWN_FLAG))
    await driver.goes_on(f"flags {UNKNOWN_FLAG:#x}")


@net_check(
    "virtio14/NX2",
    section=SECTION,
    observe="packets without NEEDS_CSUM whose csum_start is beyond their end: used, no NEEDS_RESET, the next is taken",
    features=(NetFeature.CSUM,),
)
async def nx2(driver: ConformanceDriver) -> None:
    """Without NEEDS_CSUM in flags, csum_start and csum_offset are not used."""
    await driver.start(NetFeature.CSUM)
    for start, offset in ((0xFFFF, 0), (0, 0xFFFF), (0xFFFF, 0xFFFF)):
        await driver.send(frames.frame(frames.BROADCAST), Header(csum_start=start, csum_offset=offset))
        await driver.goes_on(f"csum_start {start:#x}, csum_offset {offset:#x}")


@net_check(
    "virtio14/NX3",
    section=SECTION,
    observe="packets to be segmented whose hdr_len is 0, 1 and 0xffff: used, no NEEDS_RESET, the next is taken",
    features=(NetFeature.CSUM, NetFeature.HOST_TSO4),
)
async def nx3(driver: ConformanceDriver) -> None:
    """The device does not rely on hdr_len."""
    await driver.start(NetFeature.CSUM, NetFeature.HOST_TSO4)
    for hdr_len in LIES:
        await driver.send(frames.tcp(frames.BROADCAST, PAYLOAD, partial=True), segmented(hdr_len))
        await driver.goes_on(f"hdr_len {hdr_len:#x}")


@net_check(
    "virtio14/NX4",
    section=SECTION,
    keyword=ADVICE,
    observe="buffers too short for a header, a frame of 1 byte, a gso_type that was not negotiated: as NX1",
)
async def nx4(driver: ConformanceDriver) -> None:
    """A packet that cannot be sent is dropped, and the device goes on: a program in the guest may have made it."""
    await driver.start()
    for message in (b"\0", bytes(11), bytes(12)):
        await driver.transmit(message)
        await driver.goes_on(f"a transmit buffer of {len(message):#x} bytes")
    await driver.send(b"\0")
    await driver.goes_on("a frame of 1 byte")
    await driver.send(frames.tcp(frames.BROADCAST, PAYLOAD), Header(0, GsoType.TCPV4, frames.HEADERS, SEGMENT))
    await driver.goes_on("a gso_type that was not negotiated")
