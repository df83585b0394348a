"""Network device (virtio 1.4, 5.1): configuration, packet header, control commands; names of linux/virtio_net.h.

A long file, since the chapter is: it is one table after another, in the order of the chapter, with little between them.
What is from "flow filter" on (5.1.9.6) is a matter of administration commands, and not here.
"""

import struct
from enum import IntEnum, IntFlag
from typing import Any

from construct import Bytes, Int8ul, Int16ul, Int32ul, Int64ul, Struct

from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.record import record
from vfiouser_virtio.protocols.virtio.device_type import DeviceType, Exercise, QueueSets, RequestShape, no_complaint
from vfiouser_virtio.protocols.virtio.features import FeatureBit
from vfiouser_virtio.protocols.virtio.ids import DeviceId

DEVICE_ID = DeviceId.NET

ETH_ALEN = 6
"""Bytes of a MAC address."""
ETH_HLEN = 14
"""Bytes of an Ethernet header without a VLAN tag, which `Config`'s ``mtu`` does not count."""
MIN_MTU, MAX_MTU = 68, 65535
"""Values that ``mtu`` may have (5.1.4.1)."""
MIN_RSS_KEY, MIN_RSS_TABLE = 40, 128
"""The least that ``rss_max_key_size`` and ``rss_max_indirection_table_length`` may be (5.1.4.1)."""


class NetFeature(FeatureBit):
    """Feature bits, by number (5.1.3): ``VIRTIO_NET_F_*``."""

    CSUM = 0
    GUEST_CSUM = 1
    CTRL_GUEST_OFFLOADS = 2
    MTU = 3
    MAC = 5
    GUEST_TSO4 = 7
    GUEST_TSO6 = 8
    GUEST_ECN = 9
    GUEST_UFO = 10
    HOST_TSO4 = 11
    HOST_TSO6 = 12
    HOST_ECN = 13
    HOST_UFO = 14
    MRG_RXBUF = 15
    STATUS = 16
    CTRL_VQ = 17
    CTRL_RX = 18
    CTRL_VLAN = 19
    CTRL_RX_EXTRA = 20
    GUEST_ANNOUNCE = 21
    MQ = 22
    CTRL_MAC_ADDR = 23
    DEVICE_STATS = 50
    HASH_TUNNEL = 51
    VQ_NOTF_COAL = 52
    NOTF_COAL = 53
    GUEST_USO4 = 54
    GUEST_USO6 = 55
    HOST_USO = 56
    HASH_REPORT = 57
    GUEST_HDRLEN = 59
    RSS = 60
    RSC_EXT = 61
    STANDBY = 62
    SPEED_DUPLEX = 63
    RSS_CONTEXT = 64
    GUEST_UDP_TUNNEL_GSO = 65
    GUEST_UDP_TUNNEL_GSO_CSUM = 66
    HOST_UDP_TUNNEL_GSO = 67
    HOST_UDP_TUNNEL_GSO_CSUM = 68
    OUT_NET_HEADER = 69
    IPSEC = 70


class Status(IntFlag):
    """``status`` (5.1.4): ``VIRTIO_NET_S_*``."""

    LINK_UP = 1
    ANNOUNCE = 2


class Duplex(IntEnum):
    """``duplex``, as it is in use: 5.1.4.1 says it the other way round than the text before it, and than Linux."""

    HALF = 0
    FULL = 1
    UNKNOWN = 0xFF


SPEED_UNKNOWN = 0xFFFF_FFFF
"""``speed`` that is not known; else it is in Mbit/s, up to 0x7fffffff."""

# struct virtio_net_config (5.1.4).
CONFIG = Struct(
    "mac" / Bytes(ETH_ALEN),
    "status" / Int16ul,
    "max_virtqueue_pairs" / Int16ul,
    "mtu" / Int16ul,
    "speed" / Int32ul,
    "duplex" / Int8ul,
    "rss_max_key_size" / Int8ul,
    "rss_max_indirection_table_length" / Int16ul,
    "supported_hash_types" / Int32ul,
    "supported_tunnel_types" / Int32ul,
)
Config = record(CONFIG)


# ---- packet header (5.1.9) -------------------------------------------------------------------------------------------


