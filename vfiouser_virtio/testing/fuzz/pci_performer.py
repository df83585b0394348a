"""Steps of a fuzz case of a PCI device of an author's own, whose registers have names in them."""

from vfiouser_virtio.protocols.vfio_user import Command, PciRegion
from vfiouser_virtio.testing.fuzz.case import Case
from vfiouser_virtio.testing.fuzz.client import FuzzClient
from vfiouser_virtio.testing.fuzz.message_performer import MessagePerformer
from vfiouser_virtio.testing.fuzz.oracle import Found
from vfiouser_virtio.testing.fuzz.pci_bounds import PciBounds
from vfiouser_virtio.testing.fuzz.pci_driver import PciFuzzDriver
from vfiouser_virtio.testing.fuzz.ram import FuzzRam
from vfiouser_virtio.testing.fuzz.register_map import RegisterMap, Spot
from vfiouser_virtio.vfio_device import VfioDevice


class PowerOn:
    """State that a device shows after a reset: what is the same after two of them, before anything else was done."""

    def __init__(self) -> None:
        self.seen: dict[str, bytes] | None = None


class PciPerformer(MessagePerformer[PciFuzzDriver, PciBounds]):
    """Part of one client in a case."""

    def __init__(
        self,
        client: FuzzClient,
        ram: FuzzRam,
        bounds: PciBounds,
        case: Case,
        registers: RegisterMap,
        served: VfioDevice,
        power_on: PowerOn,
    ) -> None:
        driver = PciFuzzDriver(client, ram, bounds, case.memory, registers, served, direct=case.direct)
        super().__init__(client, ram, case, driver, bounds)
        self._registers = registers
        self._power_on = power_on

    def disturbed(self, command: int, region: int | None = None, offset: int = 0) -> None:  # noqa: ARG002
        """Memory may be mapped where it is not by `PciFuzzDriver.map`, and Bus Master be on again."""
        self.bounds.anywhere |= command == Command.DMA_MAP
        self.bounds.quiet = False

    # ---- the life of a device ------------------------------------------------------------------------------------

    async def do_bring_up(self) -> None:
        """From any state to one in which it works."""
        self.client.answers.clear()
        await self.client.answer_late()
        await self.driver.bring_up()

    async def do_reset(self) -> None:
        """DEVICE_RESET, which is not waited for."""
        self.disturbed(Command.DEVICE_RESET)
        await self.client.call(Command.DEVICE_RESET)

    async def do_settle(self) -> None:
        """Wait until the device has done what it can, and look at what it did."""
        await self.driver.settle()
        self.bounds.check()

    async def do_capability(self, id: int, at: int, data: str) -> None:  # noqa: A002 - the name of the field
        """Write in a capability, where the device has it: power states, function level resets, MSI and MSI-X."""
        offset = await self.driver.capability(id)
        if offset:
            self.disturbed(Command.REGION_WRITE, PciRegion.CONFIG, offset)
            self.driver.write(PciRegion.CONFIG, offset + at, bytes.fromhex(data))
            await self.client.flush()

    async def do_check(self) -> None:
        """The device works: after a reset it is quiet, and shows what it has shown before anything was done to it."""
        self.client.answers.clear()
        await self.client.answer_late()
        if self._power_on.seen is None:
            await self._learn()
        await self.driver.reset()
        await self.driver.unmap_all()
        await self.driver.map()
        if self.client.closed.is_set():
            return
        self.bounds.forget()
        await self._look()
        self.bounds.check()
        self.bounds.quiet = False
        await self.driver.wake()
        await self.driver.settle()
        self.bounds.check()

    async def _learn(self) -> None:
        """Look at a new device, before anything is done to it. What changes from reset to reset says nothing."""
        await self.driver.reset()
        first = await self.driver.snapshot()
        await self.driver.reset()
        second = await self.driver.snapshot()
        self._power_on.seen = {name: value for name, value in first.items() if second[name] == value}

    async def _look(self) -> None:
        seen, before = await self.driver.snapshot(), self._power_on.seen or {}
        for name, value in seen.items():
            if before.get(name, value) != value:
                what = f"after a reset {name} is {_shown(value)}, and was {_shown(before[name])} at first"
                raise Found("broken", what, name)

    async def leave_quiet(self) -> None:
        """Reset the device before the client goes; it stores nothing after that."""
        await self.driver.reset()
        self.bounds.forget()
        await self.driver.settle()
        self.bounds.check()

    # ---- registers -----------------------------------------------------------------------------------------------

    async def do_get(self, register: str, at: int = 0, size: int | None = None) -> None:
        """Read a register, or some bytes from ``at`` on."""
        spot = self._spot(register)
        await self.driver.read(spot.region, spot.offset + at, size or spot.size)

    async def do_set(
        self, register: str, value: int, at: int = 0, size: int | None = None, posted: bool = True
    ) -> None:
        """Write a register, or some bytes from ``at`` on. Posted writes go out with the next request."""
        spot = self._spot(register)
        size = size or min(spot.size, 8)
        data = (value & (1 << 8 * size) - 1).to_bytes(size, "little")
        if posted:
            self.disturbed(Command.REGION_WRITE, spot.region, spot.offset)
            self.driver.write(spot.region, spot.offset + at, data)
        else:
            await self.do_write(spot.region, spot.offset + at, data.hex())

    async def do_poke(self, at: int, data: str) -> None:
        """Store to RAM."""
        self.ram.write(at, bytes.fromhex(data))

    def _spot(self, register: str) -> Spot:
        return self._registers.spots[register]


def _shown(value: bytes) -> str:
    return hex(int.from_bytes(value, "little")) if len(value) <= 8 else f"{value[:32].hex()}…"
