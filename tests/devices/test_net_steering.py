"""Receive steering: flows of frames, Microsoft's verification suite for the hash, and which queue gets what."""

from ipaddress import ip_address

import pytest
from support.net_frames import ICMP, MACS, TCP, UDP, cut, ethernet, ipv4, ipv6, tcp4, transport

from vfiouser_virtio.backends.net.frame import Frame, frame_of
from vfiouser_virtio.devices.net_flow import HEAD, flow_of, parse, reverse, without_extensions
from vfiouser_virtio.devices.net_steering import FIRST, HASH_TYPES, RssConfig, Steering
from vfiouser_virtio.devices.net_toeplitz import MAX_INPUT, MAX_KEY, Toeplitz
from vfiouser_virtio.protocols.virtio.net import HashReport, HashType

# "Verifying the RSS Hash Calculation" of Microsoft's driver documentation.
KEY = bytes.fromhex(
    "6d5a56da255b0ec24167253d43a38fb0d0ca2bcbae7b30b477cb2da38030f20c6a42b73bbeac01fa",
)
# Source, destination, their ports, the hash of the addresses, the hash of all four.
SUITE = [
    ("66.9.149.187", "161.142.100.80", 2794, 1766, 0x323E8FC2, 0x51CCC178),
    ("199.92.111.2", "65.69.140.83", 14230, 4739, 0xD718262A, 0xC626B0EA),
    ("24.19.198.95", "12.22.207.184", 12898, 38024, 0xD2D0A5DE, 0x5C2B394A),
    ("38.27.205.30", "209.142.163.6", 48228, 2217, 0x82989176, 0xAFC7327F),
    ("153.39.163.191", "202.188.127.2", 44251, 1303, 0x5D1809C5, 0x10E828A2),
    ("3ffe:2501:200:1fff::7", "3ffe:2501:200:3::1", 2794, 1766, 0x2CC18CD5, 0x40207D3D),
    ("3ffe:501:8::260:97ff:fe40:efab", "ff02::1", 14230, 4739, 0x0F0C461C, 0xDDE51BBF),
    ("3ffe:1900:4545:3:200:f8ff:fe21:67cf", "fe80::200:f8ff:fe21:67cf", 44251, 38024, 0x4B61E985, 0x02D1FEEF),
]
HOME, CARE_OF = "2001:db8::77", "2001:db8::99"
A, B = "2001:db8::1", "2001:db8::2"
# Extension headers, without the byte that says what follows.
HOP_BY_HOP = (0, bytes([0, 1, 4, 0, 0, 0, 0]))
ROUTING_2 = (43, bytes([2, 2, 1, 0, 0, 0, 0]) + ip_address(CARE_OF).packed)
ROUTING_DONE = (43, bytes([2, 2, 0, 0, 0, 0, 0]) + ip_address(CARE_OF).packed)
HOME_ADDRESS = (60, bytes([2, 1, 2, 0, 0, 0xC9, 16]) + ip_address(HOME).packed)
PADS_ONLY = (60, bytes([0, 0, 0, 1, 2, 0, 0]))
AUTHENTICATION = (51, bytes([4]) + bytes(22))
ATOMIC = (44, bytes([0, 0, 0, 1, 2, 3, 4]))
FRAGMENT = (44, bytes([0, 0, 1, 1, 2, 3, 4]))
LATER_FRAGMENT = (44, bytes([0, 0, 8, 1, 2, 3, 4]))


def packet(source: str, destination: str, protocol: int, payload: bytes) -> bytes:
    return (ipv6 if ":" in source else ipv4)(source, destination, protocol, payload)


def hashed(frame: Frame, types: int = HASH_TYPES, key: bytes = KEY) -> tuple[int, HashReport]:
    steering = Steering()
    steering.set_hash(types, key)
    pair, value, report = steering.steer(frame)
    assert pair == 0
    return value, HashReport(report)


# ---- the hash --------------------------------------------------------------------------------------------------------


