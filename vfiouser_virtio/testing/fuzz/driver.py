"""Well-behaved driver of the fuzzer, through messages only: bring a device up, offer buffers, reset it.

The offsets are those of `VirtioPci`; the rings are those of `testing.raw`.
"""

from collections.abc import Iterable, Sequence
from itertools import count

import trio
import trio.testing

from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.testing.fuzz.case import Memory
from vfiouser_virtio.testing.fuzz.client import Asked, FuzzClient
from vfiouser_virtio.testing.fuzz.deadline import Deadline
from vfiouser_virtio.testing.fuzz.function_driver import FunctionDriver
from vfiouser_virtio.testing.fuzz.oracle import Bounds, Found
from vfiouser_virtio.testing.fuzz.ram import (
    HEAP,
    HEAP_END,
    MAX_RINGS,
    RING_STRIDE,
    RINGS,
    TABLES,
    TABLES_END,
    FuzzRam,
)
from vfiouser_virtio.testing.raw.bring_up import DRIVER_OK, RegisterWrite, enable_queue, negotiate
from vfiouser_virtio.testing.raw.packed import RawPackedRing
from vfiouser_virtio.testing.raw.ring import INDIRECT, WRITE, RawRing, RingFullError, Segment
from vfiouser_virtio.testing.raw.split import RawSplitRing
from vfiouser_virtio.transports.pci import COMMON, NOTIFY, NOTIFY_MULTIPLIER, VIRTIO_BAR
from vfiouser_virtio.vfio_device import VfioDevice

RESET_TIMEOUT = 20.0
"""Seconds until the status must read 0 after a 0 was written."""
SUSPEND_TIMEOUT = 20.0
"""Seconds for SUSPEND: the device may wait 5 s for what is under way."""
BUFFER_TIMEOUT = 20.0
"""Seconds that a device may keep a buffer that it has no reason to keep; far more than it needs on a busy machine."""

_FEATURE_WORDS = 4
_MOMENT, _LONGEST_MOMENT = 0.0001, 0.005
_NEEDS_RESET = int(DeviceStatus.NEEDS_RESET)
_RUNNING = int(DeviceStatus.SUSPEND | DeviceStatus.DRIVER_OK)
_GAP = 24  # bytes between buffers: no multiple of what a device is likely to align to


