"""A `VfioDevice` with no device in it: five regions of plain bytes, and a list of what it was asked."""

import errno
from collections.abc import Sequence
from typing import Any

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.vfio_device import (
    Buffer,
    DeviceFlags,
    DeviceInfo,
    DmaClient,
    Hold,
    IoEventFd,
    IrqInfo,
    IrqInfoFlags,
    IrqSetFlags,
    PciIrq,
    PciRegion,
    RegionFlags,
    RegionInfo,
)


class EchoDevice:
    """Remembers writes, the DMA table and the eventfds; `calls` are (method, arguments...) in order."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.client: DmaClient | None = None
        self.regions = {index: bytearray(size) for index, size in ((0, 0x4000), (4, 0x4000), (PciRegion.CONFIG, 256))}
        self.capabilities: dict[int, tuple[tuple[int, int, bytes], ...]] = {}
        self.region_fds: dict[int, tuple[int, ...]] = {}
        self.io: list[IoEventFd] = []
        self.maps: dict[int, tuple[int, int | None]] = {}
        self.irqs: dict[tuple[int, int, int], int] = {}
        self.irq_counts = {PciIrq.INTX: 1, PciIrq.MSIX: 32}
        self.hold: Hold | None = None
        """Returned once by the next `dma_unmap` or `reset`."""
        self.disconnect_hold: Hold | None = None
        self.bug: Exception | None = None
        """Raised by every `region_read`."""

    def names(self) -> list[str]:
        """The methods called, in order."""
        return [call[0] for call in self.calls]

    def connected(self, client: DmaClient) -> None:
        self.calls.append(("connected", client.name))
        self.client = client

    def disconnected(self) -> Hold | None:
        self.calls.append(("disconnected",))
        self.client = None
        close_all(fd for _size, fd in self.maps.values() if fd is not None)
        close_all(self.irqs.values())
        self.maps.clear()
        self.irqs.clear()
        return self.disconnect_hold

    def device_info(self) -> DeviceInfo:
        return DeviceInfo(DeviceFlags.RESET | DeviceFlags.PCI, 9, 5)

    def region_info(self, index: int) -> RegionInfo:
        if index >= 9:
            raise PeerError(f"DEVICE_GET_REGION_INFO: no region 0x{index:x}")
        fds = self.region_fds.get(index, ())
        flags = RegionFlags.READ | RegionFlags.WRITE | (RegionFlags.MMAP if fds else RegionFlags(0))
        if index not in self.regions:
            return RegionInfo()
        return RegionInfo(flags, len(self.regions[index]), 0, self.capabilities.get(index, ()), fds)

    def irq_info(self, index: int) -> IrqInfo:
        if index not in self.irq_counts:
            raise PeerError(f"DEVICE_GET_IRQ_INFO: no interrupts of index 0x{index:x}")
        return IrqInfo(IrqInfoFlags.EVENTFD, self.irq_counts[PciIrq(index)])

    def io_fds(self, index: int) -> Sequence[IoEventFd]:
        return self.io if index == 4 else []

    def region_read(self, index: int, offset: int, count: int) -> Buffer:
        self.calls.append(("region_read", index, offset, count))
        if self.bug is not None:
            raise self.bug
        self._check(index, offset, count)
        return bytes(self.regions[index][offset : offset + count])

    def region_write(self, index: int, offset: int, data: Buffer) -> None:
        self.calls.append(("region_write", index, offset, bytes(data)))
        self._check(index, offset, len(data))
        self.regions[index][offset : offset + len(data)] = data

    def _check(self, index: int, offset: int, count: int) -> None:
        if index not in self.regions or offset + count > len(self.regions[index]):
            raise PeerError(f"no 0x{count:x} bytes at 0x{offset:x} of region 0x{index:x}")

    def dma_map(self, address: int, size: int, *, readable: bool, writable: bool, fd: int | None, offset: int) -> None:
        self.calls.append(("dma_map", address, size, readable, writable, fd is not None, offset))
        if address in self.maps:
            close_all([] if fd is None else [fd])
            raise PeerError(f"DMA_MAP: 0x{address:x} is mapped", errno.EEXIST)
        self.maps[address] = (size, fd)

    def dma_unmap(self, address: int, size: int) -> Hold | None:
        self.calls.append(("dma_unmap", address, size))
        for start in [start for start in self.maps if address <= start < address + size]:
            _size, fd = self.maps.pop(start)
            close_all([] if fd is None else [fd])
        return self._take_hold()

    def set_irqs(
        self, index: int, flags: IrqSetFlags, start: int, count: int, data: Buffer, fds: Sequence[int]
    ) -> None:
        self.calls.append(("set_irqs", index, flags, start, count, bytes(data), len(fds)))
        action = flags & (IrqSetFlags.ACTION_MASK | IrqSetFlags.ACTION_UNMASK | IrqSetFlags.ACTION_TRIGGER)
        if flags & IrqSetFlags.DATA_EVENTFD:
            for number in range(start, start + count):
                close_all([fd for fd in [self.irqs.pop((index, action, number), None)] if fd is not None])
            self.irqs.update({(index, action, start + number): fd for number, fd in enumerate(fds)})
        else:
            close_all(fds)

    def reset(self) -> Hold | None:
        self.calls.append(("reset",))
        return self._take_hold()

    def _take_hold(self) -> Hold | None:
        hold, self.hold = self.hold, None
        return hold
