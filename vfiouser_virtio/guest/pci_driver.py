"""PCI driver ``virtio-pci``: binds to virtio functions, adds child devices to a bus (virtio 1.4, 4.1.2)."""

from types import TracebackType

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.guest.bus import VirtioBus
from vfiouser_virtio.guest.device import VirtioDevice
from vfiouser_virtio.guest.driver import VirtioId
from vfiouser_virtio.guest.pci import enumerate_function
from vfiouser_virtio.guest.pci_transport import Interrupts, PciTransport
from vfiouser_virtio.guest.ports import Ids, PciPort
from vfiouser_virtio.protocols.virtio.ids import MAX_PCI_DEVICE_ID, PCI_DEVICE_ID_BASE
from vfiouser_virtio.protocols.virtio.pci import VENDOR_ID, VENDOR_ID_2007


class VirtioPciDriver:
    """Driver that puts virtio functions on ``bus``; an async context manager, whose tasks serve INTx and polling.

    ``interrupts`` is how devices tell the driver: by default MSI-X, else INTx, else not at all (polling). At the end of
    the block its devices are removed, unless that ends by an exception.
    """

    name = "virtio-pci"
    id_table = tuple(
        VirtioId(vendor, PCI_DEVICE_ID_BASE + number)
        for vendor in (VENDOR_ID, VENDOR_ID_2007)
        for number in range(MAX_PCI_DEVICE_ID + 1)
    )

    def __init__(self, bus: VirtioBus, *, interrupts: Interrupts | None = None, feature_mask: int = -1) -> None:
        self.bus = bus
        self.interrupts: Interrupts | None = interrupts
        self.feature_mask = feature_mask
        self._transports: dict[VirtioDevice, PciTransport] = {}
        self._tasks = background()
        self._nursery: trio.Nursery | None = None

    def matches(self, ids: Ids) -> bool:
        """Whether a function with these numbers is a virtio one."""
        return any(row.matches(ids) for row in self.id_table)

    async def probe(self, port: PciPort) -> VirtioDevice:
        """Enumerate a function and put its child device on the bus, where a driver may take it at once.

        Raises ConfigError for a function that is none of ours, DeviceBroken for one that breaks the rules, and what the
        driver's probe raises.
        """
        info = await enumerate_function(port)
        if not self.matches(info):
            raise ConfigError(f"{port.name}: {info} is no virtio function")
        transport = await PciTransport.open(port, interrupts=self.interrupts, nursery=self._nursery, info=info)
        try:
            device = await self.bus.add_device(transport, feature_mask=self.feature_mask)
        except Exception:
            await transport.close()
            raise
        self._transports[device] = transport
        return device

    async def remove(self, device: VirtioDevice) -> None:
        """Take a device that `probe` has made off the bus again, and switch its function off."""
        transport = self._transports.pop(device)
        await self.bus.remove_device(device)
        await transport.close()

    async def __aenter__(self) -> "VirtioPciDriver":
        self._nursery = await self._tasks.__aenter__()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        try:
            if error is None:
                for device in list(self._transports):
                    await self.remove(device)
        except BaseException as failure:
            await self._tasks.__aexit__(type(failure), failure, failure.__traceback__)
            raise
        return await self._tasks.__aexit__(kind, error, traceback)
