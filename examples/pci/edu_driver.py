"""Driver of edu.py in Python: ``async with pci_function(Edu()) as f: driver = EduDriver(f)``."""

from vfiouser_virtio.guest.function import GuestFunction

IDENT, LIVENESS, FACTORIAL, STATUS, IRQ_STATUS, IRQ_RAISE, IRQ_ACKNOWLEDGE = 0x00, 0x04, 0x08, 0x20, 0x24, 0x60, 0x64
SOURCE, TARGET, COUNT, COMMAND = 0x80, 0x88, 0x90, 0x98
START, FROM_CHIP, INTERRUPT = 1, 2, 4
BUFFER = 0x40000


class EduDriver:
    """Driver of one chip. Raises RuntimeError for a chip that is another one, or dead."""

    def __init__(self, function: GuestFunction) -> None:
        self.regs, self.irq, self.memory = function.bar[0], function.irq[0], function.memory

    async def probe(self) -> None:
        """Look whether this is the chip, and alive."""
        if await self.regs.read32(IDENT) & 0xFF != 0xED:
            raise RuntimeError("this is no edu")
        await self.regs.write32(LIVENESS, 0x1234_5678)
        if await self.regs.read32(LIVENESS) != 0xEDCB_A987:
            raise RuntimeError("the chip is dead")
        await self.regs.write32(STATUS, 0x80)

    async def factorial(self, number: int) -> int:
        """number! modulo 2**32; waits for the interrupt."""
        await self.regs.write32(FACTORIAL, number)
        await self._interrupted()
        return await self.regs.read32(FACTORIAL)

    async def store(self, data: bytes, at: int = 0) -> None:
        """Put data into the chip's buffer, by DMA."""
        with_room = self.memory.alloc(max(len(data), 1))
        try:
            with_room.view[: len(data)] = data
            await self.transfer(with_room.address, BUFFER + at, len(data), START | INTERRUPT)
        finally:
            self.memory.free(with_room)

    async def load(self, count: int, at: int = 0) -> bytes:
        """What is in the chip's buffer, by DMA."""
        room = self.memory.alloc(max(count, 1))
        try:
            await self.transfer(BUFFER + at, room.address, count, START | FROM_CHIP | INTERRUPT)
            return bytes(room.view[:count])
        finally:
            self.memory.free(room)

    async def transfer(self, source: int, target: int, count: int, command: int) -> None:
        """One DMA, however wrong it is."""
        for register, value in ((SOURCE, source), (TARGET, target), (COUNT, count), (COMMAND, command)):
            await self.regs.write64(register, value)
        await self._interrupted()

    async def _interrupted(self) -> None:
        causes = 0
        while not causes:  # INTx may come once more for what is acknowledged already
            await self.irq.wait()
            causes = await self.regs.read32(IRQ_STATUS)
        await self.regs.write32(IRQ_ACKNOWLEDGE, causes)