def by_bits(key: bytes, data: bytes) -> int:
    """As it is defined."""
    key = key.ljust(MAX_KEY, b"\0")
    value, bits = 0, int.from_bytes(key, "big")
    for place in range(8 * len(data)):
        if data[place // 8] & 0x80 >> place % 8:
            value ^= bits >> 8 * MAX_KEY - 32 - place & 0xFFFF_FFFF
    return value


@pytest.mark.parametrize(("source", "destination", "source_port", "destination_port", "two", "four"), SUITE)
def test_microsofts_verification_suite(
    source: str, destination: str, source_port: int, destination_port: int, two: int, four: int
) -> None:
    ports = transport(source_port, destination_port)
    version = 6 if ":" in source else 4
    for protocol, name in ((TCP, "TCP"), (UDP, "UDP")):
        frame = ethernet(packet(source, destination, protocol, ports))
        assert hashed(frame) == (four, HashReport[f"{name}v{version}"])
        assert hashed(frame, HashType.IPv4 | HashType.IPv6) == (two, HashReport[f"IPv{version}"])
    assert hashed(ethernet(packet(source, destination, ICMP, ports))) == (two, HashReport[f"IPv{version}"])


@pytest.mark.parametrize("size", [0, 1, 8, 12, 32, MAX_INPUT])
@pytest.mark.parametrize("key", [KEY, KEY[::-1], KEY[:7], b"\xff" * MAX_KEY, b"\x80", b""])
def test_tables_give_what_bits_give(key: bytes, size: int) -> None:
    data = bytes(range(200, 200 - size, -1))
    assert Toeplitz(key)(data) == by_bits(key, data)


@pytest.mark.parametrize(
    ("types", "expected"),
    [
        (0, (0, HashReport.NONE)),
        (HashType.UDPv4, (0, HashReport.NONE)),
        (HashType.IPv6 | HashType.TCPv6 | HashType.TCP_EX, (0, HashReport.NONE)),
        (HashType.IPv4, (SUITE[0][4], HashReport.IPv4)),
        (HashType.TCPv4 | HashType.IPv4, (SUITE[0][5], HashReport.TCPv4)),
        (HashType.TCPv4, (SUITE[0][5], HashReport.TCPv4)),
    ],
)
def test_only_enabled_types(types: int, expected: tuple[int, HashReport]) -> None:
    source, destination, source_port, destination_port = SUITE[0][:4]
    assert hashed(tcp4(source, source_port, destination, destination_port), types) == expected


# ---- flows -----------------------------------------------------------------------------------------------------------

PORTS = transport(1000, 2000)
FOUR = ip_address("10.0.0.1").packed + ip_address("10.0.0.2").packed
SIX = ip_address(A).packed + ip_address(B).packed


def v4(protocol: int = TCP, payload: bytes = PORTS, *, options: bytes = b"", fragment: int = 0) -> bytes:
    return ipv4("10.0.0.1", "10.0.0.2", protocol, payload, options=options, fragment=fragment)


@pytest.mark.parametrize(
    ("data", "kind", "fields"),
    [
        (v4(), HashReport.TCPv4, FOUR + PORTS[:4]),
        (v4(UDP), HashReport.UDPv4, FOUR + PORTS[:4]),
        (v4(ICMP), HashReport.IPv4, FOUR),
        (v4(options=bytes(8)), HashReport.TCPv4, FOUR + PORTS[:4]),
        (v4(fragment=0x4000), HashReport.TCPv4, FOUR + PORTS[:4]),  # "don't fragment"
        (v4(fragment=0x2000), HashReport.IPv4, FOUR),
        (v4(fragment=0x0001), HashReport.IPv4, FOUR),
        (v4(fragment=0x0100), HashReport.IPv4, FOUR),
        (v4(payload=PORTS[:3]), HashReport.IPv4, FOUR),
        (v4(payload=b"", options=bytes(8)), HashReport.IPv4, FOUR),
        (b"\x44" + v4()[1:], HashReport.IPv4, FOUR),  # a header of 16 bytes
        (ipv6(A, B, TCP, PORTS), HashReport.TCPv6, SIX + PORTS[:4]),
        (ipv6(A, B, UDP, PORTS), HashReport.UDPv6, SIX + PORTS[:4]),
        (ipv6(A, B, 58, PORTS), HashReport.IPv6, SIX),
        (ipv6(A, B, 59, b""), HashReport.IPv6, SIX),
        (ipv6(A, B, TCP, PORTS[:3]), HashReport.IPv6, SIX),
    ],
)
def test_flows(data: bytes, kind: HashReport, fields: bytes) -> None:
    for tags in (b"", b"\x81\0\x60\x05", b"\x88\xa8\0\1\x81\0\0\2"):
        frame = ethernet(data, tags=tags)
        assert flow_of(frame) == (kind, fields)
        for sizes in [(14,), (14 + len(tags), 20), (1, 30), (37,), (54,), (0, 60)]:
            assert flow_of(cut(frame, *sizes)) == (kind, fields)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        MACS,
        MACS + b"\x08\x06" + bytes(28),  # ARP
        MACS + b"\x08\0" + v4()[:19],
        MACS + b"\x08\0\x65" + v4()[1:],  # no version 4
        MACS + b"\x86\xdd" + ipv6(A, B, TCP, PORTS)[:39],
        MACS + b"\x86\xdd\x40" + ipv6(A, B, TCP, PORTS)[1:],
        MACS + b"\x81\0",
        MACS + b"\x81\0\0\5\x81\0\0\5\x81\0\0\5\x08\0" + v4(),
    ],
)
def test_what_has_no_flow(data: bytes) -> None:
    assert flow_of(frame_of(data)) is None
    assert flow_of(Frame([], 0)) is None


