"""Watch of what the headers of packets say of their frames: checksums, lengths, tunnels (virtio 1.4, 5.1.9.2.1).

::

    Ethernet │ IP │ TCP or UDP │ …                            the checksum field has the sum of the pseudo header,
                  ▲ csum_start                                which needs no look at the payload
    Ethernet │ IP │ UDP │ tunnel's header … IP │ TCP │ …      what is before csum_start is complete
                                                ▲ csum_start

A frame is judged as far as `find_headers` knows its protocols, and not where an option or extension header may say
another final destination than the IP header does. A program of the guest may have made the packet, header and all
(AF_PACKET with PACKET_VNET_HDR): that cannot be told from the driver's.
"""

from vfiouser_virtio.audit.chains import SeenChain
from vfiouser_virtio.audit.rule import must, should
from vfiouser_virtio.audit.types.base import RequestWatch
from vfiouser_virtio.backends.net import tunnel
from vfiouser_virtio.backends.net.frame import Offload, frame_of
from vfiouser_virtio.backends.net.headers import (
    HEAD,
    IPV4,
    NO_TRANSPORT,
    TCP,
    UDP,
    Headers,
    find_headers,
    find_ip_headers,
)
from vfiouser_virtio.backends.net.netdev import MAX_FRAME
from vfiouser_virtio.backends.net.offload import BadOffload, complete
from vfiouser_virtio.backends.net.segmentation import (
    U16,
    UDP_CHECK,
    UDP_HLEN,
    check_csum,
    ones_complement_sum,
    pseudo_sum,
)
from vfiouser_virtio.protocols.virtio.net import GSO_UDP_TUNNEL, GsoType, HdrFlags, NetFeature

_SEND = "5.1.9.2.1 Packet Transmission"

START = must(
    "net/csum-start",
    _SEND,
    "With NEEDS_CSUM, csum_start and csum_offset are those of the checksum that is to be completed.",
    "where the frame has a TCP or UDP header, with a bit of UDP tunnels the inner one; that both lie within the frame",
)
PSEUDO = must(
    "net/csum-pseudo",
    _SEND,
    "With NEEDS_CSUM, the checksum field has the sum of the TCP or UDP pseudo header.",
    "the field, and the IP header, where it has no options or extension headers",
)
BEFORE = must(
    "net/csum-before",
    _SEND,
    "With NEEDS_CSUM, checksums before csum_start are valid.",
    "packets without gso_type, of UDP or TCP, with csum_start behind that header: its checksum once the other is "
    "complete; a frame that ends with its packet",
)
HDR_LEN = must(
    "net/hdr-len",
    _SEND,
    "With GUEST_HDRLEN, hdr_len of a packet with a gso_type is the length of its headers, with the transport's.",
    "hdr_len, and the TCP or UDP header, with a bit of UDP tunnels the inner one; of devices of your own, for ours do "
    "not offer GUEST_HDRLEN",
)
ECN = must(
    "net/gso-ecn",
    _SEND,
    "With HOST_ECN, gso_type of a TCP packet to be cut that has the ECN bit has ECN.",
    "CWR in the TCP header of each such packet",
)
ECN_NEGOTIATED = should(
    "net/gso-ecn-negotiated",
    _SEND,
    "A TCP packet to be cut has the ECN bit only where HOST_ECN was negotiated.",
    "CWR in the TCP header of each such packet",
)
OFFSETS = must(
    "net/tunnel-offsets",
    _SEND,
    "With a bit of UDP tunnels, outer_th_offset and inner_nh_offset are those of outer UDP header and inner IP header.",
    "where the frame has them",
)
INNER = must(
    "net/tunnel-inner",
    _SEND,
    "The bit of UDP tunnels is that of the inner IP header.",
    "the version of what is at inner_nh_offset",
)
OUTER = must(
    "net/tunnel-outer-csum",
    _SEND,
    "The outer UDP checksum is 0 or that of each segment, with UDP_TUNNEL_CSUM that of the pseudo header.",
    "the field; of segments the first one, and that the last one is as long",
)

_CHECK = {TCP: 16, UDP: UDP_CHECK}
"""Where a transport's header has its checksum."""
_LEAST = {TCP: 20, UDP: UDP_HLEN}
_CWR = 0x80
# Of an inner header that is looked for: IPv6 with some extension headers, and TCP.
_INNER_ROOM = 160


