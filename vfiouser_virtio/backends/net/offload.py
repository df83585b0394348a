"""Offloads in software: checksums completed, packets cut into segments, for those who take no offload header.

The same as Linux does with CHECKSUM_PARTIAL and in ``tcp_gso_segment``, ``__udp_gso_segment`` and
``inet_gso_segment`` for a device without these abilities.
"""

from collections.abc import Iterator, Sequence
from struct import Struct
from typing import NamedTuple

from vfiouser_virtio.backends.net.frame import Frame, Offload
from vfiouser_virtio.backends.net.headers import ETH_HLEN, HEAD, IPV4, IPV6, TCP, UDP, find_headers
from vfiouser_virtio.backends.net.netdev import Does
from vfiouser_virtio.protocols.virtio.net import GSO_UDP_TUNNEL, GsoType, HdrFlags

MAX_SEGMENTS = 1024
"""Segments that one packet may be cut into.

Each costs about as much as a frame of its own. A guest that says a ``gso_size`` of 1 with 64 KiB would have the server
make 65,000 frames, of 60 bytes of headers each, out of one buffer (as the "SACK Panic" did to Linux, CVE-2019-11477).
64 KiB in so many are 64 bytes each: no more than twice the bytes go out that came in. Linux takes no smaller segments
than TCP_MIN_MSS (88) from anybody; real paths have 536 and more, which makes 123 of 64 KiB.
"""

_CSUM = Does.CSUM.value
_and = int.__and__  # of IntFlag too, whose own & takes twenty times as long
_NEEDS_CSUM = int(HdrFlags.NEEDS_CSUM)
_CSUM_FLAGS = int(HdrFlags.NEEDS_CSUM | HdrFlags.DATA_VALID)
_ECN = int(GsoType.ECN)

_GSO_NEEDS = {
    GsoType.TCPV4: Does.TSO4,
    GsoType.TCPV6: Does.TSO6,
    GsoType.UDP_L4: Does.USO,
    GsoType.TCPV4 | GsoType.ECN: Does.TSO4 | Does.ECN,
    GsoType.TCPV6 | GsoType.ECN: Does.TSO6 | Does.ECN,
}
_NAMES = {kind.value: kind.name for kind in GsoType}
_NOBODY = 1 << 30
# By gso_type, of which a byte has 256, as plain integers. Unknown types go to nobody, and so to `finish`, which refuses
# them, or knows better: ECN beside nothing says nothing.
_NEEDS = [int(_GSO_NEEDS[kind] | Does.CSUM) if kind in _GSO_NEEDS else _NOBODY if kind else 0 for kind in range(256)]

_U16, _U32 = Struct(">H"), Struct(">I")
_TCP_HLEN, _UDP_HLEN = 20, 8
_TCP_CHECK, _UDP_CHECK = 16, 6
_FIN, _PSH, _CWR = 0x01, 0x08, 0x80


class BadOffload(Exception):
    """Lie of an offload header about its frame: the frame is to be dropped, and counted. Says which number, in hex."""


def needs(offload: Offload) -> int:
    """The `Does` that a sink must have to take a frame with this as it is, as a plain int."""
    need = _NEEDS[offload.gso_type]
    return need | _CSUM if offload.flags & _CSUM_FLAGS else need


def takes(does: int, frame: Frame) -> bool:
    """Whether a sink with these abilities can take the frame as it is."""
    offload = frame.offload
    if offload is None:
        return True
    need = needs(offload)
    return _and(need, does) == need


def check(frame: Frame) -> None:
    """Compare what an offload header says with its frame; whoever makes one from a driver's or peer's bytes does this.

    The numbers lie within the frame, the segments are at most `MAX_SEGMENTS`, the headers are those of ``gso_type``.
    In a guest's memory the headers can be changed afterwards: who relies on them looks at a copy, as `finish` does.

    Raises BadOffload.
    """
    offload = frame.offload
    if offload is None:
        return
    if offload.gso_type & ~_ECN:
        _plan(frame.head(HEAD), frame.length, offload)
    elif offload.flags & _NEEDS_CSUM:
        _check_csum(frame.length, offload)


def finish(frame: Frame, does: int) -> Sequence[Frame] | Iterator[Frame]:
    """Frames that a sink with these abilities (`Does`) can take, in the order in which they go out.

    The frame itself, or its bytes, where nothing is to be done to them; else frames with memory of their own, made one
    by one when they are asked for, from a copy: the original is not looked at again after the call.

    Raises BadOffload, as `check`: before the first frame is made.
    """
    offload = frame.offload
    if offload is None:
        return (frame,)
    does = int(does)
    need = needs(offload)
    if need & does == need:
        return (frame,)
    csum = bool(does & _CSUM)
    if offload.gso_type & ~_ECN:
        data = frame.tobytes()
        return _cut(data, _plan(data[:HEAD], len(data), offload), partial=csum)
    if csum:
        return (Frame(frame.segments, frame.length, offload._replace(gso_type=0)),)
    if offload.flags & _NEEDS_CSUM:
        return (_complete(frame, offload),)
    return (Frame(frame.segments, frame.length),)  # with DATA_VALID, which the sink has not asked for


