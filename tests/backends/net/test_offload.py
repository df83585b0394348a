"""Checksums and segmentation in software, against a slow reference of its own."""

import itertools
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.packets import MACS, TCP, UDP, Packet, ones_complement_sum

from vfiouser_virtio.backends.net import segmentation
from vfiouser_virtio.backends.net.frame import Frame, Offload, frame_of
from vfiouser_virtio.backends.net.netdev import ALL, LONG_FRAME, Does
from vfiouser_virtio.backends.net.offload import MAX_SEGMENTS, BadOffload, check, finish, needs, takes
from vfiouser_virtio.protocols.virtio.net import GsoType, HdrFlags

NOTHING = Does(0)
PADN = b"\x01\x04\0\0\0\0"
EXTENSIONS = (
    (0, b""),
    (0, bytes([TCP, 0]) + PADN),  # hop by hop
    (60, bytes([43, 0]) + PADN + bytes([60, 2, 0, 0]) + bytes(20) + bytes([TCP, 0]) + PADN),  # 60, 43, 60
)
packets = st.builds(
    Packet,
    payload=st.binary(max_size=3000),
    version=st.sampled_from([4, 6]),
    protocol=st.sampled_from([TCP, UDP]),
    tags=st.sampled_from([(), ((0x8100, 0x2005),), ((0x88A8, 7), (0x8100, 1))]),
    identification=st.integers(0, 0xFFFF),
    seq=st.integers(0, 0xFFFF_FFFF),
    flags=st.integers(0, 0xFF),
    tcp_options=st.sampled_from([b"", b"\x01\x01\x08\x0a" + bytes(8), bytes(40)]),
    addresses=st.binary(min_size=32, max_size=32),
)


def with_options(packet: Packet, choice: int) -> Packet:
    if packet.version == 4:
        return replace(packet, options=(b"", b"\x01" * 4, b"\x01" * 40)[choice])
    first, extensions = EXTENSIONS[choice]
    if packet.protocol == UDP and extensions:
        where = len(extensions) - 8
        extensions = extensions[:where] + bytes([UDP]) + extensions[where + 1 :]
    return replace(packet, options=extensions, first=first)


def gso_type(packet: Packet) -> int:
    if packet.protocol == UDP:
        return GsoType.UDP_L4
    return GsoType.TCPV4 if packet.version == 4 else GsoType.TCPV6


def gso(packet: Packet, size: int, *, ecn: bool = False, **lies: int) -> Frame:
    offload = Offload(
        HdrFlags.NEEDS_CSUM,
        gso_type(packet) | (GsoType.ECN if ecn else 0),
        0,
        size,
        packet.transport,
        6 if packet.protocol == UDP else 16,
    )
    return frame_of(packet.build(partial=True), offload._replace(**lies))


def scattered(frame: Frame, *cuts: int) -> Frame:
    """The same in several segments, as a guest may have it."""
    data = memoryview(frame.tobytes())
    places = [0, *(cut for cut in sorted(cuts) if cut < len(data)), len(data)]
    pieces = [data[start:end] for start, end in itertools.pairwise(places)]
    return Frame(pieces, frame.length, frame.offload)


TRANSPORT = Packet(b"").transport
TCP_CSUM = Offload(HdrFlags.NEEDS_CSUM, 0, 0, 0, TRANSPORT, 16)


@given(packet=packets, choice=st.integers(0, 2), size=st.integers(30, 1600), cuts=st.lists(st.integers(1, 200)))
@settings(deadline=None)
def test_segments_are_those_that_a_network_card_would_send(
    packet: Packet, choice: int, size: int, cuts: list[int]
) -> None:
    packet = with_options(packet, choice)
    frame = scattered(gso(packet, size), *cuts)
    check(frame)

    segments = list(finish(frame, NOTHING))

    assert all(segment.offload is None for segment in segments)
    assert all(segment.length == len(segment.tobytes()) for segment in segments)
    assert [equal_zeros(packet, segment.tobytes()) for segment in segments] == [
        equal_zeros(packet, part.build(partial=False)) for part in packet.cut(size)
    ]