class HdrFlags(IntFlag):
    """``flags`` of a packet's header: ``VIRTIO_NET_HDR_F_*``."""

    NEEDS_CSUM = 1
    DATA_VALID = 2
    RSC_INFO = 4
    UDP_TUNNEL_CSUM = 8
    SECURITY = 16
    SECURITY_ERR = 32
    SECURITY_SA_SOFT_EXPIRY_WARN = 64


class GsoType(IntEnum):
    """``gso_type`` of a packet's header: ``VIRTIO_NET_HDR_GSO_*``; those from 0x20 on are bits beside the others."""

    NONE = 0
    TCPV4 = 1
    UDP = 3
    TCPV6 = 4
    UDP_L4 = 5
    UDP_TUNNEL_IPV4 = 0x20
    UDP_TUNNEL_IPV6 = 0x40
    ECN = 0x80


GSO_UDP_TUNNEL = GsoType.UDP_TUNNEL_IPV4 | GsoType.UDP_TUNNEL_IPV6

_HDR_FIELDS = (
    "flags" / Int8ul,
    "gso_type" / Int8ul,
    "hdr_len" / Int16ul,
    "gso_size" / Int16ul,
    "csum_start" / Int16ul,
    "csum_offset" / Int16ul,
    "num_buffers" / Int16ul,
)
_HASH_FIELDS = ("hash_value" / Int32ul, "hash_report" / Int16ul, "padding_reserved" / Int16ul)
_TUNNEL_FIELDS = ("outer_th_offset" / Int16ul, "inner_nh_offset" / Int16ul)

# struct virtio_net_hdr in its three lengths: 12 bytes (Linux's virtio_net_hdr_v1), 20 with HASH_REPORT
# (virtio_net_hdr_v1_hash), 24 with one of the UDP_TUNNEL_GSO (virtio_net_hdr_v1_hash_tunnel).
HDR = Struct(*_HDR_FIELDS)
HDR_HASH = Struct(*_HDR_FIELDS, *_HASH_FIELDS)
HDR_TUNNEL = Struct(*_HDR_FIELDS, *_HASH_FIELDS, *_TUNNEL_FIELDS)
HDR_CODEC, HDR_HASH_CODEC, HDR_TUNNEL_CODEC = codec(HDR), codec(HDR_HASH), codec(HDR_TUNNEL)


def hdr_codec(features: int) -> struct.Struct:
    """Codec of the header of every packet, in both directions, with these accepted feature bits."""
    if features & (NetFeature.GUEST_UDP_TUNNEL_GSO.mask | NetFeature.HOST_UDP_TUNNEL_GSO.mask):
        return HDR_TUNNEL_CODEC
    return HDR_HASH_CODEC if features & NetFeature.HASH_REPORT.mask else HDR_CODEC


def hdr_size(features: int) -> int:
    """Its length in bytes."""
    return hdr_codec(features).size


class HashType(IntFlag):
    """``hash_types`` and ``supported_hash_types`` (5.1.9.4.3): ``VIRTIO_NET_HASH_TYPE_*``, Linux's RSS_HASH_TYPE."""

    IPv4 = 1 << 0
    TCPv4 = 1 << 1
    UDPv4 = 1 << 2
    IPv6 = 1 << 3
    TCPv6 = 1 << 4
    UDPv6 = 1 << 5
    IP_EX = 1 << 6
    TCP_EX = 1 << 7
    UDP_EX = 1 << 8


class HashReport(IntEnum):
    """``hash_report`` (5.1.9.4.5): ``VIRTIO_NET_HASH_REPORT_*``."""

    NONE = 0
    IPv4 = 1
    TCPv4 = 2
    UDPv4 = 3
    IPv6 = 4
    TCPv6 = 5
    UDPv6 = 6
    IPv6_EX = 7
    TCPv6_EX = 8
    UDPv6_EX = 9


class HashTunnelType(IntFlag):
    """``supported_tunnel_types``, ``enabled_tunnel_types`` (5.1.9.4.4): ``VIRTIO_NET_HASH_TUNNEL_TYPE_*``."""

    GRE_2784 = 1 << 0
    GRE_2890 = 1 << 1
    GRE_7676 = 1 << 2
    GRE_UDP = 1 << 3
    VXLAN = 1 << 4
    VXLAN_GPE = 1 << 5
    GENEVE = 1 << 6
    IPIP = 1 << 7
    NVGRE = 1 << 8


