"""TUN/TAP of Linux: ioctl(2) numbers, flags and the header before each frame; names of linux/if_tun.h."""

from enum import IntFlag

from construct import Bytes, Int8ul, Int16ul, Padding, Struct

from vfiouser_virtio.protocols.codec import codec

TUNSETIFF = 0x400454CA
TUNGETIFF = 0x800454D2
TUNSETOFFLOAD = 0x400454D0
TUNSETVNETHDRSZ = 0x400454D8
TUNSETVNETLE = 0x400454DC
TUNSETQUEUE = 0x400454D9

IFNAMSIZ = 16
"""Bytes of an interface's name, with a NUL."""
MAX_QUEUES = 256
"""``MAX_TAP_QUEUES`` of Linux's drivers/net/tun.c."""


class IfFlags(IntFlag):
    """``IFF_*`` of an ifreq for TUNSETIFF."""

    TUN = 0x0001
    TAP = 0x0002
    MULTI_QUEUE = 0x0100
    ATTACH_QUEUE = 0x0200
    DETACH_QUEUE = 0x0400
    NO_PI = 0x1000
    VNET_HDR = 0x4000


class TunOffload(IntFlag):
    """Work that the reader of a frame will do itself, for TUNSETOFFLOAD: ``TUN_F_*``."""

    CSUM = 0x01
    TSO4 = 0x02
    TSO6 = 0x04
    TSO_ECN = 0x08
    UFO = 0x10
    USO4 = 0x20
    USO6 = 0x40
    UDP_TUNNEL_GSO = 0x80
    """From Linux 6.17 on; the kernel takes such packets as well then, and all frames have `virtio.net.HDR_TUNNEL`."""
    UDP_TUNNEL_GSO_CSUM = 0x100


# struct ifreq of linux/if.h, as far as these ioctls use it.
IFREQ = Struct("name" / Bytes(IFNAMSIZ), "flags" / Int16ul, Padding(22))
IFREQ_CODEC = codec(IFREQ)

# struct virtio_net_hdr: before each frame, with VNET_HDR; little-endian after TUNSETVNETLE.
VNET_HDR = Struct(
    "flags" / Int8ul,
    "gso_type" / Int8ul,
    "hdr_len" / Int16ul,
    "gso_size" / Int16ul,
    "csum_start" / Int16ul,
    "csum_offset" / Int16ul,
)
VNET_HDR_CODEC = codec(VNET_HDR)
