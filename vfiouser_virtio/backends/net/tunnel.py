"""Segmentation of what is in a UDP tunnel (VXLAN, GENEVE, …), in software: the inner packet is cut, the outer repeated.

::

    Ethernet │ IP │ UDP │ tunnel's header, Ethernet │ IP │ TCP │ payload
              outer ▲ outer_th_offset   inner_nh_offset ▲    ▲ csum_start

What is between the outer UDP header and the inner IP header is not looked at, so any tunnel will do. The same as Linux
does in ``__skb_udp_tunnel_segment`` (virtio 1.4, 5.1.9.2).
"""

from collections.abc import Iterator
from typing import NamedTuple

from vfiouser_virtio.backends.net import segmentation
from vfiouser_virtio.backends.net.frame import Frame, Offload
from vfiouser_virtio.backends.net.headers import IPV4, UDP, Headers, find_headers, find_ip_headers
from vfiouser_virtio.backends.net.segmentation import (
    U16,
    UDP_CHECK,
    UDP_HLEN,
    BadOffload,
    CutPlan,
    ones_complement_sum,
    pseudo_sum,
)
from vfiouser_virtio.protocols.virtio.net import GSO_UDP_TUNNEL, HdrFlags

_DATA_VALID, _UDP_TUNNEL_CSUM = int(HdrFlags.DATA_VALID), int(HdrFlags.UDP_TUNNEL_CSUM)


class TunnelPlan(NamedTuple):
    """Plan of how a packet in a tunnel is cut."""

    inner: CutPlan
    outer: Headers
    checksum: bool
    """The outer UDP checksum is to be completed; else it is none, or that of each segment already."""


def plan(head: bytes, length: int, offload: Offload) -> TunnelPlan:
    """How to cut a frame of ``length`` bytes that begins with ``head``. Raises BadOffload.

    Of UDP_TUNNEL_IPV4 and UDP_TUNNEL_IPV6 one is set, but which of them says nothing: it is of the inner IP header by
    the specification, of the outer one by Linux. What is in the frame counts.
    """
    bits = offload.gso_type & GSO_UDP_TUNNEL
    if bits == GSO_UDP_TUNNEL:
        raise BadOffload(f"gso_type {offload.gso_type:#x} has both UDP_TUNNEL_IPV4 and UDP_TUNNEL_IPV6")
    if offload.flags & _DATA_VALID:
        raise BadOffload(f"flags {offload.flags:#x} have DATA_VALID, with a packet of a tunnel to be cut")
    outer = find_headers(head)
    if outer.protocol != UDP:
        raise BadOffload(f"gso_type {offload.gso_type:#x} of a UDP tunnel, but no whole UDP header in the frame")
    if offload.outer_th_offset != outer.transport:
        raise BadOffload(
            f"outer_th_offset {offload.outer_th_offset:#x}, but the outer UDP header is at {outer.transport:#x}"
        )
    inner = offload.inner_nh_offset
    if inner < outer.transport + UDP_HLEN:
        raise BadOffload(
            f"inner_nh_offset {inner:#x} is before the end of the outer UDP header at {outer.transport:#x}"
        )
    plain = offload._replace(flags=offload.flags & ~_UDP_TUNNEL_CSUM, gso_type=offload.gso_type ^ bits)
    headers = find_ip_headers(head, inner)
    if not headers.ethertype:
        raise BadOffload(f"no IP header at inner_nh_offset {inner:#x}")
    within = segmentation.plan(head, length, plain, headers)
    if length > outer.network + 0xFFFF:
        longest = within.payload + min(within.size, length - within.payload)
        segmentation.check_longest(outer.ethertype, outer.network, longest)
    return TunnelPlan(within, outer, bool(offload.flags & _UDP_TUNNEL_CSUM))


def cut(data: bytes, tunnel: TunnelPlan, partial: bool) -> Iterator[Frame]:
    """Segments as of `segmentation.cut`; with ``partial`` their inner checksums are left to do, the outer never."""
    inner, (ethertype, network, _, transport), checksum = tunnel
    inner_at = inner.transport
    inner_check = inner_at + inner.offload.csum_offset
    outer_check = transport + UDP_CHECK
    identification = network_sum = pseudo = 0
    if ethertype == IPV4:
        identification = U16.unpack_from(data, network + 4)[0]
        header = bytearray(data[network:transport])
        header[2:6] = bytes(4)
        header[10:12] = bytes(2)
        network_sum = ones_complement_sum(header)
    if checksum:
        pseudo = pseudo_sum(data, ethertype, network, transport, outer_check)

    for frame in segmentation.cut(data, inner, partial=True):
        first, payload = frame.segments
        if ethertype == IPV4:
            total = frame.length - network
            U16.pack_into(first, network + 2, total)
            U16.pack_into(first, network + 4, identification)
            U16.pack_into(first, network + 10, (0xFFFF - (network_sum + total + identification) % 0xFFFF) % 0xFFFF)
            identification = (identification + 1) & 0xFFFF
        else:
            U16.pack_into(first, network + 4, frame.length - network - 40)
        length = frame.length - transport
        U16.pack_into(first, transport + 4, length)
        if checksum:
            # What the inner checksum covers sums up to the complement of its pseudo header once it is complete, so the
            # payload is not looked at ("local checksum offload", Documentation/networking/checksum-offloads.rst).
            U16.pack_into(first, outer_check, 0)
            covered = 0xFFFF - U16.unpack_from(first, inner_check)[0]
            if inner_at - transport & 1:  # at an odd place its bytes are the other halves of the words
                covered <<= 8
            total = pseudo + length + ones_complement_sum(first[transport:inner_at]) + covered
            U16.pack_into(first, outer_check, 0xFFFF - total % 0xFFFF)
        if not partial:
            total = ones_complement_sum(first[inner_at:]) + ones_complement_sum(payload)
            U16.pack_into(first, inner_check, 0xFFFF - total % 0xFFFF)
            frame.offload = None
        yield frame
