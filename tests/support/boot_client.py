"""Client of a boot server: frames as firmware sends them, made and read without the formats of the server."""

import struct
from collections.abc import Awaitable, Callable, Mapping
from ipaddress import IPv4Address
from typing import NamedTuple

from support.net_packets import internet_checksum

BROADCAST, MAC = b"\xff" * 6, bytes.fromhex("525400123456")
SERVER_MAC, SERVER, CLIENT = bytes.fromhex("52550a000202"), "10.0.2.2", "10.0.2.15"
NOBODY, EVERYBODY = "0.0.0.0", "255.255.255.255"
MAGIC = bytes.fromhex("63825363")
TFTP = 69


def packed(address: str) -> bytes:
    return IPv4Address(address).packed


def ethernet(payload: bytes, *, to: bytes = SERVER_MAC, mac: bytes = MAC, ethertype: int = 0x0800) -> bytes:
    return to + mac + ethertype.to_bytes(2, "big") + payload


def ipv4(payload: bytes, protocol: int, *, source: str = CLIENT, to: str = SERVER, flags: int = 0) -> bytes:
    header = (
        struct.pack("!BBHHHBBH", 0x45, 0, 20 + len(payload), 7, flags, 64, protocol, 0) + packed(source) + packed(to)
    )
    return header[:10] + internet_checksum(header).to_bytes(2, "big") + header[12:] + payload


def udp(
    payload: bytes, port: int, *, source_port: int = 1024, source: str = CLIENT, to: str = SERVER, mac: bytes = MAC
) -> bytes:
    """The frame of a datagram."""
    length = 8 + len(payload)
    header = struct.pack("!HHHH", source_port, port, length, 0)
    pseudo = packed(source) + packed(to) + struct.pack("!HH", 17, length)
    check = internet_checksum(pseudo + header + payload) or 0xFFFF
    datagram = header[:6] + check.to_bytes(2, "big") + payload
    return ethernet(ipv4(datagram, 17, source=source, to=to), to=BROADCAST if to == EVERYBODY else SERVER_MAC, mac=mac)


class Datagram(NamedTuple):
    """What came, and to whom."""

    mac: bytes
    """Of the receiver."""
    address: str
    source_port: int
    port: int
    payload: bytes


def read_udp(frame: bytes, *, server: str = SERVER) -> Datagram:
    """The datagram of the server's that a frame is, all of whose checksums are right."""
    assert frame[6:12] == b"\x52\x55" + packed(server)
    assert frame[12:15] == b"\x08\0\x45"
    header, datagram = frame[14:34], frame[34:]
    assert internet_checksum(header) == 0
    assert struct.unpack("!H", header[2:4]) == (len(frame) - 14,)
    assert header[9] == 17
    assert header[12:16] == packed(server)
    source, port, length, check = struct.unpack("!HHHH", datagram[:8])
    assert length == len(datagram)
    assert check
    assert internet_checksum(header[12:20] + struct.pack("!HH", 17, length) + datagram) == 0
    return Datagram(frame[:6], str(IPv4Address(header[16:20])), source, port, datagram[8:])


# ---- DHCP ------------------------------------------------------------------------------------------------------------

DISCOVER, OFFER, REQUEST, DECLINE, ACK, NAK, RELEASE, INFORM = range(1, 9)


def tlv(options: Mapping[int, bytes]) -> bytes:
    return b"".join(bytes((code, len(value))) + value for code, value in options.items()) + b"\xff"


def dhcp_message(
    kind: int | None,
    options: Mapping[int, bytes] | None = None,
    *,
    mac: bytes = MAC,
    ciaddr: str = NOBODY,
    giaddr: str = NOBODY,
    flags: int = 0,
) -> bytes:
    message = struct.pack("!BBBBIHH", 1, 1, 6, 0, 0x1234, 0, flags) + packed(ciaddr) + bytes(8) + packed(giaddr)
    message += mac.ljust(16, b"\0") + bytes(192) + MAGIC
    return message + tlv(({} if kind is None else {53: bytes((kind,))}) | dict(options or {}))


