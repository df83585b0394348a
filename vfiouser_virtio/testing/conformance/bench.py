"""Test bench of one conformance check: a device that was found and reset, with registers, queues and interrupts.

Everything goes through the vfio-user client. What a check does on purpose and a driver must not do is done here with
bare register writes: nothing is corrected, nothing is checked but what the check looks at.
"""

import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator
from contextlib import asynccontextmanager, contextmanager

import trio

from vfiouser_virtio.guest.errors import DeviceBroken
from vfiouser_virtio.guest.pci import PciFunctionInfo, enumerate_function, set_command, set_msix
from vfiouser_virtio.guest.pci_structures import VirtioLayout, locate, virtio_structures
from vfiouser_virtio.protocols.pci import PciCommand
from vfiouser_virtio.protocols.virtio.device_type import Exercise
from vfiouser_virtio.protocols.virtio.device_types import device_type, known_type
from vfiouser_virtio.protocols.virtio.features import FEATURE_BITS, DeviceStatus, Feature, mask_of
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS, NO_VECTOR, VENDOR_ID, VENDOR_ID_2007, Isr
from vfiouser_virtio.testing.conformance.interrupt_counts import InterruptCounts
from vfiouser_virtio.testing.conformance.placed import Placed, place_request
from vfiouser_virtio.testing.conformance.verdicts import ExerciseFailed, Failed, NotApplicable, expect, fail
from vfiouser_virtio.testing.conformance.wire import Wire
from vfiouser_virtio.testing.raw.bring_up import DRIVER_OK, RegisterWrite, enable_queue, negotiate
from vfiouser_virtio.testing.raw.packed import RawPackedRing, packed_areas
from vfiouser_virtio.testing.raw.ring import RawRing
from vfiouser_virtio.testing.raw.split import RawSplitRing, linked, split_areas
from vfiouser_virtio.testing.readable_config import readable_config
from vfiouser_virtio.vfio_user import Client, ClientOptions, PrivateMemory, RemoteError, SharedMemory

NO_VIRTIO = "no virtio device"
"""How the reason begins for which nothing of virtio is applicable."""
MEMORY_SIZE = 1 << 20
RING_SIZE = 16
"""Entries of a ring where a check does not care."""

UNWRITTEN = 0xEEEE_EEEE
"""What used elements hold before the device writes them."""
_POLL = 0.0005  # seconds between two looks at memory or at a register
# More vectors than these are not needed by any check, and every one is an eventfd and a task.
_VECTORS = 4
_FEATURE_WORDS = FEATURE_BITS // 32
TRANSITIONAL = range(0x1000, 0x1040)
_BASE = 0x1040


