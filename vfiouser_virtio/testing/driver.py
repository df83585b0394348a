"""Split-ring driver (virtio 1.4, 2.7 and 3.1), in process: what every device test drives its device with.

::

    @pytest.mark.parametrize("private", [False, True])           # memory with, and without, a file descriptor
    async def test_echo(private: bool) -> None:
        async with running(Echo(), private=private) as driver:   # DRIVER_OK is set, all queues are enabled
            token = driver.add(0, [b"ping"], [512, 1])           # readable bytes, sizes of writable buffers
            driver.kick(0)                                       # only if the device asks for it, as a driver does
            used = await driver.wait(0, token)                   # sleeps until an interrupt, as a driver does
            assert used.written == 4
            assert used.data[0][:4] == b"ping"

Each item of both lists becomes one descriptor; ``indirect=True`` puts them into an indirect table. `Driver.request` is
add, kick and wait in one. For what a good driver never does there are `Driver.alloc` and `Driver.add_raw`. A device
that gives up (NEEDS_RESET) ends every `Driver.wait` with `DeviceNeedsReset`. The ring is that of `testing.raw`.
"""

import math
import os
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any, NamedTuple

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.dma import DmaRegion, PrivateMemory, SharedMemory
from vfiouser_virtio.holds import wait_hold
from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.testing.raw.packed import RawPackedRing, packed_areas
from vfiouser_virtio.testing.raw.ring import INDIRECT, WRITE, Segment, lay_out
from vfiouser_virtio.testing.raw.split import RawSplitRing, split_areas
from vfiouser_virtio.vfio_device import Buffer, Hold
from vfiouser_virtio.virtio import Device, DeviceCore, Limits, Offer, Virtqueue

ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET = 1, 2, 4, 8, 64
VERSION_1, INDIRECT_DESC, EVENT_IDX, RING_PACKED = 32, 28, 29, 34
# NOTIFICATION_DATA and NOTIF_CONFIG_DATA would take another driver; packed rings are for who asks for them.
UNKNOWN = 1 << 34 | 1 << 38 | 1 << 39
RAM_BASE = 0x10_0000
RAM_SIZE = 32 << 20
TIMEOUT = 30.0  # seconds, after which a device that does not answer has failed its test


class DeviceNeedsReset(AssertionError):
    """Device that has set NEEDS_RESET."""


class Used(NamedTuple):
    """Used buffer: the length that the device reports, and the contents of each writable descriptor."""

    written: int
    data: list[bytes]


class Ram:
    """Guest RAM: a memfd that both sides map, or (private) bytes that the device reaches through messages."""

    name = "test driver"
    uid: int | None = None

    def __init__(self, memory: GuestMemory, *, private: bool) -> None:
        self.memory = memory
        self.messages = 0
        self._used = False
        self.region: DmaRegion = (PrivateMemory if private else SharedMemory)(RAM_SIZE, address=RAM_BASE)
        memory.attach(self)
        self.map()

    def map(self) -> None:
        fd = None if self.region.fd is None else os.dup(self.region.fd)
        self.memory.map(RAM_BASE, RAM_SIZE, readable=True, writable=True, fd=fd, offset=0)

    def unmap(self) -> Hold | None:
        return self.memory.unmap(RAM_BASE, RAM_SIZE)

    def clear(self) -> None:
        """Zero all of it; new RAM is zero without that, and has no pages yet."""
        if self._used:
            self.write(RAM_BASE, bytes(RAM_SIZE))
        self._used = True

    def read(self, address: int, count: int) -> bytes:
        return self.region.read(address, count)

    def write(self, address: int, data: Buffer) -> None:
        self.region.write(address, data)

    def close(self) -> None:
        self.region.close()

    async def dma_read(self, address: int, count: int) -> bytes:
        self.messages += 1
        await trio.lowlevel.checkpoint()
        return self.read(address, count)

    async def dma_write(self, address: int, data: Buffer) -> None:
        self.messages += 1
        data = bytes(data)
        await trio.lowlevel.checkpoint()
        self.write(address, data)


