"""What a well-behaved driver does, through nothing but messages: bring a device up, offer buffers, reset it.

The offsets are those of `VirtioPci`; the ring is written apart from the device's side: no mistake is made twice.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio
import trio.testing

from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import TYPE0_HEADER, CapId
from vfiouser_virtio.protocols.vfio_user import DMA_MAP, DMA_UNMAP, Command, DmaUnmapFlags, PciRegion
from vfiouser_virtio.protocols.virtio.features import Feature, Status
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.protocols.virtio.ring import DescFlags
from vfiouser_virtio.testing.fuzz.case import Memory
from vfiouser_virtio.testing.fuzz.client import Client
from vfiouser_virtio.testing.fuzz.oracle import Bounds, Found
from vfiouser_virtio.testing.fuzz.ram import (
    HEAP,
    HEAP_END,
    MAX_RINGS,
    PIECES,
    RING_STRIDE,
    RINGS,
    TABLES,
    TABLES_END,
    Ram,
)
from vfiouser_virtio.transports.pci import COMMON, NOTIFY, NOTIFY_MULTIPLIER, VIRTIO_BAR

RESET_PATIENCE = 5.0
"""Seconds until the status must read 0 after a 0 was written."""
BUFFER_PATIENCE = 4.0
"""Seconds that a device may keep a buffer that it has no reason to keep."""

_READY = Status.ACKNOWLEDGE | Status.DRIVER | Status.FEATURES_OK
_COMMAND_AT, _ = offsets(TYPE0_HEADER)["command"]
_CAPABILITIES_AT, _ = offsets(TYPE0_HEADER)["capability_list"]
_MEMORY_AND_MASTER = 0x6
_FEATURE_WORDS = 4


@dataclass(slots=True)
class Ring:
    """The driver's side of one split queue, at its place in `Ram`."""

    index: int
    size: int
    avail_idx: int = 0
    next_free: int = 0
    seen: int = 0
    """used.idx up to which `pending` was looked at."""
    pending: dict[int, int] = field(default_factory=dict)
    """Heads that are with the device, and how many descriptors each takes."""
    hostile: bool = False
    """Something was done to it that no driver does: nothing is promised any more."""

    @property
    def desc(self) -> int:
        return RINGS + RING_STRIDE * self.index

    @property
    def avail(self) -> int:
        return self.desc + 0x800

    @property
    def used(self) -> int:
        return self.desc + 0x1000

    @property
    def free(self) -> int:
        """Descriptors that no pending chain takes."""
        return self.size - sum(self.pending.values())