def equal_zeros(packet: Packet, data: bytes) -> bytes:
    """TCP takes either zero of one's complement as a checksum."""
    at = packet.transport + 16
    if packet.protocol == TCP and data[at : at + 2] == b"\xff\xff":
        return data[:at] + bytes(2) + data[at + 2 :]
    return data


@given(packet=packets, choice=st.integers(0, 2), size=st.integers(30, 1600))
@settings(deadline=None)
def test_a_sink_that_completes_checksums_gets_segments_with_the_pseudo_headers_sum(
    packet: Packet, choice: int, size: int
) -> None:
    packet = with_options(packet, choice)

    segments = list(finish(gso(packet, size), Does.CSUM))

    assert [equal_sums(packet, segment.tobytes()) for segment in segments] == [
        equal_sums(packet, part.build(partial=True)) for part in packet.cut(size)
    ]
    for segment in segments:
        check(segment)
        assert takes(Does.CSUM, segment)
        (complete,) = finish(segment, NOTHING)
        whole = complete.tobytes()[packet.transport :]
        assert ones_complement_sum(packet.pseudo(len(whole)) + whole) == 0xFFFF


def equal_sums(packet: Packet, data: bytes) -> bytes:
    """Sums that differ only in which zero they are."""
    at = packet.transport + (6 if packet.protocol == UDP else 16)
    return data[:at] + bytes(2) + data[at + 2 :] if data[at : at + 2] == b"\xff\xff" else data


@given(packet=packets, choice=st.integers(0, 2), cuts=st.lists(st.integers(1, 200)))
@settings(deadline=None)
def test_a_partial_checksum_is_completed(packet: Packet, choice: int, cuts: list[int]) -> None:
    packet = with_options(packet, choice)
    offset = 6 if packet.protocol == UDP else 16
    offload = Offload(HdrFlags.NEEDS_CSUM, 0, 0, 0, packet.transport, offset)
    frame = scattered(frame_of(packet.build(partial=True), offload), *cuts)

    (complete,) = finish(frame, NOTHING)

    assert complete.offload is None
    assert equal_zeros(packet, complete.tobytes()) == equal_zeros(packet, packet.build(partial=False))


@pytest.mark.parametrize("size", [301, 511, 512, 1459, 1460, 4097, 0x8000, 0xFFFF, 0x10001])
@pytest.mark.parametrize("fill", [b"\0", b"\xff", b"\x12\x34\xfe"])
def test_checksums_of_all_lengths(fill: bytes, size: int) -> None:
    packet = Packet((fill * size)[:size])
    frame = frame_of(packet.transport_bytes())
    assert segmentation.ones_complement_sum(frame.segments[0]) % 0xFFFF == ones_complement_sum(frame.tobytes()) % 0xFFFF


def test_a_udp_checksum_of_zero_is_sent_as_its_other_zero() -> None:
    packet = Packet(b"\0\0", protocol=UDP)
    body = packet.transport_bytes()
    zero = ones_complement_sum(packet.pseudo(len(body)) + body) ^ 0xFFFF
    packet = Packet(zero.to_bytes(2, "big"), protocol=UDP)  # the payload makes up for all the rest

    (complete,) = finish(gso(packet, 100), NOTHING)

    assert complete.tobytes() == packet.build(partial=False)
    assert complete.tobytes()[packet.transport + 6 :][:2] == b"\xff\xff"


