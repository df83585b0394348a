"""Payloads of a client's requests and replies ("Commands"): pure functions of bytes, one pair per command.

A reply that is too short or answers something else raises PeerError with EPROTO. It is not fatal: where the next
message starts is still known.
"""

import errno
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.protocols.codec import codec
from vfiouser_virtio.protocols.vfio_user import (
    DEVICE_INFO,
    DMA_MAP,
    DMA_UNMAP,
    INFO_CAP_HEADER,
    IOEVENTFD,
    IRQ_INFO,
    IRQ_SET,
    REGION_ACCESS_CODEC,
    REGION_INFO,
    REGION_IO_FDS,
    WRITE_MULTI_ENTRY,
    WRITE_MULTI_REPLY,
    Command,
    DmaMapFlags,
    IoEventFdFlags,
    IoFdType,
)
from vfiouser_virtio.vfio_device import Buffer, DeviceFlags, DeviceInfo, IrqInfo, IrqInfoFlags, RegionFlags, RegionInfo

_DEVICE_INFO = codec(DEVICE_INFO)
_REGION_INFO = codec(REGION_INFO)
_INFO_CAP_HEADER = codec(INFO_CAP_HEADER)
_IO_FDS = codec(REGION_IO_FDS)
_IO_FD = codec(IOEVENTFD)  # an ioregionfd has the same layout, with user_data in place of datamatch
_IRQ_INFO = codec(IRQ_INFO)
_IRQ_SET = codec(IRQ_SET)
_DMA_MAP = codec(DMA_MAP)
_DMA_UNMAP = codec(DMA_UNMAP)
_MULTI_ENTRY = codec(WRITE_MULTI_ENTRY)
_MULTI_COUNT = codec(WRITE_MULTI_REPLY)

REGION_INFO_SIZE = _REGION_INFO.size
"""The argsz of who wants no capabilities, in bytes."""


@dataclass(frozen=True, slots=True)
class IoFd:
    """Sub-region of DEVICE_GET_REGION_IO_FDS; ``fd`` is the client's, and closed with it."""

    offset: int
    size: int
    """In bytes; 0 stands for a write of any width."""
    fd: int
    type: IoFdType | int
    flags: int
    datamatch: int
    """``user_data`` of an ioregionfd."""

    def takes(self, offset: int, size: int, value: int) -> bool:
        """Whether such a write goes to the eventfd (linux/kvm.h: KVM_IOEVENTFD)."""
        return (
            self.offset == offset
            and self.type == IoFdType.IOEVENTFD
            and self.size in (0, size)
            and (not self.flags & IoEventFdFlags.DATAMATCH or value == self.datamatch)
        )


def _wrong(command: Command, text: str) -> PeerError:
    return PeerError(f"{command.name}: the reply {text}", errno.EPROTO)


def _fields(layout: struct.Struct, command: Command, payload: Buffer) -> tuple[Any, ...]:
    if len(payload) < layout.size:
        raise _wrong(command, f"has {len(payload):#x} bytes of payload, {layout.size:#x} expected")
    return layout.unpack_from(payload)


def _same(command: Command, field: str, found: int, expected: int) -> None:
    if found != expected:
        raise _wrong(command, f"has {field} {found:#x}, {expected:#x} was asked for")


# What there is


def device_info_request() -> bytes:
    """DEVICE_GET_INFO."""
    return _DEVICE_INFO.pack(_DEVICE_INFO.size, 0, 0, 0)


def parse_device_info(payload: Buffer) -> DeviceInfo:
    """DEVICE_GET_INFO's reply."""
    _argsz, flags, regions, irqs = _fields(_DEVICE_INFO, Command.DEVICE_GET_INFO, payload)
    return DeviceInfo(DeviceFlags(flags), regions, irqs)


def irq_info_request(index: int) -> bytes:
    """DEVICE_GET_IRQ_INFO."""
    return _IRQ_INFO.pack(_IRQ_INFO.size, 0, index, 0)


def parse_irq_info(index: int, payload: Buffer) -> IrqInfo:
    """DEVICE_GET_IRQ_INFO's reply."""
    _argsz, flags, found, count = _fields(_IRQ_INFO, Command.DEVICE_GET_IRQ_INFO, payload)
    _same(Command.DEVICE_GET_IRQ_INFO, "index", found, index)
    return IrqInfo(IrqInfoFlags(flags), count)


def region_info_request(index: int, argsz: int) -> bytes:
    """DEVICE_GET_REGION_INFO with room for a reply of ``argsz`` bytes behind the header."""
    return _REGION_INFO.pack(argsz, 0, index, 0, 0, 0)


def region_info_argsz(payload: Buffer) -> int:
    """How many bytes DEVICE_GET_REGION_INFO's reply would have, with all capabilities."""
    return int(_fields(_REGION_INFO, Command.DEVICE_GET_REGION_INFO, payload)[0])


def parse_region_info(index: int, payload: Buffer, fds: Sequence[int]) -> RegionInfo:
    """DEVICE_GET_REGION_INFO's whole reply, with its chain of capabilities."""
    command = Command.DEVICE_GET_REGION_INFO
    argsz, flags, found, cap_offset, size, offset = _fields(_REGION_INFO, command, payload)
    _same(command, "index", found, index)
    if argsz > len(payload):
        raise _wrong(command, f"has argsz {argsz:#x}, but only {len(payload):#x} bytes of payload")
    capabilities = _capabilities(payload, cap_offset) if flags & RegionFlags.CAPS else ()
    return RegionInfo(RegionFlags(flags), size, offset, capabilities, tuple(fds))


