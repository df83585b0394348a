"""Chips with one bug each, for the oracle of the fuzzer of PCI devices."""

import os
import time
from typing import ClassVar

import trio

from vfiouser_virtio.errors import Unmapped
from vfiouser_virtio.pci import (
    BarMemory,
    DmaFault,
    Doorbell,
    Identity,
    PciDevice,
    Register,
    bar,
    field,
    flag,
    vendor_capability,
)


class Command(Register):
    start = flag(0)
    mode = field(6, 4)


class GoodChip(PciDevice):
    """Copies at most a page, in `run`."""

    identity = Identity(vendor=0x1234, device=0xBAD, class_code=0xFF0000)
    regs = bar(0, size=0x100)
    command = Command(0x00)
    total = Register(0x04)
    address = Register(0x08, width=64)
    length = Register(0x10)
    go = Doorbell(0x14)
    serial = Register(0x18, sticky=True)
    flash = BarMemory(0x40, size=0x40, sticky=True)

    async def run(self) -> None:
        async for _ in self.go:
            try:
                data = await self.dma.read(self.address.value, min(self.length.value, 4096))
                await self.dma.write(self.address.value, data[::-1])
            except DmaFault:
                self.total.value = 0xFFFF_FFFF


class RaisesInAHook(GoodChip):
    mode = Command(0x20)

    @mode.on_write
    def chosen(self) -> None:
        [0, 1, 2, 3, 4, 5, 6][self.mode.mode]


class StallsInAHook(GoodChip):
    slow = Register(0x20)

    @slow.on_write
    def counts(self, value: int) -> None:
        end = time.thread_time() + value
        while time.thread_time() < end:
            pass


class TakesWhatItIsTold(GoodChip):
    async def run(self) -> None:
        async for _ in self.go:
            bytearray(self.length.value)


class DoesNotReset(GoodChip):
    def __init__(self) -> None:
        super().__init__()
        self.kept = 0

    async def run(self) -> None:
        async for value in self.go:
            self.kept = value

    def reset(self) -> None:
        self.total.value = self.kept


class NeverRests(GoodChip):
    async def run(self) -> None:
        async for _ in self.go:
            while self.command.start:
                await trio.lowlevel.checkpoint()


def _stores(_offset: int, _count: int) -> None:
    for chip in IgnoresBusMaster.made[-1:]:
        try:
            chip.dma.memory.writable(0x1000, 4)[0][:] = b"late"
        except Unmapped:
            pass


class IgnoresBusMaster(GoodChip):
    """Stores whenever config space is read, past `Dma`."""

    made: ClassVar[list[GoodChip]] = []
    capabilities = (vendor_capability(b"look", on_read=_stores),)

    def __init__(self) -> None:
        super().__init__()
        self.made.append(self)

    def close(self) -> None:
        self.made.clear()


class LeaksAFile(GoodChip):
    def __init__(self) -> None:
        super().__init__()
        self.leaked: list[int] = []

    async def run(self) -> None:
        async for _ in self.go:
            self.leaked.append(os.dup(0))

    def close(self) -> None:
        for fd in self.leaked:
            os.close(fd)


class MistakenAuthor(GoodChip):
    """A value that its register has no room for: an error without a traceback."""

    async def run(self) -> None:
        async for value in self.go:
            self.total.value = value + 0xFFFF_FFFF