def test_sums_behind_options_are_those_of_the_driver_who_knows_the_final_destination() -> None:
    """RFC 8200, 8.1: with a routing header, the pseudo header has the last hop's address, not the next one's."""
    final = bytes(range(100, 132))
    routed = Packet(bytes(range(256)), version=6, options=bytes([TCP, 2, 0, 1, 0, 0, 0, 0]) + final[16:], first=43)
    at = routed.transport + 16
    data = bytearray(routed.build(partial=True))
    last = Packet(b"", version=6, addresses=routed.addresses[:16] + final[16:])
    whole = len(data) - routed.transport
    data[at : at + 2] = ones_complement_sum(last.pseudo(whole)).to_bytes(2, "big")

    for segment in finish(frame_of(data, gso(routed, 100).offload), NOTHING):
        body = segment.tobytes()[routed.transport :]
        assert ones_complement_sum(last.pseudo(len(body)) + body) == 0xFFFF


def test_what_a_sink_takes_is_the_frame_itself() -> None:
    plain, packet = frame_of(bytes(60)), Packet(bytes(5000))
    for frame, does in (
        (plain, NOTHING),
        (gso(packet, 1000), Does.CSUM | Does.TSO4),
        (gso(packet, 1000, ecn=True), ALL),
        (frame_of(packet.build(partial=True), TCP_CSUM), Does.CSUM),
    ):
        assert takes(does, frame)
        assert list(finish(frame, does)) == [frame]


@pytest.mark.parametrize("does", [NOTHING, Does.CSUM, Does.TSO4, Does.CSUM | Does.TSO6 | Does.USO, ALL & ~Does.ECN])
def test_what_a_sink_does_not_take_is_cut(does: Does) -> None:
    frame = gso(Packet(bytes(5000), flags=0x80), 1000, ecn=True)

    assert not takes(does, frame)
    assert len(list(finish(frame, does))) == 5


def test_a_gso_packet_of_one_segment_is_only_finished() -> None:
    for payload in (b"", b"x", bytes(1000)):
        packet = Packet(payload, flags=0x99)
        assert [each.tobytes() for each in finish(gso(packet, 1000), NOTHING)] == [packet.build(partial=False)]


@given(packet=packets, size=st.integers(30, 1600))
@settings(deadline=None)
def test_tcp_segments_stay_long_for_who_takes_long_ones(packet: Packet, size: int) -> None:
    segments = list(finish(gso(packet, size), Does.LONG_TCP))

    parts = packet.cut(size) if packet.protocol == UDP else [packet]
    assert [equal_zeros(packet, each.tobytes()) for each in segments] == [
        equal_zeros(packet, part.build(partial=False)) for part in parts
    ]


@pytest.mark.parametrize("size", [1460, 0xFFFF])
@pytest.mark.parametrize("version", [4, 6])
def test_but_none_is_longer_than_the_longest_frame(version: int, size: int) -> None:
    packet = Packet(bytes(range(256)) * 255, version=version)
    packet = replace(packet, payload=packet.payload + bytes(LONG_FRAME + 1 - len(packet.build(partial=True))))

    segments = list(finish(gso(packet, size), Does.LONG_TCP))

    room = LONG_FRAME - packet.transport - 20
    assert [each.tobytes() for each in segments] == [part.build(partial=False) for part in packet.cut(room)]
    assert [each.length for each in segments] == [LONG_FRAME, packet.transport + 20 + 1]


def test_a_checksum_that_the_host_has_validated_is_not_told_to_who_has_not_asked() -> None:
    frame = frame_of(bytes(60), Offload(HdrFlags.DATA_VALID, 0, 0, 0, 0, 0))

    assert list(finish(frame, Does.CSUM)) == [frame]
    (finished,) = finish(frame, NOTHING)

    assert finished.offload is None
    assert finished.tobytes() == bytes(60)


def test_ecn_beside_no_segmentation_says_nothing() -> None:
    """As 5.1.4.1 allows by "gso_type NONE or ECN"; Linux would drop it on the receiving side."""
    packet = Packet(b"hello")
    frame = frame_of(packet.build(partial=True), TCP_CSUM._replace(gso_type=GsoType.ECN))
    check(frame)

    (kept,) = finish(frame, ALL)
    assert kept.offload == TCP_CSUM
    (complete,) = finish(frame, NOTHING)
    assert complete.tobytes() == packet.build(partial=False)


