"""Frames that are made up for checks of network devices, and the checksums that they must have."""

import struct
from ipaddress import ip_address

from vfiouser_virtio.protocols.virtio.net import ETH_ALEN, ETH_HLEN

STATION = bytes.fromhex("02c04f000001")
"""Address of who sends all of these frames (locally administered)."""
STRANGER = bytes.fromhex("02c04f0000fe")
"""Address that no device has."""
GROUP = bytes.fromhex("03c04f0000fd")
BROADCAST = b"\xff" * ETH_ALEN
SHORTEST = 60
"""Bytes of the shortest frame of Ethernet, without its checksum."""

IP_AT = ETH_HLEN
TCP_AT, TCP_CHECK = IP_AT + 20, 16
"""Where TCP begins in a frame of `tcp`, and where its checksum is in it: ``csum_start`` and ``csum_offset``."""
HEADERS = TCP_AT + 20
"""Bytes of all headers of a frame of `tcp`."""

_EXPERIMENT = b"\x88\xb5"  # EtherType that IEEE 802 leaves to experiments
_IPV4, _VLAN = b"\x08\x00", b"\x81\x00"
_TCP = 6
_MARKER = b"vfiouser-virtio conform marker "
_SUM = struct.Struct(">H")


def frame(to: bytes, length: int = SHORTEST, *, seed: int = 0) -> bytes:
    """A frame whose bytes say where they are; another one for each ``seed``."""
    return to + STATION + _EXPERIMENT + _pattern(length - ETH_HLEN, seed)


def tagged(to: bytes, vlan: int) -> bytes:
    """A frame with a tag of 802.1Q."""
    return to + STATION + _VLAN + vlan.to_bytes(2, "big") + _EXPERIMENT + _pattern(SHORTEST - ETH_HLEN, vlan & 0xFF)


def marker(to: bytes, number: int) -> bytes:
    """A frame that only says that those before it have been seen to."""
    return (to + STATION + _EXPERIMENT + _MARKER + number.to_bytes(4, "big")).ljust(SHORTEST, b"\0")


def is_marker(data: bytes) -> bool:
    """Whether a frame is one of `marker`."""
    return data[ETH_HLEN:].startswith(_MARKER)


def tcp(
    to: bytes,
    payload: int,
    *,
    partial: bool = False,
    source: tuple[str, int] = ("10.0.0.1", 1234),
    destination: tuple[str, int] = ("10.0.0.2", 80),
) -> bytes:
    """A TCP segment over IPv4; ``partial``: its checksum is that of the pseudo header alone, as NEEDS_CSUM has it."""
    addresses = ip_address(source[0]).packed + ip_address(destination[0]).packed
    header = struct.pack(">BBHHHBBH", 0x45, 0, 40 + payload, 7, 0, 64, _TCP, 0) + addresses
    header = header[:10] + _SUM.pack(checksum(header)) + header[12:]
    segment = struct.pack(">HHIIBBHHH", source[1], destination[1], 1000, 0, 0x50, 0x10, 0xFFFF, 0, 0)
    segment += _pattern(payload, 0)
    pseudo = _pseudo(addresses, len(segment))
    check = ~checksum(pseudo) & 0xFFFF if partial else checksum(pseudo + segment)
    return to + STATION + _IPV4 + header + segment[:TCP_CHECK] + _SUM.pack(check) + segment[TCP_CHECK + 2 :]


def tcp_payload(data: bytes) -> bytes:
    """What a segment of `tcp` carries."""
    return data[HEADERS:]


def is_complete(data: bytes) -> bool:
    """Whether a segment of `tcp` has the checksums, of IPv4 and of TCP, that its bytes must have."""
    segment = data[TCP_AT:]
    addresses = data[IP_AT + 12 : TCP_AT]
    return checksum(data[IP_AT:TCP_AT]) == 0 and checksum(_pseudo(addresses, len(segment)) + segment) == 0


def completed(data: bytes, start: int, offset: int) -> bytes:
    """The frame with the checksum from ``csum_start`` on stored at ``csum_offset``, as its header asks for."""
    at = start + offset
    return data[:at] + _SUM.pack(checksum(data[start:])) + data[at + 2 :]


def checksum(data: bytes) -> int:
    """The internet checksum (RFC 1071)."""
    data += b"\0" * (len(data) % 2)
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _pseudo(addresses: bytes, length: int) -> bytes:
    return addresses + bytes([0, _TCP]) + length.to_bytes(2, "big")


def _pattern(length: int, seed: int) -> bytes:
    return bytes((seed + at * 7 + (at >> 8)) & 0xFF for at in range(length))
