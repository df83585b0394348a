"""A guest's accesses to the registers of a virtio-pci function, as a protocol engine makes them."""

import os
import struct
from collections.abc import Iterator

import trio
import trio.testing
from construct import Int32ul, Struct

from vfiouser_virtio.protocols.record import record
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.vfio_device import PciRegion
from vfiouser_virtio.virtio import Device, queue

COMMON, ISR, DEVICE_CFG, NOTIFY = 0x0000, 0x1000, 0x2000, 0x3000
NO_VECTOR = 0xFFFF
RAM, RAM_SIZE = 0x10_0000, 0x10_0000
PM_CAP, MSIX_CAP, EXP_CAP, VENDOR_CAP = 0x01, 0x11, 0x10, 0x09


class Echo(Device):
    device_id = 2
    requestq = queue(max_size=8)
    otherq = queue(max_size=16)

    def __init__(self) -> None:
        super().__init__(
            config=record(Struct("value" / Int32ul, "other" / Int32ul))(value=0x11223344), features=1 << 68
        )

    async def run(self) -> None:
        async for chain in self.requestq:
            chain.writable.write(chain.readable.read())
            chain.complete()


class Guest:
    """Register accesses by name, and a queue, through nothing but the seam."""

    name = "a client"
    uid: int | None = None

    def __init__(self, function: VirtioPci) -> None:
        self.function = function
        function.connected(self)
        fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, RAM_SIZE)
        self.ram = os.dup(fd)
        function.dma_map(RAM, RAM_SIZE, readable=True, writable=True, fd=fd, offset=0)
        self.config_write(4, b"\x06\x04")  # memory, bus master, no INTx
        self.avail_idx = 0

    async def dma_read(self, address: int, count: int) -> bytes:
        raise NotImplementedError

    async def dma_write(self, address: int, data: object) -> None:
        raise NotImplementedError

    def config(self, offset: int, size: int) -> int:
        return int.from_bytes(self.function.region_read(PciRegion.CONFIG, offset, size), "little")

    def config_write(self, offset: int, data: bytes) -> None:
        self.function.region_write(PciRegion.CONFIG, offset, data)

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.function.region_read(PciRegion.BAR4, offset, size), "little")

    def write(self, offset: int, size: int, value: int) -> None:
        self.function.region_write(PciRegion.BAR4, offset, value.to_bytes(size, "little"))

    def get(self, name: str) -> int:
        return self.read(*COMMON_CFG_OFFSETS[name])

    def set(self, name: str, value: int) -> None:
        self.write(*COMMON_CFG_OFFSETS[name], value)

    def capabilities(self) -> Iterator[tuple[int, int]]:
        at = self.config(0x34, 1)
        while at:
            yield self.config(at, 1), at
            at = self.config(at + 1, 1)

    def virtio_structures(self) -> dict[int, tuple[int, int, int, int]]:
        """cfg_type -> place of the capability, BAR, offset, length."""
        return {
            self.config(at + 3, 1): (at, self.config(at + 4, 1), self.config(at + 8, 4), self.config(at + 12, 4))
            for number, at in self.capabilities()
            if number == VENDOR_CAP
        }

    def negotiate(self, accepted: int = -1) -> None:
        for status in (1, 3):
            self.set("device_status", status)
        for select in (0, 1):
            self.set("driver_feature_select", select)
            self.set("device_feature_select", select)
            # Without EVENT_IDX: every used buffer is worth an interrupt.
            offered = self.get("device_feature") & ~(1 << 29 if select == 0 else 0)
            self.set("driver_feature", offered & accepted >> 32 * select)
        self.set("device_status", 11)
        assert self.get("device_status") == 11

    def enable(self, index: int, vector: int = NO_VECTOR) -> None:
        base = RAM + 0x4000 * index
        self.set("queue_select", index)
        self.set("queue_msix_vector", vector)
        for name, at in (("queue_desc", 0), ("queue_driver", 0x1000), ("queue_device", 0x2000)):
            offset = COMMON_CFG_OFFSETS[name][0]
            self.write(offset, 4, base + at)  # Linux writes halves
            self.write(offset + 4, 4, 0)
        self.set("queue_enable", 1)

    def start(self, vector: int = NO_VECTOR) -> None:
        self.negotiate()
        self.enable(0, vector)
        self.set("device_status", 15)

    def request(self, message: bytes) -> None:
        os.pwrite(self.ram, message, 0x8000)
        descs = struct.pack("<QIHH", RAM + 0x8000, len(message), 1, 1), struct.pack("<QIHH", RAM + 0x9000, 64, 2, 0)
        os.pwrite(self.ram, b"".join(descs), 0)
        os.pwrite(self.ram, struct.pack("<H", 0), 0x1000 + 4 + 2 * (self.avail_idx % 8))
        self.avail_idx += 1
        os.pwrite(self.ram, struct.pack("<H", self.avail_idx), 0x1002)
        self.write(NOTIFY, 2, 0)

    async def answer(self) -> bytes:
        await trio.testing.wait_all_tasks_blocked()
        index = struct.unpack("<H", os.pread(self.ram, 2, 0x2002))[0]
        assert index == self.avail_idx
        _, written = struct.unpack("<II", os.pread(self.ram, 8, 0x2004 + 8 * ((index - 1) % 8)))
        return os.pread(self.ram, written, 0x9000)