class Driver:
    """A driver on one connection. Every call comes back early where the server has hung up."""

    def __init__(self, client: Client, ram: Ram, bounds: Bounds, memory: Memory) -> None:
        self.client = client
        self.ram = ram
        self.bounds = bounds
        self.memory: Memory = memory
        self.rings: list[Ring] = []
        self.features = 0
        """What was accepted in the last `bring_up`."""
        self._pm_cap: int | None = None
        self._offered: list[int] = []
        self._queue_sizes: list[int] = []
        self._heap = HEAP
        self._tables = TABLES

    # ---- registers -----------------------------------------------------------------------------------------------

    async def read(self, region: int, offset: int, count: int) -> int:
        """A register's value; 0 where there was no answer, or a refusal."""
        reply = await self.client.call(Command.REGION_READ, struct.pack("<QII", offset, region, count))
        return 0 if reply is None or reply.error else int.from_bytes(reply.body[16:], "little")

    def write(self, region: int, offset: int, data: bytes) -> None:
        """A posted write, as QEMU's are; it goes out with the next request."""
        self.client.post(Command.REGION_WRITE, struct.pack("<QII", offset, region, len(data)) + data)

    async def common(self, name: str) -> int:
        """A field of the common configuration."""
        offset, size = COMMON_CFG_OFFSETS[name]
        return await self.read(VIRTIO_BAR, COMMON + offset, size)

    def set_common(self, name: str, value: int) -> None:
        """Write a field of the common configuration."""
        offset, size = COMMON_CFG_OFFSETS[name]
        self.write(VIRTIO_BAR, COMMON + offset, value.to_bytes(size, "little"))

    # ---- memory --------------------------------------------------------------------------------------------------

    async def map(self, pieces: Sequence[int] = range(len(PIECES))) -> None:
        """Pieces of the RAM, by index, each with its file descriptor or without."""
        for piece in (PIECES[index] for index in pieces):
            private = self.memory == "private" or (self.memory == "mixed" and piece.private_if_mixed)
            fields = {"argsz": 32, "flags": piece.flags, "address": piece.address, "size": piece.size}
            body = DMA_MAP.build(fields | {"offset": 0 if private else piece.address})
            await self.client.call(Command.DMA_MAP, body, [] if private else [self.ram.fd])

    async def unmap(self, pieces: Sequence[int]) -> None:
        """Pieces of the RAM go."""
        for piece in (PIECES[index] for index in pieces):
            await self._unmap(0, piece.address, piece.size)

    async def unmap_all(self) -> None:
        """All memory goes, whatever it is."""
        await self._unmap(DmaUnmapFlags.ALL, 0, 0)

    async def _unmap(self, flags: int, address: int, size: int) -> None:
        body = DMA_UNMAP.build({"argsz": 24, "flags": flags, "address": address, "size": size})
        await self.client.call(Command.DMA_UNMAP, body)

    # ---- the life of a device ------------------------------------------------------------------------------------

    async def wake(self) -> None:
        """D0, memory decoding and bus mastering on: what a machine does before its driver looks at a device."""
        if self._pm_cap is None:
            space = (await self.read(PciRegion.CONFIG, 0, 256)).to_bytes(256, "little")
            at = space[_CAPABILITIES_AT]
            while at and space[at] != CapId.PM:
                at = space[at + 1]
            self._pm_cap = at
        if self._pm_cap:
            self.write(PciRegion.CONFIG, self._pm_cap + 4, b"\0\0")
        self.write(PciRegion.CONFIG, _COMMAND_AT, _MEMORY_AND_MASTER.to_bytes(2, "little"))

    async def reset(self) -> None:
        """Write 0 to the status and wait until it is 0. Raises Found where that does not come."""
        await self._sync()
        self.set_common("device_status", 0)
        with trio.move_on_after(RESET_PATIENCE):
            while not self.client.closed.is_set():
                if await self.common("device_status") == 0:
                    break
                await trio.sleep(0.001)
            self.rings = []
            return
        raise Found("broken", f"status is not 0 {RESET_PATIENCE} s after a reset", "reset")

    async def bring_up(self, *, size: int = 16, features: int = (1 << 128) - 1) -> None:
        """From any state to DRIVER_OK, with rings of ``size`` entries, or as many as the device takes."""
        await self.wake()
        await self.reset()
        if self.client.twin:  # what was stored before the reset may still be on its way
            await trio.testing.wait_all_tasks_blocked()
        self.bounds.check()
        self.bounds.forget()
        self._heap, self._tables = HEAP, TABLES
        self.set_common("device_status", Status.ACKNOWLEDGE)
        self.set_common("device_status", Status.ACKNOWLEDGE | Status.DRIVER)
        features |= Feature.VERSION_1.mask
        self.features = 0
        if not self._offered:
            await self._look_around()
        for word, offered in enumerate(self._offered):
            self.set_common("driver_feature_select", word)
            self.set_common("driver_feature", offered & features >> 32 * word)
            self.features |= (offered & features >> 32 * word) << 32 * word
        self.set_common("device_status", _READY)
        for index, largest in enumerate(self._queue_sizes):
            self.set_common("queue_select", index)
            ring = Ring(index, min(size, largest))
            self.ram.write(ring.desc, bytes(RING_STRIDE))
            self.rings.append(ring)
            self.set_common("queue_size", ring.size)
            self.set_common("queue_desc", ring.desc)
            self.set_common("queue_driver", ring.avail)
            self.set_common("queue_device", ring.used)
            self.set_common("queue_enable", 1)
        self.set_common("device_status", _READY | Status.DRIVER_OK)
        await self._sync()

    async def _sync(self) -> None:
        """What was posted has been done, and the oracle knows the rings."""
        await self.common("device_status")
        self.bounds.note()

    async def _look_around(self) -> None:
        """What the device offers, right after a reset: the same each time."""
        for word in range(_FEATURE_WORDS):
            self.set_common("device_feature_select", word)
            self._offered.append(await self.common("device_feature"))
        for index in range(min(await self.common("num_queues"), MAX_RINGS)):
            self.set_common("queue_select", index)
            self._queue_sizes.append(await self.common("queue_size"))

    # ---- buffers -------------------------------------------------------------------------------------------------

    def alloc(self, size: int) -> int:
        """The address of a buffer; old ones are used again."""
        if self._heap + size > HEAP_END:
            self._heap = HEAP
        address, self._heap = self._heap, self._heap + size
        return address

    def offer(
        self, queue: int, readable: Sequence[bytes], writable: Sequence[int], *, indirect: bool = False
    ) -> tuple[int, list[int]] | None:
        """Make a chain available; its head and its writable addresses. None where the ring has no room."""
        if queue >= len(self.rings):
            return None
        ring = self.rings[queue]
        self.collect(ring)
        buffers = [(self.alloc(len(data)), len(data), 0) for data in readable]
        for (address, _, _), data in zip(buffers, readable, strict=True):
            self.ram.write(address, data)
        buffers += [(self.alloc(size), size, int(DescFlags.WRITE)) for size in writable]
        needed = 1 if indirect else len(buffers)
        if not buffers or ring.free < needed:
            return None
        head = ring.next_free
        while head in ring.pending:  # chains end in any order
            head = (head + 1) % ring.size
        indexes = self._indexes(ring, head, needed)
        if len(indexes) < needed:
            return None
        if indirect:
            table = b"".join(_descriptor(buffers, n, n + 1) for n in range(len(buffers)))
            if self._tables + len(table) > TABLES_END:
                self._tables = TABLES
            address, self._tables = self._tables, self._tables + len(table)
            self.ram.write(address, table)
            entry = struct.pack("<QIHH", address, len(table), DescFlags.INDIRECT, 0)
            self.ram.write(ring.desc + 16 * indexes[0], entry)
        else:
            for n, index in enumerate(indexes):
                following = indexes[n + 1] if n + 1 < needed else 0
                self.ram.write(ring.desc + 16 * index, _descriptor(buffers, n, following))
        ring.pending[head] = needed
        ring.next_free = (indexes[-1] + 1) % ring.size
        self.expose(ring, [head])
        return head, [address for address, _, flags in buffers if flags]

    @staticmethod
    def _indexes(ring: Ring, head: int, needed: int) -> list[int]:
        taken = {(first + n) % ring.size for first, count in ring.pending.items() for n in range(count)}
        found = [(head + n) % ring.size for n in range(needed)]
        return [] if taken & set(found) else found  # contiguous, so that `pending` says which they are

    def expose(self, ring: Ring, heads: Sequence[int], jump: int = 0) -> None:
        """Put heads into the available ring and move its index behind them, or ``jump`` further."""
        for head in heads:
            self.ram.write(ring.avail + 4 + 2 * (ring.avail_idx % ring.size), struct.pack("<H", head))
            ring.avail_idx = ring.avail_idx + 1 & 0xFFFF
        ring.avail_idx = ring.avail_idx + jump & 0xFFFF
        self.ram.write(ring.avail + 2, struct.pack("<H", ring.avail_idx))
        self.bounds.note()

    async def kick(self, queue: int) -> None:
        """The available buffer notification, whether the device asked for it or not."""
        self.write(VIRTIO_BAR, NOTIFY + NOTIFY_MULTIPLIER * queue, queue.to_bytes(2, "little"))
        await self.client.flush()

    def collect(self, ring: Ring) -> dict[int, int]:
        """What the device has given back since the last look: used lengths by head."""
        (index,) = struct.unpack("<H", self.ram.read(ring.used + 2, 2))
        used: dict[int, int] = {}
        while ring.seen != index and not ring.hostile:
            head, length = struct.unpack("<II", self.ram.read(ring.used + 4 + 8 * (ring.seen % ring.size), 8))
            if head not in ring.pending:
                raise Found("reply", f"queue {ring.index}: head {head:#x} comes back, which the device does not have")
            del ring.pending[head]
            used[head] = length
            ring.seen = ring.seen + 1 & 0xFFFF
        return used

    async def wait_used(self, ring: Ring, head: int) -> int | None:
        """The used length of a chain; None if the device needs a reset or the server hung up. Raises Found: a hang."""
        with trio.move_on_after(BUFFER_PATIENCE):
            while True:
                used = self.collect(ring)
                if head in used:
                    return used[head]
                if self.client.closed.is_set() or await self.common("device_status") & Status.NEEDS_RESET:
                    return None
                await trio.lowlevel.checkpoint()
        raise Found("hang", f"queue {ring.index}: a buffer does not come back within {BUFFER_PATIENCE} s", "buffer")

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


def _descriptor(buffers: Sequence[tuple[int, int, int]], n: int, following: int) -> bytes:
    address, length, flags = buffers[n]
    more = n + 1 < len(buffers)
    return struct.pack("<QIHH", address, length, flags | DescFlags.NEXT * more, following if more else 0)
