"""Accelerator that does not exist: SHA-256 of buffers in memory, by a queue of jobs, for uio_pci_generic or vfio-pci.

Of this kind is much that is built today, and its first driver is often in user space. The register map is this file's
own; `tests/interop/test_gallery.py` has a driver for it in shell.

::

    BAR0  0x00 ident     0x5348_4132             0x18 tail     doorbell: jobs up to here are to be done
          0x04 control   bit 0 enable; 0 resets  0x1c head     jobs up to here are done
          0x08 ring      address, 64 bits        0x20 status   bit 0 jobs done, bit 1 ring broken; written 1s clear
          0x10 size      of the ring, in jobs

    job   0x00 source    address, 64 bits        0x10 length   in bytes, at most 1 MiB
          0x08 digest    address, 64 bits        0x14 result   1 done, 2 length too big   ◀─ ours
"""

import hashlib
import struct

import trio

from vfiouser_virtio import main
from vfiouser_virtio.pci import DmaFault, Doorbell, Identity, PciDevice, Register, bar, flag, interrupts

IDENT = 0x5348_4132
JOB = struct.Struct("<QQII")
MAX_JOBS = 256
MAX_LENGTH = 1 << 20
"""A driver could say 4 GiB, and all other devices of this process would wait for it."""
PIECE = 64 << 10
DONE, TOO_LONG = 1, 2


class Control(Register):
    enable = flag(0)


class Status(Register):
    done = flag(0)
    broken = flag(1)


class Accelerator(PciDevice):
    identity = Identity(vendor=0x1234, device=0x5A12, class_code=0x120000)
    irq = interrupts(1, msix_bar=1)

    regs = bar(0, size=0x1000)
    ident = Register(0x00, reset=IDENT, access="ro")
    control = Control(0x04)
    ring = Register(0x08, width=64)
    size = Register(0x10)
    tail = Doorbell(0x18)
    head = Register(0x1C, access="ro")
    status = Status(0x20, access="w1c")

    @control.on_write
    def control_written(self, _value: int, old: int) -> None:
        if old & 1 and not self.control.enable:
            self.soft_reset()

    @status.on_write
    def status_written(self, _value: int) -> None:
        if not self.status.value:
            self.irq[0].clear()

    async def run(self) -> None:
        async for tail in self.tail:
            if not self.control.enable:
                continue
            try:
                await self._work(tail)
            except DmaFault as fault:
                self.log.warning("%s: the ring stands still until it is reset", fault)
                self.status.broken = True
                self.irq[0].trigger()
                return
            if self.status.value:
                self.irq[0].trigger()

    async def _work(self, tail: int) -> None:
        size = self.size.value
        if not 0 < size <= MAX_JOBS or tail >= size:
            raise DmaFault(f"tail {tail:#x} in a ring of {size:#x} jobs, which has 1 to {MAX_JOBS:#x}")
        while self.head.value != tail:
            address = self.ring.value + JOB.size * self.head.value
            source, digest, length, _ = JOB.unpack(await self.dma.read(address, JOB.size))
            result = TOO_LONG
            if length <= MAX_LENGTH:
                sha = hashlib.sha256()
                for start in range(0, length, PIECE):
                    sha.update(await self.dma.read(source + start, min(PIECE, length - start)))
                    await trio.lowlevel.checkpoint()  # other devices have their turns
                await self.dma.write(digest, sha.digest())
                result = DONE
            await self.dma.write(address + JOB.size - 4, result.to_bytes(4, "little"))
            self.head.value = (self.head.value + 1) % size
            self.status.done = True


if __name__ == "__main__":
    main(Accelerator)
