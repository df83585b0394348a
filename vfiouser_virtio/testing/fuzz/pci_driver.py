"""Driver of a PCI device of an author's own: what it has in common with all such, by name of its registers."""

from collections.abc import Sequence

import trio
import trio.testing

from vfiouser_virtio.protocols.pci import PciCommand
from vfiouser_virtio.protocols.vfio_user import Command, PciRegion
from vfiouser_virtio.testing.fuzz.case import Memory
from vfiouser_virtio.testing.fuzz.client import FuzzClient
from vfiouser_virtio.testing.fuzz.deadline import ends_within
from vfiouser_virtio.testing.fuzz.function_driver import COMMAND_AT, FunctionDriver, capability
from vfiouser_virtio.testing.fuzz.oracle import Found
from vfiouser_virtio.testing.fuzz.pci_bounds import PciBounds
from vfiouser_virtio.testing.fuzz.ram import PIECES, FuzzRam
from vfiouser_virtio.testing.fuzz.register_map import RegisterMap, Spot
from vfiouser_virtio.vfio_device import VfioDevice

IDLE_TIMEOUT = 20.0
"""Seconds after which a device must have come to rest; far more than it needs for half a MiB of memory."""
_CONFIG_HEADER = 256
_DECODED = (PciCommand.MEMORY | PciCommand.IO).to_bytes(2, "little")
_LOOKED_AT = 256
_LONGEST_LOOK = 4096


class PciFuzzDriver(FunctionDriver):
    """Driver on one connection. Every call comes back early where the server has hung up."""

    def __init__(
        self,
        client: FuzzClient,
        ram: FuzzRam,
        bounds: PciBounds,
        memory: Memory,
        registers: RegisterMap,
        served: VfioDevice,
        *,
        direct: bool,
    ) -> None:
        """``served`` is the function itself; with ``direct`` its registers are accessed without the socket."""
        super().__init__(client, ram, memory, served if direct else None)
        self.bounds = bounds
        self.registers = registers
        self._served = served
        self._space: bytes | None = None

    async def map(self, pieces: Sequence[int] = range(len(PIECES))) -> None:
        """As `FunctionDriver.map`; the device may store there from now on."""
        self.bounds.pieces.update(pieces)
        await super().map(pieces)

    async def unmap(self, pieces: Sequence[int]) -> None:
        """As `FunctionDriver.unmap`; once that is answered, nothing is stored there."""
        await super().unmap(pieces)
        self.bounds.check()
        self.bounds.pieces.difference_update(pieces)

    async def unmap_all(self) -> None:
        """As `FunctionDriver.unmap_all`."""
        await super().unmap_all()
        self.bounds.check()
        self.bounds.pieces.clear()
        self.bounds.anywhere = False

    async def capability(self, name: int) -> int:
        """Where a capability is in config space; 0 where the device has none of that id."""
        if self._space is None:
            self._space = (await self.read(PciRegion.CONFIG, 0, _CONFIG_HEADER)).to_bytes(_CONFIG_HEADER, "little")
        return capability(self._space, name)

    async def bring_up(self) -> None:
        """From any state to one in which the device works: reset, awake, with Bus Master."""
        await self.reset()
        self.bounds.quiet = False
        await self.wake()
        await self.client.flush()

    async def reset(self) -> None:
        """DEVICE_RESET, which ends what the device was doing."""
        await self.client.flush()
        await self.client.call(Command.DEVICE_RESET)
        await self.settle()
        self.bounds.check()

    async def settle(self) -> None:
        """Wait until the device has done what it can. Raises Found for one that never comes to rest."""
        await self.client.flush()
        if not await ends_within(IDLE_TIMEOUT, trio.testing.wait_all_tasks_blocked):
            raise Found("hang", f"the device does not come to rest within {IDLE_TIMEOUT:.0f} s", "busy")

    async def snapshot(self) -> dict[str, bytes]:
        """What can be seen of the device without changing it: registers as they are stored, memories, config space."""
        self.write(PciRegion.CONFIG, COMMAND_AT, _DECODED)
        await self.settle()
        try:
            seen = {"config space": bytes(self._served.region_read(PciRegion.CONFIG, 0, _CONFIG_HEADER))}
            plain = [spot for spot in self.registers.spots.values() if spot.plain]
            for spot in plain[:: max(1, -(-len(plain) // _LOOKED_AT))]:
                seen[spot.name] = b"".join(
                    bytes(self._served.region_read(spot.region, at, count)) for at, count in _pieces(spot)
                )
        except OSError as error:
            raise Found("broken", f"after a reset its registers cannot be read: {error}", "snapshot") from error
        return seen


def _pieces(spot: Spot) -> list[tuple[int, int]]:
    """Offset and size of what is looked at: all, or the ends of a large memory."""
    if spot.size <= 2 * _LONGEST_LOOK:
        return [(spot.offset, spot.size)]
    return [(spot.offset, _LONGEST_LOOK), (spot.offset + spot.size - _LONGEST_LOOK, _LONGEST_LOOK)]