def dhcp(kind: int | None, options: Mapping[int, bytes] | None = None, *, mac: bytes = MAC, ciaddr: str = NOBODY,
         giaddr: str = NOBODY, flags: int = 0) -> bytes:  # fmt: skip
    """The frame of a message."""
    message = dhcp_message(kind, options, mac=mac, ciaddr=ciaddr, giaddr=giaddr, flags=flags)
    to = SERVER if ciaddr != NOBODY else EVERYBODY
    return udp(message, 67, source_port=68, source=ciaddr, to=to, mac=mac)


class DhcpReply(NamedTuple):
    """Message of a server."""

    sent_to: tuple[bytes, str]
    type: int
    yiaddr: str
    siaddr: str
    file: str
    options: dict[int, bytes]


def read_dhcp(frame: bytes, *, mac: bytes = MAC, server: str = SERVER) -> DhcpReply:
    datagram = read_udp(frame, server=server)
    assert (datagram.source_port, datagram.port) == (67, 68)
    data = datagram.payload
    assert len(data) >= 300
    assert data[:8] == struct.pack("!BBBBI", 2, 1, 6, 0, 0x1234)
    assert data[28:44] == mac.ljust(16, b"\0")
    assert data[236:240] == MAGIC
    options, at = {}, 240
    while data[at] != 0xFF:
        options[data[at]] = data[at + 2 : at + 2 + data[at + 1]]
        at += 2 + data[at + 1]
    assert options[54] == packed(server)
    yiaddr, siaddr = (str(IPv4Address(data[at : at + 4])) for at in (16, 20))
    file = data[108:236].rstrip(b"\0").decode()
    return DhcpReply((datagram.mac, datagram.address), options[53][0], yiaddr, siaddr, file, options)


# ---- TFTP ------------------------------------------------------------------------------------------------------------


def rrq(name: str, options: Mapping[str, object] | None = None, *, mode: str = "octet", opcode: int = 1) -> bytes:
    words = [name, mode, *(str(word) for pair in (options or {}).items() for word in pair)]
    return opcode.to_bytes(2, "big") + b"".join(word.encode("utf-8", "surrogateescape") + b"\0" for word in words)


def ack(block: int) -> bytes:
    return struct.pack("!HH", 4, block & 0xFFFF)


class TftpError(Exception):
    """ERROR of the server: code, text."""


async def download(
    send: Callable[[bytes], object],
    receive: Callable[[], Awaitable[bytes]],
    name: str,
    options: Mapping[str, object] | None = None,
    *,
    port: int = 1024,
) -> tuple[bytes, dict[str, int]]:
    """A file, and the options that the server has taken. ``send`` gets frames, ``receive`` gives them."""
    send(udp(rrq(name, options), TFTP, source_port=port))
    taken: dict[str, int] = {}
    data, expected, unacknowledged = b"", 1, 0
    while True:
        got = read_udp(await receive())
        assert (got.mac, got.address, got.port) == (MAC, CLIENT, port)
        opcode, value = struct.unpack("!HH", got.payload[:4])

        def answer(payload: bytes, to: int = got.source_port) -> None:
            send(udp(payload, to, source_port=port))

        if opcode == 5:
            raise TftpError(value, got.payload[4:-1].decode())
        if opcode == 6:
            words = got.payload[2:-1].decode().split("\0")
            taken = dict(zip(words[::2], map(int, words[1::2]), strict=True))
            answer(ack(0))
            continue
        assert opcode == 3
        assert value == expected & 0xFFFF, "in order, on this network"
        data += got.payload[4:]
        unacknowledged += 1
        ended = len(got.payload) - 4 < taken.get("blksize", 512)
        if ended or unacknowledged == taken.get("windowsize", 1):
            answer(ack(expected))
            unacknowledged = 0
        if ended:
            return data, taken
        expected += 1