# ---- control queue (5.1.9.5) -----------------------------------------------------------------------------------------


class Ack(IntEnum):
    """``ack``: the first byte that a device writes: ``VIRTIO_NET_OK``, ``VIRTIO_NET_ERR``."""

    OK = 0
    ERR = 1


class CtrlClass(IntEnum):
    """``class``: ``VIRTIO_NET_CTRL_*``."""

    RX = 0
    MAC = 1
    VLAN = 2
    ANNOUNCE = 3
    MQ = 4
    GUEST_OFFLOADS = 5
    NOTF_COAL = 6
    HASH_TUNNEL = 7
    STATS = 8
    RSS_CTX = 9


class CtrlRx(IntEnum):
    """``command`` of class RX: ``VIRTIO_NET_CTRL_RX_*``; the data is one byte, 0 or 1."""

    PROMISC = 0
    ALLMULTI = 1
    ALLUNI = 2
    NOMULTI = 3
    NOUNI = 4
    NOBCAST = 5


class CtrlMac(IntEnum):
    """``command`` of class MAC: ``VIRTIO_NET_CTRL_MAC_*``."""

    TABLE_SET = 0
    """Two times a `MAC_TABLE` and its addresses: unicast, multicast."""
    ADDR_SET = 1
    """The data is an address."""


class CtrlVlan(IntEnum):
    """``command`` of class VLAN: ``VIRTIO_NET_CTRL_VLAN_*``; the data is a `VLAN_ID`."""

    ADD = 0
    DEL = 1


class CtrlAnnounce(IntEnum):
    """``command`` of class ANNOUNCE: ``VIRTIO_NET_CTRL_ANNOUNCE_*``; no data."""

    ACK = 0


class CtrlMq(IntEnum):
    """``command`` of class MQ: ``VIRTIO_NET_CTRL_MQ_*``."""

    VQ_PAIRS_SET = 0
    RSS_CONFIG = 1
    HASH_CONFIG = 2


class CtrlGuestOffloads(IntEnum):
    """``command`` of class GUEST_OFFLOADS: ``VIRTIO_NET_CTRL_GUEST_OFFLOADS_*``; the data are `OFFLOADS`."""

    SET = 0


class CtrlNotfCoal(IntEnum):
    """``command`` of class NOTF_COAL: ``VIRTIO_NET_CTRL_NOTF_COAL_*``."""

    TX_SET = 0
    RX_SET = 1
    VQ_SET = 2
    VQ_GET = 3


class CtrlHashTunnel(IntEnum):
    """``command`` of class HASH_TUNNEL: ``VIRTIO_NET_CTRL_HASH_TUNNEL_*``."""

    SET = 0


class CtrlStats(IntEnum):
    """``command`` of class STATS: ``VIRTIO_NET_CTRL_STATS_*``."""

    QUERY = 0
    GET = 1


# What every command begins with: struct virtio_net_ctrl_hdr. The specification's fields are "class" and "command".
CTRL_HDR = Struct("class" / Int8ul, "cmd" / Int8ul)
CTRL_HDR_CODEC = codec(CTRL_HDR)

# struct virtio_net_ctrl_mac: so many addresses of 6 bytes follow.
MAC_TABLE = Struct("entries" / Int32ul)
VLAN_ID = Struct("vlan" / Int16ul)

VQ_PAIRS_MIN, VQ_PAIRS_MAX = 1, 0x8000
# struct virtio_net_ctrl_mq.
MQ_PAIRS = Struct("virtqueue_pairs" / Int16ul)

# struct virtio_net_rss_config: RSS_CONFIG, (indirection_table_mask + 1) times RSS_QUEUE, RSS_CONFIG_TAIL, the key.
RSS_CONFIG = Struct("hash_types" / Int32ul, "indirection_table_mask" / Int16ul, "unclassified_queue" / Int16ul)
RSS_QUEUE = Struct("queue" / Int16ul)
"""Bits 1 to 16 of a receive queue's index: 0 for receiveq1, 1 for receiveq2."""
RSS_CONFIG_TAIL = Struct("max_tx_vq" / Int16ul, "hash_key_length" / Int8ul)
# struct virtio_net_hash_config; the key follows.
HASH_CONFIG = Struct("hash_types" / Int32ul, "reserved" / Bytes(8), "hash_key_length" / Int8ul)

