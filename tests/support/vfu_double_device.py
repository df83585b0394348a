"""The regions and interrupts of the double: what libvfio-user answers to the client's requests about them."""

import ctypes
import errno
import os
import struct
from dataclasses import dataclass, field
from typing import Any

from vfiouser_virtio.libvfio_user.bindings import PciDevRegion, PciType, RegionFlag
from vfiouser_virtio.protocols.vfio_user import (
    DEVICE_INFO,
    INFO_CAP_HEADER,
    IRQ_INFO,
    IRQ_SET,
    REGION_ACCESS,
    REGION_INFO,
    REGION_IO_FDS,
    SPARSE_MMAP,
    DeviceFlags,
    IrqInfoFlags,
    IrqSetFlags,
    PciIrq,
    RegionFlags,
    RegionInfoCap,
)

_MAX_TRANSFER = 1 << 20
_DATA = IrqSetFlags.DATA_NONE | IrqSetFlags.DATA_BOOL | IrqSetFlags.DATA_EVENTFD
_ACTION = IrqSetFlags.ACTION_MASK | IrqSetFlags.ACTION_UNMASK | IrqSetFlags.ACTION_TRIGGER


# struct vfio_user_sub_region_ioeventfd has shadow_offset before datamatch, which the specification has not.
_IOEVENTFD = struct.Struct("<QQIIIIQQ")


class AnsweredError(OSError):
    """An error whose reply has a payload all the same."""

    def __init__(self, number: int, payload: bytes) -> None:
        super().__init__(number, os.strerror(number))
        self.payload = payload


def require(condition: bool, number: int = errno.EINVAL) -> None:
    if not condition:
        raise OSError(number, os.strerror(number))


@dataclass
class Region:
    size: int = 0
    access: Any = None
    flags: int = 0
    areas: list[tuple[int, int]] = field(default_factory=list)
    fd: int = -1
    offset: int = 0
    ioeventfds: list[tuple[int, int, int, int, int]] = field(default_factory=list)  # offset, size, fd, flags, datamatch


@dataclass
class Irqs:
    """One set of eventfds for all of INTx, MSI and MSI-X, as the library has it."""

    counts: list[int] = field(default_factory=lambda: [0, 0, 0, 1, 1])
    state_callbacks: dict[int, Any] = field(default_factory=dict)
    vectors: list[int] = field(default_factory=list)
    others: dict[int, list[int]] = field(default_factory=lambda: {PciIrq.ERR: [-1], PciIrq.REQ: [-1]})

    def eventfds(self, index: int) -> list[int]:
        return self.others.get(index, self.vectors)

    def close(self, eventfds: list[int], start: int, end: int) -> None:
        for at in range(start, end):
            if eventfds[at] != -1:
                os.close(eventfds[at])
                eventfds[at] = -1

    def close_all(self) -> None:
        for eventfds in (self.vectors, *self.others.values()):
            self.close(eventfds, 0, len(eventfds))

    def set(self, handle: int, payload: bytes, fds: list[int]) -> None:
        require(len(payload) >= IRQ_SET.sizeof())
        request = IRQ_SET.parse(payload)
        index, start, count, data = request.index, request.start, request.count, payload[IRQ_SET.sizeof() :]
        kind, action = IrqSetFlags(request.flags & _DATA), IrqSetFlags(request.flags & _ACTION)
        require(request.argsz >= IRQ_SET.sizeof() and index < len(self.counts))
        require(kind != IrqSetFlags.DATA_BOOL or len(data) == count)
        require(kind.bit_count() == 1 and action.bit_count() == 1)
        require(start < self.counts[index] and start + count <= self.counts[index])
        trigger = action == IrqSetFlags.ACTION_TRIGGER
        require(index not in self.others or (trigger and count <= 1))
        require(count > 0 or (start == 0 and trigger and kind == IrqSetFlags.DATA_NONE))
        require(not fds or (kind == IrqSetFlags.DATA_EVENTFD and len(fds) == count))
        eventfds = self.eventfds(index)
        if not trigger:
            if index in self.state_callbacks:
                self.state_callbacks[index](handle, start, count, action == IrqSetFlags.ACTION_MASK)
        elif (kind == IrqSetFlags.DATA_NONE and count == 0) or (kind == IrqSetFlags.DATA_EVENTFD and not fds):
            # Not start + count: the library's own slip.
            self.close(eventfds, start, count or self.counts[index])
        elif kind == IrqSetFlags.DATA_EVENTFD:
            self.close(eventfds, start, start + count)
            eventfds[start : start + count] = fds
            fds.clear()
        else:
            for at in range(start, start + count):
                if eventfds[at] != -1 and (kind == IrqSetFlags.DATA_NONE or data[at - start] == 1):
                    os.eventfd_write(eventfds[at], 1)


