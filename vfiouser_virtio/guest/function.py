"""PCI function for a small driver of one's own: BARs, interrupts and DMA memory, and nothing of virtio.

::

    async with open_function(port) as f:
        assert f.info.device == 0x11E8
        await f.bar[0].write32(0x08, 5)
        await f.irq[0].wait()
        buffer = f.memory.alloc(4096)
"""

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Literal

import trio

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.guest.pci import BarInfo, PciFunctionInfo, enumerate_function, set_command, set_msi, set_msix
from vfiouser_virtio.guest.ports import DmaMemory, MappingPort, MsiPort, PciPort
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import (
    EXP_CAP,
    STD_NUM_BARS,
    TYPE0_HEADER,
    CapId,
    ExpDevCap,
    ExpDevCtl,
    PciCommand,
)

_COMMAND, (_BAR0, _) = offsets(TYPE0_HEADER)["command"], offsets(TYPE0_HEADER)["base_address"]
_DEVCAP, _DEVCTL = offsets(EXP_CAP)["devcap"][0], offsets(EXP_CAP)["devctl"][0]

FunctionInterrupts = Literal["msix", "msi", "intx", "none"]


class BarAccess:
    """BAR of a function, of ``size`` bytes; offsets count from its begin, values are unsigned and little-endian."""

    def __init__(self, port: PciPort, info: BarInfo) -> None:
        self._port = port
        self.index, self.size = info.index, info.size

    async def read(self, offset: int, size: int) -> int:
        """Read 1, 2, 4 or 8 bytes."""
        return await self._port.bar_read(self.index, offset, size)

    async def write(self, offset: int, size: int, value: int) -> None:
        """Write 1, 2, 4 or 8 bytes; returns when the device has seen it."""
        await self._port.bar_write(self.index, offset, size, value)

    async def read8(self, offset: int) -> int:
        """As `read`."""
        return await self.read(offset, 1)

    async def read16(self, offset: int) -> int:
        """As `read`."""
        return await self.read(offset, 2)

    async def read32(self, offset: int) -> int:
        """As `read`."""
        return await self.read(offset, 4)

    async def read64(self, offset: int) -> int:
        """As `read`."""
        return await self.read(offset, 8)

    async def write8(self, offset: int, value: int) -> None:
        """As `write`."""
        await self.write(offset, 1, value)

    async def map(self, offset: int, size: int) -> memoryview:
        """Memory of the BAR, reached without a message from now on.

        Raises PeerError where the device does not offer that, ConfigError over a port that cannot (QEMU by qtest).
        """
        if not isinstance(self._port, MappingPort):
            raise ConfigError(f"{self._port.name}: memory cannot be mapped over this port: use carrier socket")
        return await self._port.bar_map(self.index, offset, size)

    async def write16(self, offset: int, value: int) -> None:
        """As `write`."""
        await self.write(offset, 2, value)

    async def write32(self, offset: int, value: int) -> None:
        """As `write`."""
        await self.write(offset, 4, value)

    async def write64(self, offset: int, value: int) -> None:
        """As `write`."""
        await self.write(offset, 8, value)


class FunctionIrq:
    """Interrupt of a function, as its driver gets it."""

    def __init__(self) -> None:
        self.count = 0
        """How often it came. INTx comes again until the driver has made the device lower the line."""
        self._seen = 0
        self._waiters = trio.lowlevel.ParkingLot()

    def raised(self) -> None:
        """It has come."""
        self.count += 1
        self._waiters.unpark_all()

    async def wait(self) -> None:
        """Wait until it has come since the last call: however often, that is one."""
        await trio.lowlevel.checkpoint()
        while self.count == self._seen:
            await self._waiters.park()
        self._seen = self.count


