"""Carriers for tests: the same device and the same driver over each kind of connection.

================  =====================================================================  ===================
carrier           what is between the driver and the device                              a test takes about
================  =====================================================================  ===================
loopback          nothing: no PCI, no socket (`transports.loopback`)                     3 ms
socket            PCI, vfio-user, our own client; memory that the device maps            20 ms
socket-private    the same; memory that the device reaches by DMA_READ and DMA_WRITE     20 ms
qtest             PCI, vfio-user, QEMU's client, in a machine that never runs            0.2 s
qtest-private     the same; QEMU answers DMA_READ and DMA_WRITE                          0.2 s
libvfio-user      as socket, with the C library instead of our server                    20 ms
qtest-library     as qtest, with the C library instead of our server                     0.2 s
================  =====================================================================  ===================

The last two need libvfio-user: of LIBVFIO_USER in the environment, or where the loader finds it.

::

    async with carry(Blk(size=1 << 20), "socket") as device:    # a guest.VirtioDevice that a driver is bound to
        disk: Disk = device.driver_data
        await disk.read(0, 8)
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache
from typing import Literal, get_args

import trio

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.core import faulty_core
from vfiouser_virtio.guest import VirtioDevice, VirtioDriver, bound, bound_pci
from vfiouser_virtio.guest.ports import PciPort
from vfiouser_virtio.libvfio_user.engine import LibraryEngine
from vfiouser_virtio.pci import Identity
from vfiouser_virtio.testing.conversation import Conversation
from vfiouser_virtio.testing.qtest_machine import qtest_machine
from vfiouser_virtio.testing.recorded import recorded
from vfiouser_virtio.testing.served import served
from vfiouser_virtio.transports import Loopback
from vfiouser_virtio.transports.identity import Style
from vfiouser_virtio.vfio_user import ClientOptions, PrivateMemory, SharedMemory, connect
from vfiouser_virtio.virtio import Device, DeviceCore, Offer
from vfiouser_virtio.vm import Qemu, find_qemu

Carrier = Literal["loopback", "socket", "socket-private", "qtest", "qtest-private", "libvfio-user", "qtest-library"]
CARRIERS: tuple[Carrier, ...] = get_args(Carrier)
LIBRARY_CARRIERS: tuple[Carrier, ...] = ("libvfio-user", "qtest-library")
Interrupts = Literal["msix", "intx", "poll"]

_MEMORY_SIZE = 16 << 20


@cache
def library_engine() -> LibraryEngine:
    """The engine of the library carriers. Raises ConfigError when there is no libvfio-user."""
    return LibraryEngine()


@asynccontextmanager
async def pci_port(
    device: Device,
    carrier: Carrier,
    *,
    ids: Style | Identity = "default",
    offer: Offer | None = None,
    conversation: Conversation | None = None,
    qemu: Qemu | None = None,
    faults: FaultPlan | None = None,
) -> AsyncIterator[PciPort]:
    """A device's PCI function as a guest's CPU reaches it, over any carrier but loopback; ``qemu`` as in `carry`.

    Raises ConfigError for loopback, which has no PCI, and when there is no QEMU or no libvfio-user.
    """
    conversation = conversation or Conversation(device.name)
    if carrier == "loopback":
        raise ConfigError("a device on the loopback is no PCI function: choose another carrier")
    if carrier not in CARRIERS:
        raise ConfigError(f"carrier {carrier!r}: expected one of {', '.join(CARRIERS)}")
    private = carrier.endswith("-private")
    chosen = library_engine() if carrier in LIBRARY_CARRIERS else None
    if carrier.startswith("qtest"):
        found = await trio.to_thread.run_sync(find_qemu) if qemu is None else qemu
        # QEMU sends an fd for whatever memory we can see ourselves: not taking it is what makes it private.
        async with (
            served(
                device,
                ids=ids,
                offer=offer,
                conversation=conversation,
                accept_fds=not private,
                engine=chosen,
                faults=faults,
            ) as at,
            qtest_machine(found, {device.name: at.path}) as machine,
        ):
            yield machine.ports[device.name]
    else:
        # What the library's side cannot record, ours does.
        options = ClientOptions(trace=conversation.record) if chosen else ClientOptions()
        with PrivateMemory(_MEMORY_SIZE) if private else SharedMemory(_MEMORY_SIZE) as memory:
            async with (
                served(device, ids=ids, offer=offer, conversation=conversation, engine=chosen, faults=faults) as at,
                connect(at.path, memory=[memory], options=options) as client,
            ):
                yield client


@asynccontextmanager
async def carry(
    device: Device,
    carrier: Carrier = "loopback",
    *drivers: VirtioDriver,
    ids: Style | Identity = "default",
    interrupts: Interrupts | None = None,
    feature_mask: int = -1,
    offer: Offer | None = None,
    conversation: Conversation | None = None,
    qemu: Qemu | None = None,
    faults: FaultPlan | None = None,
) -> AsyncIterator[VirtioDevice]:
    """A device under test, and the guest's side of it over a carrier: found by a bus, bound to its driver, running.

    ``drivers`` are those on the bus, by default all of `guest.drivers`. ``offer`` is what they may choose from beside
    the features of the device's type; the driver accepts no feature outside of ``feature_mask``. ``interrupts`` are
    those of PCI, by default the best that the device has.
    ``conversation`` records what is said. ``qemu`` is for the qtest carriers, by default what `vm.find_qemu` finds.
    ``faults`` are what the device does wrong on purpose: see `faults`.

    Raises ConfigError for a carrier that cannot be, DeviceBroken when the device does not let itself be driven.
    """
    conversation = conversation or Conversation(device.name)
    if carrier == "loopback":
        async with (
            Loopback(device, ids=ids, offer=offer, core=faulty_core(faults) if faults else DeviceCore) as transport,
            bound(recorded(transport, conversation), *drivers, feature_mask=feature_mask) as found,
        ):
            yield found
    else:
        async with (
            pci_port(
                device, carrier, ids=ids, offer=offer, conversation=conversation, qemu=qemu, faults=faults
            ) as port,
            bound_pci(port, *drivers, interrupts=interrupts, feature_mask=feature_mask) as found,
        ):
            yield found
