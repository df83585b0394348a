"""Packets with real headers, for tests of offloads: a TCP segment, a checksum, what they must come out as."""

import struct

from vfiouser_virtio.backends.net.frame import Offload
from vfiouser_virtio.protocols.virtio.net import GsoType, HdrFlags

MAC, PEER = bytes.fromhex("525400123456"), bytes.fromhex("525400abcdef")
SOURCE, DESTINATION = bytes([10, 0, 0, 1]), bytes([10, 0, 0, 2])
TCP_AT, TCP_CHECK, HEADERS = 34, 16, 54


def internet_checksum(data: bytes) -> int:
    """RFC 1071, the slow way."""
    if len(data) % 2:
        data += b"\0"
    total: int = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def _pseudo(length: int) -> bytes:
    return SOURCE + DESTINATION + bytes([0, 6]) + struct.pack(">H", length)


def tcp_packet(payload: int, *, to: bytes = MAC, partial: bool = True, sequence: int = 1000) -> bytes:
    """A TCP segment over IPv4; ``partial``: its checksum is the sum of the pseudo header, as for NEEDS_CSUM."""
    data = bytes((at * 13 + (at >> 8)) & 0xFF for at in range(payload))
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 40 + payload, 7, 0, 64, 6, 0) + SOURCE + DESTINATION
    ip = ip[:10] + struct.pack(">H", internet_checksum(ip)) + ip[12:]
    tcp = struct.pack(">HHIIBBHHH", 1234, 80, sequence, 0, 0x50, 0x10, 0xFFFF, 0, 0)
    if partial:
        check = ~internet_checksum(_pseudo(20 + payload)) & 0xFFFF
    else:
        check = internet_checksum(_pseudo(20 + payload) + tcp + data)
    return to + PEER + b"\x08\0" + ip + tcp[:16] + struct.pack(">H", check) + tcp[18:] + data


def is_complete(frame: bytes) -> bool:
    """Whether a frame of `tcp_packet` has the checksums that its bytes must have."""
    ip, segment = frame[14:34], frame[34:]
    return internet_checksum(ip) == 0 and internet_checksum(_pseudo(len(segment)) + segment) == 0


CSUM = Offload(int(HdrFlags.NEEDS_CSUM), 0, 0, 0, TCP_AT, TCP_CHECK)


def tso(size: int, *, ecn: bool = False) -> Offload:
    """Segmentation of `tcp_packet` into segments of ``size``."""
    kind = GsoType.TCPV4 | (GsoType.ECN if ecn else 0)
    return Offload(int(HdrFlags.NEEDS_CSUM), kind, HEADERS, size, TCP_AT, TCP_CHECK)
