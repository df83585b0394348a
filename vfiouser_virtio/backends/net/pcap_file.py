"""Packet capture files: blocks of pcapng written, packets of pcapng and classic pcap read piece by piece."""

import struct
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from vfiouser_virtio.protocols import pcap
from vfiouser_virtio.protocols.pcap import BlockType, Opt, PacketDirection

MAX_BLOCK = 16 << 20
"""Bytes of a block or packet that is read, as Wireshark has it: a file that says 4 GiB must not be believed."""


class BadCapture(Exception):
    """Damage of a capture file, or one of a kind that is not read; says at which byte."""


# ---- writing ---------------------------------------------------------------------------------------------------------


def _padded(data: bytes) -> bytes:
    return data + bytes(-len(data) % 4)


def _option(code: int, value: bytes) -> bytes:
    return pcap.OPTION_CODEC.pack(code, len(value)) + _padded(value)


_END_OF_OPTIONS = _option(Opt.ENDOFOPT, b"")
_EPB_FLAGS = {direction: _option(Opt.EPB_FLAGS, pcap.FLAGS_CODEC.pack(direction)) for direction in PacketDirection}


def _block(kind: int, body: bytes) -> bytes:
    length = pcap.BLOCK_CODEC.size + len(body) + pcap.BLOCK_END_CODEC.size
    return pcap.BLOCK_CODEC.pack(kind, length) + body + pcap.BLOCK_END_CODEC.pack(length)


def section(application: str, interface: str, snaplen: int) -> bytes:
    """The beginning of a file with one Ethernet interface, whose timestamps are in nanoseconds."""
    options = _option(Opt.SHB_USERAPPL, application.encode()) + _END_OF_OPTIONS
    header = pcap.SECTION_HEADER_CODEC.pack(pcap.BYTE_ORDER_MAGIC, 1, 0, pcap.SECTION_LENGTH_UNKNOWN)
    description = pcap.INTERFACE_DESCRIPTION_CODEC.pack(pcap.LINKTYPE_ETHERNET, 0, snaplen)
    description += _option(Opt.IF_NAME, interface.encode(errors="replace")[:0xFFFF])
    description += _option(Opt.IF_TSRESOL, pcap.TSRESOL_CODEC.pack(9)) + _END_OF_OPTIONS
    return _block(BlockType.SECTION_HEADER, header + options) + _block(BlockType.INTERFACE_DESCRIPTION, description)


def packet(data: bytes, length: int, time_ns: int, direction: PacketDirection, lost: int = 0) -> bytes:
    """A packet of ``length`` bytes, of which these were captured; ``lost`` are missing before it."""
    options = _EPB_FLAGS[direction]
    if lost:
        options += _option(Opt.EPB_DROPCOUNT, pcap.DROPCOUNT_CODEC.pack(lost))
    header = pcap.ENHANCED_PACKET_CODEC.pack(0, time_ns >> 32, time_ns & 0xFFFF_FFFF, len(data), length)
    return _block(BlockType.ENHANCED_PACKET, header + _padded(data) + options + _END_OF_OPTIONS)


# ---- reading ---------------------------------------------------------------------------------------------------------


class Packet(NamedTuple):
    """Packet of a capture file."""

    time_ns: int
    data: bytes
    """What was captured of it."""
    direction: PacketDirection


