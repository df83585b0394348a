"""Loopback transport: a device and its driver in one process, with nothing in between (virtio 1.4, 2 and 3).

::

    guest.VirtioBus ──▶ Loopback ──▶ virtio.DeviceCore ──▶ child device
                           │  ▲ interrupts, from a task of its own, so that neither side runs inside of the other
                           ▼
              memfd that both sides map (or, private, bytes that the device gets by message)

It is a `guest.ports.Transport` by its shape alone: neither package imports the other. Its numbers are those that the
same device would show on PCI.
"""

import math
import mmap
import os
from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from types import TracebackType

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.dma import DmaRegion, PrivateMemory, SharedMemory
from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.holds import wait_hold
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.pci import Identity
from vfiouser_virtio.protocols.virtio.features import FEATURE_BITS
from vfiouser_virtio.transports.identity import Style, identity
from vfiouser_virtio.vfio_device import Buffer
from vfiouser_virtio.virtio import Device, DeviceCore, Limits, Offer
from vfiouser_virtio.virtio.device_checks import close_device

MEMORY_SIZE = 16 << 20
"""Bytes for rings and buffers; taken page by page, as they are used."""

_FEATURE_WORDS = FEATURE_BITS // 32


@dataclass(frozen=True, slots=True)
class LoopbackIds:
    """Ids of the device as PCI would show them."""

    vendor: int
    device: int
    subsystem_vendor: int
    subsystem: int
    class_code: int
    virtio_id: int