class FuzzDriver(FunctionDriver):
    """Driver of a virtio device on one connection."""

    def __init__(
        self, client: FuzzClient, ram: FuzzRam, bounds: Bounds, memory: Memory, function: VfioDevice | None = None
    ) -> None:
        """``function``: its registers are accessed without the socket."""
        super().__init__(client, ram, memory, function)
        self.bounds = bounds
        self.rings: list[RawRing] = []
        self.features = 0
        """What was accepted in the last `bring_up`."""
        self._offered = 0
        self._queue_sizes: list[int] = []
        self._heap = HEAP
        self._tables = TABLES

    # ---- registers -----------------------------------------------------------------------------------------------

    async def common(self, name: str) -> int:
        """A field of the common configuration."""
        [value] = await self._commons([(None, 0, name)])
        return value

    async def _commons(self, reads: Sequence[tuple[str | None, int, str]]) -> list[int]:
        """Fields, each behind a write of another one if that is named; nothing is waited for in between."""
        asked: list[Asked | int | None] = []
        for select, value, name in reads:
            if select is not None:
                self.set_common(select, value)
            offset, size = COMMON_CFG_OFFSETS[name]
            asked.append(await self._ask(VIRTIO_BAR, COMMON + offset, size))
        return [await self._value(each) for each in asked]

    def set_common(self, name: str, value: int) -> None:
        """Write a field of the common configuration."""
        offset, size = COMMON_CFG_OFFSETS[name]
        self.write(VIRTIO_BAR, COMMON + offset, value.to_bytes(size, "little"))

    def _set_all(self, writes: Iterable[RegisterWrite]) -> None:
        for name, value in writes:
            self.set_common(name, value)

    # ---- the life of a device ------------------------------------------------------------------------------------

    async def reset(self) -> None:
        """Write 0 to the status and wait until it is 0. Raises Found where that does not come."""
        await self._sync()
        self.set_common("device_status", 0)
        limit = Deadline(RESET_TIMEOUT)
        while not self.client.closed.is_set() and await self.common("device_status") != 0:
            if limit.over():
                raise Found("broken", f"status is not 0 {RESET_TIMEOUT} s after a reset", "reset")
            await trio.sleep(0.001)
        self.rings = []

    async def bring_up(self, *, size: int = 16, features: int = (1 << 128) - 1) -> None:
        """From any state to DRIVER_OK, with rings of ``size`` entries, or as many as the device takes."""
        await self.wake()
        await self.reset()
        if self.client.twin or self._function is not None:  # what was stored before may still be on its way
            await trio.testing.wait_all_tasks_blocked()
        self.bounds.check()
        if self.client.heard:
            self.bounds.forget()
        self._heap, self._tables = HEAP, TABLES
        if not self._offered:
            await self._look_around()
        self.features = self._offered & (features | Feature.VERSION_1.mask)
        self._set_all(negotiate(self.features, _FEATURE_WORDS))
        make = RawPackedRing if self.has(Feature.RING_PACKED) else RawSplitRing
        for index, largest in enumerate(self._queue_sizes):
            desc = RINGS + RING_STRIDE * index
            self.ram.write(desc, bytes(RING_STRIDE))
            ring = make(self.ram, min(size, largest), (desc, desc + 0x800, desc + 0x1000), index)
            # A reset that was not heard: the device may still have the ring that was here before, and its buffers.
            ring.hostile = not self.client.heard
            self.rings.append(ring)
            self._set_all(enable_queue(index, ring.addresses, size=ring.size))
        self.set_common("device_status", DRIVER_OK)
        await self._sync()

    def has(self, feature: Feature) -> bool:
        """Whether it was accepted."""
        return bool(self.features & feature.mask)

    async def suspend(self) -> None:
        """Stop a running device, and let it go on. Raises Found where it does neither, nor needs a reset."""
        for asked, wanted in (
            (DeviceStatus.SUSPEND, DeviceStatus.SUSPEND),
            (DeviceStatus.SUSPEND | DeviceStatus.DRIVER_OK, DeviceStatus.DRIVER_OK),
        ):
            status = await self.common("device_status")
            if self.client.closed.is_set() or not status or status & DeviceStatus.NEEDS_RESET:
                return
            self.set_common("device_status", status | asked)
            await self._wait_suspended(wanted)

    async def _wait_suspended(self, wanted: DeviceStatus) -> None:
        limit = Deadline(SUSPEND_TIMEOUT)
        for looks in count():
            status = await self.common("device_status")
            if self.client.closed.is_set() or status & _RUNNING == wanted or status & _NEEDS_RESET:
                return
            if limit.over():
                what = f"of SUSPEND and DRIVER_OK not just {wanted.name} within {SUSPEND_TIMEOUT} s"
                raise Found("hang", what, "suspend")
            await self.let_work(limit, looks)

    async def let_work(self, limit: Deadline, looks: int) -> None:
        """The server does what it can; not at the first look, but then, a moment passes for a thread or the kernel.

        A look at each round of the event loop would be most of what a case takes.
        """
        if looks:
            await trio.sleep(min(_MOMENT * (1 << min(looks, 6)), _LONGEST_MOMENT))
        with trio.move_on_after(limit.left):
            await trio.testing.wait_all_tasks_blocked()

    async def _sync(self) -> None:
        """What was posted has been done, and the oracle knows the rings."""
        await self.common("device_status")
        self.bounds.note()

    async def _look_around(self) -> None:
        """What the device offers, right after a reset: the same each time."""
        features = [("device_feature_select", word, "device_feature") for word in range(_FEATURE_WORDS)]
        *words, queues = await self._commons([*features, (None, 0, "num_queues")])
        self._offered = sum(word << 32 * index for index, word in enumerate(words))
        sizes = [("queue_select", index, "queue_size") for index in range(min(queues, MAX_RINGS))]
        self._queue_sizes = await self._commons(sizes)

    # ---- buffers -------------------------------------------------------------------------------------------------

    def alloc(self, size: int) -> int:
        """The address of a buffer, with canaries behind it, which no later buffer covers; old ones are used again."""
        if self._heap + size > HEAP_END:
            self._heap = HEAP
        address, self._heap = self._heap, self._heap + size + _GAP
        return address

    def offer(
        self, queue: int, readable: Sequence[bytes], writable: Sequence[int], *, indirect: bool = False
    ) -> tuple[int, list[int]] | None:
        """Make a chain available; its name and its writable addresses. None where the ring has no room."""
        if queue >= len(self.rings):
            return None
        ring = self.rings[queue]
        self.collect(ring)
        buffers: list[Segment] = [(self.alloc(len(data)), len(data), 0) for data in readable]
        for (address, _, _), data in zip(buffers, readable, strict=True):
            self.ram.write(address, data)
        buffers += [(self.alloc(size), size, WRITE) for size in writable]
        if not buffers:
            return None
        segments = buffers
        if indirect:
            table = ring.table(buffers)
            if self._tables + len(table) > TABLES_END:
                self._tables = TABLES
            address, self._tables = self._tables, self._tables + len(table)
            self.ram.write(address, table)
            segments = [(address, len(table), INDIRECT)]
        try:
            name = ring.add(segments)
        except RingFullError:
            return None
        self.bounds.allow((address, length) for address, length, flags in buffers if flags)
        return name, [address for address, _, flags in buffers if flags]

    def collect(self, ring: RawRing) -> dict[int, int]:
        """Used lengths, by name, of what the device has given back since the last look. Raises Found."""
        used: dict[int, int] = {}
        try:
            while not ring.hostile and (element := ring.take_used()) is not None:
                used[element[0]] = element[1]
        except LookupError as error:
            raise Found("reply", f"queue {ring.index}: {error}") from None
        return used

    async def kick(self, queue: int) -> None:
        """The available buffer notification, whether the device asked for it or not."""
        data = queue.to_bytes(2, "little")
        if self.has(Feature.NOTIFICATION_DATA) and queue < len(self.rings):
            data += self.rings[queue].next_available.to_bytes(2, "little")
        self.write(VIRTIO_BAR, NOTIFY + NOTIFY_MULTIPLIER * queue, data)
        await self.client.flush()

    async def wait_used(self, ring: RawRing, head: int) -> int | None:
        """The used length of a chain; None if the device needs a reset or the server hung up. Raises Found: a hang."""
        limit = Deadline(BUFFER_TIMEOUT)
        for looks in count():
            if limit.over():
                break
            used = self.collect(ring)
            if head in used:
                return used[head]
            if self.client.closed.is_set() or await self.common("device_status") & _NEEDS_RESET:
                return None
            await self.let_work(limit, looks)
        raise Found("hang", f"queue {ring.index}: a buffer does not come back within {BUFFER_TIMEOUT} s", "buffer")

    async def request(self, queue: int, readable: Sequence[bytes], writable: Sequence[int]) -> tuple[int, bytes]:
        """One request that must succeed: its used length and what was written. Raises Found: broken."""
        offered = self.offer(queue, readable, writable)
        assert offered is not None
        head, addresses = offered
        await self.kick(queue)
        length = await self.wait_used(self.rings[queue], head)
        if length is None:
            raise Found("broken", f"queue {queue}: a good request gets no answer", "request")
        data = b"".join(self.ram.read(address, size) for address, size in zip(addresses, writable, strict=True))
        return length, data