class _Bytes:
    """Bytes of a file that come in pieces."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._data = b""
        self._at = 0
        self.offset = 0
        """Bytes that were taken."""

    def take(self, count: int) -> bytes:
        """So many, or fewer where the file ends."""
        while len(self._data) - self._at < count:
            piece = next(self._pieces, b"")
            if not piece:
                break
            self._data = self._data[self._at :] + piece
            self._at = 0
        taken = self._data[self._at : self._at + count]
        self._at += len(taken)
        self.offset += len(taken)
        return taken

    def must(self, count: int, what: str) -> bytes:
        """So many. Raises BadCapture where the file ends before."""
        taken = self.take(count)
        if len(taken) < count:
            raise BadCapture(f"the file ends at {self.offset:#x}, in the middle of {what}")
        return taken


def packets(pieces: Iterable[bytes]) -> Iterator[Packet]:
    """Ethernet packets of a capture file, whose bytes come in pieces of any size.

    Packets of other interfaces than Ethernet are left out, and blocks of other kinds. Raises BadCapture.
    """
    source = _Bytes(pieces)
    magic = source.must(4, "its first number: it is no capture file")
    if magic == pcap.BLOCK_CODEC.pack(BlockType.SECTION_HEADER, 0)[:4]:
        return _pcapng(source)
    for big in (False, True):
        number = int.from_bytes(magic, "big" if big else "little")
        if number in (pcap.MAGIC, pcap.MAGIC_NANOSECONDS):
            return _classic(source, magic, big, 1 if number == pcap.MAGIC_NANOSECONDS else 1000)
    raise BadCapture(f"it begins with {magic.hex(' ')}: neither pcapng nor pcap")


def _ordered(codec: struct.Struct, big: bool) -> struct.Struct:
    return pcap.big_endian(codec) if big else codec


def _classic(source: _Bytes, magic: bytes, big: bool, unit_ns: int) -> Iterator[Packet]:
    codec = _ordered(pcap.FILE_HEADER_CODEC, big)
    header = codec.unpack(magic + source.must(codec.size - len(magic), "its header"))
    linktype = header[-1] & pcap.LINKTYPE_MASK
    if linktype != pcap.LINKTYPE_ETHERNET:
        raise BadCapture(f"its linktype is {linktype}, expected {pcap.LINKTYPE_ETHERNET}, Ethernet")
    codec = _ordered(pcap.PACKET_HEADER_CODEC, big)

    def read() -> Iterator[Packet]:
        while start := source.take(1):
            at = source.offset - 1
            seconds, fraction, captured, _ = codec.unpack(start + source.must(codec.size - 1, "a packet's header"))
            if captured > MAX_BLOCK:
                raise BadCapture(f"the packet at {at:#x} has {captured:#x} bytes, expected up to {MAX_BLOCK:#x}")
            data = source.must(captured, "a packet")
            yield Packet(seconds * 1_000_000_000 + fraction * unit_ns, data, PacketDirection.UNKNOWN)

    return read()


class _CapturedInterface(NamedTuple):
    linktype: int
    snaplen: int
    unit: tuple[int, int]
    """A timestamp's nanoseconds: times the first, divided by the second."""


class _Section:
    """Byte order and interfaces of a section, as its header decides."""

    def __init__(self, big: bool) -> None:
        self.big = big
        self.block = _ordered(pcap.BLOCK_CODEC, big)
        self.end = _ordered(pcap.BLOCK_END_CODEC, big)
        self.enhanced = _ordered(pcap.ENHANCED_PACKET_CODEC, big)
        self.simple = _ordered(pcap.SIMPLE_PACKET_CODEC, big)
        self.description = _ordered(pcap.INTERFACE_DESCRIPTION_CODEC, big)
        self.option = _ordered(pcap.OPTION_CODEC, big)
        self.interfaces: list[_CapturedInterface] = []

    def option_of(self, options: bytes, wanted: int) -> bytes | None:
        """The value of an option."""
        at = 0
        while at + self.option.size <= len(options):
            code, length = self.option.unpack_from(options, at)
            at += self.option.size
            if code == wanted:
                return options[at : at + length]
            if code == Opt.ENDOFOPT:
                break
            at += length + -length % 4
        return None

    def interface(self, body: bytes) -> _CapturedInterface:
        linktype, _, snaplen = self.description.unpack_from(body)
        value = self.option_of(body[self.description.size :], Opt.IF_TSRESOL)
        resolution = value[0] if value else pcap.TSRESOL_DEFAULT
        exponent = resolution & ~pcap.TSRESOL_BINARY
        per_second = 2**exponent if resolution & pcap.TSRESOL_BINARY else 10**exponent
        return _CapturedInterface(linktype, snaplen, (1_000_000_000, per_second))

    def direction(self, options: bytes) -> PacketDirection:
        value = self.option_of(options, Opt.EPB_FLAGS) or b""
        flags = int.from_bytes(value, "big" if self.big else "little") & pcap.DIRECTION_MASK
        return (
            PacketDirection(flags)
            if flags in (PacketDirection.INBOUND, PacketDirection.OUTBOUND)
            else PacketDirection.UNKNOWN
        )


