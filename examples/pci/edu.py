"""A chip for teaching: factorials, DMA and interrupts, with the registers of QEMU's "edu" device.

BAR 0, 1 MiB (QEMU's documentation, "EDU device", from which all of this is):

    0x00  identification, 0x010000ed                  0x60  raise interrupts: these bits
    0x04  liveness: reads as the inverse              0x64  acknowledge interrupts: these bits
    0x08  factorial: write n, read n!                 0x80  DMA: source, 64 bits
    0x20  status: 0x01 computing, 0x80 interrupt      0x88  DMA: target, 64 bits
          when the factorial is there                 0x90  DMA: bytes, 64 bits
    0x24  interrupt status                            0x98  DMA: command
    0x40000  4 KiB of its own, one end of each DMA
"""

import trio

from vfiouser_virtio import main
from vfiouser_virtio.pci import BarMemory, DmaFault, Identity, PciDevice, Register, bar, field, flag, interrupts

FACTORIAL, DMA_DONE = 0x001, 0x100
"""Causes of an interrupt."""
BUFFER, BUFFER_SIZE = 0x40000, 4096


class Status(Register):
    computing = flag(0, access="ro")
    interrupt = flag(7)


class DmaCommand(Register):
    start = flag(0)
    from_chip = flag(1)
    interrupt = flag(2)
    reserved = field(63, 3, access="ro")


class Edu(PciDevice):
    identity = Identity(vendor=0x1234, device=0x11E8, class_code=0x00FF00, revision=0x10)
    irq = interrupts(1, msi=True)
    needs_bus_master = False  # the factorial takes no DMA

    regs = bar(0, size=1 << 20)
    ident = Register(0x00, reset=0x0100_00ED, access="ro")
    liveness = Register(0x04)
    factorial = Register(0x08)
    status = Status(0x20)
    irq_status = Register(0x24, access="ro")
    irq_raise = Register(0x60, access="wo")
    irq_acknowledge = Register(0x64, access="wo")
    source = Register(0x80, width=64)
    target = Register(0x88, width=64)
    count = Register(0x90, width=64)
    command = DmaCommand(0x98, width=64)
    buffer = BarMemory(BUFFER, size=BUFFER_SIZE)

    @liveness.on_read
    def inverse(self) -> int:
        return ~self.liveness.value & 0xFFFF_FFFF

    @factorial.on_write
    def computes(self) -> None:
        self.status.computing = True

    @irq_raise.on_write
    def interrupt(self, causes: int) -> None:
        self.irq_status.value |= causes
        if self.irq_status.value:
            self.irq[0].trigger()  # a message for each cause, also while the one before is not acknowledged

    @irq_acknowledge.on_write
    def acknowledge(self, causes: int) -> None:
        self.irq_status.value &= ~causes
        if not self.irq_status.value:
            self.irq[0].clear()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.compute)
            nursery.start_soon(self.copy)

    async def compute(self) -> None:
        while True:
            product = 1
            for factor in range(2, min(await self.factorial.wait_written(), 34) + 1):
                product = product * factor & 0xFFFF_FFFF  # from 34! on that is 0
            self.factorial.value = product
            self.status.computing = False
            if self.status.interrupt:
                self.interrupt(FACTORIAL)

    async def copy(self) -> None:
        while True:
            await self.command.wait_written()
            if not self.command.start:
                continue
            try:
                await self.transfer()
            except DmaFault as fault:
                self.log.warning("%s", fault)
            self.command.start = False
            if self.command.interrupt:
                self.interrupt(DMA_DONE)

    async def transfer(self) -> None:
        own, address = self.target.value, self.source.value
        if self.command.from_chip:
            own, address = address, own
        start, count = own - BUFFER, self.count.value
        if not 0 <= start <= start + count <= BUFFER_SIZE:
            self.log.warning("DMA of %#x bytes at %#x of the chip is outside of its buffer", count, own)
        elif self.command.from_chip:
            await self.dma.write(address, self.buffer.data[start : start + count])
        else:
            self.buffer.data[start : start + count] = await self.dma.read(address, count)


if __name__ == "__main__":
    main(Edu)
