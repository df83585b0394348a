"""Binding of a device to its driver for the length of a block, as a test or a tool needs it."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from vfiouser_virtio.guest.bus import VirtioBus
from vfiouser_virtio.guest.device import VirtioDevice
from vfiouser_virtio.guest.driver import VirtioDriver
from vfiouser_virtio.guest.drivers import ALL_DRIVERS
from vfiouser_virtio.guest.pci_driver import VirtioPciDriver
from vfiouser_virtio.guest.pci_transport import Interrupts
from vfiouser_virtio.guest.ports import PciPort, Transport


@asynccontextmanager
async def bound(transport: Transport, *drivers: VirtioDriver, feature_mask: int = -1) -> AsyncIterator[VirtioDevice]:
    """A device bound to its driver, on a bus of its own; it is removed at the end, unless the block raises.

    Without ``drivers`` there are all that come with the package. Raises what their probe raises.
    """
    bus = await _bus(drivers)
    device = await bus.add_device(transport, feature_mask=feature_mask)
    yield device
    await bus.remove_device(device)


@asynccontextmanager
async def bound_pci(
    port: PciPort, *drivers: VirtioDriver, interrupts: Interrupts | None = None, feature_mask: int = -1
) -> AsyncIterator[VirtioDevice]:
    """The same for the device of a PCI function; ``interrupts`` as for `VirtioPciDriver`."""
    bus = await _bus(drivers)
    async with VirtioPciDriver(bus, interrupts=interrupts, feature_mask=feature_mask) as pci:
        yield await pci.probe(port)


async def _bus(drivers: tuple[VirtioDriver, ...]) -> VirtioBus:
    bus = VirtioBus()
    for driver in drivers or [make() for make in ALL_DRIVERS]:
        await bus.register_virtio_driver(driver)
    return bus
