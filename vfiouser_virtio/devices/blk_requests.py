"""Block requests (virtio 1.4, 5.2.6): parsed, checked, and turned into one operation of the backend."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from vfiouser_virtio.backends.block import BlockBackend, Cancel, Range, Segments, StartingBackend
from vfiouser_virtio.protocols.virtio import blk
from vfiouser_virtio.protocols.virtio.blk import SECTOR_SIZE, BlkStatus, RequestType, SegmentFlags
from vfiouser_virtio.virtio import Chain, copy_into

# One segment of a discard or of a write of zeros. Where the host has to write the zeros, this takes about a second.
MAX_RANGE_SECTORS = (256 << 20) // SECTOR_SIZE
MAX_DISCARD_SEGMENTS = 16
MAX_WRITE_ZEROES_SEGMENTS = 1

# A plain int: the complement of an IntFlag has only the bits that the flag knows.
_UNMAP = int(SegmentFlags.UNMAP)


@dataclass(slots=True)
class Request:
    """Parsed request that takes more than a moment: see `Chain.take_request`.

    Its views may be touched as long as its chain is pinned, or until the next await.
    """

    chain: Chain
    kind: int
    sector: int
    data: Segments
    length: int
    """Bytes of ``data``, which the driver wrote."""
    buffers: Segments
    room: int
    """Bytes of ``buffers``, which are to be filled."""

    @property
    def name(self) -> str:
        """For messages."""
        return RequestType(self.kind).name

    def finish(self, status: BlkStatus, fills: int = 0) -> None:
        """Give the request back; the first ``fills`` bytes of the writable part hold data."""
        self.chain.finish_request(status, fills)


@dataclass(slots=True)
class Plan:
    """Operation of the backend that a request asks for: one that may take its time, its arguments, and one at once.

    ``nowait`` is None where that has been tried. ``start`` is the same once more, for a backend that needs no task.
    """

    patiently: Callable[..., Awaitable[None]]
    arguments: tuple[Any, ...]
    nowait: Callable[..., bool] | None = None
    writes: bool = False
    fills: int = 0
    """Bytes from the start of the writable part that it stores."""
    start: Callable[..., Cancel | None] | None = None


class Refused(Exception):
    """Request that ends with this status before anything was touched."""

    def __init__(self, status: BlkStatus) -> None:
        super().__init__(status)
        self.status = status


class Planner:
    """Conversion of requests to plans for one disk. ``unmaps``: discards, and the flag UNMAP, are to be honoured.

    Buffers per request and their sizes are not checked against seg_max and size_max: those bind the driver (5.2.6.1),
    and whatever it sends can be served.
    """

    def __init__(self, backend: BlockBackend, *, serial: bytes, unmaps: bool) -> None:
        self.backend = backend
        self.sectors = backend.size // SECTOR_SIZE
        """Capacity; grows and shrinks with the disk."""
        self._serial = serial
        self._unmaps = unmaps
        self._start_read = self._start_write = self._start_flush = None
        if isinstance(backend, StartingBackend):
            self._start_read, self._start_write = backend.start_read, backend.start_write
            self._start_flush = backend.start_flush
        self._plans: dict[int, Callable[[Request], Plan]] = {
            RequestType.IN: self._read,
            RequestType.OUT: self._write,
            RequestType.FLUSH: self._flush,
            RequestType.GET_ID: self._get_id,
        }
        # What is not offered is not known either: UNSUPP.
        if not backend.readonly:
            self._plans[RequestType.WRITE_ZEROES] = self._write_zeroes
        if unmaps:
            self._plans[RequestType.DISCARD] = self._discard

    def plan(self, request: Request) -> Plan:
        """What to do. Raises Refused for what must not be done (5.2.6.2), GuestError for what is not even a request."""
        make = self._plans.get(request.kind)
        if make is None:
            raise Refused(BlkStatus.UNSUPP)
        return make(request)

    def offset(self, sector: int, length: int) -> int:
        """The offset of a sector. Raises Refused unless ``length`` bytes from there are whole sectors of the disk."""
        if length % SECTOR_SIZE or sector + length // SECTOR_SIZE > self.sectors:
            raise Refused(BlkStatus.IOERR)
        return sector * SECTOR_SIZE

    def _read(self, request: Request) -> Plan:
        arguments = self.offset(request.sector, request.room), request.buffers
        return Plan(self.backend.read, arguments, fills=request.room, start=self._start_read)

    def _write(self, request: Request) -> Plan:
        if self.backend.readonly:
            raise Refused(BlkStatus.IOERR)
        arguments = self.offset(request.sector, request.length), request.data
        return Plan(self.backend.write, arguments, writes=True, start=self._start_write)

    def _flush(self, request: Request) -> Plan:  # noqa: ARG002 - its sector means nothing
        return Plan(self.backend.flush, (), self.backend.flush_nowait, start=self._start_flush)

    def _get_id(self, request: Request) -> Plan:
        room = min(request.room, blk.ID_BYTES)
        copy_into(request.buffers, self._serial.ljust(blk.ID_BYTES, b"\0")[:room])
        return Plan(trio.lowlevel.checkpoint, (), _done, fills=room)

    def _discard(self, request: Request) -> Plan:
        ranges, _ = self._ranges(request, MAX_DISCARD_SEGMENTS, known_flags=0)
        return Plan(self.backend.discard, (ranges,), self.backend.discard_nowait, writes=True)

    def _write_zeroes(self, request: Request) -> Plan:
        [(offset, length)], flags = self._ranges(request, MAX_WRITE_ZEROES_SEGMENTS, known_flags=_UNMAP)
        arguments = offset, length, bool(flags) and self._unmaps
        return Plan(self.backend.write_zeroes, arguments, self.backend.write_zeroes_nowait, writes=True)

    def _ranges(self, request: Request, limit: int, *, known_flags: int) -> tuple[list[Range], int]:
        """The segments of a discard or of a write of zeros, all checked before any is used, and their flags."""
        count, rest = divmod(request.length, blk.SEGMENT_CODEC.size)
        if rest or not 0 < count <= limit:
            raise Refused(BlkStatus.IOERR)
        segments = list(blk.SEGMENT_CODEC.iter_unpack(b"".join(request.data)))
        all_flags = 0
        for _, _, flags in segments:
            all_flags |= flags
        if all_flags & ~known_flags:
            raise Refused(BlkStatus.UNSUPP)
        ranges: list[Range] = []
        for sector, sectors, _ in segments:
            if sectors > MAX_RANGE_SECTORS:
                raise Refused(BlkStatus.IOERR)
            length = sectors * SECTOR_SIZE
            ranges.append((self.offset(sector, length), length))
        return ranges, all_flags


def _done() -> bool:
    return True
