"""Driver for the block device (virtio 1.4, 5.2)."""

from itertools import cycle
from typing import NamedTuple

from vfiouser_virtio.guest.device import VirtioDevice
from vfiouser_virtio.guest.driver import VirtioDriver, virtio_ids
from vfiouser_virtio.guest.errors import DeviceBroken
from vfiouser_virtio.guest.requests import RequestQueue
from vfiouser_virtio.protocols.virtio import blk
from vfiouser_virtio.protocols.virtio.blk import SECTOR_SIZE, BlkFeature, BlkStatus, RequestType, SegmentFlags
from vfiouser_virtio.protocols.virtio.features import mask_of

MAX_TRANSFER = 1 << 20
"""Bytes of one read or write request; longer ones become several."""

WANTED = mask_of(
    (
        BlkFeature.SIZE_MAX,
        BlkFeature.SEG_MAX,
        BlkFeature.GEOMETRY,
        BlkFeature.RO,
        BlkFeature.BLK_SIZE,
        BlkFeature.FLUSH,
        BlkFeature.TOPOLOGY,
        BlkFeature.CONFIG_WCE,
        BlkFeature.MQ,
        BlkFeature.DISCARD,
        BlkFeature.WRITE_ZEROES,
    )
)
"""Mask of the features that this driver makes use of; the rest is left alone."""


class BlkReply(NamedTuple):
    """End of one request: its status byte, the data it brought, and the length that the device reports."""

    status: int
    data: bytes
    written: int


class RequestFailed(Exception):
    """Request that the disk ended with another ``status`` than OK."""

    def __init__(self, what: str, status: int) -> None:
        known = BlkStatus(status).name if status in {*BlkStatus} else f"{status:#x}"
        super().__init__(f"{what}: {known}")
        self.status = status


class Disk:
    """Disk: ``driver_data`` of its device. Sectors have 512 bytes, whatever the block size."""

    def __init__(self, device: VirtioDevice, queues: list[RequestQueue], segment_size: int, segments: int) -> None:
        self.device = device
        self.queues = queues
        self._next_queue = cycle(queues)
        self._segment_size = segment_size
        self._max_sectors = max(1, min(MAX_TRANSFER, segment_size * segments) // SECTOR_SIZE)

    async def capacity(self) -> int:
        """Sectors of the disk, now: it may be resized at any time."""
        return await self.device.config.get_int("capacity")

    @property
    def readonly(self) -> bool:
        """Whether the device refuses writes."""
        return self.device.has_feature(BlkFeature.RO)

    async def read(self, sector: int, count: int) -> bytes:
        """``count`` sectors from ``sector`` on. Raises RequestFailed; what `RequestQueue.request` raises."""
        parts = []
        while count:
            sectors = min(count, self._max_sectors)
            reply = await self.request(RequestType.IN, sector, in_len=sectors * SECTOR_SIZE)
            self._check(f"read of {sectors} sectors at {sector}", reply)
            # Data counts only as far as the device says that it has written it (2.7.8.2).
            if reply.written < len(reply.data):
                short = f"{reply.written:#x} of {len(reply.data):#x} bytes"
                raise DeviceBroken(f"{self.device.name}: used length says that a read brought only {short}", "UR2")
            parts.append(reply.data)
            sector, count = sector + sectors, count - sectors
        return b"".join(parts)

    async def write(self, sector: int, data: bytes) -> None:
        """Write whole sectors from ``sector`` on. Raises ValueError for what is no number of sectors; as `read`."""
        if len(data) % SECTOR_SIZE:
            raise ValueError(f"{len(data)} bytes are no number of sectors")
        for at in range(0, len(data), self._max_sectors * SECTOR_SIZE):
            piece = data[at : at + self._max_sectors * SECTOR_SIZE]
            first = sector + at // SECTOR_SIZE
            self._check(f"write at {first}", await self.request(RequestType.OUT, first, piece))

    async def flush(self) -> None:
        """Everything that was written before is durable when this returns."""
        self._check("flush", await self.request(RequestType.FLUSH))

    async def discard(self, sector: int, count: int) -> None:
        """These sectors are of no use any more."""
        self._check(f"discard at {sector}", await self._range(RequestType.DISCARD, sector, count, 0))

    async def write_zeroes(self, sector: int, count: int, *, unmap: bool = False) -> None:
        """Zeros to these sectors; ``unmap`` lets the disk give their space back."""
        flags = SegmentFlags.UNMAP if unmap else 0
        self._check(f"write of zeros at {sector}", await self._range(RequestType.WRITE_ZEROES, sector, count, flags))

    async def get_id(self) -> bytes:
        """The serial number, up to 20 bytes."""
        reply = await self.request(RequestType.GET_ID, in_len=blk.ID_BYTES)
        self._check("get id", reply)
        return reply.data.split(b"\0")[0]

    async def set_writeback(self, on: bool) -> None:
        """Whether the disk may keep writes in a volatile cache until a flush. Needs CONFIG_WCE."""
        await self.device.config.set("wce", int(on))

    async def request(self, kind: int, sector: int = 0, out: bytes = b"", in_len: int = 0) -> BlkReply:
        """Any request at all, with whatever status it ends."""
        header = blk.REQUEST_HEADER_CODEC.pack(kind, 0, sector)
        sizes = self._cut(in_len)
        written, data = await next(self._next_queue).request([header, *self._pieces(out)], [*sizes, 1])
        return BlkReply(data[-1][0], b"".join(data[:-1]), written)

    async def _range(self, kind: RequestType, sector: int, count: int, flags: int) -> BlkReply:
        return await self.request(kind, out=blk.SEGMENT_CODEC.pack(sector, count, flags))

    def _cut(self, length: int) -> list[int]:
        return [min(self._segment_size, length - at) for at in range(0, length, self._segment_size)]

    def _pieces(self, data: bytes) -> list[bytes]:
        return [data[at : at + self._segment_size] for at in range(0, len(data), self._segment_size)]

    def _check(self, what: str, reply: BlkReply) -> None:
        if reply.status != BlkStatus.OK:
            raise RequestFailed(f"{self.device.name}: {what}", reply.status)


class BlkDriver(VirtioDriver):
    """Driver that makes a `Disk` of each device, which uses all request queues it has, one after the other."""

    name = "virtio_blk"
    id_table = virtio_ids(blk.DEVICE_ID)

    async def probe(self, device: VirtioDevice) -> None:
        await device.negotiate(WANTED)
        config = device.config
        count = await config.get_int("num_queues") if device.has_feature(BlkFeature.MQ) else 1
        segment_size = await config.get_int("size_max") if device.has_feature(BlkFeature.SIZE_MAX) else 0
        queues = [await RequestQueue.open(device, f"requestq{number}") for number in range(1, count + 1)]
        # A chain may not be longer than its queue (2.7.5.3.1), and has a header and a status byte, too.
        segments = max(1, min(queue.vq.size for queue in queues) - 2)
        if device.has_feature(BlkFeature.SEG_MAX):
            segments = min(segments, await config.get_int("seg_max"))
        device.driver_data = Disk(device, queues, segment_size or MAX_TRANSFER, segments)

    async def remove(self, device: VirtioDevice) -> None:
        for queue in device.driver_data.queues:
            queue.close()


DRIVER = BlkDriver
