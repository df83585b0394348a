"""Received packets and their buffers (virtio 1.4, 5.1.9.3 and 5.1.9.4). A second device on the network sends them."""

from vfiouser_virtio.protocols.virtio.net import ETH_HLEN, MAX_MTU, NetFeature
from vfiouser_virtio.testing.conformance.checks import ADVICE
from vfiouser_virtio.testing.conformance.net import frames
from vfiouser_virtio.testing.conformance.net.declare import peer_check
from vfiouser_virtio.testing.conformance.net.driver import ConformanceDriver, ReceivedFrame
from vfiouser_virtio.testing.conformance.net.traffic import TrafficWay
from vfiouser_virtio.testing.conformance.verdicts import FrameLost, NotApplicable, expect, fail, note

SECTION = "Device Operation / Processing of Incoming Packets"
_BUFFERS = "Device Operation / Setting Up Receive Buffers"
_SMALL = 128
"""Bytes of a receive buffer that has room for a marker, and for no usual frame."""
_SPREAD = 600
"""Bytes of a frame that takes several of those."""


@peer_check(
    "virtio14/NR1", section=SECTION, observe="frames of 60 to 1514 bytes: each arrives once, and as it was sent"
)
async def nr1(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """A frame of the network is passed to the driver, behind a header."""
    try:
        way = await into(driver, peer)
    except FrameLost as error:
        fail(str(error))
    for length in (60, 61, 128, 1514):
        sent = frames.frame(frames.BROADCAST, length, seed=length)
        found = await way.carry(sent)
        note([each.data for each in found] == [sent], f"{len(found)} of a frame of {length} bytes, or other bytes")


@peer_check("virtio14/NR2", section=_BUFFERS, observe="num_buffers of frames of 60 and 1514 bytes, without MRG_RXBUF")
async def nr2(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Without MRG_RXBUF num_buffers is 1, and a packet has one buffer."""
    way = await into(driver, peer)
    for length in (60, 1514):
        for each in await way.carry(frames.frame(frames.BROADCAST, length)):
            note(each.header.num_buffers == 1, f"num_buffers is {each.header.num_buffers:#x}")


@peer_check(
    "virtio14/NR2-small",
    section=_BUFFERS,
    keyword=ADVICE,
    observe=f"a frame of {_SPREAD} bytes where all buffers have {_SMALL}: no NEEDS_RESET, and the next frame arrives",
)
async def nr2_small(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Without MRG_RXBUF, a frame that does not fit into a buffer is dropped, and the device goes on."""
    way = await into(driver, peer, room=_SMALL)
    found = await way.carry(frames.frame(frames.BROADCAST, _SPREAD))
    expect(not found, f"{len(found)} frames arrive, of {[len(each.data) for each in found]} bytes")
    await driver.goes_on("a frame that fits into no buffer")


async def _spread(driver: ConformanceDriver, peer: ConformanceDriver) -> list[ReceivedFrame]:
    """What comes of a frame that takes several buffers."""
    way = await into(driver, peer, NetFeature.MRG_RXBUF, room=_SMALL, buffers=16)
    return await way.carry(frames.frame(frames.BROADCAST, _SPREAD))


@peer_check(
    "virtio14/NR3",
    section=SECTION,
    observe=f"num_buffers of a frame of {_SPREAD} bytes in buffers of {_SMALL}, and what they hold",
    features=(NetFeature.MRG_RXBUF,),
)
async def nr3(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """With MRG_RXBUF num_buffers says over how many buffers the packet is spread."""
    found = await _spread(driver, peer)
    sent = frames.frame(frames.BROADCAST, _SPREAD)
    numbers = [f"{each.header.num_buffers:#x} for {len(each.data):#x} bytes" for each in found]
    expect([each.data for each in found] == [sent], f"num_buffers is {', '.join(numbers)}, of {_SPREAD:#x} bytes")


@peer_check(
    "virtio14/NR3-full",
    section=SECTION,
    observe=f"used lengths of a frame of {_SPREAD} bytes in buffers of {_SMALL}",
    features=(NetFeature.MRG_RXBUF,),
)
async def nr3_full(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """Of the buffers of a packet all but the last are filled completely."""
    for each in await _spread(driver, peer):
        full = all(length == _SMALL for length in each.lengths[:-1])
        note(full, f"used lengths {[*each.lengths]} of buffers of {_SMALL}")


@peer_check(
    "virtio14/NR3-together",
    section=SECTION,
    observe="when the first buffer of a spread packet is used: whether num_buffers are",
    features=(NetFeature.MRG_RXBUF,),
)
async def nr3_together(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """The buffers of a packet are used together: the driver sees at least num_buffers of them."""
    for each in await _spread(driver, peer):
        note(each.together, f"num_buffers is {each.header.num_buffers:#x}, but fewer were used with the first")


@peer_check(
    "virtio14/NR9",
    section="Device configuration layout",
    observe="frames of mtu and of mtu + 1 bytes, without Ethernet headers, from a peer that may send them",
    features=(NetFeature.MTU,),
)
async def nr9(driver: ConformanceDriver, peer: ConformanceDriver) -> None:
    """With MTU no frame that exceeds mtu is passed to the driver, unless it is to be segmented."""
    mtu = await driver.number("mtu")
    if mtu == MAX_MTU or (peer.offers(NetFeature.MTU) and await peer.number("mtu") < mtu + 1):
        raise NotApplicable("needs a peer that may send more than mtu")
    way = await into(driver, peer, NetFeature.MTU, room=mtu + 64)
    fits = frames.frame(frames.BROADCAST, mtu + ETH_HLEN)
    found = await way.carry(fits, frames.frame(frames.BROADCAST, mtu + 1 + ETH_HLEN))
    lengths = [len(each.data) for each in found]
    expect(max(lengths, default=0) <= len(fits), f"mtu is {mtu}, frames of {lengths} bytes arrive")


async def into(
    driver: ConformanceDriver, peer: ConformanceDriver, *features: NetFeature, room: int = 2048, buffers: int = 8
) -> TrafficWay:
    """From a peer that sends complete frames to the device."""
    await driver.start(*features, room=room, buffers=buffers)
    await peer.start()
    return await TrafficWay.open(peer, driver, to=frames.BROADCAST)
