"""Flow of an Ethernet frame: addresses and ports, as automatic steering and RSS hashes know it (virtio 1.4, 5.1.9.4.3).

Looked at are the first bytes only. What is in them comes from a network or another guest, and may lie: each length is
checked, and what cannot be found is not there.
"""

from vfiouser_virtio.backends.net.frame import Frame
from vfiouser_virtio.protocols.virtio.net import HashReport

Flow = tuple[int, bytes]
"""Kind and fields. The kind is the `HashReport` with all hash types enabled; the fields are source and destination
address, then for TCP and UDP the ports, then for packets with extension headers (``*_EX``) the home address and the
address of a routing header of type 2, or again source and destination address."""

HEAD = 256
"""Bytes that are looked at. Headers of more are no flow that steering could tell from others: by addresses only."""
# A driver's neighbour may send a chain of small extension headers; the kernel's own use three at most.
_MAX_EXTENSIONS = 8
_MAX_OPTIONS = 16

_TCP, _UDP = 6, 17
_L4 = (_TCP, _UDP)
_IPV4, _IPV6 = b"\x08\x00", b"\x86\xdd"
_VLAN = (b"\x81\x00", b"\x88\xa8")
# A header without options, and flags and offset of what is no fragment: the bits that say so.
_PLAIN_IPV4 = _IPV4 + b"\x45"
_FRAGMENT = 0x3FFF
_HOP_BY_HOP, _ROUTING, _FRAGMENT_HEADER, _AUTHENTICATION, _DESTINATION, _MOBILITY = 0, 43, 44, 51, 60, 135
_EXTENSIONS = (_HOP_BY_HOP, _ROUTING, _FRAGMENT_HEADER, _AUTHENTICATION, _DESTINATION, _MOBILITY)
_PAD1, _HOME_ADDRESS = 0, 0xC9

# Plain ints: an enumeration's member takes longer to look up than all else.
_V4, _TCP4, _UDP4 = int(HashReport.IPv4), int(HashReport.TCPv4), int(HashReport.UDPv4)
_V6, _TCP6, _UDP6 = int(HashReport.IPv6), int(HashReport.TCPv6), int(HashReport.UDPv6)
_V6_EX, _TCP6_EX, _UDP6_EX = int(HashReport.IPv6_EX), int(HashReport.TCPv6_EX), int(HashReport.UDPv6_EX)


def flow_of(frame: Frame) -> Flow | None:
    """The flow that a frame belongs to; None for what is neither IPv4 nor IPv6."""
    try:
        # What most frames are, in a sixth of the time that it takes for any frame.
        head = frame.segments[0][:HEAD].tobytes()
        start = head[12:15]
        if start == _PLAIN_IPV4:
            if head[37] >= 0 and not head[21] and not head[20] & 0x3F:
                protocol = head[23]
                if protocol == _TCP:
                    return _TCP4, head[26:38]
                if protocol == _UDP:
                    return _UDP4, head[26:38]
        elif start[:2] == _IPV6 and head[57] >= 0 and start[2] >> 4 == 6:
            protocol = head[20]
            if protocol == _TCP:
                return _TCP6, head[22:58]
            if protocol == _UDP:
                return _UDP6, head[22:58]
    except IndexError:  # it is shorter, or its first segment
        pass
    return parse(frame.head(HEAD))


def parse(head: bytes) -> Flow | None:
    """As `flow_of`, from the first bytes of any frame."""
    at = 12
    for _ in range(2):
        if head[at : at + 2] in _VLAN:
            at += 4
    ethertype, at = head[at : at + 2], at + 2
    if ethertype == _IPV4:
        return _ipv4(head, at)
    return _ipv6(head, at) if ethertype == _IPV6 else None


def reverse(flow: Flow) -> Flow:
    """The flow of the answers: source and destination changed. What extension headers say is left out."""
    kind, fields = flow
    if kind <= _UDP4:
        return kind, fields[4:8] + fields[:4] + fields[10:12] + fields[8:10]
    if kind >= _V6_EX:
        kind -= _V6_EX - _V6
        fields = fields[:-32]
    return kind, fields[16:32] + fields[:16] + fields[34:36] + fields[32:34]


def without_extensions(flow: Flow) -> Flow:
    """The flow as it would be without IPv6 extension headers."""
    kind, fields = flow
    return (kind - (_V6_EX - _V6), fields[:-32]) if kind >= _V6_EX else flow


def _ipv4(head: bytes, at: int) -> Flow | None:
    if len(head) < at + 20 or head[at] >> 4 != 4:
        return None
    length, protocol = (head[at] & 0xF) * 4, head[at + 9]
    addresses = head[at + 12 : at + 20]
    # Only the first fragment has ports: all go where none have them.
    if length >= 20 and protocol in _L4 and not int.from_bytes(head[at + 6 : at + 8], "big") & _FRAGMENT:
        ports = head[at + length : at + length + 4]
        if len(ports) == 4:
            return _TCP4 if protocol == _TCP else _UDP4, addresses + ports
    return _V4, addresses


def _ipv6(head: bytes, at: int) -> Flow | None:
    if len(head) < at + 40 or head[at] >> 4 != 6:
        return None
    addresses, protocol = head[at + 8 : at + 40], head[at + 6]
    source, destination = addresses[:16], addresses[16:]
    extended = False
    at += 40
    for _ in range(_MAX_EXTENSIONS):
        if protocol not in _EXTENSIONS:
            break
        extended = True
        header = head[at : at + 8]
        if len(header) < 8:
            protocol = -1
            break
        length = (header[1] + 1) * 8
        if protocol == _FRAGMENT_HEADER:
            length = 8
            if int.from_bytes(header[2:4], "big") & 0xFFF9:  # an offset, or more fragments
                protocol = -1
                break
        elif protocol == _AUTHENTICATION:
            length = (header[1] + 2) * 4
        elif protocol == _ROUTING and header[2] == 2 and header[3] == 1 and len(head) >= at + 24:
            destination = head[at + 8 : at + 24]
        elif protocol == _DESTINATION:
            source = _home_address(head[at + 2 : at + length]) or source
        protocol, at = header[0], at + length
    ports = head[at : at + 4] if protocol in _L4 and len(head) >= at + 4 else b""
    kind = (_TCP6 if protocol == _TCP else _UDP6) if ports else _V6
    if extended:
        return kind + _V6_EX - _V6, addresses + ports + source + destination
    return kind, addresses + ports


def _home_address(options: bytes) -> bytes | None:
    """The address in a home address option (RFC 6275, 6.3)."""
    at = 0
    for _ in range(_MAX_OPTIONS):
        if at >= len(options):
            return None
        kind = options[at]
        if kind == _PAD1:
            at += 1
            continue
        length = options[at + 1] if at + 1 < len(options) else 0
        if kind == _HOME_ADDRESS:
            address = options[at + 2 : at + 18]
            return address if length == len(address) == 16 else None
        at += 2 + length
    return None
