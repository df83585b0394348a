"""Segmentation of packets in UDP tunnels, in software, against a slow reference of its own."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packets import TCP, UDP, Packet, ones_complement_sum
from support.tunnels import GENEVE, VXLAN, Tunneled, equal_zeros

from vfiouser_virtio.backends.net.frame import Frame, frame_of
from vfiouser_virtio.backends.net.netdev import ALL, MAX_FRAME, Does
from vfiouser_virtio.backends.net.offload import BadOffload, check, finish, needs, takes
from vfiouser_virtio.protocols.virtio.net import GsoType, HdrFlags

NOTHING = Does(0)

inner_packets = st.builds(
    Packet,
    payload=st.binary(max_size=3000),
    version=st.sampled_from([4, 6]),
    protocol=st.sampled_from([TCP, UDP]),
    tags=st.sampled_from([(), ((0x8100, 0x2005),)]),
    identification=st.integers(0, 0xFFFF),
    seq=st.integers(0, 0xFFFF_FFFF),
    flags=st.integers(0, 0xFF),
    tcp_options=st.sampled_from([b"", b"\x01\x01\x08\x0a" + bytes(8)]),
    addresses=st.binary(min_size=32, max_size=32),
)
outer_packets = st.builds(
    Packet,
    payload=st.just(b""),
    version=st.sampled_from([4, 6]),
    protocol=st.just(UDP),
    tags=st.sampled_from([(), ((0x8100, 7),)]),
    identification=st.integers(0, 0xFFFF),
    addresses=st.binary(min_size=32, max_size=32),
)
# The last is none, but of a length that no tunnel has: what is in it is at an odd place.
tunnels = st.builds(
    Tunneled, inner_packets, outer_packets, st.sampled_from([VXLAN, GENEVE, b"\1\2\3"]), checksum=st.booleans()
)


@given(packet=tunnels, size=st.integers(30, 1600))
@settings(deadline=None)
def test_segments_are_those_that_a_network_card_would_send(packet: Tunneled, size: int) -> None:
    frame = packet.frame(size)
    check(frame)

    segments = list(finish(frame, ALL & ~Does.CSUM))

    assert all(segment.offload is None for segment in segments)
    assert all(segment.length == len(segment.tobytes()) for segment in segments)
    assert [equal_zeros(packet, segment.tobytes()) for segment in segments] == [
        equal_zeros(packet, part.build(partial=False)) for part in packet.cut(size)
    ]


@given(packet=tunnels, size=st.integers(30, 1600))
@settings(deadline=None)
def test_a_sink_without_tunnels_completes_inner_checksums_only(packet: Tunneled, size: int) -> None:
    """The outer ones are complete: they are right once the inner ones are."""
    frame = packet.frame(size)

    segments = list(finish(frame, ALL & ~Does.TUNNEL))

    start = packet.inner_at + packet.inner.transport
    for segment, part in zip(segments, packet.cut(size), strict=True):
        check(segment)
        assert segment.offload is not None
        assert takes(Does.CSUM, segment)
        assert (segment.offload.csum_start, segment.offload.outer_th_offset) == (start, 0)
        (complete,) = finish(segment, NOTHING)
        assert equal_zeros(packet, complete.tobytes()) == equal_zeros(packet, part.build(partial=False))
        if packet.checksum:
            datagram = complete.tobytes()[packet.outer.transport :]
            assert ones_complement_sum(packet.outer.pseudo(len(datagram)) + datagram) == 0xFFFF


INNER = Packet(bytes(2500), flags=0x18)
PACKET = Tunneled(INNER, Packet(b"", protocol=UDP))


def test_what_a_sink_must_do() -> None:
    whole = PACKET.frame(1000)
    assert needs(PACKET.offload(1000)) == Does.CSUM | Does.TSO4 | Does.TUNNEL | Does.TUNNEL_CSUM
    assert takes(ALL, whole)
    assert list(finish(whole, ALL)) == [whole]
    for lacking in (Does.CSUM, Does.TSO4, Does.TUNNEL, Does.TUNNEL_CSUM):
        assert not takes(ALL & ~lacking, whole)
        assert len(list(finish(whole, ALL & ~lacking))) == 3
    plain = replace(PACKET, checksum=False)
    assert takes(ALL & ~Does.TUNNEL_CSUM, plain.frame(1000))
    six = replace(PACKET, inner=replace(INNER, version=6))
    assert needs(six.offload(1000, ecn=True)) & ~Does.TUNNEL_CSUM == (Does.CSUM | Does.TSO6 | Does.ECN | Does.TUNNEL)
    datagrams = replace(PACKET, inner=replace(INNER, protocol=UDP))
    assert needs(datagrams.offload(1000)) & Does.USO


def lying(packet: Tunneled, **lies: int) -> Frame:
    """The packet with other numbers in its header."""
    return frame_of(packet.build(partial=True), packet.offload(1000)._replace(**lies))


@pytest.mark.parametrize("bit", [GsoType.UDP_TUNNEL_IPV4, GsoType.UDP_TUNNEL_IPV6])
@pytest.mark.parametrize(("outer", "inner"), [(4, 4), (4, 6), (6, 4), (6, 6)])
def test_which_tunnel_it_is_the_frame_says(outer: int, inner: int, bit: int) -> None:
    """Linux names the outer IP version, the specification the inner one."""
    packet = replace(PACKET, inner=replace(INNER, version=inner), outer=replace(PACKET.outer, version=outer))
    kind = packet.offload(1000).gso_type & ~0x60
    segments = list(finish(lying(packet, gso_type=kind | bit), NOTHING))
    assert [each.tobytes() for each in segments] == [each.build(partial=False) for each in packet.cut(1000)]


def test_a_checksum_that_the_driver_has_computed_for_each_segment_stays() -> None:
    """Virtio 1.4, 5.1.9.2.1: without UDP_TUNNEL_CSUM it is none, or that of each segment already."""
    data = bytearray(replace(PACKET, checksum=False).build(partial=True))
    at = PACKET.outer.transport + 6
    data[at : at + 2] = b"\x12\x34"
    offload = PACKET.offload(1250)._replace(flags=int(HdrFlags.NEEDS_CSUM))
    segments = list(finish(frame_of(data, offload), NOTHING))
    assert len(segments) == 2
    assert all(segment.tobytes()[at : at + 2] == b"\x12\x34" for segment in segments)


LIES: list[tuple[dict[str, int], str]] = [
    ({"gso_type": GsoType.TCPV4 | 0x60}, "gso_type 0x61 has both"),
    ({"gso_type": int(GsoType.UDP_TUNNEL_IPV4)}, "gso_type 0x0 is none"),
    ({"gso_type": GsoType.UDP | GsoType.UDP_TUNNEL_IPV4}, "gso_type 0x3 is none"),
    ({"gso_type": GsoType.UDP_L4 | GsoType.ECN | GsoType.UDP_TUNNEL_IPV4}, "gso_type 0x85 is none"),
    ({"flags": int(HdrFlags.UDP_TUNNEL_CSUM)}, "flags 0x0 are without NEEDS_CSUM"),
    ({"flags": HdrFlags.NEEDS_CSUM | HdrFlags.DATA_VALID}, "flags 0x3 have DATA_VALID"),
    ({"gso_size": 0}, "gso_size is 0"),
    ({"gso_size": 1}, "into more than 0x400 segments"),
    ({"outer_th_offset": 0}, "outer_th_offset 0x0, but the outer UDP header is at 0x22"),
    ({"outer_th_offset": 0xFFFF}, "outer_th_offset 0xffff, but"),
    ({"inner_nh_offset": 0}, "inner_nh_offset 0x0 is before the end of the outer UDP header"),
    ({"inner_nh_offset": PACKET.outer.transport + 7}, "inner_nh_offset 0x29 is before"),
    ({"inner_nh_offset": PACKET.outer.transport + 8}, "no IP header at inner_nh_offset 0x2a"),  # but VXLAN
    ({"inner_nh_offset": 0xFFFF}, "no IP header at inner_nh_offset 0xffff"),
    ({"inner_nh_offset": PACKET.inner_at + INNER.transport}, "no IP header at"),  # but TCP
    ({"csum_start": PACKET.outer.transport}, "csum_start 0x22, but the TCPV4 header is at"),
    ({"csum_start": 0xFFFF}, "csum_start 0xffff .* beyond"),
    ({"csum_offset": 6}, "csum_offset 0x6 is not"),
    ({"gso_type": GsoType.TCPV6 | GsoType.UDP_TUNNEL_IPV4}, "gso_type TCPV6, but the frame's ethertype is 0x800"),
    ({"gso_type": GsoType.UDP_L4 | GsoType.UDP_TUNNEL_IPV4}, "no whole UDP header"),
]


@pytest.mark.parametrize(("lies", "message"), LIES, ids=[message for _, message in LIES])
def test_lies(lies: dict[str, int], message: str) -> None:
    frame = lying(PACKET, **lies)
    with pytest.raises(BadOffload, match=message):
        check(frame)
    with pytest.raises(BadOffload, match=message):
        list(finish(frame, NOTHING))


@pytest.mark.parametrize(
    "outer",
    [
        Packet(b"", protocol=UDP).build(partial=True)[:30],  # cut short
        Packet(b"", protocol=TCP).build(partial=True),
        bytes(12) + b"\x08\x06" + bytes(60),
    ],
    ids=["short", "tcp", "arp"],
)
def test_no_tunnel_at_all(outer: bytes) -> None:
    data = outer.ljust(200, b"\0") if len(outer) > 30 else outer
    lying_otherwise: list[dict[str, int]] = [{}, {"csum_start": 14, "csum_offset": 0}]
    for lies in lying_otherwise:
        with pytest.raises(BadOffload):
            list(finish(frame_of(data, PACKET.offload(1000)._replace(**lies)), NOTHING))


def test_udp_tunnel_csum_without_a_tunnel() -> None:
    frame = frame_of(INNER.build(partial=True))
    for gso_type, message in (
        (0, "UDP_TUNNEL_CSUM, without a packet of a tunnel"),
        (1, "flags 0x9 have UDP_TUNNEL_CSUM"),
    ):
        frame.offload = PACKET.offload(1000)._replace(flags=9, gso_type=gso_type, csum_start=INNER.transport)
        with pytest.raises(BadOffload, match=message):
            check(frame)


@pytest.mark.parametrize("tunnel", [True, False])
def test_a_segment_that_no_length_field_can_say(tunnel: bool) -> None:
    if tunnel:
        data, offload = PACKET.build(partial=True), PACKET.offload(0xFFFF)
    else:
        data = INNER.build(partial=True)
        offload = PACKET.offload(0xFFFF)._replace(flags=1, gso_type=1, csum_start=INNER.transport)
    frame = frame_of(data.ljust(MAX_FRAME, b"\0"), offload)
    assert frame.length == MAX_FRAME
    with pytest.raises(BadOffload, match="an IP packet of 0x1"):
        check(frame)
    with pytest.raises(BadOffload, match="an IP packet of 0x1"):
        list(finish(frame, NOTHING))
    frame.offload = offload._replace(gso_size=60_000)
    assert [type(each) for each in finish(frame, NOTHING)] == [Frame, Frame]
