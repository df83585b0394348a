"""A device with the guest's side of it over a carrier, and no driver: a test does a driver's steps itself."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Literal

import trio

from vfiouser_virtio.guest import VirtioDevice
from vfiouser_virtio.guest.pci_transport import PciTransport
from vfiouser_virtio.testing.carriers import Carrier, pci_port
from vfiouser_virtio.transports import Loopback
from vfiouser_virtio.virtio import Device, Offer

PATIENCE = 120.0


@asynccontextmanager
async def bare_device(
    device: Device, carrier: Carrier | Literal["loopback-private"], offer: Offer, features: int = -1
) -> AsyncIterator[VirtioDevice]:
    """Found, reset, and its features negotiated: all that it offers, and of these only ``features``.

    ``carrier`` is also ``loopback-private``. Queues are to be made, and DRIVER_OK is to be set.
    """
    with trio.fail_after(PATIENCE):
        if carrier == "loopback" or carrier == "loopback-private":
            async with Loopback(device, offer=offer, private=carrier.endswith("private")) as loopback:
                found = VirtioDevice(loopback, feature_mask=features)
                await _negotiate(found)
                yield found
                await found.reset()
        else:
            async with pci_port(device, carrier, offer=offer) as port:
                transport = await PciTransport.open(port)
                found = VirtioDevice(transport, feature_mask=features)
                await _negotiate(found)
                yield found
                await found.reset()
                await transport.close()


async def _negotiate(device: VirtioDevice) -> None:
    await device.start()
    await device.negotiate(-1)