class Driver:
    """Driver of one device, and its interrupt sink."""

    def __init__(
        self,
        device: Device,
        *,
        private: bool = False,
        features: int | None = None,
        offer: Offer | None = None,
        virtqueue: type[Virtqueue] = Virtqueue,
        core: Callable[..., DeviceCore] | None = None,
        limits: Limits | None = None,
    ) -> None:
        self.memory = GuestMemory()
        self.ram = Ram(self.memory, private=private)
        make = core or partial(DeviceCore, virtqueue=virtqueue)
        self.core = make(device, self.memory, self, offer=offer, limits=limits)
        self.offered = self.core.device_features
        self.wanted = features
        self.queue_interrupts = [0] * len(device.queues)
        self.config_interrupts = 0
        self.event_idx = False
        self.rings: list[Any] = []
        """RawSplitRing, or RawPackedRing where that was asked for and offered: a test knows which."""
        self._buffers: dict[tuple[int, int], list[tuple[int, int]]] = {}  # queue and head: the writable ones
        self._done: dict[tuple[int, int], Used] = {}
        self._interrupt = trio.lowlevel.ParkingLot()
        self._heap = self._heap_start = RAM_BASE

    # ---- virtio.InterruptSink ---------------------------------------------------------------------------------------

    def queue_interrupt(self, index: int) -> None:
        self.queue_interrupts[index] += 1
        self._interrupt.unpark_all()

    def config_interrupt(self) -> None:
        self.config_interrupts += 1
        self._interrupt.unpark_all()

    @property
    def device(self) -> Device:
        return self.core.device

    # ---- status ----------------------------------------------------------------------------------------------------

    @property
    def status(self) -> int:
        return self.core.status

    def probe(self) -> None:
        """From reset to DRIVER_OK, with every queue enabled at its greatest size."""
        core = self.core
        core.write_status(ACKNOWLEDGE)
        core.write_status(ACKNOWLEDGE | DRIVER)
        features = self.offered & ~UNKNOWN if self.wanted is None else self.wanted & self.offered | 1 << VERSION_1
        for select in range(4):
            core.write_driver_features(select, features >> 32 * select & 0xFFFF_FFFF)
        core.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        assert core.status & FEATURES_OK, f"the device refuses features {features:#x}"
        packed = bool(features >> RING_PACKED & 1)
        # A packed ring's event suppression is zero, so that both sides notify each time.
        self.event_idx = not packed and bool(features >> EVENT_IDX & 1)
        self.rings, self._buffers, self._done = [], {}, {}
        base = RAM_BASE
        self.ram.clear()
        for index, queue in enumerate(core.queues):
            addresses, end = lay_out(base, packed_areas(queue.size) if packed else split_areas(queue.size))
            ring = (RawPackedRing if packed else RawSplitRing)(self.ram, queue.size, addresses, index)
            queue.configure(desc=ring.desc, driver=ring.driver, device=ring.device)
            core.enable_queue(index)
            self.rings.append(ring)
            base = -(-end // 4096) * 4096
        self._heap = self._heap_start = base
        core.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)

    async def reset(self) -> None:
        """Reset the device and wait until that is complete."""
        hold = self.core.write_status(0)
        if hold is not None:
            with trio.fail_after(TIMEOUT):
                await wait_hold(hold, timeout=math.inf)
        assert self.core.status == 0
        self.rings = []

    # ---- buffers ---------------------------------------------------------------------------------------------------

    def alloc(self, content: Buffer | int) -> int:
        """Guest address of a new buffer: these bytes, or so many of 0xAA. Gone when nothing is in flight."""
        data = b"\xaa" * content if isinstance(content, int) else bytes(content)
        address, self._heap = self._heap, self._heap + len(data)
        assert self._heap <= RAM_BASE + RAM_SIZE, "the test driver's RAM is full"
        self.ram.write(address, data)
        return address

    def add(self, queue: int, out: Sequence[Buffer], in_: Sequence[int] = (), *, indirect: bool = False) -> int:
        """Make one chain available; returns its token."""
        descriptors = [(self.alloc(data), len(data), 0) for data in out]
        descriptors += [(self.alloc(size), size, WRITE) for size in in_]
        return self.add_raw(queue, descriptors, indirect=indirect)

    def add_raw(self, queue: int, descriptors: Sequence[Segment], *, indirect: bool = False) -> int:
        """Make a chain of (address, length, flags) available; NEXT is set here."""
        ring, segments = self.rings[queue], descriptors
        if indirect:
            table = ring.table(descriptors)
            segments = [(self.alloc(table), len(table), INDIRECT)]
        token: int = ring.add(segments)
        self._buffers[queue, token] = [(address, length) for address, length, flags in descriptors if flags & WRITE]
        return token

    # ---- the device's turn -----------------------------------------------------------------------------------------

    def kick(self, queue: int, *, force: bool = False) -> None:
        """Notify the device of what was added, if it asks for that."""
        if self.rings[queue].wants_notification(event_idx=self.event_idx) or force:
            self.core.notify_queue(queue)

    def _collect(self, queue: int) -> None:
        """Take what the device has used, and ask for an interrupt at the next."""
        ring = self.rings[queue]
        while (used := ring.take_used()) is not None:
            token, written = used
            buffers = self._buffers.pop((queue, token))
            self._done[queue, token] = Used(written, [self.ram.read(*buffer) for buffer in buffers])
            if self.event_idx:
                ring.set_event(ring.seen_idx)
        if not any(ring.pending for ring in self.rings):
            self._heap = self._heap_start

    async def wait(self, queue: int, token: int) -> Used:
        """What the device did with a chain; looks at the used ring only after an interrupt."""
        with trio.fail_after(TIMEOUT):
            while True:
                self._collect(queue)
                if (queue, token) in self._done:
                    return self._done.pop((queue, token))
                if self.status & NEEDS_RESET:
                    raise DeviceNeedsReset("the device needs a reset")
                await self._interrupt.park()

    async def request(
        self, out: Sequence[Buffer], in_: Sequence[int] = (), *, queue: int = 0, indirect: bool = False
    ) -> Used:
        """One request from begin to end."""
        token = self.add(queue, out, in_, indirect=indirect)
        self.kick(queue)
        return await self.wait(queue, token)

    def is_used(self, queue: int, token: int) -> bool:
        """Whether a chain has come back, without waiting."""
        self._collect(queue)
        return (queue, token) in self._done

    def take_used(self, queue: int) -> list[Used]:
        """The chains that have come back, each once, without waiting: of a queue whose buffers the device fills."""
        self._collect(queue)
        return [self._done.pop(key) for key in list(self._done) if key[0] == queue]

    async def wait_broken(self) -> None:
        """Returns when the device has set NEEDS_RESET, with its configuration interrupt."""
        with trio.fail_after(TIMEOUT):
            while not self.status & NEEDS_RESET:
                await self._interrupt.park()

    async def wait_config_interrupt(self, seen: int = 0) -> None:
        """Returns when there have been more than ``seen`` configuration interrupts."""
        with trio.fail_after(TIMEOUT):
            while self.config_interrupts <= seen:
                await self._interrupt.park()

    def config(self, offset: int, size: int) -> int:
        """A little-endian field of the configuration space."""
        return int.from_bytes(self.core.read_config(offset, size), "little")


@asynccontextmanager
async def running(
    device: Device,
    *,
    private: bool = False,
    features: int | None = None,
    offer: Offer | None = None,
    virtqueue: type[Virtqueue] = Virtqueue,
    core: Callable[..., DeviceCore] | None = None,
    limits: Limits | None = None,
    probe: bool = True,
) -> AsyncIterator[Driver]:
    """A device with its driver, until the end of the block; then it is closed.

    ``features`` is what the driver accepts, by default all it is offered and can do, ``offer`` what it may choose from
    beside the features of the device's type, ``virtqueue`` makes its queues, ``core`` all of it,
    ``limits`` are those of how much it does; without ``probe`` the driver does nothing by itself.
    """
    driver = Driver(
        device, private=private, features=features, offer=offer, virtqueue=virtqueue, core=core, limits=limits
    )
    try:
        async with background() as tasks:
            tasks.start_soon(driver.core.serve)
            if probe:
                driver.probe()
            yield driver
    finally:
        driver.device.close()
        driver.ram.close()
