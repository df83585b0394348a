"""Virtio bus, driver side, after Arnd Bergmann's proposal of 2007: matches child devices with drivers.

Transports add devices, drivers register; neither knows of the other, and there is no global backend: a program may have
several buses, and a bus devices of every transport at once.
"""

import logging

from vfiouser_virtio.guest.device import VirtioDevice
from vfiouser_virtio.guest.driver import VirtioDriver
from vfiouser_virtio.guest.ports import Transport
from vfiouser_virtio.guest.virtqueues import free_vq
from vfiouser_virtio.protocols.virtio.features import DeviceStatus

logger = logging.getLogger(__name__)


class VirtioBus:
    """Devices and drivers, in the order in which they came. The first driver that matches a device gets it."""

    def __init__(self) -> None:
        self.devices: list[VirtioDevice] = []
        self.drivers: list[VirtioDriver] = []

    async def add_device(self, transport: Transport, *, feature_mask: int = -1) -> VirtioDevice:
        """A new device. If there is a driver for it, that one's probe has succeeded when this returns.

        What the probe raises comes through, and then the device is not on the bus.
        """
        device = VirtioDevice(transport, feature_mask=feature_mask)
        driver = next((driver for driver in self.drivers if driver.matches(device.ids)), None)
        if driver is not None:
            await self._bind(device, driver)
        self.devices.append(device)
        return device

    async def remove_device(self, device: VirtioDevice) -> None:
        """The device goes away, its driver first. Raises ValueError when it is not on this bus."""
        self.devices.remove(device)
        await self._unbind(device)

    async def register_virtio_driver(self, driver: VirtioDriver) -> None:
        """A new driver; it gets every device that has none and matches.

        A probe that fails leaves its device without a driver; this raises then, when the others have been probed.
        """
        self.drivers.append(driver)
        failures: list[Exception] = []
        for device in self.devices:
            if device.driver is None and driver.matches(device.ids):
                try:
                    await self._bind(device, driver)
                except Exception as error:
                    failures.append(error)
        if len(failures) == 1:
            raise failures[0]
        if failures:
            raise ExceptionGroup(f"driver {driver.name} could not be bound to {len(failures)} devices", failures)

    async def unregister_virtio_driver(self, driver: VirtioDriver) -> None:
        """The driver lets go of its devices, which stay, without one. Raises ValueError when it is not registered."""
        self.drivers.remove(driver)
        for device in self.devices:
            if device.driver is driver:
                await self._unbind(device)

    async def _bind(self, device: VirtioDevice, driver: VirtioDriver) -> None:
        logger.info("%s: bound to driver %s", device.name, driver.name)
        await device.start()
        device.driver = driver
        try:
            await driver.probe(device)
            await device.ready()
        except BaseException as error:
            device.driver = device.driver_data = device.on_config = None
            if isinstance(error, Exception):
                await self._give_up(device)
            raise

    async def _give_up(self, device: VirtioDevice) -> None:
        """A probe has failed: take back what it had given to the device, and say FAILED (3.1.1)."""
        try:
            await device.reset()
            await _free_all(device)
            await device.add_status(DeviceStatus.ACKNOWLEDGE | DeviceStatus.DRIVER | DeviceStatus.FAILED)
        except Exception as error:  # that the probe failed says more
            logger.info("%s: not set to FAILED: %s", device.name, error)

    async def _unbind(self, device: VirtioDevice) -> None:
        driver = device.driver
        if driver is None:
            return
        # The device lets go of all buffers before the driver does.
        await device.reset()
        await driver.remove(device)
        await _free_all(device)
        device.driver = device.driver_data = device.on_config = None


async def _free_all(device: VirtioDevice) -> None:
    for vq in list(device.virtqueues.values()):
        await free_vq(vq)