@pytest.mark.parametrize(
    ("extensions", "ports", "source", "destination"),
    [
        ((HOP_BY_HOP,), True, A, B),
        ((HOP_BY_HOP, PADS_ONLY, AUTHENTICATION), True, A, B),
        ((ROUTING_2,), True, A, CARE_OF),
        ((ROUTING_DONE,), True, A, B),
        ((HOME_ADDRESS,), True, HOME, B),
        ((HOP_BY_HOP, ROUTING_2, HOME_ADDRESS), True, HOME, CARE_OF),
        ((ATOMIC,), True, A, B),
        ((FRAGMENT,), False, A, B),
        ((LATER_FRAGMENT, HOME_ADDRESS), False, A, B),
        ((HOP_BY_HOP,) * 8, True, A, B),
        ((HOP_BY_HOP,) * 9, False, A, B),  # too many to look at
        (((0, bytes([200]) + bytes(30)),), False, A, B),  # longer than what is looked at
    ],
)
def test_extension_headers(
    extensions: tuple[tuple[int, bytes], ...], ports: bool, source: str, destination: str
) -> None:
    ends = ip_address(source).packed + ip_address(destination).packed
    for protocol, name in ((TCP, "TCP"), (UDP, "UDP")):
        frame = ethernet(ipv6(A, B, protocol, PORTS, extensions))
        kind = HashReport[f"{name if ports else 'IP'}v6_EX"]
        assert flow_of(frame) == (kind, SIX + (PORTS[:4] if ports else b"") + ends)
        # The hash of it: the addresses that the extension headers have, then those of the header.
        full = ends + (PORTS[:4] if ports else b"")
        assert hashed(frame) == (by_bits(KEY, full), kind)
        assert hashed(frame, HashType.IP_EX | HashType.TCPv6 | HashType.IPv6) == (
            by_bits(KEY, ends),
            HashReport.IPv6_EX,
        )
        four = SIX + PORTS[:4] if ports else SIX
        plain = HashReport[f"{name if ports else 'IP'}v6"]
        assert hashed(frame, HashType.IPv6 | HashType.TCPv6 | HashType.UDPv6) == (by_bits(KEY, four), plain)
        assert hashed(frame, HashType.IPv4) == (0, HashReport.NONE)


def test_any_beginning_of_a_frame_is_safe() -> None:
    frames = [
        ethernet(ipv6(A, B, TCP, PORTS, (HOP_BY_HOP, ROUTING_2, HOME_ADDRESS, AUTHENTICATION, ATOMIC))),
        ethernet(ipv6(A, B, UDP, PORTS, (HOME_ADDRESS, FRAGMENT)), tags=b"\x81\0\0\1"),
        ethernet(v4(options=bytes(40))),
    ]
    for frame in frames:
        data = frame.tobytes()
        for count in range(len(data)):
            assert flow_of(frame_of(data[:count])) == parse(data[:count])
            for value in (0, 1, 0x7F, 0xFF):  # and each byte wrong
                flow = flow_of(frame_of(data[:count] + bytes([value]) + data[count + 1 :]))
                if flow is not None:
                    assert reverse(reverse(flow)) == without_extensions(flow)


