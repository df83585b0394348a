"""A driver's accesses to a `PciDevice` in this process: registers through its function, and RAM of its own."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import trio
import trio.testing
from support.pci import Client

from vfiouser_virtio.pci import PciDevice
from vfiouser_virtio.transports.pci_device import PciDeviceFunction
from vfiouser_virtio.vfio_device import Buffer, PciRegion

RAM_SIZE = 1 << 20


class InProcessDriver:
    """Addresses of RAM begin at 0."""

    def __init__(self, function: PciDeviceFunction, bar: int) -> None:
        self.function, self.bar = function, bar
        self.ram = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.ram, RAM_SIZE)

    def read(self, offset: int, size: int = 4) -> int:
        return int.from_bytes(self.function.region_read(self.bar, offset, size), "little")

    def write(self, offset: int, value: int, size: int = 4) -> None:
        self.function.region_write(self.bar, offset, value.to_bytes(size, "little"))

    def set_command(self, command: int) -> None:
        self.function.region_write(PciRegion.CONFIG, 4, command.to_bytes(2, "little"))

    def put(self, address: int, data: bytes) -> None:
        os.pwrite(self.ram, data, address)

    def get(self, address: int, size: int) -> bytes:
        return os.pread(self.ram, size, address)

    @property
    def interrupted(self) -> bool:
        """Whether INTx is up."""
        return self.function.intx.level

    @staticmethod
    async def settle() -> None:
        """Until the device waits for something."""
        with trio.fail_after(120):
            await trio.testing.wait_all_tasks_blocked()


class AnsweringClient(Client):
    """Client whose RAM has no file descriptor for the device: it answers messages."""

    def __init__(self, ram: int) -> None:
        self._ram = ram

    async def dma_read(self, address: int, count: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return os.pread(self._ram, count, address)

    async def dma_write(self, address: int, data: Buffer) -> None:
        await trio.lowlevel.checkpoint()
        os.pwrite(self._ram, data, address)


@asynccontextmanager
async def driving(device: PciDevice, bar: int = 0, *, by_message: bool = False) -> AsyncIterator[InProcessDriver]:
    """The device is served, and its driver has turned everything on. ``by_message``: its RAM is reached by messages."""
    function = PciDeviceFunction(device)
    driver = InProcessDriver(function, bar)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function.serve)
        await driver.settle()
        function.connected(AnsweringClient(driver.ram) if by_message else Client())
        fd = None if by_message else os.dup(driver.ram)
        function.dma_map(0, RAM_SIZE, readable=True, writable=True, fd=fd, offset=0)
        driver.set_command(0x0007)
        await driver.settle()
        try:
            yield driver
        finally:
            function.disconnected()
            os.close(driver.ram)
            nursery.cancel_scope.cancel()
