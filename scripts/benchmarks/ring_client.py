"""A driver for many queues that makes block reads as fast as it can: it is the server that is to be seen."""

import mmap
import struct

from benchmarks.client import NOTIFY, RAM_SIZE, Client
from vfiouser_virtio.barrier import full_barrier
from vfiouser_virtio.protocols.vfio_user import PciRegion
from vfiouser_virtio.protocols.virtio.ring import DESC_CODEC, DescFlags

# Of each queue, in guest memory, from 0 on: its rings, and the headers and status bytes of its requests.
QUEUE_SPACE = 0x4000
_AVAIL, _USED, _HEADERS = 0x1800, 0x2000, 0x3000
_DATA = 64 * QUEUE_SPACE
_ENTRIES = 128


class ReadQueue:
    """One queue with ``depth`` reads of ``size`` bytes, each in ``segments`` pieces, that are made over and over."""

    def __init__(self, client: Client, index: int, ram: mmap.mmap, *, depth: int, size: int, segments: int) -> None:
        assert depth * (segments + 2) <= _ENTRIES, "the requests do not fit into the queue"
        self._client = client
        self._index = index
        self._depth = depth
        self._base = index * QUEUE_SPACE
        view = memoryview(ram).cast("H")
        self._avail = view[(self._base + _AVAIL) // 2 :]
        self._used = view[(self._base + _USED) // 2 :]
        self._next = 0
        self._heads = [number * (segments + 2) for number in range(depth)]
        for number in range(depth):
            self._build(ram, number, size // segments, segments)
        client.enable_queue(index, _ENTRIES, self._base, self._base + _AVAIL, self._base + _USED)

    def _build(self, ram: mmap.mmap, number: int, piece: int, segments: int) -> None:
        """The request ``number``: its header, data and status, in descriptors side by side."""
        header = self._base + _HEADERS + 32 * number
        struct.pack_into("<IIQ", ram, header, 0, 0, 8 * number)
        room = (RAM_SIZE - _DATA) // piece
        # A step that has no factor in common with their number: data lies all over memory.
        places = (_DATA + (number * segments + segment) * 61 % room * piece for segment in range(segments))
        buffers = [(header, 16, 0), *((place, piece, DescFlags.WRITE) for place in places)]
        buffers.append((header + 16, 1, DescFlags.WRITE))
        first = self._heads[number]
        for at, (address, length, flags) in enumerate(buffers, start=first):
            last = at == first + len(buffers) - 1
            descriptor = DESC_CODEC.pack(
                address, length, flags if last else flags | DescFlags.NEXT, 0 if last else at + 1
            )
            start = self._base + DESC_CODEC.size * at
            ram[start : start + len(descriptor)] = descriptor

    def submit(self) -> None:
        """Make all requests available, and kick where the device asks for it."""
        for number, head in enumerate(self._heads, start=self._next):
            self._avail[2 + number % _ENTRIES] = head
        self._next += self._depth
        self._avail[1] = self._next & 0xFFFF
        # The index is stored before the flag is read: else both sides could wait for each other.
        full_barrier()
        if not self._used[0] & 1:
            self._client.post(PciRegion.BAR4, NOTIFY + 4 * self._index, self._index.to_bytes(2, "little"))

    @property
    def done(self) -> bool:
        """Whether all have come back."""
        return self._used[1] == self._next & 0xFFFF