# struct virtnet_hash_tunnel.
HASH_TUNNEL = Struct("enabled_tunnel_types" / Int32ul)

OFFLOADS = Struct("offloads" / Int64ul)
OFFLOAD_BITS: dict[NetFeature, int] = {
    NetFeature.GUEST_CSUM: 1,
    NetFeature.GUEST_TSO4: 7,
    NetFeature.GUEST_TSO6: 8,
    NetFeature.GUEST_ECN: 9,
    NetFeature.GUEST_UFO: 10,
    NetFeature.GUEST_UDP_TUNNEL_GSO: 46,
    NetFeature.GUEST_UDP_TUNNEL_GSO_CSUM: 47,
    NetFeature.GUEST_USO4: 54,
    NetFeature.GUEST_USO6: 55,
}
"""Bits of ``offloads`` (5.1.9.5.9.1), by the feature: the same number, but for those that 64 bits have no room for."""

# struct virtio_net_ctrl_coal, of TX_SET and RX_SET (Linux: virtio_net_ctrl_coal_tx, _rx); virtio_net_ctrl_coal_vq.
COAL = Struct("max_packets" / Int32ul, "max_usecs" / Int32ul)
COAL_VQ = Struct("vq_index" / Int16ul, "reserved" / Int16ul, "coal" / COAL)


# ---- device statistics (5.1.9.5.11) ----------------------------------------------------------------------------------


class StatsType(IntEnum):
    """Kinds of statistics: ``type`` of a reply, ``VIRTIO_NET_STATS_TYPE_REPLY_*``; bit numbers in bitmaps of them."""

    RX_BASIC = 0
    RX_CSUM = 1
    RX_GSO = 2
    RX_SPEED = 3
    TX_BASIC = 16
    TX_CSUM = 17
    TX_GSO = 18
    TX_SPEED = 19
    CVQ = 32


# struct virtio_net_stats_capabilities: the result of QUERY.
STATS_CAPABILITIES = Struct("supported_stats_types" / Int64ul)
# An entry of struct virtio_net_ctrl_queue_stats: the data of GET is an array of these.
QUEUE_STATS = Struct("vq_index" / Int16ul, "reserved" / Bytes(6), "types_bitmap" / Int64ul)
# struct virtio_net_stats_reply_hdr: what each statistic begins with; its ``size`` is included in ``size``.
STATS_REPLY_HDR = Struct(
    "type" / Int8ul, "reserved" / Int8ul, "vq_index" / Int16ul, "reserved1" / Int16ul, "size" / Int16ul
)

_STATS_FIELDS: dict[StatsType, tuple[str, ...]] = {
    StatsType.CVQ: ("command_num", "ok_num"),
    StatsType.RX_BASIC: (
        "rx_notifications",
        "rx_packets",
        "rx_bytes",
        "rx_interrupts",
        "rx_drops",
        "rx_drop_overruns",
    ),
    StatsType.RX_CSUM: ("rx_csum_valid", "rx_needs_csum", "rx_csum_none", "rx_csum_bad"),
    StatsType.RX_GSO: ("rx_gso_packets", "rx_gso_bytes", "rx_gso_packets_coalesced", "rx_gso_bytes_coalesced"),
    StatsType.RX_SPEED: ("rx_packets_allowance_exceeded", "rx_bytes_allowance_exceeded"),
    StatsType.TX_BASIC: (
        "tx_notifications",
        "tx_packets",
        "tx_bytes",
        "tx_interrupts",
        "tx_drops",
        "tx_drop_malformed",
    ),
    StatsType.TX_CSUM: ("tx_csum_none", "tx_needs_csum"),
    StatsType.TX_GSO: (
        "tx_gso_packets",
        "tx_gso_bytes",
        "tx_gso_segments",
        "tx_gso_segments_bytes",
        "tx_gso_packets_noseg",
        "tx_gso_bytes_noseg",
    ),
    StatsType.TX_SPEED: ("tx_packets_allowance_exceeded", "tx_bytes_allowance_exceeded"),
}
STATS = {kind: Struct(*(name / Int64ul for name in names)) for kind, names in _STATS_FIELDS.items()}
"""What follows a `STATS_REPLY_HDR`, by its type: struct virtio_net_stats_rx_basic and the others, without a header."""


