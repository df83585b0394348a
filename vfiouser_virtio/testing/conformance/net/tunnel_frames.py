"""Frames of a VXLAN tunnel that are made up, with their headers, and what is right of them at the other end.

::

    Ethernet │ IPv4 │ UDP │ VXLAN, Ethernet │ IPv4 │ TCP │ payload
              UDP_AT ▲            INNER_AT ▲       ▲ TCP_AT

Both IP headers are of version 4: Linux reads the two tunnel bits of ``gso_type`` as of the outer one, the specification
(5.1.9.2) as of the inner one.
"""

import struct

from vfiouser_virtio.protocols.virtio.net import ETH_HLEN, GSO_UDP_TUNNEL, GsoType, HdrFlags
from vfiouser_virtio.testing.conformance.net import frames
from vfiouser_virtio.testing.conformance.net.driver import Header
from vfiouser_virtio.testing.conformance.net.traffic import SentPacket
from vfiouser_virtio.testing.conformance.net.transmit import PAYLOAD, SEGMENT

UDP_AT = ETH_HLEN + 20
"""Where the outer UDP header is: ``outer_th_offset``."""
_UDP_HLEN, _UDP_CHECK = 8, 6
_VXLAN = bytes.fromhex("08000000 00002a00")  # network 42 (RFC 7348, 5)
_INNER_ETHERNET = UDP_AT + _UDP_HLEN + len(_VXLAN)
INNER_AT = _INNER_ETHERNET + ETH_HLEN
"""Where the inner IP header is: ``inner_nh_offset``."""
TCP_AT = _INNER_ETHERNET + frames.TCP_AT
"""Where the inner TCP header is: ``csum_start``."""
HEADERS = _INNER_ETHERNET + frames.HEADERS
"""Bytes of all headers."""

_UDP = 17
_VXLAN_PORT = 4789
_ADDRESSES = bytes([10, 1, 0, 1, 10, 1, 0, 2])
_CHECKED, _PLAIN = HdrFlags.NEEDS_CSUM | HdrFlags.UDP_TUNNEL_CSUM, HdrFlags.NEEDS_CSUM


def packet(*, checksum: bool = False, flags: int | None = None, gso_type: int | None = None) -> SentPacket:
    """A packet that is to be cut into segments of `SEGMENT` bytes, with or without an outer UDP checksum to complete.

    ``flags`` and ``gso_type`` may be others than those that it must have.
    """
    if flags is None:
        flags = _CHECKED if checksum else _PLAIN
    if gso_type is None:
        gso_type = GsoType.TCPV4 | GsoType.UDP_TUNNEL_IPV4
    offsets = {"outer_th_offset": UDP_AT, "inner_nh_offset": INNER_AT}
    header = Header(flags, gso_type, HEADERS, SEGMENT, TCP_AT, frames.TCP_CHECK, **offsets)
    return SentPacket(frame(PAYLOAD, checksum=checksum), header)


def frame(payload: int, *, checksum: bool) -> bytes:
    """A segment of TCP in the tunnel; its checksum is that of the pseudo header, and so is the outer one, or none."""
    inner = frames.tcp(frames.STRANGER, payload, partial=True)
    length = _UDP_HLEN + len(_VXLAN) + len(inner)
    header = struct.pack(">BBHHHBBH", 0x45, 0, 20 + length, 9, 0, 64, _UDP, 0) + _ADDRESSES
    header = header[:10] + frames.checksum(header).to_bytes(2, "big") + header[12:]
    check = ~frames.checksum(_pseudo(length)) & 0xFFFF if checksum else 0
    udp = struct.pack(">HHHH", 0xC000, _VXLAN_PORT, length, check)
    return frames.BROADCAST + frames.STATION + b"\x08\x00" + header + udp + _VXLAN + inner


def is_tunnel(header: Header) -> bool:
    """Whether ``gso_type`` says that a packet is of a tunnel."""
    return bool(header.gso_type & GSO_UDP_TUNNEL)


def payload(data: bytes) -> bytes:
    """What the inner segment carries."""
    return data[HEADERS:]


def wrong(data: bytes) -> list[str]:
    """What is wrong with a frame that nothing is left to be done for: lengths, checksums."""
    inner = data[_INNER_ETHERNET:]
    lengths = {
        "the outer IP length": (data[ETH_HLEN + 2 : ETH_HLEN + 4], len(data) - ETH_HLEN),
        "the outer UDP length": (data[UDP_AT + 4 : UDP_AT + 6], len(data) - UDP_AT),
        "the inner IP length": (inner[ETH_HLEN + 2 : ETH_HLEN + 4], len(inner) - ETH_HLEN),
    }
    found = [
        f"{what} is {int.from_bytes(field, 'big'):#x}, of {length:#x} bytes"
        for what, (field, length) in lengths.items()
        if int.from_bytes(field, "big") != length
    ]
    if frames.checksum(data[ETH_HLEN:UDP_AT]):
        found.append("the outer IP checksum is wrong")
    if outer_checksum(data) and not outer_is_complete(data):
        found.append("the outer UDP checksum is wrong")
    if not frames.is_complete(inner):
        found.append("an inner checksum is wrong")
    return found


def outer_checksum(data: bytes) -> int:
    """The outer UDP checksum; 0: there is none."""
    at = UDP_AT + _UDP_CHECK
    return int.from_bytes(data[at : at + 2], "big")


def outer_is_complete(data: bytes) -> bool:
    """Whether the outer UDP checksum is that of the packet's bytes."""
    return frames.checksum(_pseudo(len(data) - UDP_AT) + data[UDP_AT:]) == 0


def outer_is_partial(data: bytes) -> bool:
    """Whether the outer UDP checksum is that of its pseudo header alone."""
    return outer_checksum(data) == ~frames.checksum(_pseudo(len(data) - UDP_AT)) & 0xFFFF


def _pseudo(length: int) -> bytes:
    return _ADDRESSES + bytes([0, _UDP]) + length.to_bytes(2, "big")
