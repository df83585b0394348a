"""Requests of network devices beside those of the declaration: packets and commands that are nearly right.

The declaration's have random bytes behind their headers, with which no checksum, no segment and no hash key is ever
got to. These have real headers of IPv4, IPv6, TCP, UDP and VXLAN, and whole tables and keys, in all of which one
number or another lies. Packets come with each of the three lengths of header: which one is right depends on the
features.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from construct import Bytes, Int8ul, Int16ul, Int32ul, Struct

from vfiouser_virtio.protocols.virtio.device_type import RequestShape
from vfiouser_virtio.protocols.virtio.net import (
    CTRL_HDR,
    HASH_CONFIG,
    HDR,
    HDR_HASH,
    HDR_TUNNEL,
    MQ_PAIRS,
    OFFLOADS,
    RSS_CONFIG,
    RSS_CONFIG_TAIL,
    CtrlClass,
    CtrlGuestOffloads,
    CtrlMac,
    CtrlMq,
    CtrlStats,
    GsoType,
)

_KEY = 40  # bytes of a hash key
_CONTROLQS, _TRANSMITQS = (4, 4, 2), (1, 3)


def _big(value: int, size: int = 2) -> int:
    """The number whose little-endian bytes are those of ``value`` in the order of the network."""
    return int.from_bytes(value.to_bytes(size, "big"), "little")


# ---- packets -------------------------------------------------------------------------------------------------------

_ETHERNET = ("destination" / Bytes(6), "source" / Bytes(6), "ethertype" / Int16ul)
_IPV4 = (
    "version_ihl" / Int8ul,
    "tos" / Int8ul,
    "total_length" / Int16ul,
    "ipv4_id" / Int16ul,
    "fragment" / Int16ul,
    "ttl" / Int8ul,
    "protocol" / Int8ul,
    "ipv4_checksum" / Int16ul,
    "addresses" / Bytes(8),
)
_IPV6 = (
    "version_class" / Int32ul,
    "payload_length" / Int16ul,
    "next_header" / Int8ul,
    "hop_limit" / Int8ul,
    "addresses" / Bytes(32),
)
_TCP = (
    "ports" / Bytes(4),
    "sequence" / Bytes(8),
    "data_offset" / Int8ul,
    "tcp_flags" / Int8ul,
    "window" / Int16ul,
    "checksum" / Int16ul,
    "urgent" / Int16ul,
)
_UDP = ("ports" / Bytes(4), "udp_length" / Int16ul, "checksum" / Int16ul)
_TUNNEL = (
    "outer_ports" / Bytes(4),
    "outer_length" / Int16ul,
    "outer_checksum" / Int16ul,
    "vxlan" / Bytes(8),
    "inner_addresses" / Bytes(12),
    "inner_ethertype" / Int16ul,
    "inner_version_ihl" / Int8ul,
    "inner_tos" / Int8ul,
    "inner_total_length" / Int16ul,
    "inner_ipv4" / Bytes(5),
    "inner_protocol" / Int8ul,
    "inner_checksum_addresses" / Bytes(10),
)

# The first of each is right, most times.
_USUAL: Mapping[str, Sequence[int]] = {
    "flags": (1, 0, 1, 1, 1, 2, 3, 8, 9),
    "gso_size": (536, 1000, 1448, 1, 0, 9000),
    "num_buffers": (0, 1),
    "destination": ((1 << 48) - 1, 2, 1),
    "source": (2, 0x0100_0000_0002),
    "version_ihl": (0x45, 0x45, 0x45, 0x46, 0x4F, 0x44),
    "total_length": tuple(map(_big, (1500, 40, 0, 0xFFFF))),
    "fragment": (0, 0, 0, _big(0x2000), _big(1)),
    "version_class": (0x60,),
    "payload_length": tuple(map(_big, (1480, 20, 0, 0xFFFF))),
    "next_header": (6, 6, 17, 0, 44, 60),
    "data_offset": (0x50, 0x50, 0x80, 0xF0, 0x40, 0),
    "tcp_flags": (0x10, 0x18, 0x11, 0x80, 0x82),
    "udp_length": tuple(map(_big, (8, 1480, 0, 0xFFFF))),
    "outer_length": tuple(map(_big, (8, 1480, 0, 0xFFFF))),
    "outer_checksum": (0, 0, 1),
    "vxlan": (8, 0),
    "inner_ethertype": (_big(0x0800), _big(0x0800), _big(0x86DD)),
    "inner_version_ihl": (0x45, 0x45, 0x46, 0x60),
    "inner_protocol": (6, 6, 17),
    "outer_th_offset": (34, 34, 0, 0xFFFF),
    "inner_nh_offset": (64, 64, 0, 34, 0xFFFF),
}
_PAYLOADS = (0, 1, 100, 1000, 1448, 3000, 9000, 20000)


def _packets(*fields: Any, **usual: Sequence[int]) -> list[RequestShape]:
    packet = Struct(*_ETHERNET, *fields)
    return [
        RequestShape(
            queues=_TRANSMITQS,
            header=header,
            entry=packet,
            counts=(1,),
            payload=_PAYLOADS,
            usual={**_USUAL, **usual},
            weight=weight,
        )
        for header, weight in ((HDR, 1), (HDR_HASH, 1), (HDR_TUNNEL, 4))  # as most cases have it
    ]


_PACKETS = [
    *_packets(
        *_IPV4,
        *_TCP,
        ethertype=(_big(0x0800),),
        protocol=(6, 6, 6, 17),
        gso_type=(GsoType.TCPV4, GsoType.TCPV4, 0, GsoType.TCPV4 | GsoType.ECN, GsoType.TCPV6, GsoType.UDP),
        hdr_len=(54, 66, 0, 0xFFFF),
        csum_start=(34, 34, 34, 54, 0, 0xFFFF),
        csum_offset=(16, 16, 6, 0xFFFF),
    ),
    *_packets(
        *_IPV4,
        *_UDP,
        ethertype=(_big(0x0800),),
        protocol=(17, 17, 6),
        gso_type=(GsoType.UDP_L4, GsoType.UDP_L4, 0, GsoType.UDP, GsoType.TCPV4),
        hdr_len=(42, 0, 0xFFFF),
        csum_start=(34, 34, 42, 0, 0xFFFF),
        csum_offset=(6, 6, 16, 0xFFFF),
    ),
    *_packets(
        *_IPV6,
        *_TCP,
        ethertype=(_big(0x86DD),),
        gso_type=(GsoType.TCPV6, GsoType.TCPV6, 0, GsoType.TCPV6 | GsoType.ECN, GsoType.TCPV4),
        hdr_len=(74, 0, 0xFFFF),
        csum_start=(54, 54, 54, 34, 0xFFFF),
        csum_offset=(16, 16, 6),
    ),
    *_packets(
        *_IPV4,
        *_TUNNEL,
        *_TCP,
        ethertype=(_big(0x0800),),
        protocol=(17,),
        gso_type=(
            GsoType.UDP_TUNNEL_IPV4 | GsoType.TCPV4,
            GsoType.UDP_TUNNEL_IPV4 | GsoType.TCPV4,
            GsoType.UDP_TUNNEL_IPV6 | GsoType.TCPV6,
            GsoType.UDP_TUNNEL_IPV4 | GsoType.UDP_TUNNEL_IPV6 | GsoType.TCPV4,
            GsoType.UDP_TUNNEL_IPV4,
        ),
        hdr_len=(104, 0, 0xFFFF),
        csum_start=(84, 84, 84, 34, 0xFFFF),
        csum_offset=(16, 16, 6),
    ),
    # VLAN tags: what is filtered, and headers that are four bytes later.
    *_packets(
        "tag" / Int16ul,
        "inner_type" / Int16ul,
        *_IPV4,
        ethertype=(_big(0x8100),),
        tag=tuple(map(_big, (0, 1, 4095, 0xE001))),
        inner_type=(_big(0x0800), _big(0x8100)),
        gso_type=(0, 0, GsoType.TCPV4),
        csum_start=(38, 34),
    ),
]

# ---- commands ------------------------------------------------------------------------------------------------------


def _command(kind: CtrlClass, command: int, *fields: Any, **usual: Sequence[int]) -> RequestShape:
    return RequestShape(
        queues=_CONTROLQS,
        header=CTRL_HDR,
        usual={"class": (kind,), "cmd": (command,), **usual},
        entry=Struct(*fields),
        counts=(1,),
        writable=(1, 1, 1, 1, 0, 9),
        weight=4,
    )


def _rss(entries: int) -> RequestShape:
    return _command(
        CtrlClass.MQ,
        CtrlMq.RSS_CONFIG,
        *RSS_CONFIG.subcons,
        *(f"table{at}" / Int16ul for at in range(entries)),
        *RSS_CONFIG_TAIL.subcons,
        "hash_key" / Bytes(_KEY),
        hash_types=(0x3F, 0, 0x1, 0x1FF, 0x200, 0xFFFF_FFFF),
        indirection_table_mask=(entries - 1, entries - 1, entries - 1, entries, 2, 127, 0xFFFF),
        unclassified_queue=(0, 1, 1, 2, 0x8000),
        max_tx_vq=(2, 2, 1, 0, 3),
        hash_key_length=(_KEY, _KEY, _KEY, 0, 1, _KEY + 1, 0xFF),
        **{f"table{at}": (0, 1, 0, 1, 0, 1, 2) for at in range(entries)},
    )


_COMMANDS = [
    _command(
        CtrlClass.MAC,
        CtrlMac.TABLE_SET,
        "unicast" / Int32ul,
        "unicast_mac" / Bytes(6),
        "multicast" / Int32ul,
        "multicast_mac" / Bytes(6),
        unicast=(1, 1, 1, 0, 2, 0xFFFF_FFFF),
        unicast_mac=(2, 2, 1, 0),
        multicast=(1, 1, 1, 0, 2, 0x2AAA_AAAB),
        multicast_mac=(1, 1, (1 << 48) - 1, 2),
    ),
    _command(CtrlClass.MAC, CtrlMac.ADDR_SET, "mac" / Bytes(6), mac=(2, 2, 1, 0, (1 << 48) - 1)),
    _command(CtrlClass.MQ, CtrlMq.VQ_PAIRS_SET, *MQ_PAIRS.subcons, virtqueue_pairs=(2, 1, 0, 3, 0x8000)),
    _command(
        CtrlClass.GUEST_OFFLOADS,
        CtrlGuestOffloads.SET,
        *OFFLOADS.subcons,
        offloads=(0, 1 << 1, 1 << 1 | 1 << 7, 1 << 7),
    ),
    *map(_rss, (1, 2, 4)),
    _command(
        CtrlClass.MQ,
        CtrlMq.HASH_CONFIG,
        *HASH_CONFIG.subcons,
        "hash_key" / Bytes(_KEY),
        hash_types=(0x3F, 0, 0x1FF, 0x200),
        hash_key_length=(_KEY, _KEY, _KEY, 0, _KEY + 1, 0xFF),
    ),
    RequestShape(
        queues=_CONTROLQS,
        header=CTRL_HDR,
        usual={"class": (CtrlClass.STATS,), "cmd": (CtrlStats.QUERY,)},
        writable=(9, 9, 1, 8, 0),
    ),
]

NET_REQUESTS = (*_PACKETS, *_COMMANDS)
"""Shapes of requests, for a target."""
