"""Segmentation in software: one packet of TCP or UDP with a long payload cut into several, as a network card does it.

The same as Linux does in ``tcp_gso_segment``, ``__udp_gso_segment`` and ``inet_gso_segment`` for a device without these
abilities.
"""

from collections.abc import Iterator
from struct import Struct
from typing import NamedTuple

from vfiouser_virtio.backends.net.frame import Frame, Offload
from vfiouser_virtio.backends.net.headers import ETH_HLEN, IPV4, IPV6, TCP, UDP, Headers
from vfiouser_virtio.protocols.virtio.net import GsoType, HdrFlags

MAX_SEGMENTS = 1024
"""Segments that one packet may be cut into.

Each costs about as much as a frame of its own. A guest that says a ``gso_size`` of 1 with 64 KiB would have the server
make 65,000 frames, of 60 bytes of headers each, out of one buffer (as the "SACK Panic" did to Linux, CVE-2019-11477).
64 KiB in so many are 64 bytes each: no more than twice the bytes go out that came in. Linux takes no smaller segments
than TCP_MIN_MSS (88) from anybody; real paths have 536 and more, which makes 123 of 64 KiB.
"""

U16 = Struct(">H")
"""A field of a protocol's header."""
UDP_HLEN, UDP_CHECK = 8, 6
"""Length of a UDP header in bytes, and where its checksum is."""
_U32 = Struct(">I")
_TCP_HLEN, _TCP_CHECK = 20, 16
_FIN, _PSH, _CWR = 0x01, 0x08, 0x80

# Halves of 2^17 bytes, in bits, halves of those, …, each with the mask of the lower one.
_HALVES = [(1 << power, (1 << (1 << power)) - 1) for power in range(19, 9, -1)]
_NEEDS_CSUM = int(HdrFlags.NEEDS_CSUM)
_CSUM_FLAGS = int(HdrFlags.NEEDS_CSUM | HdrFlags.UDP_TUNNEL_CSUM)
_ECN = int(GsoType.ECN)
_NAMES = {kind.value: kind.name for kind in GsoType}
_KINDS = {
    int(GsoType.TCPV4),
    int(GsoType.TCPV6),
    int(GsoType.UDP_L4),
    GsoType.TCPV4 | GsoType.ECN,
    GsoType.TCPV6 | GsoType.ECN,
}


class BadOffload(Exception):
    """Lie of an offload header about its frame: the frame is to be dropped, and counted. Says which number, in hex."""


def check_csum(length: int, offload: Offload) -> None:
    """Raises BadOffload for a checksum that is not in a frame of ``length`` bytes."""
    start, offset = offload.csum_start, offload.csum_offset
    if start + offset + 2 > length:
        raise BadOffload(f"csum_start {start:#x} + csum_offset {offset:#x} + 2 is beyond the frame's {length:#x} bytes")
    if start < ETH_HLEN:
        raise BadOffload(f"csum_start {start:#x} is in the Ethernet header of {ETH_HLEN:#x} bytes")


def ones_complement_sum(data: bytes | bytearray | memoryview) -> int:
    """Sum of 16-bit words, modulo 0xffff: the one's complement sum, but that 0 may be either of its zeros.

    As one big number, whose digits to base 0x10000 the words are: 2 µs for 1 KiB, where adding words takes 20. The
    halves of a long one are added first, and theirs: 90 µs for 64 KiB, and 190 to divide it as it is.
    """
    size = len(data)
    total = int.from_bytes(data, "big")
    if size > 300:
        for bits, mask in _HALVES[17 - size.bit_length() :]:
            total = (total & mask) + (total >> bits)
    total %= 0xFFFF
    return total << 8 if size & 1 else total


class CutPlan(NamedTuple):
    """Plan of how a packet is cut."""

    ethertype: int
    network: int
    transport: int
    payload: int
    """Where it begins, and how long the headers are."""
    size: int
    """Bytes of payload of each segment, but for the last."""
    offload: Offload


