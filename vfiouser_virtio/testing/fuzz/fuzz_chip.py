"""A chip with something of everything that a `PciDevice` can have: what `fuzz self` looks at the package with."""

import struct

import trio

from vfiouser_virtio.pci import (
    Bank,
    BarKind,
    BarMemory,
    DmaFault,
    Doorbell,
    Fifo,
    Identity,
    PciDevice,
    Register,
    array,
    banks,
    bar,
    field,
    flag,
    interrupts,
)

COPY = struct.Struct("<QQII")
"""Source, target, length, flags: what lies in memory for a channel."""
MAX_COPY = 1 << 16
SLOW, INTERRUPT = 1, 2
"""Flags of a copy."""


class ChipControl(Register):
    enable = flag(0)
    reset = flag(1)
    mode = field(7, 4)
    done = flag(31, access="w1c")


class ChipChannel(Bank):
    """Copies from memory to memory, as descriptors say."""

    descriptor = Register(0x00, width=64)
    start = Doorbell(0x08)
    copied = Register(0x0C, access="ro")

    async def serve(self) -> None:
        """Copies for ever."""
        async for count in self.start:
            for number in range(min(count, 16)):
                await self.copy(self.descriptor.value + COPY.size * number)

    async def copy(self, address: int) -> None:
        """One of them. A DmaFault of it is only that channel's, and told in its register."""
        try:
            source, target, length, flags = COPY.unpack(await self.device.dma.read(address, COPY.size))
            length = min(length, MAX_COPY)
            if flags & SLOW:
                async with self.device.dma.view(target, length, write=True) as view:
                    await trio.sleep(0.005)
                    view[:] = await self.device.dma.read(source, length)
            else:
                await self.device.dma.write(target, await self.device.dma.read(source, length))
        except DmaFault:
            self.copied.value = 0xFFFF_FFFF
            return
        self.copied.value = length
        self.device.control.done = True
        if flags & INTERRUPT:
            self.device.irq[self.index].trigger()


class FuzzChip(PciDevice):
    """Two BARs with registers of each access, a FIFO, memory with and without a mapping, and two DMA channels."""

    name = "fuzz-chip"
    identity = Identity(vendor=0x1234, device=0xF022, class_code=0xFF0000)
    irq = interrupts(2, msix_bar=1, msi=True)

    regs = bar(0, size=0x4000)
    ident = Register(0x00, reset=0xF022_1234, access="ro")
    control = ChipControl(0x04)
    events = Register(0x08, access="rc", reset=0xF0)
    key = Register(0x0C, access="wo")
    enable_set = Register(0x10, access="w1s")
    strict = Register(0x14, widths=(4,))
    scratch = array(Register(0x20, width=16), count=4)
    count = Register(0x30, access="ro")
    serial = Register(0x38, reset=1, sticky=True)
    port = Fifo(0x40, depth=4, width=8, empty=0xEE)
    channels = banks(ChipChannel, 0x100, count=2, stride=0x10)
    notes = BarMemory(0x800, size=0x100, contents=b"notes")
    flash = BarMemory(0x1000, size=0x100, contents=b"flash", sticky=True)
    frames = BarMemory(0x2000, size=0x2000, contents=b"frames", mapped=True)

    doors = bar(2, size=0x1000, kind=BarKind.MEM64, prefetchable=True, widths=(4, 8))
    wide = Register(0x00, width=64)

    ports = bar(4, size=0x10, kind=BarKind.IO)
    index = Register(0x0, width=8)
    value = Register(0x1, width=8)

    def __init__(self) -> None:
        super().__init__()
        self.reads = 0

    def reset(self) -> None:
        self.reads = 0

    @control.on_write
    def control_written(self) -> None:
        if self.control.reset:
            self.soft_reset()
            return
        self.irq[0].set(self.control.enable and self.control.done)

    @count.on_read
    def next_count(self) -> int:
        self.reads = self.reads + 1 & 0xFFFF_FFFF
        return self.reads

    @port.on_write
    def echoed(self, value: int) -> None:
        self.port.push(value ^ 0xFF)

    @value.on_read
    def selected(self) -> int:
        return self.notes.data[self.index.value]

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for channel in self.channels:
                nursery.start_soon(channel.serve)
