"""PCI function of a QEMU that never runs, reached by qtest: a `PciPort` through QEMU's own vfio-user client.

`QtestPort.power_on` does what firmware would have done before a driver comes: it gives the BARs their addresses
(PCI 3.0, 6.2.5.1).
"""

from collections.abc import Callable

from vfiouser_virtio.guest.ports import DmaMemory
from vfiouser_virtio.protocols.pci import (
    MSIX_ENTRY_SIZE,
    STD_NUM_BARS,
    BaseAddress,
    CapId,
    PciCommand,
)
from vfiouser_virtio.testing.doorbell import InterruptDoorbell, MsixMessage
from vfiouser_virtio.testing.qtest import Qtest

ECAM_BASE = 0xB000_0000
"""Where `qtest_machine` puts the enhanced configuration space: QEMU's firmware chooses the same on q35."""
_ECAM_PER_SLOT = 8 * 4096  # eight functions of 4 KiB each (PCIe 4.0, 7.2.2)
_COMMAND, _BAR0, _CAPABILITY_LIST = 0x04, 0x10, 0x34
_MEMORY_FLAGS = 0xF  # what is no address in a memory BAR
_MASKED = 1


class BarAddresses:
    """Guest-physical addresses for BARs, below 4 GiB and above ECAM."""

    def __init__(self) -> None:
        self._next = 0xC000_0000

    def take(self, size: int) -> int:
        """Room for a BAR of ``size`` bytes, a power of two."""
        address = -(-self._next // size) * size
        self._next = address + size
        # From here on the chipset has its own: IO-APIC, HPET, local APIC (QEMU, hw/i386/q35).
        assert self._next <= 0xFEC0_0000, "too many, or too big BARs for this little machine"
        return address


class InterruptLines:
    """Levels of the inputs of the IO-APIC, and their handlers."""

    def __init__(self) -> None:
        self._handlers: dict[int, Callable[[], None]] = {}
        self._raised: set[int] = set()

    def change(self, line: int, level: bool) -> None:
        """What QEMU says about one line."""
        if not level:
            self._raised.discard(line)
            return
        self._raised.add(line)
        if handler := self._handlers.get(line):
            handler()

    def connect(self, line: int, handler: Callable[[], None] | None) -> None:
        """Call ``handler`` when a line goes up; at once if it is up already."""
        self._handlers.pop(line, None)
        if handler is not None:
            self._handlers[line] = handler
            if line in self._raised:
                handler()


class QtestPort:
    """Function in a slot of bus 0, as `guest.ports.PciPort` has it. A BAR in I/O space gets no address."""

    def __init__(
        self, qtest: Qtest, slot: int, name: str, memory: DmaMemory, doorbell: InterruptDoorbell, lines: InterruptLines
    ) -> None:
        self.name = name
        self.memory = memory
        self.bars: dict[int, int] = {}
        """Guest-physical address of each memory BAR, after `power_on`."""
        self._qtest = qtest
        self._config = ECAM_BASE + slot * _ECAM_PER_SLOT
        self._doorbell, self._messages = doorbell, list[MsixMessage]()
        self._lines = lines
        # How q35 wires pin A of slots 0 to 24 while no firmware has said otherwise: PIRQE to PIRQH in turn, which are
        # inputs 20 to 23 of the IO-APIC (QEMU, hw/isa/lpc_ich9.c).
        self._line = 20 + slot % 4

    async def power_on(self, addresses: BarAddresses) -> None:
        """Size the BARs, give them addresses, and let the function answer there."""
        bar = 0
        while bar < STD_NUM_BARS:
            size, wide = await self._size_bar(bar)
            if size:
                self.bars[bar] = address = addresses.take(size)
                await self.config_write(_BAR0 + 4 * bar, 4, address)
                if wide:
                    await self.config_write(_BAR0 + 4 * bar + 4, 4, address >> 32)
            bar += 2 if wide else 1
        await self.config_write(_COMMAND, 2, await self.config_read(_COMMAND, 2) | PciCommand.MEMORY)

    async def _size_bar(self, bar: int) -> tuple[int, bool]:
        """The size of a memory BAR, 0 if there is none, and whether it is 64 bits wide."""
        offset = _BAR0 + 4 * bar
        await self.config_write(offset, 4, 0xFFFF_FFFF)
        low = await self.config_read(offset, 4)
        if not low or low & BaseAddress.SPACE_IO:
            return 0, False
        if not low & BaseAddress.MEM_TYPE_64:
            return 2**32 - (low & ~_MEMORY_FLAGS), False
        await self.config_write(offset + 4, 4, 0xFFFF_FFFF)
        high = await self.config_read(offset + 4, 4)
        return 2**64 - (high << 32 | low & ~_MEMORY_FLAGS), True

    async def config_read(self, offset: int, size: int) -> int:
        return await self._qtest.read(self._config + offset, size)

    async def config_write(self, offset: int, size: int, value: int) -> None:
        await self._qtest.write(self._config + offset, size, value)

    async def bar_read(self, bar: int, offset: int, size: int) -> int:
        return await self._qtest.read(self.bars[bar] + offset, size)

    async def bar_write(self, bar: int, offset: int, size: int, value: int) -> None:
        self.bar_post(bar, offset, size, value)
        # QEMU does not wait for the server after a write to memory; but this read of the vendor id goes to it, behind.
        await self.config_read(0, 2)

    def bar_post(self, bar: int, offset: int, size: int, value: int) -> None:
        self._qtest.post_write(self.bars[bar] + offset, size, value)

    async def connect_msix(self, handlers: list[Callable[[], None]]) -> None:
        table = await self._msix_table()
        for vector, message in enumerate(self._messages):
            await self._qtest.write(table + vector * MSIX_ENTRY_SIZE + 12, 4, _MASKED)
            self._doorbell.disconnect(message)
        self._messages = [self._doorbell.connect(handler) for handler in handlers]
        for vector, message in enumerate(self._messages):
            fields = (message.address & 0xFFFF_FFFF, message.address >> 32, message.data, 0)
            for number, value in enumerate(fields):
                await self._qtest.write(table + vector * MSIX_ENTRY_SIZE + 4 * number, 4, value)

    async def connect_intx(self, handler: Callable[[], None] | None) -> None:
        self._lines.connect(self._line, handler)

    async def _msix_table(self) -> int:
        """The address of the MSI-X table. Raises LookupError when the function has no MSI-X."""
        at = await self.config_read(_CAPABILITY_LIST, 1)
        while at:
            header = await self.config_read(at, 2)
            if header & 0xFF == CapId.MSIX:
                where = await self.config_read(at + 4, 4)
                return self.bars[where & 7] + (where & ~7)
            at = header >> 8
        raise LookupError(f"{self.name}: no MSI-X capability")
