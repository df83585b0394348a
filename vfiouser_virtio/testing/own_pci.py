"""PCI device of an author's own under test: on a socket, with a driver in Python on the other end.

::

    async with pci_function(Edu()) as f:                 # a guest.function.GuestFunction
        await f.bar[0].write32(0x08, 5)
        await f.irq[0].wait()
"""

import os
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import trio

from vfiouser_virtio.engines import VfioUserEngine
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.guest.function import FunctionInterrupts, GuestFunction, open_function
from vfiouser_virtio.pci.device import PciDevice
from vfiouser_virtio.serving.register_names import FieldWords, RegisterNames
from vfiouser_virtio.serving.serve import serve
from vfiouser_virtio.testing.carriers import CARRIERS, LIBRARY_CARRIERS, Carrier, library_engine
from vfiouser_virtio.testing.conversation import Conversation
from vfiouser_virtio.testing.qtest_machine import qtest_machine
from vfiouser_virtio.transports.pci_device import PciDeviceFunction
from vfiouser_virtio.vfio_user import ClientOptions, PrivateMemory, SharedMemory, connect
from vfiouser_virtio.vm import Qemu, find_qemu

_MEMORY_SIZE = 16 << 20


class _DeviceWithoutFds(PciDeviceFunction):
    """Function that cannot map its client's memory."""

    def dma_map(self, address: int, size: int, *, readable: bool, writable: bool, fd: int | None, offset: int) -> None:
        if fd is not None:
            os.close(fd)
        super().dma_map(address, size, readable=readable, writable=writable, fd=None, offset=offset)


def conversation_with(device: PciDevice) -> Conversation:
    """A conversation in which the device's registers have their names, and their fields."""
    names = RegisterNames(type(device))
    return Conversation(device.name, names, FieldWords(names).names)


@asynccontextmanager
async def pci_function(
    device: PciDevice,
    carrier: Carrier = "socket",
    *,
    interrupts: FunctionInterrupts | None = None,
    bus_master: bool = True,
    conversation: Conversation | None = None,
    qemu: Qemu | None = None,
) -> AsyncIterator[GuestFunction]:
    """A device under test, and its function as a driver has it, over a carrier: see `guest.function.open_function`.

    ``carrier`` is one of `testing.carriers`, except for loopback, which has no PCI: there is no MSI-X over qtest's
    machine without a table in a BAR. ``conversation`` records what is said. Raises ConfigError for a carrier that
    cannot be.
    """
    if carrier == "loopback" or carrier not in CARRIERS:
        raise ConfigError(f"carrier {carrier!r}: expected one of {', '.join(set(CARRIERS) - {'loopback'})}")
    conversation = conversation or conversation_with(device)
    private = carrier.endswith("-private")
    library = library_engine() if carrier in LIBRARY_CARRIERS else None
    engine = library or VfioUserEngine(trace=conversation.record)
    over_qemu = carrier.startswith("qtest")
    function = (_DeviceWithoutFds if private and over_qemu else PciDeviceFunction)(device, name=device.name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{device.name}.sock")
        async with serve(function, path=path, engine=engine):
            if over_qemu:
                found = await trio.to_thread.run_sync(find_qemu) if qemu is None else qemu
                async with qtest_machine(found, {device.name: path}) as machine:
                    port = machine.ports[device.name]
                    async with open_function(port, interrupts=interrupts, bus_master=bus_master) as opened:
                        yield opened
                return
            # What the library's side cannot record, ours does.
            options = ClientOptions(trace=conversation.record) if library else ClientOptions()
            with PrivateMemory(_MEMORY_SIZE) if private else SharedMemory(_MEMORY_SIZE) as memory:
                async with (
                    connect(path, memory=[memory], options=options) as client,
                    open_function(client, interrupts=interrupts, bus_master=bus_master) as opened,
                ):
                    yield opened
