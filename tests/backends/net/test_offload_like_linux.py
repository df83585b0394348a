"""Segments and checksums in software, compared with those that Linux makes of the same packet.

The packet goes into one TAP interface, over a bridge, and out of another one that has no offloads.
"""

import os
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import trio
import trio.testing
from support.net_namespace import NetNamespace
from support.net_sink import Sink
from support.packets import MACS, TCP, UDP, Packet
from support.tunnels import GENEVE, Tunneled

from vfiouser_virtio.backends.net.frame import Frame, Offload, frame_of
from vfiouser_virtio.backends.net.netdev import ALL, Does
from vfiouser_virtio.backends.net.offload import finish
from vfiouser_virtio.backends.net.tap import TapNetdev
from vfiouser_virtio.protocols.virtio.net import GsoType, HdrFlags

pytestmark = pytest.mark.once

ADDRESSES = bytes.fromhex("20010db8000000000000000000000001 20010db8000000000000000000000002")

_HERE = f"this is Linux {os.uname().release}"
NO_TUNNELS = (
    f"TAP interfaces of this host take no segments within UDP tunnels (TUN_F_UDP_TUNNEL_GSO, Linux 6.17): {_HERE}"
)
NO_UDP_SEGMENTS = f"TAP interfaces of this host take no segments of UDP (VIRTIO_NET_HDR_GSO_UDP_L4, Linux 6.2): {_HERE}"


@pytest.fixture
def taps(namespace: NetNamespace) -> Iterator[tuple[TapNetdev, TapNetdev]]:
    namespace.ip("link add br0 type bridge forward_delay 0")
    namespace.ip("link set br0 up")
    one, other = (namespace.run(partial(TapNetdev, ifname=name)) for name in ("tap0", "tap1"))
    for name in ("tap0", "tap1"):
        namespace.ip(f"link set {name} master br0")
    yield one, other
    one.close()
    other.close()


HOP_BY_HOP = {TCP: b"\x06\0\x01\x04\0\0\0\0", UDP: b"\x11\0\x01\x04\0\0\0\0"}


@pytest.mark.parametrize(
    ("packet", "kind"),
    [
        (Packet(b"", flags=0x99, seq=0xFFFFFF00, identification=0xFFFE), GsoType.TCPV4),
        (Packet(b"", flags=0x99, tcp_options=b"\x01\x01\x08\x0a" + bytes(8)), GsoType.TCPV4 | GsoType.ECN),
        (Packet(b"", version=6, flags=0x19, addresses=ADDRESSES), GsoType.TCPV6),
        (Packet(b"", version=6, flags=0x10, addresses=ADDRESSES, options=HOP_BY_HOP[TCP]), GsoType.TCPV6),
        (Packet(b"", flags=0x18, tags=((0x8100, 5),)), GsoType.TCPV4),
        (Packet(b"", protocol=UDP, identification=7), GsoType.UDP_L4),
        (Packet(b"", protocol=UDP, version=6, addresses=ADDRESSES), GsoType.UDP_L4),
        (Packet(b"", flags=0x18), GsoType.NONE),
        (Packet(b"", protocol=UDP), GsoType.NONE),
    ],
    ids=["tcp4", "ecn", "tcp6", "hop-by-hop", "vlan", "udp4", "udp6", "tcp-csum", "udp-csum"],
)
async def test_linux_makes_the_same_of_it(
    taps: tuple[TapNetdev, TapNetdev], nursery: trio.Nursery, packet: Packet, kind: int
) -> None:
    packet = replace(
        packet, payload=bytes(number * 7 % 256 for number in range(1001 if kind == GsoType.NONE else 5001))
    )
    check = 6 if packet.protocol == UDP else 16
    size = 0 if kind == GsoType.NONE else 1000
    headers = len(packet.build(partial=True)) - len(packet.payload)
    offload = Offload(HdrFlags.NEEDS_CSUM, kind, headers, size, packet.transport, check)
    frame = frame_of(packet.build(partial=True), offload)
    await compare(taps, nursery, frame, kind == GsoType.UDP_L4)


TCP4 = Packet(b"", flags=0x99, seq=0xFFFFFF00, identification=0xFFFE)
TCP6 = Packet(b"", version=6, flags=0x19, addresses=ADDRESSES)
OUTER4 = Packet(b"", protocol=UDP, identification=0xFFFD)
OUTER6 = Packet(b"", protocol=UDP, version=6, addresses=ADDRESSES)


