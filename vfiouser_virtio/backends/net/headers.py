"""Protocol headers of a frame: where network and transport header lie (IEEE 802.3, 802.1Q, RFC 791, RFC 8200)."""

from typing import NamedTuple

HEAD = 512
"""Bytes of a frame that all of its headers are looked for in; those behind are as good as not there."""

ETH_HLEN = 14
VLAN_HLEN = 4
IPV4, IPV6 = 0x0800, 0x86DD
"""``ETH_P_IP``, ``ETH_P_IPV6``."""
VLAN_TAGS = (b"\x81\x00", b"\x88\xa8")
"""``ETH_P_8021Q``, ``ETH_P_8021AD``."""
MAX_VLAN_TAGS = 4
TCP, UDP = 6, 17
"""``IPPROTO_TCP``, ``IPPROTO_UDP``."""
NO_TRANSPORT = -1

_HOP_BY_HOP, _ROUTING, _FRAGMENT, _DESTINATION = 0, 43, 44, 60
# Every one has 8 bytes or more, and there are few in what is real.
_MAX_EXTENSIONS = 8


class Headers(NamedTuple):
    """Places of a frame's headers, in bytes from the start of the frame, or of what was given."""

    ethertype: int
    """What lies at ``network``, VLAN tags skipped: `IPV4`, `IPV6`, others."""
    network: int
    protocol: int
    """``IPPROTO_*`` of what lies at ``transport``; `NO_TRANSPORT` where there is none: no IP, fragments, cut short."""
    transport: int


def find_headers(head: bytes) -> Headers:
    """Where the headers of a frame lie, which begins with ``head`` (`HEAD` bytes, or all that there are).

    That an IPv4 header is whole, or an IPv6 header and its extensions are, is certain where there is a transport, and
    that the transport's header has a first byte; no more.
    """
    at = ETH_HLEN - 2
    for _ in range(MAX_VLAN_TAGS):
        if head[at : at + 2] not in VLAN_TAGS:
            break
        at += VLAN_HLEN
    return _headers(head, int.from_bytes(head[at : at + 2], "big"), at + 2)


def find_ip_headers(head: bytes, network: int) -> Headers:
    """As `find_headers`, of an IP packet at ``network``; what it is, its first byte says: 0 for what is no IP."""
    version = head[network] >> 4 if network < len(head) else 0
    return _headers(head, {4: IPV4, 6: IPV6}.get(version, 0), network)


def _headers(head: bytes, ethertype: int, network: int) -> Headers:
    protocol, transport = NO_TRANSPORT, network
    if ethertype == IPV4:
        protocol, transport = ipv4_transport(head, network)
    elif ethertype == IPV6:
        protocol, transport = _ipv6_transport(head, network)
    return Headers(ethertype, network, protocol, transport)


def ipv4_transport(head: bytes, network: int) -> tuple[int, int]:
    """Protocol and place of what an IPv4 header at ``network`` carries."""
    if len(head) < network + 20:
        return NO_TRANSPORT, network
    words = head[network] & 15
    fragment = (head[network + 6] & 0x3F) | head[network + 7]  # MF, and the offset
    transport = network + words * 4
    if head[network] >> 4 != 4 or words < 5 or fragment or len(head) <= transport:
        return NO_TRANSPORT, network
    return head[network + 9], transport


def _ipv6_transport(head: bytes, network: int) -> tuple[int, int]:
    if len(head) < network + 40 or head[network] >> 4 != 6:
        return NO_TRANSPORT, network
    protocol, at = head[network + 6], network + 40
    for _ in range(_MAX_EXTENSIONS + 1):
        if at + 2 > len(head):
            break
        if protocol not in (_HOP_BY_HOP, _ROUTING, _DESTINATION):
            return (NO_TRANSPORT, network) if protocol == _FRAGMENT else (protocol, at)
        protocol, at = head[at], at + head[at + 1] * 8 + 8
    return NO_TRANSPORT, network