def _check_csum(length: int, offload: Offload) -> None:
    start, offset = offload.csum_start, offload.csum_offset
    if start + offset + 2 > length:
        raise BadOffload(f"csum_start {start:#x} + csum_offset {offset:#x} + 2 is beyond the frame's {length:#x} bytes")
    if start < ETH_HLEN:
        raise BadOffload(f"csum_start {start:#x} is in the Ethernet header of {ETH_HLEN:#x} bytes")


def _sum(data: bytes | bytearray | memoryview) -> int:
    """Sum of 16-bit words, modulo 0xffff: the one's complement sum, but that 0 may be either of its zeros.

    As one big number, whose digits to base 0x10000 the words are: 3 µs for 1 KiB, where adding words takes 20.
    """
    total = int.from_bytes(data, "big") % 0xFFFF
    return total << 8 if len(data) & 1 else total


def _complete(frame: Frame, offload: Offload) -> Frame:
    """What ``skb_checksum_help`` does."""
    _check_csum(frame.length, offload)
    data = bytearray(frame.length)
    at = 0
    for segment in frame.segments:
        data[at : at + len(segment)] = segment
        at += len(segment)
    view = memoryview(data)
    start = offload.csum_start
    # 0xffff, and not 0, where the sum is a zero: in UDP 0 would be "no checksum".
    _U16.pack_into(data, start + offload.csum_offset, 0xFFFF - _sum(view[start:]) % 0xFFFF)
    return Frame([view], len(data))


class _Plan(NamedTuple):
    """How a packet is cut."""

    ethertype: int
    network: int
    transport: int
    payload: int
    """Where it begins, and how long the headers are."""
    size: int
    """Bytes of payload of each segment, but for the last."""
    offload: Offload


def _plan(head: bytes, length: int, offload: Offload) -> _Plan:
    """Raises BadOffload."""
    kind = offload.gso_type & ~_ECN
    if offload.gso_type not in _GSO_NEEDS:
        what = "of a tunnel, which nobody has offered" if kind & GSO_UDP_TUNNEL else "is none that is offered"
        raise BadOffload(f"gso_type {offload.gso_type:#x} {what}")
    name = _NAMES[kind]
    if not offload.flags & _NEEDS_CSUM:
        raise BadOffload(f"flags {offload.flags:#x} are without NEEDS_CSUM, with gso_type {name}")
    if not offload.gso_size:
        raise BadOffload(f"gso_size is 0, with gso_type {name}")
    _check_csum(length, offload)

    ethertype, network, protocol, transport = find_headers(head)
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
    if offload.csum_offset != (_UDP_CHECK if wanted == UDP else _TCP_CHECK):
        raise BadOffload(f"csum_offset {offload.csum_offset:#x} is not that of {name}'s checksum")

    if wanted == UDP:
        payload = transport + _UDP_HLEN
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
    return _Plan(ethertype, network, transport, payload, offload.gso_size, offload)


def _cut(data: bytes, plan: _Plan, partial: bool) -> Iterator[Frame]:
    """Segments, each a header of its own and a view of the payload; with ``partial`` their checksums are left to do."""
    ethertype, network, transport, start, size, offload = plan
    tcp = offload.csum_offset == _TCP_CHECK
    check_at = transport + offload.csum_offset
    header = bytearray(data[:start])
    header[check_at : check_at + 2] = bytes(2)

    if ethertype == IPV4:
        identification = _U16.unpack_from(header, network + 4)[0]
        header[network + 2 : network + 6] = bytes(4)  # length, identification
        header[network + 10 : network + 12] = bytes(2)
        network_sum = _sum(header[network:transport])
        addresses = header[network + 12 : network + 20]
    else:
        identification = network_sum = 0
        addresses = header[network + 8 : network + 40]
    pseudo = _sum(addresses) + (TCP if tcp else UDP)
    if transport - network != (20 if ethertype == IPV4 else 40):
        # An option or extension header may name another final destination than the header does (RFC 8200, 8.1). The
        # driver knows, and has left the sum of the pseudo header, with the whole length, where the checksum belongs.
        pseudo = _U16.unpack_from(data, check_at)[0] - (len(data) - transport)

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
            _U16.pack_into(segment, network + 2, total)
            _U16.pack_into(segment, network + 4, identification)
            _U16.pack_into(segment, network + 10, (0xFFFF - (network_sum + total + identification) % 0xFFFF) % 0xFFFF)
            identification = (identification + 1) & 0xFFFF
        else:
            _U16.pack_into(segment, network + 4, start - network - 40 + after - at)
        if tcp:
            _U32.pack_into(segment, transport + 4, sequence)
            sequence = (sequence + after - at) & 0xFFFF_FFFF
            now = flags if after == end else flags & ~(_FIN | _PSH)
            segment[transport + 13] = now if first else now & ~_CWR
        else:
            _U16.pack_into(segment, transport + 4, length)

        if partial:
            _U16.pack_into(segment, check_at, (pseudo + length) % 0xFFFF)
        else:
            total = pseudo + length + _sum(memoryview(segment)[transport:]) + _sum(piece)
            _U16.pack_into(segment, check_at, 0xFFFF - total % 0xFFFF)
        yield Frame([memoryview(segment), piece], start + after - at, left)
        if after == end:
            return
        at, first = after, False