def plan(head: bytes, length: int, offload: Offload, headers: Headers) -> CutPlan:
    """How to cut a frame of ``length`` bytes that begins with ``head``; ``headers`` are those that are in it.

    Raises BadOffload.
    """
    if offload.gso_type not in _KINDS:
        raise BadOffload(f"gso_type {offload.gso_type:#x} is none that is offered")
    kind = offload.gso_type & ~_ECN
    name = _NAMES[kind]
    if offload.flags & _CSUM_FLAGS != _NEEDS_CSUM:
        what = "have UDP_TUNNEL_CSUM" if offload.flags & _NEEDS_CSUM else "are without NEEDS_CSUM"
        raise BadOffload(f"flags {offload.flags:#x} {what}, with gso_type {name}")
    if not offload.gso_size:
        raise BadOffload(f"gso_size is 0, with gso_type {name}")
    check_csum(length, offload)

    ethertype, network, protocol, transport = headers
    wanted = UDP if kind == GsoType.UDP_L4 else TCP
    if (
        ethertype != IPV4
        if kind == GsoType.TCPV4
        else ethertype != IPV6 and (kind == GsoType.TCPV6 or ethertype != IPV4)
    ):
        raise BadOffload(f"gso_type {name}, but the frame's ethertype is {ethertype:#x}")
    if protocol != wanted:
        raise BadOffload(f"gso_type {name}, but no whole {'UDP' if wanted == UDP else 'TCP'} header in the frame")
    if offload.csum_start != transport:
        raise BadOffload(f"csum_start {offload.csum_start:#x}, but the {name} header is at {transport:#x}")
    if offload.csum_offset != (UDP_CHECK if wanted == UDP else _TCP_CHECK):
        raise BadOffload(f"csum_offset {offload.csum_offset:#x} is not that of {name}'s checksum")

    if wanted == UDP:
        payload = transport + UDP_HLEN
    else:
        payload = transport + (head[transport + 12] >> 4) * 4 if transport + 12 < len(head) else transport
        if payload < transport + _TCP_HLEN:
            raise BadOffload(f"the TCP header at {transport:#x} says that it has {payload - transport:#x} bytes")
    if payload > min(length, len(head)):
        raise BadOffload(f"the headers end at {payload:#x}, beyond the frame's {min(length, len(head)):#x} bytes")
    if length - payload > offload.gso_size * MAX_SEGMENTS:
        raise BadOffload(
            f"gso_size {offload.gso_size:#x} cuts {length - payload:#x} bytes into more than {MAX_SEGMENTS:#x} segments"
        )
    if length > network + 0xFFFF:  # which few are, and the call would take a twentieth of all this
        check_longest(ethertype, network, payload + min(offload.gso_size, length - payload))
    return CutPlan(ethertype, network, transport, payload, offload.gso_size, offload)


def check_longest(ethertype: int, network: int, length: int) -> None:
    """Raises BadOffload for a segment of so many bytes that the length field of its IP header has no room for them."""
    length -= network if ethertype == IPV4 else network + 40
    if length > 0xFFFF:
        raise BadOffload(f"a segment would have an IP packet of {length:#x} bytes")


def pseudo_sum(data: bytes, ethertype: int, network: int, transport: int, check_at: int) -> int:
    """Sum of the pseudo header but for the length; ``check_at`` is where the transport's checksum is."""
    first, last = (12, 20) if ethertype == IPV4 else (8, 40)  # the addresses, which end the header
    if transport - network == last:
        addresses = data[network + first : network + last]
        return ones_complement_sum(addresses) + (UDP if check_at - transport == UDP_CHECK else TCP)
    # An option or extension header may name another final destination than the header does (RFC 8200, 8.1). The driver
    # knows, and has left the sum of the pseudo header, with the whole length, where the checksum belongs.
    partial: int = U16.unpack_from(data, check_at)[0]
    return partial - (len(data) - transport)


def cut(data: bytes, plan: CutPlan, partial: bool) -> Iterator[Frame]:
    """Segments, each a header of its own and a view of the payload; with ``partial`` their checksums are left to do."""
    ethertype, network, transport, start, size, offload = plan
    tcp = offload.csum_offset == _TCP_CHECK
    check_at = transport + offload.csum_offset
    header = bytearray(data[:start])
    header[check_at : check_at + 2] = bytes(2)

    if ethertype == IPV4:
        identification = U16.unpack_from(header, network + 4)[0]
        header[network + 2 : network + 6] = bytes(4)  # length, identification
        header[network + 10 : network + 12] = bytes(2)
        network_sum = ones_complement_sum(header[network:transport])
    else:
        identification = network_sum = 0
    pseudo = pseudo_sum(data, ethertype, network, transport, check_at)

    sequence = flags = 0
    if tcp:
        sequence = _U32.unpack_from(header, transport + 4)[0]
        flags = header[transport + 13]
    left = Offload(_NEEDS_CSUM, 0, start, 0, transport, offload.csum_offset) if partial else None

    payload = memoryview(data)
    end = len(data)
    at = start
    first = True
    while True:
        after = min(at + size, end)
        piece = payload[at:after]
        segment = bytearray(header)
        length = start - transport + after - at  # of the transport's header and payload

        if ethertype == IPV4:
            total = start - network + after - at
            U16.pack_into(segment, network + 2, total)
            U16.pack_into(segment, network + 4, identification)
            U16.pack_into(segment, network + 10, (0xFFFF - (network_sum + total + identification) % 0xFFFF) % 0xFFFF)
            identification = (identification + 1) & 0xFFFF
        else:
            U16.pack_into(segment, network + 4, start - network - 40 + after - at)
        if tcp:
            _U32.pack_into(segment, transport + 4, sequence)
            sequence = (sequence + after - at) & 0xFFFF_FFFF
            now = flags if after == end else flags & ~(_FIN | _PSH)
            segment[transport + 13] = now if first else now & ~_CWR
        else:
            U16.pack_into(segment, transport + 4, length)

        if partial:
            U16.pack_into(segment, check_at, (pseudo + length) % 0xFFFF)
        else:
            total = pseudo + length + ones_complement_sum(memoryview(segment)[transport:]) + ones_complement_sum(piece)
            U16.pack_into(segment, check_at, 0xFFFF - total % 0xFFFF)
        yield Frame([memoryview(segment), piece], start + after - at, left)
        if after == end:
            return
        at, first = after, False