class Bench:
    """Device under one check. ``offered`` are its feature bits; ``exercise`` is None for a type that has none."""

    def __init__(self, wire: Wire, client: Client, memory: SharedMemory | PrivateMemory, info: PciFunctionInfo) -> None:
        self.wire = wire
        self.client = client
        self.memory = memory
        self.info = info
        self.layout: VirtioLayout = locate(info)
        self.device_type = wire.found["device_type"] = _device_type(info)
        self._exercise = wire.exercise or device_type(self.device_type).exercise
        self.offered = 0
        self._request_works = False

    @classmethod
    @asynccontextmanager
    async def open(
        cls, wire: Wire, *, options: ClientOptions | None = None, private: bool = False
    ) -> AsyncIterator["Bench"]:
        """Connect, find the device, reset it; reset it again in the end, if that still goes.

        ``private``: with memory that the server cannot map.
        """
        with (PrivateMemory if private else SharedMemory)(MEMORY_SIZE) as memory:
            async with wire.connect(options, [memory]) as client:
                try:
                    info = await enumerate_function(client)
                    if info.vendor not in (VENDOR_ID, VENDOR_ID_2007) and not virtio_structures(info):
                        raise NotApplicable(f"{NO_VIRTIO}: the PCI function is {info.vendor:04x}:{info.device:04x}")
                    bench = cls(wire, client, memory, info)
                    await bench.enable_function()
                    await bench.reset()
                    bench.offered = await bench.read_offered()
                except DeviceBroken as error:
                    raise Failed(f"no virtio device was found: {error}") from None
                yield bench
                if client.alive:
                    await bench.set("device_status", 0)
                    await client.device_reset()

    @property
    def exercise(self) -> Exercise | None:
        """What to ask the device for; None for an unknown type."""
        return self._exercise

    @property
    def queue(self) -> int:
        """The queue that the exercise uses; 0 where there is none."""
        return 0 if self._exercise is None else self._exercise.queue

    async def enable_function(self) -> None:
        """Memory accesses and bus mastering on, MSI-X off: an earlier driver may have left it on."""
        await set_command(self.client, set=PciCommand.MEMORY | PciCommand.MASTER, clear=PciCommand.INTX_DISABLE)
        if self.info.msix is not None:
            await set_msix(self.client, self.info.msix, enable=False)

    # ---- registers -----------------------------------------------------------------------------------------------

    async def read(self, offset: int, size: int) -> int:
        """Any bytes of the common configuration. An error reply is Failed, with the name of the register."""
        common = self.layout.common
        with _named(f"a read of {_register(offset, size)}"):
            return await self.client.bar_read(common.bar, common.offset + offset, size)

    async def write(self, offset: int, size: int, value: int) -> None:
        """Any bytes of the common configuration. An error reply is Failed, with the name of the register."""
        common = self.layout.common
        with _named(f"a write of {value:#x} to {_register(offset, size)}"):
            await self.client.bar_write(common.bar, common.offset + offset, size, value)

    async def get(self, name: str) -> int:
        """A field of the common configuration; one of 64 bits as two halves (4.1.3.1)."""
        offset, size = COMMON_CFG_OFFSETS[name]
        if size == 8:
            return await self.read(offset, 4) | await self.read(offset + 4, 4) << 32
        return await self.read(offset, size)

    async def set(self, name: str, value: int) -> None:
        """As `get`."""
        offset, size = COMMON_CFG_OFFSETS[name]
        if size == 8:
            await self.write(offset, 4, value & 0xFFFF_FFFF)
            await self.write(offset + 4, 4, value >> 32)
        else:
            await self.write(offset, size, value)

    async def set_all(self, writes: Iterable[RegisterWrite]) -> None:
        """`set` one after the other."""
        for name, value in writes:
            await self.set(name, value)

    async def isr(self) -> int:
        """ISR status; reading clears it."""
        isr = self.layout.isr
        with _named("a read of ISR status"):
            return await self.client.bar_read(isr.bar, isr.offset, 1)

    async def wait_isr(self, bit: Isr) -> int:
        """Poll ISR status until it has shown a bit, or time is over; returns all bits that it has shown."""
        seen = 0
        with trio.move_on_after(self.wire.timeout):
            while not (seen := seen | await self.isr()) & bit:  # noqa: ASYNC110 - nothing tells
                await trio.sleep(_POLL)
        return seen

    async def config(self, size: int) -> bytes:
        """The first bytes of the device-specific configuration; of a type that is not known, as many as can be read.

        Raises Failed when it cannot be read.
        """
        device = self.layout.device
        assert device is not None
        size = min(size, device.length)
        if known_type(self.device_type) is None:
            data = await readable_config(self.client, device, size)
            expect(bool(data), "reads of the device-specific configuration are refused from its first byte on")
            return data
        with _named(f"a read of the first {size:#x} bytes of the device-specific configuration"):
            return await self.client.region_read(device.bar, device.offset, size)

    async def select(self, queue: int) -> None:
        """queue_select."""
        await self.set("queue_select", queue)

    async def kick(self, queue: int | None = None) -> None:
        """The available buffer notification, of the exercise's queue by default."""
        queue = self.queue if queue is None else queue
        await self.notify(queue, 2, queue)

    async def notify(self, value: int, size: int, queue: int | None = None) -> None:
        """Any value of any size to where a queue, by default the exercise's, is notified."""
        await self.select(self.queue if queue is None else queue)
        notify = self.layout.notify
        at = notify.offset + await self.get("queue_notify_off") * notify.multiplier
        with _named(f"a notification of {size} bytes, {value:#x}"):
            await self.client.bar_write(notify.bar, at, size, value)

    # ---- the steps of a driver -----------------------------------------------------------------------------------

    async def until(self, reached: Callable[[], Awaitable[bool]], otherwise: str) -> None:
        """Poll a condition; raises Failed when the server's time is over."""
        with trio.move_on_after(self.wire.timeout):
            while not await reached():  # noqa: ASYNC110 - nothing else tells when memory of ours changes
                await trio.sleep(_POLL)
            return
        fail(f"{otherwise} (waited {self.wire.timeout:g} s)")

    async def reset(self) -> None:
        """Write status 0 and wait until it reads as 0."""
        await self.set("device_status", 0)

        async def zero() -> bool:
            return await self.get("device_status") == 0

        await self.until(zero, "device_status does not become 0 after 0 was written")

    async def read_offered(self) -> int:
        """All feature bits that the device offers."""
        offered = 0
        for word in range(_FEATURE_WORDS):
            await self.set("device_feature_select", word)
            offered |= await self.get("device_feature") << 32 * word
        return offered

    @property
    def minimum(self) -> int:
        """The features that no driver can do without here."""
        return self.offered & (Feature.VERSION_1.mask | Feature.ACCESS_PLATFORM.mask)

    async def try_features(self, features: int) -> bool:
        """From a device that was reset to FEATURES_OK; whether that bit stays."""
        words = -(-(features | self.offered).bit_length() // 32)
        await self.set_all(negotiate(features, max(words, 2)))
        return bool(await self.get("device_status") & DeviceStatus.FEATURES_OK)

    async def negotiate(self, *extra: Feature) -> None:
        """Reset, and accept the minimum and what the check needs. Raises Failed when the device refuses."""
        await self.reset()
        features = self.minimum | mask_of(extra)
        if not await self.try_features(features):
            fail(f"FEATURES_OK does not stay for the features {features:#x} of the {self.offered:#x} offered")

    def split_ring(self, size: int) -> RawSplitRing:
        """A split ring in new memory, with a mark in every used element."""
        desc, driver, device = (self.memory.alloc(*area).address for area in split_areas(size))
        ring = RawSplitRing(self.memory, size, (desc, driver, device))
        ring.zero(UNWRITTEN)
        return ring

    def packed_ring(self, size: int) -> RawPackedRing:
        """A packed ring in new memory."""
        desc, driver, device = (self.memory.alloc(*area).address for area in packed_areas(size))
        return RawPackedRing(self.memory, size, (desc, driver, device))

    async def new_ring(
        self, queue: int | None = None, *, vector: int = NO_VECTOR, size: int = RING_SIZE
    ) -> RawSplitRing:
        """Set up and enable a queue, by default the exercise's, with at most this size."""
        queue = self.queue if queue is None else queue
        await self.select(queue)
        largest = await self.get("queue_size")
        expect(largest > 0, f"queue {queue:#x} has queue_size 0, so it does not exist")
        ring = self.split_ring(min(size, largest))
        await self.place(ring, queue, vector=vector)
        return ring

    async def place(self, ring: RawRing, queue: int | None = None, *, vector: int = NO_VECTOR) -> None:
        """Tell the device where a ring is, and enable it."""
        queue = self.queue if queue is None else queue
        await self.set_all(enable_queue(queue, ring.addresses, size=ring.size, vector=vector))

    async def driver_ok(self) -> None:
        """The last step."""
        await self.set("device_status", DRIVER_OK)

    async def start(self, *extra: Feature, vector: int = NO_VECTOR, size: int = RING_SIZE) -> RawSplitRing:
        """All steps with the minimum of features and these; returns the ring of the exercise's queue."""
        await self.negotiate(*extra)
        for queue in range(self.queue):  # the others are empty
            await self.new_ring(queue)
        ring = await self.new_ring(vector=vector, size=size)
        await self.driver_ok()
        return ring

    # ---- requests ------------------------------------------------------------------------------------------------

    def request(self, *, pieces: int | None = None, least: int = 1, canary: int = 0xA5) -> Placed:
        """The exercise in memory of its own, cut as `place_request` says; ``canary`` fills what is free.

        Raises NotApplicable for a device that has no exercise.
        """
        exercise = self.exercise
        if exercise is None:
            raise NotApplicable("there is no exercise for this type")
        return place_request(self.memory, exercise, pieces=pieces, least=least, canary=canary)

    def judge(self, placed: Placed, used_len: int, *, plain: bool = True) -> None:
        """Look at the device's answer.

        A wrong one to the first ``plain`` request says nothing of the rule under test: RequestFailed. Once the device
        has served one, a failure comes from what the check has done: Failed.
        """
        complaint = placed.complaint(used_len)
        if complaint:
            raise ExerciseFailed(complaint) if plain and not self._request_works else Failed(complaint)
        self._request_works = True

    def chain(self, ring: RawSplitRing, placed: Placed, first: int = 0) -> int:
        """Describe a request with consecutive descriptors from ``first`` on; returns that, the head."""
        places = range(first, first + len(placed.segments))
        for place, descriptor in zip(places, linked(placed.segments, places), strict=True):
            ring.describe(place, descriptor)
        return first

    async def wait_used(self, ring: RawSplitRing, idx: int) -> None:
        """Wait until used.idx is ``idx``. Raises Failed."""

        async def there() -> bool:
            return ring.used_idx == idx & 0xFFFF

        await self.until(there, f"used.idx is not {idx:#x}: the device has not used a buffer that is available")

    async def serve(
        self, ring: RawSplitRing, placed: Placed | None = None, *, plain: bool = True
    ) -> tuple[Placed, int, int]:
        """One request from beginning to end: (request, used id, used length). Raises as `judge`, or Failed."""
        placed = placed or self.request()
        head = self.chain(ring, placed)
        before = ring.used_idx
        ring.offer(head)
        await self.kick()
        await self.wait_used(ring, before + 1)
        used_id, used_len = ring.used_element(before)
        self.judge(placed, used_len, plain=plain)
        return placed, used_id, used_len

    async def quiet(self) -> None:
        """Long enough for what must not happen."""
        await trio.sleep(self.wire.settle)

    async def serves_nothing(self, ring: RawSplitRing, when: str) -> None:
        """One more request, after one was served, is neither used nor notified. Raises Failed."""
        await self.isr()
        ring.offer(self.chain(ring, self.request()))
        await self.kick()
        await self.quiet()
        expect(ring.used_idx == 1, f"used.idx became {ring.used_idx:#x} {when}")
        seen = await self.isr()
        expect(not seen & Isr.QUEUE, f"ISR status is {seen:#x} {when}")

    # ---- interrupts ----------------------------------------------------------------------------------------------

    async def use_msix(self) -> InterruptCounts:
        """Connect the first vectors and enable MSI-X."""
        msix = self.info.msix
        assert msix is not None
        interrupts = InterruptCounts([0] * min(msix.vectors, _VECTORS), self.wire.timeout)
        await self.client.connect_msix([interrupts.handler(vector) for vector in range(len(interrupts.counts))])
        await set_msix(self.client, msix, enable=True)
        return interrupts

    async def use_intx(self) -> InterruptCounts:
        """Connect INTx; MSI-X is off."""
        interrupts = InterruptCounts([0], self.wire.timeout)
        await self.client.connect_intx(interrupts.handler(0))
        return interrupts


def _register(offset: int, size: int) -> str:
    """The name of the field that these bytes of the common configuration are, or are part of."""
    for name, (at, length) in COMMON_CFG_OFFSETS.items():
        if at <= offset < at + length:
            return name if (offset, size) == (at, length) else f"{name} (common configuration {offset:#x}+{size})"
    return f"common configuration {offset:#x}+{size}"


@contextmanager
def _named(what: str) -> Iterator[None]:
    """An error reply in here is Failed, and says what was refused."""
    try:
        yield
    except RemoteError as error:
        fail(f"{what} is refused: {os.strerror(error.errno or 0)}")


def _device_type(info: PciFunctionInfo) -> int:
    """Transitional functions have their type in the subsystem id (4.1.2.3)."""
    return info.subsystem if info.device in TRANSITIONAL else info.device - _BASE
