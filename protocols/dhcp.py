"""DHCP messages and their options (RFC 2131, 2132, 3396), those of PXE and of iPXE included (PXE 2.1, RFC 4578)."""

from collections.abc import Mapping
from enum import IntEnum

from construct import Bytes, Int8ub, Int16ub, Int32ub, Struct

from vfiouser_virtio.protocols.codec import network_codec

SERVER_PORT, CLIENT_PORT = 67, 68

# Figure 1 of RFC 2131; options follow.
MESSAGE = Struct(
    "op" / Int8ub,
    "htype" / Int8ub,
    "hlen" / Int8ub,
    "hops" / Int8ub,
    "xid" / Int32ub,
    "secs" / Int16ub,
    "flags" / Int16ub,
    "ciaddr" / Bytes(4),
    "yiaddr" / Bytes(4),
    "siaddr" / Bytes(4),
    "giaddr" / Bytes(4),
    "chaddr" / Bytes(16),
    "sname" / Bytes(64),
    "file" / Bytes(128),
    "magic" / Int32ub,
)
MESSAGE_CODEC = network_codec(MESSAGE)
MAGIC = 0x63825363
"""The "magic cookie" before the options."""
BOOTREQUEST, BOOTREPLY = 1, 2
HTYPE_ETHERNET, HLEN_ETHERNET = 1, 6
BROADCAST_FLAG = 0x8000
"""In ``flags``: the client cannot take what is sent to an address that it does not have yet."""
MIN_MESSAGE = 300
"""Bytes of the shortest message: those of BOOTP, which some relays and clients insist on (RFC 1542, 2.1)."""


class MessageType(IntEnum):
    """Value of the option MESSAGE_TYPE."""

    DISCOVER = 1
    OFFER = 2
    REQUEST = 3
    DECLINE = 4
    ACK = 5
    NAK = 6
    RELEASE = 7
    INFORM = 8


class DhcpOption(IntEnum):
    """Code of an option."""

    PAD = 0
    SUBNET_MASK = 1
    ROUTER = 3
    HOST_NAME = 12
    VENDOR_SPECIFIC = 43
    """From PXE servers: options of PXE's own, `PxeOption`."""
    REQUESTED_ADDRESS = 50
    LEASE_TIME = 51
    """Seconds, 32 bits."""
    MESSAGE_TYPE = 53
    SERVER_IDENTIFIER = 54
    VENDOR_CLASS = 60
    TFTP_SERVER_NAME = 66
    BOOTFILE_NAME = 67
    CLIENT_ARCHITECTURE = 93
    """16 bits; 0: x86 BIOS, 7: x86-64 UEFI (RFC 4578, 2.1)."""
    CLIENT_UUID = 97
    """A type, 0, and 16 bytes; servers send it back (PXE 2.1, 2.3)."""
    IPXE = 175
    """Options of iPXE's own, `IpxeOption`."""
    END = 255


PXE_CLIENT = b"PXEClient"
"""What VENDOR_CLASS of firmware begins with, and what a server's is that knows PXE."""


class PxeOption(IntEnum):
    """Code of an option within VENDOR_SPECIFIC."""

    DISCOVERY_CONTROL = 6


USE_BOOTFILE = 8
"""Bit 3 of DISCOVERY_CONTROL: no menu and no search for boot servers, the boot file is named in this message."""


class IpxeOption(IntEnum):
    """Code of an option within IPXE."""

    NO_PXEDHCP = 176
    """1: do not wait for another server that would name a boot file."""


def parse_options(data: bytes) -> dict[int, bytes]:
    """Options by code; one in several parts is joined (RFC 3396). What follows END is not looked at.

    Raises ValueError where an option is cut short.
    """
    options: dict[int, bytes] = {}
    at = 0
    while at < len(data) and (code := data[at]) != DhcpOption.END:
        at += 1
        if code == DhcpOption.PAD:
            continue
        if at == len(data) or at + 1 + data[at] > len(data):
            raise ValueError(f"option {code:#x} is cut short at byte {len(data):#x}")
        options[code] = options.get(code, b"") + data[at + 1 : at + 1 + data[at]]
        at += 1 + data[at]
    return options


def build_options(options: Mapping[int, bytes]) -> bytes:
    """The bytes of options, in their order, with END. Raises ValueError for one of more than 255 bytes."""
    data = bytearray()
    for code, value in options.items():
        if len(value) > 0xFF:
            raise ValueError(f"option {code:#x} of {len(value):#x} bytes, expected up to 0xff")
        data += bytes((code, len(value))) + value
    data.append(DhcpOption.END)
    return bytes(data)