# ---- declaration -----------------------------------------------------------------------------------------------------

_F = NetFeature
_LOCAL_EXPERIMENTAL = 0x88B5
"""EtherType that IEEE 802 leaves to experiments."""


def _frame(to: int) -> bytes:
    """A frame of the shortest length, from and to addresses of no card (locally administered)."""
    header = b"".join(number.to_bytes(6, "big") for number in (to, 0x02_00_00_00_00_01))
    return (header + _LOCAL_EXPERIMENTAL.to_bytes(2, "big")).ljust(60, b"\0")


# Of packets that are made up.
_OFFSETS = (0, 0, 14, 16, 34, 42, 54, 62, 84, 0xFFFF)
_USUAL_HDR = {
    "flags": (0, 0, 1, 1, 2, 3, 4, 8, 9, 0xFF),
    "gso_type": (0, 0, 0, 1, 3, 4, 5, 0x21, 0x41, 0x60, 0x81, 0x84, 0xFF),
    "hdr_len": (0, 54, 66, 0xFFFF),
    "gso_size": (0, 1, 536, 1448, 0xFFFF),
    "csum_start": _OFFSETS,
    "csum_offset": (0, 6, 16, 0xFFFF),
    "num_buffers": (0, 1),
    "outer_th_offset": _OFFSETS,
    "inner_nh_offset": _OFFSETS,
}
_FRAMES = (60, 60, 0, 1, 13, 14, 54, 1514, 1518, 9014, 65589, 70000)
_RECEIVEQS, _TRANSMITQS, _CONTROLQS = (0, 2), (1, 3), (2, 4)


def _command(kind: CtrlClass, commands: type[IntEnum], **more: Any) -> RequestShape:
    usual = {"class": (kind,), "cmd": (*commands, 9), **more.pop("usual", {})}
    return RequestShape(queues=_CONTROLQS, header=CTRL_HDR, usual=usual, writable=(1, 1, 1, 0, 2), **more)