class FrameWatch(RequestWatch):
    """Watch of frames with NEEDS_CSUM, and so of all that are to be cut."""

    def packet(self, where: str, chain: SeenChain, size: int, offload: Offload) -> None:
        """The driver sends the frame that is behind ``size`` bytes of the chain, with this header."""
        if not offload.flags & HdrFlags.NEEDS_CSUM:
            return
        length = chain.out_length - size
        head = chain.peek(size + HEAD)[size:]
        if len(head) < min(length, HEAD):
            return  # in memory that cannot be looked at now
        try:
            check_csum(length, offload)
        except BadOffload as error:
            self.broke(START, f"{where}: {error}")
            return
        outer = headers = find_headers(head)
        bits = offload.gso_type & GSO_UDP_TUNNEL
        kind = offload.gso_type & ~GsoType.ECN & ~bits
        if bits:
            if bits == GSO_UDP_TUNNEL or not kind:
                return
            found = self._inner(where, head, length, offload, outer)
            if found is None:
                return
            headers = found
            self._check_outer(where, head, chain, size, offload, outer)
        if not self._check_start(where, offload, headers, alone=bool(kind)):
            if not kind and headers.protocol in _CHECK and offload.csum_start >= _end(headers):
                self._check_before(where, chain, size, offload, headers)
            return
        at = headers.transport + offload.csum_offset
        there = U16.unpack_from(head, at)[0] if at + 2 <= len(head) else None
        if there is not None and not _is_pseudo(head, headers, length, there):
            self.broke(PSEUDO, f"{where}: the checksum field at {at:#x} has {there:#x}")
        if kind:
            self._check_cut(where, head, offload, headers)

    # ---- checksums -----------------------------------------------------------------------------------------------

    def _check_start(self, where: str, offload: Offload, headers: Headers, *, alone: bool) -> bool:
        """Whether csum_start is that of a TCP or UDP header; ``alone``: it cannot be that of another one behind."""
        start, offset = offload.csum_start, offload.csum_offset
        protocol, at = headers.protocol, headers.transport
        if protocol == NO_TRANSPORT:
            return False
        if start < at or (protocol in _CHECK and start != at and (alone or start < _end(headers))):
            self.broke(START, f"{where}: csum_start {start:#x}, and the transport's header is at {at:#x}")
            return False
        if start != at or protocol not in _CHECK:
            return False
        if offset != _CHECK[protocol]:
            self.broke(START, f"{where}: csum_offset {offset:#x} with protocol {protocol:#x} at csum_start")
            return False
        return True

    def _check_before(self, where: str, chain: SeenChain, size: int, offload: Offload, headers: Headers) -> None:
        """Of a packet in another one that is to be completed: the other one's checksum, which covers it."""
        data = chain.peek(size + MAX_FRAME)[size:]
        if len(data) == chain.out_length - size and _is_wrong(complete(frame_of(data), offload), headers):
            seen = f"checksum of protocol {headers.protocol:#x} at {headers.transport:#x} is wrong"
            self.broke(BEFORE, f"{where}: csum_start {offload.csum_start:#x}, and the {seen}")

    # ---- packets to be cut ---------------------------------------------------------------------------------------

    def _check_cut(self, where: str, head: bytes, offload: Offload, headers: Headers) -> None:
        """Of the TCP or UDP header of a packet that is to be cut."""
        at = headers.transport
        if headers.protocol == TCP and len(head) < _end(headers):
            return
        due = at + (UDP_HLEN if headers.protocol == UDP else (head[at + 12] >> 4) * 4)
        if self.accepted(NetFeature.GUEST_HDRLEN) and offload.hdr_len != due:
            self.broke(HDR_LEN, f"{where}: hdr_len {offload.hdr_len:#x}, and the headers have {due:#x} bytes")
        if headers.protocol == TCP and head[at + 13] & _CWR:
            seen = f"{where}: gso_type {offload.gso_type:#x} of a TCP packet with CWR"
            if not self.accepted(NetFeature.HOST_ECN):
                self.broke(ECN_NEGOTIATED, f"{seen}, without HOST_ECN")
            elif not offload.gso_type & GsoType.ECN:
                self.broke(ECN, seen)

    def _inner(self, where: str, head: bytes, length: int, offload: Offload, outer: Headers) -> Headers | None:
        """The inner headers of a packet in a UDP tunnel; None where they are not known, or not where it says."""
        if outer.protocol not in _CHECK:
            return None
        at, inner = offload.outer_th_offset, offload.inner_nh_offset
        if outer.protocol != UDP or at != outer.transport:
            what = "TCP" if outer.protocol == TCP else "UDP"
            self.broke(OFFSETS, f"{where}: outer_th_offset {at:#x}, and there is {what} at {outer.transport:#x}")
            return None
        if HEAD - _INNER_ROOM < inner < length and length > HEAD:
            return None
        headers = find_ip_headers(head, inner)
        if inner < _end(outer) or headers.protocol not in _CHECK:
            self.broke(OFFSETS, f"{where}: inner_nh_offset {inner:#x}, and there is no IP header with TCP or UDP")
            return None
        bit = GsoType.UDP_TUNNEL_IPV4 if headers.ethertype == IPV4 else GsoType.UDP_TUNNEL_IPV6
        if not offload.gso_type & bit:
            self.broke(INNER, f"{where}: gso_type {offload.gso_type:#x}, inner ethertype {headers.ethertype:#x}")
        return headers

    def _check_outer(
        self, where: str, head: bytes, chain: SeenChain, size: int, offload: Offload, outer: Headers
    ) -> None:
        """Of the outer UDP checksum of a packet that is to be cut."""
        length = chain.out_length - size
        there = U16.unpack_from(head, outer.transport + UDP_CHECK)[0]
        seen = f"{where}: the outer UDP checksum is {there:#x}"
        if offload.flags & HdrFlags.UDP_TUNNEL_CSUM:
            if not _is_pseudo(head, outer, length, there):
                self.broke(OUTER, f"{seen}, flags {offload.flags:#x}")
        elif there:
            data = chain.peek(size + MAX_FRAME)[size:]
            try:
                plan = tunnel.plan(head, length, offload)
            except BadOffload:
                return  # another rule is broken
            if len(data) < length:
                return
            first = next(tunnel.cut(data, plan, partial=False)).tobytes()
            if (length - plan.inner.payload) % plan.inner.size or _is_wrong(first, outer):
                self.broke(OUTER, f"{seen} without UDP_TUNNEL_CSUM, and not that of each segment")


