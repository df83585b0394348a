"""Driver of a virtio device, and its id table: Rusty Russell's ``virtio_driver`` of 2007, with PCI-style ids.

::

    class Blinker(VirtioDriver):
        name = "blinker"
        id_table = virtio_ids(63)

        async def probe(self, device: VirtioDevice) -> None:
            await device.negotiate(0)
            device.driver_data = await new_vq(device, 0, self.blinked)
            await device.ready()
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from vfiouser_virtio.guest.device import VirtioDevice
from vfiouser_virtio.guest.ports import Ids
from vfiouser_virtio.protocols.virtio.ids import PCI_DEVICE_ID_BASE
from vfiouser_virtio.protocols.virtio.pci import VENDOR_ID, VENDOR_ID_2007

ANY = 0xFFFF_FFFF
"""PCI_ANY_ID: matches whatever is there."""


@dataclass(frozen=True, slots=True)
class VirtioId:
    """Row of an id table. The class matches where ``class_mask`` has ones; 0 looks at none of its 24 bits."""

    vendor: int = ANY
    device: int = ANY
    subsystem_vendor: int = ANY
    subsystem: int = ANY
    class_code: int = 0
    class_mask: int = 0

    def matches(self, ids: Ids) -> bool:
        """Whether a device with these numbers is meant."""
        return (
            self.vendor in (ANY, ids.vendor)
            and self.device in (ANY, ids.device)
            and self.subsystem_vendor in (ANY, ids.subsystem_vendor)
            and self.subsystem in (ANY, ids.subsystem)
            and not (self.class_code ^ ids.class_code) & self.class_mask
        )


def virtio_ids(virtio_id: int) -> tuple[VirtioId, ...]:
    """The rows for a virtio device type: with today's vendor, and with that of the 2007 draft."""
    return tuple(VirtioId(vendor, PCI_DEVICE_ID_BASE + virtio_id) for vendor in (VENDOR_ID, VENDOR_ID_2007))


class VirtioDriver(ABC):
    """Driver for every device that one row of `id_table` matches. It may have many of them at a time."""

    name: str
    id_table: Sequence[VirtioId]

    @abstractmethod
    async def probe(self, device: VirtioDevice) -> None:
        """Take a device that is in state DRIVER, and leave it ready. Whatever this raises leaves it FAILED."""

    @abstractmethod
    async def remove(self, device: VirtioDevice) -> None:
        """Let go of the device. The bus has reset it, and frees the queues after this that are still there."""

    def matches(self, ids: Ids) -> bool:
        """Whether the driver is for a device with these numbers."""
        return any(row.matches(ids) for row in self.id_table)