TYPE = DeviceType(
    "net",
    CONFIG,
    NetFeature,
    more=("receiveq", "transmitq"),
    last="controlq",
    sets=QueueSets("max_virtqueue_pairs", (_F.MQ, _F.RSS)),  # 5.1.2
    device_id=DEVICE_ID,
    # 5.1.3.1; "SHOULD NOT" for HASH_REPORT and CTRL_RX_EXTRA (5.1.4.1).
    requires={
        **dict.fromkeys((_F.GUEST_TSO4, _F.GUEST_TSO6, _F.GUEST_UFO, _F.GUEST_USO4, _F.GUEST_USO6), (_F.GUEST_CSUM,)),
        **dict.fromkeys((_F.HOST_TSO4, _F.HOST_TSO6, _F.HOST_UFO, _F.HOST_USO), (_F.CSUM,)),
        _F.GUEST_ECN: (_F.GUEST_TSO4, _F.GUEST_TSO6),
        _F.HOST_ECN: (_F.HOST_TSO4, _F.HOST_TSO6),
        _F.RSC_EXT: (_F.HOST_TSO4, _F.HOST_TSO6),
        **dict.fromkeys(
            (
                _F.CTRL_RX,
                _F.CTRL_RX_EXTRA,
                _F.CTRL_VLAN,
                _F.GUEST_ANNOUNCE,
                _F.MQ,
                _F.CTRL_MAC_ADDR,
                _F.NOTF_COAL,
                _F.RSS,
                _F.VQ_NOTF_COAL,
                _F.HASH_REPORT,
                _F.CTRL_GUEST_OFFLOADS,
                _F.DEVICE_STATS,
            ),
            (_F.CTRL_VQ,),
        ),
        _F.HASH_TUNNEL: (_F.RSS, _F.HASH_REPORT),
    },
    requires_all={
        _F.GUEST_UDP_TUNNEL_GSO: (_F.GUEST_TSO4, _F.GUEST_TSO6, _F.GUEST_USO4, _F.GUEST_USO6),
        _F.HOST_UDP_TUNNEL_GSO: (_F.HOST_TSO4, _F.HOST_TSO6, _F.HOST_USO),
        _F.GUEST_UDP_TUNNEL_GSO_CSUM: (_F.GUEST_UDP_TUNNEL_GSO,),
        _F.HOST_UDP_TUNNEL_GSO_CSUM: (_F.HOST_UDP_TUNNEL_GSO,),
        _F.HASH_TUNNEL: (_F.CTRL_VQ,),
        _F.RSS_CONTEXT: (_F.CTRL_VQ, _F.RSS),
    },
    device_fills=("receiveq",),
    queue_features={"controlq": _F.CTRL_VQ},
    pci_class=0x020000,
    # virtio_net needs the two of failover; programs need packets (DHCP, tcpdump).
    linux_modules=("virtio_net", "net_failover", "failover", "af_packet", "8021q"),
    exercise=Exercise("net", 1, HDR_CODEC.pack(0, 0, 0, 0, 0, 0, 0) + _frame(0x02_00_00_00_00_02), 0, no_complaint),
    requests=(
        RequestShape(queues=_RECEIVEQS, writable=(1526, 1534, 4096, 65609, 0, 1, 11, 12, 20, 60), weight=4),
        RequestShape(queues=_TRANSMITQS, header=HDR, usual=_USUAL_HDR, payload=_FRAMES, weight=4),
        RequestShape(queues=_TRANSMITQS, header=HDR_TUNNEL, usual=_USUAL_HDR, payload=_FRAMES, weight=3),
        RequestShape(queues=_TRANSMITQS, payload=(0, 1, 11, 12, 24), writable=(0, 0, 64)),
        _command(CtrlClass.RX, CtrlRx, payload=(1, 1, 0, 2)),
        _command(
            CtrlClass.MAC,
            CtrlMac,
            entry=MAC_TABLE,
            usual={"entries": (0, 1, 2, 64, 257, 0xFFFF_FFFF)},
            counts=(0, 1, 2),
            payload=(0, 4, 6, 12, 4096),
        ),
        _command(CtrlClass.VLAN, CtrlVlan, entry=VLAN_ID, usual={"vlan": (0, 1, 4095, 4096)}, counts=(1, 1, 0)),
        _command(CtrlClass.ANNOUNCE, CtrlAnnounce),
        _command(
            CtrlClass.MQ,
            CtrlMq,
            entry=MQ_PAIRS,
            usual={"virtqueue_pairs": (0, 1, 2, 3, 0x8000)},
            counts=(1, 1, 0),
        ),
        _command(
            CtrlClass.MQ,
            CtrlMq,
            entry=RSS_CONFIG,
            counts=(1, 1, 0),
            payload=(5, 43, 44, 45, 47, 299, 600),
            usual={
                "hash_types": (0, 0x3F, 0x1FF),
                "indirection_table_mask": (0, 1, 127, 3, 0xFFFF),
                "unclassified_queue": (0, 1, 2),
            },
        ),
        _command(CtrlClass.MQ, CtrlMq, entry=HASH_CONFIG, counts=(1, 1, 0), payload=(0, 40, 41)),
        _command(
            CtrlClass.GUEST_OFFLOADS,
            CtrlGuestOffloads,
            entry=OFFLOADS,
            counts=(1, 1, 0),
            usual={"offloads": (0, 1 << 1, 1 << 1 | 1 << 7, (1 << 64) - 1)},
        ),
        _command(
            CtrlClass.NOTF_COAL,
            CtrlNotfCoal,
            entry=COAL,
            counts=(1, 1, 0),
            usual={"max_packets": (0, 1, 64), "max_usecs": (0, 1, 50, 1_000_000, 0xFFFF_FFFF)},
        ),
        _command(
            CtrlClass.NOTF_COAL,
            CtrlNotfCoal,
            entry=COAL_VQ,
            counts=(1, 1, 0),
            usual={"vq_index": (0, 1, 4, 0xFFFF), "coal_max_packets": (0, 64), "coal_max_usecs": (0, 50)},
        ),
        RequestShape(
            queues=_CONTROLQS,
            header=CTRL_HDR,
            usual={
                "class": (CtrlClass.STATS,),
                "cmd": (*CtrlStats,),
                "vq_index": (0, 1, 4, 5),
                "types_bitmap": (0xF, 0xF_0000, 1 << 32, 0),
            },
            entry=QUEUE_STATS,
            counts=(0, 1, 2, 200),
            writable=(1, 9, 33, 57, 1000, 9000),
        ),
        _command(CtrlClass.RSS_CTX, CtrlClass, payload=(0, 8)),
    ),
)