class Loopback:
    """Device for drivers of this process; an async context manager, or run `serve` beside it.

    ``private`` keeps the memory from the device, which then reaches it by messages. The device is closed at the end.
    """

    def __init__(
        self,
        device: Device,
        *,
        ids: Style | Identity = "default",
        private: bool = False,
        memory_size: int = MEMORY_SIZE,
        name: str = "",
        offer: Offer | None = None,
        limits: Limits | None = None,
        core: Callable[..., DeviceCore] = DeviceCore,
    ) -> None:
        shown = ids if isinstance(ids, Identity) else identity(device.device_id, ids)
        self.ids = LoopbackIds(
            vendor=shown.vendor,
            device=shown.device,
            subsystem_vendor=shown.subsystem_vendor,
            subsystem=shown.subsystem,
            class_code=shown.class_code,
            virtio_id=device.device_id,
        )
        self.name = name or "loopback"
        self.memory: DmaRegion = (PrivateMemory if private else SharedMemory)(memory_size)
        self._guest_memory = _guest_memory(self.memory, shown_name := f"{device.name} at {self.name}")
        self.core = core(device, self._guest_memory, self, name=shown_name, offer=offer, limits=limits)
        for region in device.shared_regions.values():
            region.place(memoryview(mmap.mmap(-1, region.size)))
        self._on_queue: Callable[[int], None] | None = None
        self._on_config: Callable[[], None] | None = None
        self._pending: dict[int, None] = {}  # queues that have an interrupt pending, in order
        self._config_pending = False
        self._raised = trio.lowlevel.ParkingLot()
        self._tasks: AbstractAsyncContextManager[trio.Nursery] | None = None

    @property
    def device(self) -> Device:
        """The child device."""
        return self.core.device

    # ---- life ----------------------------------------------------------------------------------------------------

    async def serve(self) -> None:
        """Run the device, and deliver its interrupts, until cancelled; then let go of memory and of the device."""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.core.serve)
                nursery.start_soon(self._deliver)
        finally:
            self._guest_memory.clear()
            self.memory.close()
            close_device(self.device, self.core.name)

    async def __aenter__(self) -> "Loopback":
        self._tasks = background()
        nursery = await self._tasks.__aenter__()
        nursery.start_soon(self.serve)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool | None:
        assert self._tasks is not None
        return await self._tasks.__aexit__(kind, error, traceback)

    # ---- what guest.ports.Transport asks for ---------------------------------------------------------------------

    @property
    def num_queues(self) -> int:
        """Queues that the device has."""
        return len(self.core.queues)

    async def map_shared_memory(self, region_id: int) -> memoryview:
        await trio.lowlevel.checkpoint()
        region = self.device.shared_regions.get(region_id)
        if region is None:
            raise LookupError(f"{self.name}: no shared memory region {region_id}")
        return region.view

    async def read_status(self) -> int:
        await trio.lowlevel.checkpoint()
        return self.core.status

    async def write_status(self, value: int) -> None:
        await trio.lowlevel.checkpoint()
        self.core.write_status(value)  # a reset is complete when the status reads 0

    async def read_features(self) -> int:
        await trio.lowlevel.checkpoint()
        return sum(self.core.read_device_features(select) << 32 * select for select in range(_FEATURE_WORDS))

    async def write_features(self, features: int) -> None:
        await trio.lowlevel.checkpoint()
        for select in range(_FEATURE_WORDS):
            self.core.write_driver_features(select, features >> 32 * select & 0xFFFF_FFFF)

    async def read_config(self, offset: int, size: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return self.core.read_config(offset, size)

    async def write_config(self, offset: int, data: bytes) -> None:
        await trio.lowlevel.checkpoint()
        self.core.write_config(offset, data)

    async def read_generation(self) -> int:
        await trio.lowlevel.checkpoint()
        return self.core.read_generation()

    async def queue_max_size(self, index: int) -> int:
        await trio.lowlevel.checkpoint()
        return self.core.queues[index].max_size if index < self.num_queues else 0

    async def enable_queue(self, index: int, size: int, desc: int, driver: int, device: int) -> None:
        await trio.lowlevel.checkpoint()
        queue = self.core.queues[index]
        if queue.enabled or not queue.allows(size):
            # Registers would just not take it; here they are not read back.
            self.core.needs_reset(GuestError(f"queue {index} enabled with size {size:#x}"))
            return
        queue.configure(size=size, desc=desc, driver=driver, device=device)
        self.core.enable_queue(index)

    async def reset_queue(self, index: int) -> None:
        await trio.lowlevel.checkpoint()
        hold = self.core.reset_queue(index)
        if hold is not None:
            await wait_hold(hold, timeout=math.inf)
        self._pending.pop(index, None)  # no notification of a queue that was reset (QR1)

    def notify(self, index: int, next_available: int | None = None) -> None:
        self.core.notify_queue(index, next_available)

    async def connect_interrupts(self, on_queue: Callable[[int], None], on_config: Callable[[], None]) -> None:
        await trio.lowlevel.checkpoint()
        self._on_queue, self._on_config = on_queue, on_config

    async def disconnect_interrupts(self) -> None:
        await trio.lowlevel.checkpoint()
        self._on_queue = self._on_config = None

    # ---- what virtio.InterruptSink asks ---------------------------------------------------------------

    def queue_interrupt(self, index: int) -> None:
        """A used buffer notification."""
        self._pending[index] = None
        self._raised.unpark_all()

    def config_interrupt(self) -> None:
        """A configuration change notification."""
        self._config_pending = True
        self._raised.unpark_all()

    async def _deliver(self) -> None:
        while True:
            pending, self._pending = self._pending, {}
            for index in pending:
                if self._on_queue is not None:
                    self._on_queue(index)
            if self._config_pending:
                self._config_pending = False
                if self._on_config is not None:
                    self._on_config()
            if self._pending or self._config_pending:
                await trio.lowlevel.checkpoint()  # whatever a callback has started comes first
            else:
                await self._raised.park()


class _Client:
    """Client of `GuestMemory` for private memory."""

    def __init__(self, region: DmaRegion, name: str) -> None:
        self.name = name
        self.uid: int | None = None
        self._region = region

    async def dma_read(self, address: int, count: int) -> bytes:
        await trio.lowlevel.checkpoint()
        return bytes(self._region.at(address, count))

    async def dma_write(self, address: int, data: Buffer) -> None:
        # What is stored is what was there at the call, as with a message.
        copy = bytes(data)
        await trio.lowlevel.checkpoint()
        self._region.at(address, len(copy))[:] = copy


def _guest_memory(region: DmaRegion, name: str) -> GuestMemory:
    """All of the region, mapped for a device."""
    memory = GuestMemory()
    memory.configure(name)
    memory.attach(_Client(region, name))
    fd = None if region.fd is None else os.dup(region.fd)
    memory.map(region.address, region.size, readable=True, writable=True, fd=fd, offset=0)
    return memory
