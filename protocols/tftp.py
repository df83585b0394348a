"""TFTP packets (RFC 1350) and options of requests (RFC 2347 to 2349, 7440)."""

from collections.abc import Mapping
from enum import IntEnum
from typing import NamedTuple

from construct import Int16ub, Struct

from vfiouser_virtio.protocols.codec import network_codec

PORT = 69


class Opcode(IntEnum):
    """Number that every packet begins with."""

    RRQ = 1
    WRQ = 2
    DATA = 3
    ACK = 4
    ERROR = 5
    OACK = 6


class ErrorCode(IntEnum):
    """``code`` of an ERROR packet."""

    NOT_DEFINED = 0
    """See its text."""
    FILE_NOT_FOUND = 1
    ACCESS_VIOLATION = 2
    ILLEGAL_OPERATION = 4
    BAD_OPTIONS = 8


# DATA, whose bytes follow, ACK and ERROR, whose text follows with a NUL: ``value`` is a block number or an error code.
HEADER = Struct("opcode" / Int16ub, "value" / Int16ub)
HEADER_CODEC = network_codec(HEADER)
OPCODE = Struct("opcode" / Int16ub)
OPCODE_CODEC = network_codec(OPCODE)

DEFAULT_BLKSIZE, MIN_BLKSIZE = 512, 8
"""Bytes of a block."""


class TftpRequest(NamedTuple):
    """RRQ or WRQ."""

    filename: bytes
    mode: str
    """``octet``, ``netascii``, ``mail``; in lower case."""
    options: dict[str, str]
    """By name in lower case."""


def parse_request(data: bytes) -> TftpRequest:
    """The request whose packet has these bytes behind its opcode. Raises ValueError where it is none.

    Of an option that is given twice the first one counts; text that is no ASCII is kept from being one that is known.
    """
    if data[-1:] != b"\0":
        raise ValueError("a request without a NUL at its end")
    filename, *rest = data[:-1].split(b"\0")
    words = [word.decode("ascii", "backslashreplace") for word in rest]
    if not filename or len(words) % 2 != 1:
        raise ValueError(f"a request of {1 + len(words)} strings, expected a file name, a mode and pairs")
    options: dict[str, str] = {}
    for name, value in zip(words[1::2], words[2::2], strict=True):
        options.setdefault(name.lower(), value)
    return TftpRequest(filename, words[0].lower(), options)


def build_data(block: int, data: bytes | memoryview) -> bytes:
    """DATA; block numbers go on from 0 after 65535."""
    return HEADER_CODEC.pack(Opcode.DATA, block & 0xFFFF) + data


def build_error(code: ErrorCode, text: str) -> bytes:
    """ERROR."""
    return HEADER_CODEC.pack(Opcode.ERROR, code) + text.encode() + b"\0"


def build_oack(options: Mapping[str, int]) -> bytes:
    """OACK: the options that are acknowledged, and their values."""
    return OPCODE_CODEC.pack(Opcode.OACK) + b"".join(
        b"%s\0%d\0" % (name.encode(), value) for name, value in options.items()
    )