def _capabilities(payload: Buffer, start: int) -> tuple[tuple[int, int, bytes], ...]:
    """The ``vfio_info_cap_header`` chain. A body ends where another header, or the end, is: no field says."""
    command = Command.DEVICE_GET_REGION_INFO
    headers: dict[int, tuple[int, int]] = {}
    offset = start
    while offset:
        if not _REGION_INFO.size <= offset <= len(payload) - _INFO_CAP_HEADER.size:
            raise _wrong(command, f"has a capability at {offset:#x}, in {len(payload):#x} bytes of payload")
        if offset in headers:
            raise _wrong(command, f"has a chain of capabilities that comes back to {offset:#x}")
        identity, version, following = _INFO_CAP_HEADER.unpack_from(payload, offset)
        headers[offset] = identity, version
        offset = following
    ends = [*sorted(headers), len(payload)]
    return tuple(
        (identity, version, bytes(payload[at + _INFO_CAP_HEADER.size : min(end for end in ends if end > at)]))
        for at, (identity, version) in headers.items()
    )


def io_fds_request(index: int, argsz: int = _IO_FDS.size) -> bytes:
    """DEVICE_GET_REGION_IO_FDS; with the smallest argsz it asks how large the answer is."""
    return _IO_FDS.pack(argsz, 0, index, 0)


def io_fds_argsz(payload: Buffer) -> int:
    """How many bytes DEVICE_GET_REGION_IO_FDS's reply would have, with all sub-regions."""
    return int(_fields(_IO_FDS, Command.DEVICE_GET_REGION_IO_FDS, payload)[0])


def parse_io_fds(index: int, payload: Buffer, fds: Sequence[int]) -> list[IoFd]:
    """DEVICE_GET_REGION_IO_FDS's whole reply."""
    command = Command.DEVICE_GET_REGION_IO_FDS
    _argsz, _flags, found, count = _fields(_IO_FDS, command, payload)
    _same(command, "index", found, index)
    if len(payload) < _IO_FDS.size + count * _IO_FD.size:
        raise _wrong(command, f"has count {count:#x} in {len(payload):#x} bytes of payload")
    entries = []
    for number in range(count):
        entry = _IO_FD.unpack_from(payload, _IO_FDS.size + number * _IO_FD.size)
        offset, size, fd_index, kind, flags, datamatch = entry
        if fd_index >= len(fds):
            raise _wrong(command, f"has fd_index {fd_index:#x}, and {len(fds):#x} fds")
        entries.append(IoFd(offset, size, fds[fd_index], kind, flags, datamatch))
    return entries


# Accesses


def region_access(region: int, offset: int, count: int) -> bytes:
    """REGION_READ, and what stands in front of the data in REGION_WRITE and in both replies."""
    return REGION_ACCESS_CODEC.pack(offset, region, count)


def parse_region_read(access: bytes, payload: Buffer) -> bytes:
    """The data of REGION_READ's reply to ``access``. QEMU takes a reply without data for zeros; we do not."""
    check_access(Command.REGION_READ, access, payload)
    data = bytes(payload[len(access) :])
    _same(Command.REGION_READ, "a number of data bytes of", len(data), REGION_ACCESS_CODEC.unpack(access)[2])
    return data


def check_access(command: Command, access: bytes, payload: Buffer) -> None:
    """A reply to a region access repeats its offset, region and count."""
    fields = zip(
        ("offset", "region", "count"),
        _fields(REGION_ACCESS_CODEC, command, payload),
        REGION_ACCESS_CODEC.unpack(access),
        strict=True,
    )
    for field, found, expected in fields:
        _same(command, field, found, expected)


def write_multi_request(writes: Sequence[tuple[int, int, bytes]]) -> bytes:
    """REGION_WRITE_MULTI of (region, offset, data), each of 8 bytes at most; longer ones raise ValueError."""
    if any(len(data) > 8 for _region, _offset, data in writes):
        raise ValueError("REGION_WRITE_MULTI takes writes of 1 to 8 bytes")
    return _MULTI_COUNT.pack(len(writes)) + b"".join(
        _MULTI_ENTRY.pack(offset, region, len(data), data) for region, offset, data in writes
    )


def parse_write_multi(payload: Buffer) -> int:
    """REGION_WRITE_MULTI's reply: how many writes were carried out."""
    return int(_fields(_MULTI_COUNT, Command.REGION_WRITE_MULTI, payload)[0])


# Memory and interrupts


def dma_map_request(address: int, size: int, *, readable: bool, writable: bool, offset: int) -> bytes:
    """DMA_MAP; the fd comes beside it."""
    flags = (DmaMapFlags.READ if readable else 0) | (DmaMapFlags.WRITE if writable else 0)
    return _DMA_MAP.pack(_DMA_MAP.size, flags, offset, address, size)


def dma_unmap_request(address: int, size: int, flags: int) -> bytes:
    """DMA_UNMAP."""
    return _DMA_UNMAP.pack(_DMA_UNMAP.size, flags, address, size)


def set_irqs_request(index: int, flags: int, start: int, count: int, data: bytes) -> bytes:
    """DEVICE_SET_IRQS; eventfds come beside it."""
    return _IRQ_SET.pack(_IRQ_SET.size + len(data), flags, index, start, count) + data