def test_flags_that_nobody_knows_are_ignored() -> None:
    frame = frame_of(bytes(60), Offload(0xF0, 0, 0xFFFF, 0xFFFF, 0xFFFF, 0xFFFF))
    check(frame)
    assert needs(frame.offload or TCP_CSUM) == 0


TCP_PACKET = Packet(bytes(5000))
LIES: list[tuple[Frame, str]] = [
    (frame_of(bytes(60), TCP_CSUM._replace(csum_start=43)), "csum_start 0x2b .* csum_offset 0x10 .* 0x3c bytes"),
    (frame_of(bytes(60), TCP_CSUM._replace(csum_start=0xFFFF, csum_offset=0xFFFF)), "csum_start 0xffff"),
    (frame_of(bytes(60), TCP_CSUM._replace(csum_start=13, csum_offset=1)), "csum_start 0xd is in the Ethernet"),
    (frame_of(b"", TCP_CSUM), "the frame's 0x0 bytes"),
    (gso(TCP_PACKET, 1000, flags=0), "flags 0x0 are without NEEDS_CSUM"),
    (gso(TCP_PACKET, 0), "gso_size is 0"),
    (gso(TCP_PACKET, 1), "gso_size 0x1 cuts 0x1388 bytes into more than 0x400 segments"),
    (gso(TCP_PACKET, 1000, gso_type=GsoType.UDP), "gso_type 0x3 is none"),
    (gso(TCP_PACKET, 1000, gso_type=2), "gso_type 0x2"),
    (gso(TCP_PACKET, 1000, gso_type=0x7F), "gso_type 0x7f"),
    (gso(TCP_PACKET, 1000, gso_type=GsoType.UDP_L4 | GsoType.ECN), "gso_type 0x85"),
    (
        gso(TCP_PACKET, 1000, gso_type=GsoType.TCPV4 | GsoType.UDP_TUNNEL_IPV4),
        "gso_type 0x21 of a UDP tunnel, but no whole UDP header",
    ),
    (gso(TCP_PACKET, 1000, gso_type=GsoType.TCPV6), "TCPV6, but the frame's ethertype is 0x800"),
    (gso(Packet(b"", version=6), 1000, gso_type=GsoType.TCPV4), "TCPV4, but the frame's ethertype is 0x86dd"),
    (gso(TCP_PACKET, 1000, gso_type=GsoType.UDP_L4), "no whole UDP header"),
    (gso(Packet(bytes(99), protocol=UDP), 10, gso_type=GsoType.TCPV4, csum_offset=16), "no whole TCP header"),
    (gso(TCP_PACKET, 1000, csum_start=TCP_PACKET.transport + 1), "csum_start 0x23, but the TCPV4 header is at 0x22"),
    (gso(TCP_PACKET, 1000, csum_offset=6), "csum_offset 0x6"),
    (gso(Packet(bytes(99), version=6, first=44, options=bytes([TCP, 0]) + bytes(6)), 10), "no whole TCP header"),
    (gso(Packet(bytes(99), version=6, first=0, options=bytes([0, 0, 1, 4, 0, 0, 0, 0]) * 9), 10), "no whole TCP"),
]


@pytest.mark.parametrize(("frame", "what"), LIES)
def test_a_lie_is_found_and_named(frame: Frame, what: str) -> None:
    with pytest.raises(BadOffload, match=what):
        check(frame)
    with pytest.raises(BadOffload, match=what):
        finish(frame, NOTHING)


def patched(at: int, value: bytes, length: int = 5054) -> Frame:
    data = bytearray(TCP_PACKET.build(partial=True))
    data[at : at + len(value)] = value
    return frame_of(data[:length], gso(TCP_PACKET, 1000).offload)


