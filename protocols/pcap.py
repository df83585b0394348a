"""Packet capture files: pcapng (draft-ietf-opsawg-pcapng) and classic pcap (draft-ietf-opsawg-pcap).

The codecs are little-endian, in which we write. Files of either byte order are read: `big_endian` is the same codec
for the other one.
"""

import struct
from enum import IntEnum

from construct import Int8ul, Int16ul, Int32sl, Int32ul, Int64sl, Int64ul, Struct

from vfiouser_virtio.protocols.codec import codec

LINKTYPE_ETHERNET = 1


def big_endian(little: struct.Struct) -> struct.Struct:
    """The codec of the same fields for a file of a big-endian machine."""
    return struct.Struct(">" + little.format[1:])


# ---- pcapng ----------------------------------------------------------------------------------------------------------


class BlockType(IntEnum):
    """``Block Type``."""

    INTERFACE_DESCRIPTION = 1
    SIMPLE_PACKET = 3
    INTERFACE_STATISTICS = 5
    ENHANCED_PACKET = 6
    SECTION_HEADER = 0x0A0D0D0A
    """The same in both byte orders, and changed by what mistakes a file for text."""


BYTE_ORDER_MAGIC = 0x1A2B3C4D

# What every block begins with; it ends with ``total_length`` again (BLOCK_END), at a multiple of 4 bytes.
BLOCK = Struct("type" / Int32ul, "total_length" / Int32ul)
BLOCK_END = Struct("total_length" / Int32ul)
BLOCK_CODEC, BLOCK_END_CODEC = codec(BLOCK), codec(BLOCK_END)

SECTION_HEADER = Struct(
    "byte_order_magic" / Int32ul, "major_version" / Int16ul, "minor_version" / Int16ul, "section_length" / Int64sl
)
SECTION_HEADER_CODEC = codec(SECTION_HEADER)
SECTION_LENGTH_UNKNOWN = -1

INTERFACE_DESCRIPTION = Struct("linktype" / Int16ul, "reserved" / Int16ul, "snaplen" / Int32ul)
INTERFACE_DESCRIPTION_CODEC = codec(INTERFACE_DESCRIPTION)

# The packet follows, filled up to a multiple of 4 bytes, and options.
ENHANCED_PACKET = Struct(
    "interface_id" / Int32ul,
    "timestamp_upper" / Int32ul,
    "timestamp_lower" / Int32ul,
    "captured_length" / Int32ul,
    "original_length" / Int32ul,
)
ENHANCED_PACKET_CODEC = codec(ENHANCED_PACKET)

# The packet follows: as much of it as there is in the block.
SIMPLE_PACKET = Struct("original_length" / Int32ul)
SIMPLE_PACKET_CODEC = codec(SIMPLE_PACKET)

# The value follows, filled up to a multiple of 4 bytes.
OPTION = Struct("code" / Int16ul, "length" / Int16ul)
OPTION_CODEC = codec(OPTION)


class Opt(IntEnum):
    """Codes of options; which are which depends on the block."""

    ENDOFOPT = 0
    COMMENT = 1
    SHB_USERAPPL = 4
    IF_NAME = 2
    IF_TSRESOL = 9
    """One byte: timestamps count 10**-n seconds; with bit 7 set: 2**-n. 6 where the option is missing."""
    EPB_FLAGS = 2
    EPB_DROPCOUNT = 4
    """64 bits: packets that were lost between this one and the one before."""


class PacketDirection(IntEnum):
    """Bits 0 and 1 of ``epb_flags``."""

    UNKNOWN = 0
    INBOUND = 1
    OUTBOUND = 2


DIRECTION_MASK = 3
FLAGS = Struct("epb_flags" / Int32ul)
DROPCOUNT = Struct("epb_dropcount" / Int64ul)
TSRESOL = Struct("if_tsresol" / Int8ul)
FLAGS_CODEC, DROPCOUNT_CODEC, TSRESOL_CODEC = codec(FLAGS), codec(DROPCOUNT), codec(TSRESOL)
TSRESOL_DEFAULT = 6
TSRESOL_BINARY = 0x80

# ---- classic pcap ----------------------------------------------------------------------------------------------------

MAGIC, MAGIC_NANOSECONDS = 0xA1B2C3D4, 0xA1B23C4D

FILE_HEADER = Struct(
    "magic" / Int32ul,
    "version_major" / Int16ul,
    "version_minor" / Int16ul,
    "thiszone" / Int32sl,
    "sigfigs" / Int32ul,
    "snaplen" / Int32ul,
    "linktype" / Int32ul,
)
LINKTYPE_MASK = 0x03FF_FFFF
"""The bits above say that frames have their FCS, and how long it is."""
FILE_HEADER_CODEC = codec(FILE_HEADER)

# The packet follows.
PACKET_HEADER = Struct(
    "seconds" / Int32ul, "fraction" / Int32ul, "captured_length" / Int32ul, "original_length" / Int32ul
)
PACKET_HEADER_CODEC = codec(PACKET_HEADER)