def test_the_flow_of_the_answers() -> None:
    for there, back in [
        (tcp4("10.0.0.1", 1000, "10.0.0.2", 2000), tcp4("10.0.0.2", 2000, "10.0.0.1", 1000)),
        (ethernet(v4(ICMP)), ethernet(ipv4("10.0.0.2", "10.0.0.1", ICMP, b""))),
        (ethernet(ipv6(A, B, UDP, PORTS)), ethernet(ipv6(B, A, UDP, transport(2000, 1000)))),
        (ethernet(ipv6(A, B, UDP, PORTS, (HOME_ADDRESS,))), ethernet(ipv6(B, A, UDP, transport(2000, 1000)))),
        (ethernet(ipv6(A, B, 58, b"", (HOP_BY_HOP,))), ethernet(ipv6(B, A, 58, b""))),
    ]:
        flow, answers = flow_of(there), flow_of(back)
        assert flow is not None
        assert reverse(flow) == answers


def test_what_is_looked_at_is_enough_for_the_usual() -> None:
    extensions = (HOP_BY_HOP, ROUTING_2, HOME_ADDRESS, AUTHENTICATION, ATOMIC)
    assert len(MACS) + 8 + 2 + len(ipv6(A, B, TCP, PORTS, extensions)) < HEAD


# ---- queues ----------------------------------------------------------------------------------------------------------


def client(port: int) -> Frame:
    """From a client elsewhere to the driver."""
    return tcp4("10.0.0.9", port, "10.0.0.1", 80)


def answer(port: int) -> Frame:
    """What the driver answers."""
    return tcp4("10.0.0.1", 80, "10.0.0.9", port)


def test_at_first_all_goes_to_the_first_queue() -> None:
    steering = Steering()
    assert steering.trivial
    assert not steering.learns
    assert steering.steer(client(1)) is FIRST


def test_what_comes_back_goes_where_it_was_sent() -> None:
    steering = Steering()
    steering.set_pairs(4)
    assert steering.learns
    assert not steering.trivial
    for port in range(100):
        steering.steer(client(port))  # decides something before the driver has answered
        steering.sent(answer(port), port % 4)
    assert [steering.steer(client(port))[0] for port in range(100)] == [port % 4 for port in range(100)]
    steering.sent(answer(5), 3)  # it goes on elsewhere
    assert steering.steer(client(5))[0] == 3


def test_what_was_never_sent_is_spread_and_keeps_to_its_queue() -> None:
    steering = Steering()
    steering.set_pairs(4)
    first = [steering.steer(client(port))[0] for port in range(200)]
    assert set(first) == {0, 1, 2, 3}
    assert [steering.steer(client(port))[0] for port in range(200)] == first
    assert steering.steer(frame_of(MACS + b"\x08\x06" + bytes(28)))[0] == 0
    steering.sent(frame_of(MACS + b"\x08\x06" + bytes(28)), 2)
    assert steering.steer(frame_of(MACS + b"\x08\x06" + bytes(28)))[0] == 0


def test_never_above_the_pairs_in_use() -> None:
    steering = Steering()
    steering.set_pairs(4)
    steering.sent(answer(1), 3)
    assert steering.steer(client(1))[0] == 3
    steering.set_pairs(2)
    assert {steering.steer(client(port))[0] for port in range(200)} == {0, 1}
    steering.sent(answer(1), 3)  # which no driver does
    assert steering.steer(client(1))[0] < 2
    steering.set_pairs(1)
    assert steering.trivial


def test_packets_with_extension_headers_follow_their_flow() -> None:
    steering = Steering()
    steering.set_pairs(4)
    frames = [ethernet(ipv6(A, B, TCP, PORTS)), ethernet(ipv6(A, B, TCP, PORTS, (HOP_BY_HOP,)))]
    for pair, extensions in ((3, ()), (1, (HOME_ADDRESS,)), (2, ())):
        steering.sent(ethernet(ipv6(B, A, TCP, transport(2000, 1000), extensions)), pair)
        assert [steering.steer(frame)[0] for frame in frames] == [pair, pair]