def _pcapng(source: _Bytes) -> Iterator[Packet]:
    """The first block's type has been taken."""
    section = _section(source)

    def read() -> Iterator[Packet]:
        nonlocal section
        latest = 0
        while start := source.take(4):
            at = source.offset - len(start)
            if start == pcap.BLOCK_CODEC.pack(BlockType.SECTION_HEADER, 0)[:4]:
                section = _section(source)
                continue
            kind, length = section.block.unpack(start + source.must(section.block.size - len(start), "a block"))
            body = _body(source, section, at, length)
            try:
                if kind == BlockType.INTERFACE_DESCRIPTION:
                    section.interfaces.append(section.interface(body))
                elif kind == BlockType.ENHANCED_PACKET:
                    found = _enhanced(section, body, at)
                    if found is not None:
                        latest = found.time_ns
                        yield found
                elif kind == BlockType.SIMPLE_PACKET and _is_ethernet(section, 0, at):
                    (original,) = section.simple.unpack_from(body)
                    snaplen = section.interfaces[0].snaplen or original
                    data = body[section.simple.size :][: min(original, snaplen)]
                    yield Packet(latest, data, PacketDirection.UNKNOWN)
            except struct.error:
                raise BadCapture(f"the block at {at:#x} has only {length:#x} bytes") from None

    return read()


def _section(source: _Bytes) -> _Section:
    at = source.offset - 4
    length = source.must(4, "a section header")
    order = source.must(4, "a section header")
    for big in (False, True):
        if int.from_bytes(order, "big" if big else "little") == pcap.BYTE_ORDER_MAGIC:
            section = _Section(big)
            (count,) = section.end.unpack(length)
            _body(source, section, at, count, taken=len(order))
            return section
    raise BadCapture(f"the section header at {at:#x} has byte order {order.hex(' ')}: no pcapng")


def _body(source: _Bytes, section: _Section, at: int, length: int, taken: int = 0) -> bytes:
    """What is between a block's header and its second length; of that so much was taken already."""
    count = length - section.block.size - section.end.size - taken
    if count < 0 or length % 4 or length > MAX_BLOCK:
        raise BadCapture(f"the block at {at:#x} says that it has {length:#x} bytes")
    body = source.must(count, "a block")
    if section.end.unpack(source.must(section.end.size, "a block"))[0] != length:
        raise BadCapture(f"the block at {at:#x} ends with another length than it begins with")
    return body


def _is_ethernet(section: _Section, number: int, at: int) -> bool:
    if number >= len(section.interfaces):
        raise BadCapture(f"the packet at {at:#x} is of interface {number:#x}, of which nothing was said")
    return section.interfaces[number].linktype == pcap.LINKTYPE_ETHERNET


def _enhanced(section: _Section, body: bytes, at: int) -> Packet | None:
    number, upper, lower, captured, _ = section.enhanced.unpack_from(body)
    if not _is_ethernet(section, number, at):
        return None
    start = section.enhanced.size
    data = body[start : start + captured]
    if len(data) < captured:
        raise BadCapture(f"the packet at {at:#x} has {captured:#x} bytes, more than its block")
    times, divided = section.interfaces[number].unit
    options = body[start + captured + -captured % 4 :]
    return Packet((upper << 32 | lower) * times // divided, data, section.direction(options))
