"""The boot server's host: ARP, ping, and packets that lie."""

import struct
from ipaddress import IPv4Address, IPv4Network

import pytest
from support.boot_client import BROADCAST, CLIENT, EVERYBODY, MAC, SERVER, SERVER_MAC, ethernet, ipv4, packed, udp
from support.net_packets import internet_checksum

from vfiouser_virtio.backends.net.boot.host import BadPacket, Datagram, Host, Station

MAC2 = b"\x52\0\0\0\0\1"


class Wire:
    """Keeps what the host sends, and what it hands on."""

    def __init__(self, *, taken: bool = True) -> None:
        self.frames: list[bytes] = []
        self.datagrams: list[Datagram] = []
        self._taken = taken
        self.host = Host(IPv4Network("10.0.2.0/24"), IPv4Address(SERVER), self.frames.append, self._deliver)

    def _deliver(self, datagram: Datagram) -> bool:
        self.datagrams.append(datagram)
        return self._taken


def arp(operation: int = 1, *, target: str = SERVER, mac: bytes = MAC) -> bytes:
    packet = bytes.fromhex("0001 0800 06 04") + operation.to_bytes(2, "big")
    packet += mac + packed(CLIENT) + bytes(6) + packed(target)
    return ethernet(packet, to=BROADCAST, mac=mac, ethertype=0x0806)


def echo(payload: bytes = b"hello", *, kind: int = 8, to: str = SERVER) -> bytes:
    message = struct.pack("!BBHHH", kind, 0, 0, 0x1234, 5) + payload
    return ethernet(ipv4(message[:2] + internet_checksum(message).to_bytes(2, "big") + message[4:], 1, to=to))


def test_who_asks_for_its_address_is_told() -> None:
    wire = Wire()
    assert wire.host.mac == SERVER_MAC
    assert wire.host.receive(arp())
    reply = bytes.fromhex("0001 0800 06 04 0002") + SERVER_MAC + packed(SERVER) + MAC + packed(CLIENT)
    assert wire.frames == [ethernet(reply, to=MAC, mac=SERVER_MAC, ethertype=0x0806)]


@pytest.mark.parametrize("size", [0, 1, 56, 1472, 8972])
def test_a_ping_is_answered(size: int) -> None:
    wire = Wire()
    payload = bytes(at & 0xFF for at in range(size))
    # Ethernet's frames have 60 bytes or more: what is behind the packet is none of it.
    assert wire.host.receive(echo(payload) + bytes(18))
    (reply,) = wire.frames
    assert reply[:14] == MAC + SERVER_MAC + b"\x08\0"
    assert internet_checksum(reply[14:34]) == internet_checksum(reply[34:]) == 0
    assert reply[26:34] == packed(SERVER) + packed(CLIENT)
    assert reply[34:36] == b"\0\0"
    assert reply[38:] == b"\x12\x34\0\5" + payload


def test_datagrams_are_handed_on() -> None:
    wire = Wire()
    no_checksum = bytearray(udp(b"two", 69))
    no_checksum[40:42] = b"\0\0"
    for frame in (udp(b"one!", 67, source_port=68, source="0.0.0.0", to=EVERYBODY), bytes(no_checksum)):
        assert wire.host.receive(frame)
    assert [(str(each.sender.address), each.source, each.port, bytes(each.payload)) for each in wire.datagrams] == [
        ("0.0.0.0", 68, 67, b"one!"),
        (CLIENT, 1024, 69, b"two"),
    ]
    assert not Wire(taken=False).host.receive(udp(b"three", 53))


@pytest.mark.parametrize(
    "frame",
    [
        arp(2),
        arp(target="10.0.2.3"),
        arp(mac=b"\x01\0\x5e\0\0\1"),
        echo(kind=0),
        echo(to="10.0.2.255"),
        echo(to="10.0.3.2"),
        ethernet(echo()[14:], to=MAC2),
        ethernet(echo()[14:], to=b"\x01\0\x5e\0\0\1"),
        ethernet(echo()[14:], mac=b"\x01\0\x5e\0\0\1"),
        ethernet(echo()[14:], ethertype=0x86DD),
        ethernet(ipv4(bytes(20), 6)),
    ],
    ids=["ARP reply", "ARP for another", "ARP of a group", "echo reply", "ping of all", "ping of another network",
         "another station's", "group", "of a group", "IPv6", "TCP"],
)  # fmt: skip
def test_what_is_for_nobody_here_is_left_alone(frame: bytes) -> None:
    wire = Wire()
    assert not wire.host.receive(frame)
    assert not wire.frames
    assert not wire.datagrams


def changed(frame: bytes, at: int, value: bytes, *, fix: bool = True) -> bytes:
    """The same with other bytes at an offset, and with ``fix`` the IPv4 header's checksum right again."""
    data = bytearray(frame)
    data[at : at + len(value)] = value
    if fix:
        data[24:26] = b"\0\0"
        data[24:26] = internet_checksum(bytes(data[14:34])).to_bytes(2, "big")
    return bytes(data)


@pytest.mark.parametrize(
    ("frame", "kind"),
    [
        (b"", "short"),
        (echo()[:13], "short"),
        (arp()[:41], "arp"),
        (changed(arp(), 18, b"\x08", fix=False), "arp"),
        (echo()[:33], "ip"),
        (changed(echo(), 14, b"\x65"), "ip"),
        (changed(echo(), 14, b"\x44"), "ip"),
        (changed(echo(), 14, b"\x4f"), "ip"),
        (changed(echo(), 16, b"\0\x13"), "ip"),
        (changed(echo(), 16, b"\xff\xff"), "ip"),
        (changed(echo(), 22, b"\x3f", fix=False), "ip checksum"),
        (changed(echo(), 20, b"\x20\0"), "fragment"),
        (changed(echo(), 20, b"\0\1"), "fragment"),
        (echo(bytes(5))[:-1] + b"\1", "icmp"),
        (ethernet(ipv4(b"\x08\0\xf7", 1)), "icmp"),
        (ethernet(ipv4(bytes(7), 17)), "udp"),
        (changed(udp(b"x", 69), 38, b"\0\x07", fix=False), "udp"),
        (changed(udp(b"x", 69), 38, b"\0\x0a", fix=False), "udp"),
        (changed(udp(b"xy", 69), 42, b"z", fix=False), "udp checksum"),
    ],
)
def test_a_packet_that_contradicts_itself_is_refused(frame: bytes, kind: str) -> None:
    wire = Wire()
    with pytest.raises(BadPacket) as caught:
        wire.host.receive(frame)
    assert caught.value.kind == kind
    assert not wire.frames
    assert not wire.datagrams


def test_a_datagram_s_checksum_is_never_zero() -> None:
    """Zero would say that there is none: where the sum comes out as that, it is written as its other zero."""
    host, client = Wire().host, Station(MAC, IPv4Address(CLIENT))
    check = host.datagram(client, 67, 68, b"\0\0")[40:42]
    assert host.datagram(client, 67, 68, check)[40:42] == b"\xff\xff"