@dataclass
class Device:
    """The state of a context but for its connection and its DMA."""

    handle: int
    regions: list[Region] = field(default_factory=lambda: [Region() for _ in range(9)])
    irqs: Irqs = field(default_factory=Irqs)
    config: Any = None

    def pci_init(self, pci_type: int, header_type: int) -> None:
        require(pci_type in list(PciType) and header_type == 0)
        require(self.config is None, errno.EEXIST)
        self.config = ctypes.create_string_buffer(4096 if pci_type in (PciType.PCI_X_2, PciType.EXPRESS) else 256)
        config = self.regions[PciDevRegion.CONFIG]
        config.size, config.flags = len(self.config), RegionFlag.RW

    def setup_region(self, index: int, new: Region) -> None:
        require(not new.flags & ~0x3F and bool(new.flags & RegionFlag.RW))
        require(bool(new.access) or not new.flags & RegionFlag.ALWAYS_CB)
        require(not new.areas or new.fd != -1)
        require(0 <= index < len(self.regions))
        if index <= PciDevRegion.BAR5:
            least = 16 if new.flags & RegionFlag.MEM else 4
            require(new.size == 0 or (new.size.bit_count() == 1 and new.size >= least))
            wide = new.flags & RegionFlag.BITS_64
            require(not wide or (index % 2 == 0 and self.regions[index + 1].size == 0))
            require(index % 2 == 0 or not self.regions[index - 1].flags & RegionFlag.BITS_64)
        if index == PciDevRegion.CONFIG:
            require(new.flags & (RegionFlag.RW | RegionFlag.MEM) == RegionFlag.RW)
        require(all(offset + size <= new.size for offset, size in new.areas))
        if new.fd != -1 and not new.areas:
            new.areas = [(0, new.size)]
        new.ioeventfds = self.regions[index].ioeventfds
        self.regions[index] = new

    def realize(self) -> None:
        if self.config is None:
            config = self.regions[PciDevRegion.CONFIG]
            if not config.size:
                config.size, config.flags = 256, RegionFlag.RW
            self.config = ctypes.create_string_buffer(config.size)
        for index, region in enumerate(self.regions[:6]):
            bits = 0 if region.flags & RegionFlag.MEM else 1
            bits |= (4 if region.flags & RegionFlag.BITS_64 else 0) | (8 if region.flags & RegionFlag.PREFETCH else 0)
            self.config[0x10 + 4 * index] = ord(self.config[0x10 + 4 * index]) | bits
        self.config[0x3D] = self.irqs.counts[PciIrq.INTX] and 1
        self.irqs.vectors = [-1] * max(self.irqs.counts)

    # --- Requests: (reply, descriptors) -----------------------------------------------------------------------------

    def info(self, payload: bytes) -> bytes:
        require(len(payload) >= DEVICE_INFO.sizeof() and DEVICE_INFO.parse(payload).argsz >= DEVICE_INFO.sizeof())
        flags = DeviceFlags.PCI | DeviceFlags.RESET
        return DEVICE_INFO.build({"argsz": 16, "flags": flags, "num_regions": 9, "num_irqs": 5})

    def region_info(self, payload: bytes) -> tuple[bytes, list[int]]:
        require(len(payload) >= REGION_INFO.sizeof())
        request = REGION_INFO.parse(payload)
        require(request.argsz >= REGION_INFO.sizeof() and request.index < len(self.regions))
        region = self.regions[request.index]
        flags = RegionFlags(region.flags & RegionFlag.RW) | (RegionFlags.MMAP if region.fd != -1 else 0)
        capability, fds, at = b"", [], 0
        if region.size and region.areas:
            areas = [{"offset": offset, "size": size} for offset, size in region.areas]
            header = INFO_CAP_HEADER.build({"id": RegionInfoCap.SPARSE_MMAP, "version": 1, "next": 0})
            capability = header + SPARSE_MMAP.build({"areas": areas})
        argsz = REGION_INFO.sizeof() + len(capability)
        if capability and request.argsz >= argsz:
            flags, fds, at = flags | RegionFlags.CAPS, [region.fd], REGION_INFO.sizeof()
        else:
            capability = bytes(min(len(capability), request.argsz - REGION_INFO.sizeof()))
        values = {"argsz": argsz, "flags": flags, "index": request.index, "cap_offset": at}
        return REGION_INFO.build(values | {"size": region.size, "offset": region.offset}) + capability, fds

    def irq_info(self, payload: bytes) -> bytes:
        require(len(payload) >= IRQ_INFO.sizeof())
        request = IRQ_INFO.parse(payload)
        require(request.argsz >= IRQ_INFO.sizeof() and request.index < len(self.irqs.counts))
        count = self.irqs.counts[request.index]
        return IRQ_INFO.build({"argsz": 16, "flags": IrqInfoFlags.EVENTFD, "index": request.index, "count": count})

    def io_fds(self, payload: bytes) -> tuple[bytes, list[int]]:
        require(len(payload) >= REGION_IO_FDS.sizeof())
        request = REGION_IO_FDS.parse(payload)
        require(request.flags == request.count == 0 and request.index < len(self.regions))
        region = self.regions[request.index]
        require(bool(region.flags) and 16 <= request.argsz <= _MAX_TRANSFER)
        argsz = 16 + _IOEVENTFD.size * len(region.ioeventfds)
        entries, fds = b"", list[int]()
        for offset, size, fd, flags, datamatch in reversed(region.ioeventfds) if request.argsz >= argsz else ():
            if fd not in fds:
                fds.append(fd)
            entries += _IOEVENTFD.pack(offset, size, fds.index(fd), 0, flags, 0, 0, datamatch)
        head = {"argsz": argsz, "flags": 0, "index": request.index, "count": len(region.ioeventfds)}
        return REGION_IO_FDS.build(head) + entries, fds

    def access(self, payload: bytes, is_write: bool) -> bytes:
        size = REGION_ACCESS.sizeof()
        require(len(payload) >= size)
        request = REGION_ACCESS.parse(payload)
        require(request.count <= _MAX_TRANSFER and (not is_write or len(payload) - size == request.count))
        require(request.region < len(self.regions))
        region = self.regions[request.region]
        require(request.offset + request.count <= region.size)
        if request.count == 0:
            return b""
        data = payload[size:] if is_write else bytes(request.count)
        buffer = ctypes.create_string_buffer(data, request.count)
        if request.region == PciDevRegion.CONFIG and not region.flags & RegionFlag.ALWAYS_CB:
            require(not is_write)  # the library's own emulation of config space is not here
            stored: bytes = self.config.raw[request.offset : request.offset + request.count]
            return payload[:size] + stored
        done, number = -1, errno.EINVAL
        if region.access:
            done = region.access(self.handle, ctypes.addressof(buffer), request.count, request.offset, is_write)
            number = ctypes.get_errno() if done < 0 else errno.EINVAL
        reply = payload[:size] + (b"" if is_write else buffer.raw)
        if done != request.count:
            raise AnsweredError(number, reply)
        return reply
