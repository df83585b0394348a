"""Driver for many queues that makes block reads as fast as it can: it is the server that is to be seen."""

import struct

from vfiouser_virtio.barrier import full_barrier
from vfiouser_virtio.protocols.vfio_user import PciRegion
from vfiouser_virtio.testing.raw.blocking import NOTIFY, RAM_SIZE, BlockingClient
from vfiouser_virtio.testing.raw.ring import WRITE, Segment
from vfiouser_virtio.testing.raw.split import RawSplitRing, linked

# Of each queue, in guest memory, from 0 on: its rings, and the headers and status bytes of its requests.
QUEUE_SPACE = 0x4000
_AVAIL, _USED, _HEADERS = 0x1800, 0x2000, 0x3000
_DATA = 64 * QUEUE_SPACE
_ENTRIES = 128


class ReadQueue:
    """Queue with ``depth`` reads of ``size`` bytes, each in ``segments`` pieces, that are made over and over."""

    def __init__(self, client: BlockingClient, index: int, *, depth: int, size: int, segments: int) -> None:
        assert depth * (segments + 2) <= _ENTRIES, "the requests do not fit into the queue"
        self._client = client
        self._index = index
        self._depth = depth
        self._base = index * QUEUE_SPACE
        view = client.ram.view.cast("H")
        ring = RawSplitRing(client.ram, _ENTRIES, (self._base, self._base + _AVAIL, self._base + _USED), index)
        self._avail = view[(self._base + _AVAIL) // 2 :]
        self._used = view[(self._base + _USED) // 2 :]
        self._next = 0
        self._heads = [number * (segments + 2) for number in range(depth)]
        for number in range(depth):
            self._build(ring, number, size // segments, segments)
        client.enable_queue(index, _ENTRIES, *ring.addresses)

    def _build(self, ring: RawSplitRing, number: int, piece: int, segments: int) -> None:
        """The request ``number``: its header, data and status, in descriptors side by side."""
        header = self._base + _HEADERS + 32 * number
        ring.ram.write(header, struct.pack("<IIQ", 0, 0, 8 * number))
        room = (RAM_SIZE - _DATA) // piece
        # A step that has no factor in common with their number: data lies all over memory.
        places = (_DATA + (number * segments + segment) * 61 % room * piece for segment in range(segments))
        buffers: list[Segment] = [(header, 16, 0), *((place, piece, WRITE) for place in places)]
        buffers.append((header + 16, 1, WRITE))
        indices = range(self._heads[number], self._heads[number] + len(buffers))
        for index, descriptor in zip(indices, linked(buffers, indices), strict=True):
            ring.describe(index, descriptor)

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