@pytest.mark.parametrize(
    ("packet", "ecn"),
    [
        (Tunneled(TCP4, OUTER4), False),
        (Tunneled(replace(TCP4, tcp_options=b"\x01\x01\x08\x0a" + bytes(8)), OUTER4, checksum=False), True),
        (Tunneled(TCP4, OUTER6, GENEVE), False),
        (Tunneled(TCP6, OUTER4, GENEVE, checksum=False), False),
        (Tunneled(TCP6, OUTER6), False),
        (Tunneled(Packet(b"", protocol=UDP, identification=7), OUTER4), False),
        (Tunneled(TCP4, replace(OUTER4, tags=((0x8100, 5),))), False),
    ],
    ids=["4-in-4", "ecn-no-csum", "4-in-6", "6-in-4-no-csum", "6-in-6", "udp", "vlan"],
)
async def test_linux_makes_the_same_of_a_tunnel(
    taps: tuple[TapNetdev, TapNetdev], nursery: trio.Nursery, packet: Tunneled, ecn: bool
) -> None:
    payload = bytes(number * 7 % 256 for number in range(5001))
    frame = replace(packet, inner=replace(packet.inner, payload=payload)).frame(1000, ecn=ecn)
    await compare(taps, nursery, frame, False)


async def compare(taps: tuple[TapNetdev, TapNetdev], nursery: trio.Nursery, frame: Frame, may_be_unknown: bool) -> None:
    """Have Linux cut the frame, and compare what comes out with what `finish` makes of it."""
    expected = [each.tobytes() for each in finish(frame, Does(0))]
    one, other = taps
    sink = Sink(does=Does(0))
    nursery.start_soon(one.run, Sink(does=ALL))
    nursery.start_soon(other.run, sink)
    await trio.testing.wait_all_tasks_blocked()
    assert frame.offload is not None
    if frame.offload.outer_th_offset and not one.does & Does.TUNNEL:
        pytest.skip(NO_TUNNELS)
    assert one.put(frame)
    if one.counters.tx_dropped and may_be_unknown:
        pytest.skip(NO_UDP_SEGMENTS)
    got: list[bytes] = []
    seen = 0
    with trio.fail_after(60):
        while len(got) < len(expected):
            await sink.wait_frames(seen + 1)
            # The host says other things as well, such as router solicitations.
            got += [each.tobytes() for each in sink.frames[seen:] if each.head(12) == MACS]
            seen = len(sink.frames)
    assert got == expected


async def tunnel_frames(sink: Sink, count: int) -> list[Frame]:
    """So many frames of ours: the host says other things as well."""
    seen = 0
    while True:
        ours = [each for each in sink.frames if each.head(12) == MACS]
        if len(ours) >= count:
            return ours
        seen = len(sink.frames)
        await sink.wait_frames(seen + 1)


async def test_linux_hands_a_tunnel_on_whole_until_the_driver_cannot(
    taps: tuple[TapNetdev, TapNetdev], nursery: trio.Nursery
) -> None:
    """What is left for the driver before, in a form that the next does not take, is thrown away."""
    packet = Tunneled(replace(TCP4, payload=bytes(range(200)) * 25), OUTER4)
    frame = packet.frame(1000)
    one, other = taps
    nursery.start_soon(one.run, Sink(does=ALL))
    async with trio.open_nursery() as first:
        sink = Sink(does=ALL)
        first.start_soon(other.run, sink)
        await trio.testing.wait_all_tasks_blocked()
        if not one.does & Does.TUNNEL:
            pytest.skip(NO_TUNNELS)
        assert one.put(frame)
        [whole] = await tunnel_frames(sink, 1)
        assert whole.tobytes() == frame.tobytes()
        assert whole.offload is not None
        assert frame.offload is not None
        assert whole.offload._replace(hdr_len=0) == frame.offload._replace(hdr_len=0)
        first.cancel_scope.cancel()

    assert one.put(frame)  # nobody reads it now
    sink = Sink(does=Does(0))
    nursery.start_soon(other.run, sink)
    await trio.testing.wait_all_tasks_blocked()
    assert other.counters.rx_dropped >= 1
    assert one.put(frame)
    got = [each.tobytes() for each in await tunnel_frames(sink, 5)]
    assert got == [each.build(partial=False) for each in packet.cut(1000)]
    assert other.link
