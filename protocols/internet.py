"""Headers of Ethernet, ARP, IPv4, ICMP and UDP (IEEE 802.3, RFC 826, 791, 792, 768), in network byte order."""

from enum import IntEnum

from construct import Bytes, Int8ub, Int16ub, Struct

from vfiouser_virtio.protocols.codec import network_codec

BROADCAST = b"\xff" * 6
"""The address of all stations."""


class EtherType(IntEnum):
    """``ETH_P_*`` of linux/if_ether.h."""

    IP = 0x0800
    ARP = 0x0806


ETHERNET = Struct("destination" / Bytes(6), "source" / Bytes(6), "ethertype" / Int16ub)
ETHERNET_CODEC = network_codec(ETHERNET)

# struct arphdr of linux/if_arp.h, with the addresses of Ethernet and IPv4 behind it.
ARP = Struct(
    "ar_hrd" / Int16ub,
    "ar_pro" / Int16ub,
    "ar_hln" / Int8ub,
    "ar_pln" / Int8ub,
    "ar_op" / Int16ub,
    "ar_sha" / Bytes(6),
    "ar_sip" / Bytes(4),
    "ar_tha" / Bytes(6),
    "ar_tip" / Bytes(4),
)
ARP_CODEC = network_codec(ARP)
ARPHRD_ETHER = 1


class ArpOp(IntEnum):
    """``ar_op``."""

    REQUEST = 1
    REPLY = 2


# struct iphdr of linux/ip.h; options follow, up to ihl * 4 bytes in all.
IPV4 = Struct(
    "version_ihl" / Int8ub,
    "tos" / Int8ub,
    "tot_len" / Int16ub,
    "id" / Int16ub,
    "frag_off" / Int16ub,
    "ttl" / Int8ub,
    "protocol" / Int8ub,
    "check" / Int16ub,
    "saddr" / Bytes(4),
    "daddr" / Bytes(4),
)
IPV4_CODEC = network_codec(IPV4)
IP_MF = 0x2000
IP_OFFSET = 0x1FFF
"""Parts of ``frag_off``: more fragments follow; offset in units of 8 bytes."""


class IpProtocol(IntEnum):
    """``IPPROTO_*``."""

    ICMP = 1
    UDP = 17


# struct icmphdr of linux/icmp.h, as echo messages have it.
ICMP_ECHO = Struct("type" / Int8ub, "code" / Int8ub, "checksum" / Int16ub, "id" / Int16ub, "sequence" / Int16ub)
ICMP_ECHO_CODEC = network_codec(ICMP_ECHO)


class IcmpType(IntEnum):
    """``type``."""

    ECHOREPLY = 0
    ECHO = 8


# struct udphdr of linux/udp.h.
UDP = Struct("source" / Int16ub, "dest" / Int16ub, "len" / Int16ub, "check" / Int16ub)
UDP_CODEC = network_codec(UDP)

# What the checksum of UDP covers beside the datagram (RFC 768).
PSEUDO = Struct("saddr" / Bytes(4), "daddr" / Bytes(4), "zero_protocol" / Int16ub, "len" / Int16ub)
PSEUDO_CODEC = network_codec(PSEUDO)