def _end(headers: Headers) -> int:
    """Where the transport's header ends, without options."""
    return headers.transport + _LEAST[headers.protocol]


def _is_plain(headers: Headers) -> bool:
    """Whether the addresses of the pseudo header are certain: those of the IP header."""
    return headers.transport - headers.network == (20 if headers.ethertype == IPV4 else 40)


def _ip_end(head: bytes, headers: Headers) -> int:
    """Where the packet ends by its IP header."""
    at = headers.network
    if headers.ethertype == IPV4:
        return at + int(U16.unpack_from(head, at + 2)[0])
    return at + 40 + int(U16.unpack_from(head, at + 4)[0])


def _is_pseudo(head: bytes, headers: Headers, length: int, there: int) -> bool:
    """Whether the sum of the pseudo header is ``there``, or is not known; its length is that of the packet or frame."""
    if not _is_plain(headers):
        return True
    at = headers.transport + _CHECK[headers.protocol]
    pseudo = pseudo_sum(head, headers.ethertype, headers.network, headers.transport, at)
    ends = (length, _ip_end(head, headers))
    return any((pseudo + end - headers.transport - there) % 0xFFFF == 0 for end in ends)


def _is_wrong(data: bytes | memoryview, headers: Headers) -> bool:
    """Whether the transport's checksum of a frame is certainly not that of its bytes."""
    data = bytes(data)
    at = headers.transport
    if not _is_plain(headers) or _ip_end(data, headers) != len(data) or len(data) < _end(headers):
        return False
    if headers.protocol == UDP:
        length, there = (U16.unpack_from(data, at + place)[0] for place in (4, UDP_CHECK))
        if not there or length != len(data) - at:
            return False
    pseudo = pseudo_sum(data, headers.ethertype, headers.network, at, at + _CHECK[headers.protocol])
    return (pseudo + len(data) - at + ones_complement_sum(data[at:])) % 0xFFFF != 0