@pytest.mark.parametrize(
    ("frame", "what"),
    [
        (patched(46, b"\x40"), "TCP header at 0x22 says that it has 0x10 bytes"),
        (patched(46, b"\xf0", length=60), "headers end at 0x5e, beyond the frame's 0x3c bytes"),
        (patched(14, b"\x44"), "no whole TCP"),
        (patched(14, b"\x65"), "no whole TCP"),
        (patched(14, b"\x4f"), "csum_start 0x22, but the TCPV4 header is at 0x4a"),
        (patched(20, b"\x20\x00"), "no whole TCP"),  # fragments: MF
        (patched(20, b"\x00\x01"), "no whole TCP"),  # fragments: not the first
        (patched(12, b"\x81\x00"), "ethertype is 0x13b0"),
        (patched(12, b"\x81\x00\x00\x01" * 5), "ethertype is 0x8100"),
    ],
)
def test_headers_that_are_not_there_are_a_lie(frame: Frame, what: str) -> None:
    for use in (check, lambda frame: finish(frame, NOTHING)):
        with pytest.raises(BadOffload, match=what):
            use(frame)


@given(data=st.data())
@settings(deadline=None, max_examples=300)
def test_whatever_is_said_of_whatever_bytes_there_is_no_other_error_and_an_end(data: st.DataObject) -> None:
    raw = bytearray(data.draw(st.one_of(st.binary(max_size=200), packets.map(lambda each: each.build(partial=True)))))
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, 80), st.integers(0, 255)), max_size=4)):
        if at < len(raw):
            raw[at] = value
    numbers = st.one_of(st.integers(0, 80), st.integers(0, 0xFFFF))
    offload = Offload(
        data.draw(st.sampled_from([0, 1, 1, 1, 0xFF])),
        data.draw(st.sampled_from([0, 1, 1, 4, 4, 5, 5, 0x81, 3, 0x20, 0xFF])),
        data.draw(numbers),
        data.draw(numbers),
        data.draw(st.one_of(st.sampled_from([34, 38, 54, 62]), numbers)),
        data.draw(st.one_of(st.sampled_from([6, 16]), numbers)),
    )
    frame = frame_of(raw, offload)
    for does in (NOTHING, Does.CSUM, ALL):
        try:
            check(frame)
            frames = list(finish(frame, does))
        except BadOffload:
            continue
        assert 1 <= len(frames) <= MAX_SEGMENTS
        assert all(takes(does, each) for each in frames)


def test_headers_that_change_after_the_check_are_seen_when_it_matters() -> None:
    """A guest's memory can change under our hands; `finish` believes in nothing that was looked at before."""
    memory = bytearray(TCP_PACKET.build(partial=True))
    frame = frame_of(memory, gso(TCP_PACKET, 1000).offload)
    check(frame)
    memory[TRANSPORT + 12] = 0x10

    with pytest.raises(BadOffload):
        finish(frame, NOTHING)


def test_segments_are_of_a_copy_made_at_once() -> None:
    memory = bytearray(TCP_PACKET.build(partial=True))
    segments = finish(frame_of(memory, gso(TCP_PACKET, 1000).offload), NOTHING)
    memory[:] = bytes(len(memory))

    assert [each.tobytes() for each in segments] == [each.build(partial=False) for each in TCP_PACKET.cut(1000)]


def test_the_largest_packet_is_cut_into_as_many_segments_as_are_allowed() -> None:
    packet = Packet(bytes(65535 - 40))
    assert len(list(finish(gso(packet, 64), NOTHING))) == MAX_SEGMENTS
    with pytest.raises(BadOffload, match="into more than 0x400"):
        check(gso(packet, 63))


def test_addresses_are_left_alone() -> None:
    assert all(each.head(12) == MACS for each in finish(gso(TCP_PACKET, 1000), NOTHING))
