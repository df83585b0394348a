"""Device under test on a socket of its own, with its conversation kept."""

import os
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from vfiouser_virtio.engines import Engine, VfioUserEngine
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.pci import FaultyPci
from vfiouser_virtio.pci import Identity
from vfiouser_virtio.serving.serve import serve
from vfiouser_virtio.testing.conversation import Conversation
from vfiouser_virtio.transports import VirtioPci
from vfiouser_virtio.transports.identity import Style
from vfiouser_virtio.virtio import Device, Offer


@dataclass(frozen=True)
class ServedDevice:
    """Device on a socket, where any vfio-user client finds it."""

    path: Path
    function: VirtioPci
    conversation: Conversation = field(repr=False)

    @property
    def device(self) -> Device:
        """The device itself."""
        return self.function.device

    @property
    def qemu_argument(self) -> dict[str, object]:
        """QEMU's ``-device``, as `vm.boot_guest` takes it."""
        return {"driver": "vfio-user-pci", "socket": {"type": "unix", "path": str(self.path)}}


@asynccontextmanager
async def served(
    device: Device,
    *,
    ids: Style | Identity = "default",
    conversation: Conversation | None = None,
    accept_fds: bool = True,
    offer: Offer | None = None,
    engine: Engine | None = None,
    faults: FaultPlan | None = None,
) -> AsyncIterator[ServedDevice]:
    """Serve a device on a socket of its own until the end of the block.

    ``offer`` is what a driver may choose from. Without ``accept_fds``, memory that comes with a file descriptor is
    reached by messages all the same. ``engine`` is our own by default; another one keeps its conversation to itself.
    ``faults`` are what the device does wrong on purpose.
    """
    conversation = conversation or Conversation(device.name)
    make: Callable[..., VirtioPci] = VirtioPci if accept_fds else _PciWithoutFds
    if faults:
        make = partial(FaultyPci if accept_fds else _FaultyPciWithoutFds, faults=faults)
    function = make(device, ids=ids, name=device.name, offer=offer)
    engine = engine or VfioUserEngine(trace=conversation.record)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"{device.name}.sock")
        async with serve(function, path=path, engine=engine):
            yield ServedDevice(path, function, conversation)


class _WithoutFds(VirtioPci):
    """Mixin: a function that cannot map its client's memory."""

    def dma_map(self, address: int, size: int, *, readable: bool, writable: bool, fd: int | None, offset: int) -> None:
        if fd is not None:
            os.close(fd)
        super().dma_map(address, size, readable=readable, writable=writable, fd=None, offset=offset)


class _PciWithoutFds(_WithoutFds):
    """A function that cannot map its client's memory."""


class _FaultyPciWithoutFds(_WithoutFds, FaultyPci):
    """The same with faults."""