def test_flows_that_are_remembered_are_bounded() -> None:
    steering = Steering(max_flows=16)
    steering.set_pairs(4)
    for port in range(1000):
        steering.sent(answer(7), 2)  # this one is in use all the time
        steering.sent(answer(1000 + port), 3)
        steering.steer(client(1000 + port))
        assert steering.steer(client(7))[0] == 2
    assert steering.flows <= 3 * 16
    assert steering.steer(client(1999))[0] == 3


def test_flows_that_move_to_another_queue_are_bounded() -> None:
    """Those with some extension headers too, which are placed anew each time otherwise."""
    steering = Steering(max_flows=16)
    steering.set_pairs(4)
    for port in range(1000):
        frame = ethernet(ipv6(A, B, UDP, transport(port, 80), (HOME_ADDRESS,)))
        for pair in (port % 4, (port + 1) % 4):
            assert steering.move(frame, pair)
            assert steering.steer(frame)[0] == pair
        assert steering.flows <= 16
    for port in range(1000):
        assert steering.move(client(port), port % 4)
        assert steering.steer(client(port))[0] == port % 4
        assert steering.flows <= 16


def test_rss_by_the_indirection_table() -> None:
    steering = Steering()
    table = [(7 * index) % 4 for index in range(128)]
    steering.set_rss(RssConfig(2, table), HASH_TYPES, KEY, 4)
    assert not steering.learns
    for source, destination, source_port, destination_port, two, four in SUITE:
        ports = transport(source_port, destination_port)
        frame = ethernet(packet(source, destination, TCP, ports))
        for _ in range(2):
            pair, value, report = steering.steer(frame)
            assert (pair, value) == (table[four & 127], four)
            assert report == (HashReport.TCPv6 if ":" in source else HashReport.TCPv4)
        assert steering.steer(ethernet(packet(source, destination, ICMP, ports)))[:2] == (table[two & 127], two)
    steering.sent(answer(1), 3)
    assert steering.steer(frame_of(MACS + b"\x08\x06" + bytes(28))) == (2, 0, HashReport.NONE)


def test_rss_without_hash_types_is_all_unclassified() -> None:
    steering = Steering()
    steering.set_rss(RssConfig(3, [0]), 0, b"", 4)
    assert not steering.trivial
    assert steering.steer(client(1)) == (3, 0, 0)


def test_the_last_command_counts() -> None:
    steering = Steering()
    steering.set_rss(RssConfig(0, [3]), HASH_TYPES, KEY, 4)
    assert steering.steer(client(1))[0] == 3
    steering.set_pairs(2)  # automatic from now on; what is reported stays
    steering.sent(answer(1), 1)
    pair, value, report = steering.steer(client(1))
    assert (pair, report) == (1, HashReport.TCPv4)
    assert value == hashed(client(1))[0]
    steering.set_rss(RssConfig(0, [2]), HASH_TYPES, KEY, 4)
    assert steering.steer(client(1))[0] == 2
    steering.set_hash(0, b"")
    assert steering.pairs == 4
    assert steering.steer(client(1))[1:] == (0, 0)


def test_another_key_and_other_types_take_effect() -> None:
    steering = Steering()
    steering.set_hash(HASH_TYPES, KEY)
    before = steering.steer(client(1))
    steering.set_hash(HASH_TYPES, KEY[::-1])
    assert steering.steer(client(1)) != before
    steering.set_hash(HASH_TYPES, KEY)
    assert steering.steer(client(1)) == before
    steering.set_hash(HashType.IPv4, KEY)
    assert steering.steer(client(1))[2] == HashReport.IPv4


def test_a_reset_forgets_all() -> None:
    steering = Steering()
    steering.set_rss(RssConfig(1, [1]), HASH_TYPES, KEY, 2)
    steering.reset()
    assert steering.trivial
    assert (steering.pairs, steering.steer(client(1))) == (1, FIRST)
    steering.set_pairs(2)
    assert steering.steer(client(1))[1:] == (0, 0)