class GuestFunction:
    """PCI function that a driver has enabled: see `open_function`."""

    def __init__(
        self,
        port: PciPort,
        info: PciFunctionInfo,
        irq: Sequence[FunctionIrq],
        interrupts: FunctionInterrupts = "none",
    ) -> None:
        self.port, self.info = port, info
        self.interrupts: FunctionInterrupts = interrupts
        self.bar: Mapping[int, BarAccess] = {each.index: BarAccess(port, each) for each in info.bars}
        """BARs by their index."""
        self.irq = irq
        """Vectors of MSI-X or MSI, or INTx alone."""

    @property
    def memory(self) -> DmaMemory:
        """Memory that the device can reach."""
        return self.port.memory

    async def reset(self) -> None:
        """Function level reset (PCIe 4.0 §6.6.2), with config space as it was: BARs, Bus Master, interrupts.

        Raises ConfigError for a function that has none: one that is not ``express``, for instance.
        """
        express = self.info.find(CapId.EXP)
        if express is None or not int.from_bytes(express.data[_DEVCAP : _DEVCAP + 4], "little") & ExpDevCap.FLR:
            raise ConfigError(f"{self.port.name}: {self.info} has no function level reset")
        places = [_COMMAND, *((_BAR0 + 4 * index, 4) for index in range(STD_NUM_BARS))]
        saved = [await self.port.config_read(*place) for place in places]
        control = await self.port.config_read(express.offset + _DEVCTL, 2)
        await self.port.config_write(express.offset + _DEVCTL, 2, control | ExpDevCtl.BCR_FLR)
        for place, value in zip(reversed(places), reversed(saved), strict=True):
            await self.port.config_write(*place, value)
        await _enable_messages(self.port, self.info, self.interrupts, len(self.irq))


@asynccontextmanager
async def open_function(
    port: PciPort, *, interrupts: FunctionInterrupts | None = None, bus_master: bool = True
) -> AsyncIterator[GuestFunction]:
    """Enumerate the function behind ``port``, enable it, and disable it in the end.

    ``interrupts`` are MSI-X where it has that, else INTx, else none; MSI, with all its vectors, when it is asked for,
    over a port that has it (QEMU by qtest has not). Raises ConfigError for those that it does not
    have, DeviceBroken for a function that breaks the rules of PCI.
    """
    info = await enumerate_function(port)
    best: FunctionInterrupts = "msix" if info.msix is not None else "intx" if info.interrupt_pin else "none"
    chosen = interrupts or best
    if not {"msix": info.msix, "msi": info.msi, "intx": info.interrupt_pin, "none": True}[chosen]:
        raise ConfigError(f"{port.name}: {info} has no {chosen}")
    if chosen == "msi" and not isinstance(port, MsiPort):
        raise ConfigError(f"{port.name}: this port has no MSI: use carrier socket")
    enabled = PciCommand.IO | PciCommand.MEMORY | (PciCommand.MASTER if bus_master else 0)
    messages = info.msix if chosen == "msix" else info.msi if chosen == "msi" else None
    count = int(chosen == "intx") if messages is None else messages.vectors
    irq = [FunctionIrq() for _ in range(count)]
    await set_command(port, set=int(enabled))
    try:
        if chosen == "msix" and info.msix is not None:
            await port.connect_msix([each.raised for each in irq])
        elif chosen == "msi" and isinstance(port, MsiPort):
            await port.connect_msi([each.raised for each in irq])
        elif chosen == "intx":
            await port.connect_intx(irq[0].raised)
        await _enable_messages(port, info, chosen, count)
        yield GuestFunction(port, info, irq, chosen)
    finally:
        with trio.CancelScope(shield=True) as scope:
            scope.deadline = trio.current_time() + _CLOSE_S
            await _close(port, info, chosen)


async def _enable_messages(port: PciPort, info: PciFunctionInfo, interrupts: FunctionInterrupts, count: int) -> None:
    if interrupts == "msix" and info.msix is not None:
        await set_msix(port, info.msix, enable=True)
    elif interrupts == "msi" and info.msi is not None:
        await set_msi(port, info.msi, count)


async def _close(port: PciPort, info: PciFunctionInfo, interrupts: FunctionInterrupts) -> None:
    if interrupts == "intx":
        await port.connect_intx(None)
    elif interrupts == "msix" and info.msix is not None:
        await set_msix(port, info.msix, enable=False)
        await port.connect_msix([])
    elif interrupts == "msi" and info.msi is not None and isinstance(port, MsiPort):
        await set_msi(port, info.msi, 0)
        await port.connect_msi([])
    await set_command(port, clear=int(PciCommand.MASTER | PciCommand.MEMORY | PciCommand.IO))


_CLOSE_S = 5.0
"""Seconds that a device gets to answer a driver that leaves."""
