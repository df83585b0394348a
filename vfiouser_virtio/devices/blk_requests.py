"""Block requests (virtio 1.4, 5.2.6): taken apart, checked, and turned into one operation of the backend."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from vfiouser_virtio.backends.block import BlockBackend, Cancel, Range, StartingBackend
from vfiouser_virtio.protocols.virtio import blk
from vfiouser_virtio.protocols.virtio.blk import SECTOR_SIZE, RequestType, SegmentFlags, Status
from vfiouser_virtio.virtio import Chain

# One segment of a discard or of a write of zeros. Where the host has to write the zeros, this takes about a second.
MAX_RANGE_SECTORS = (256 << 20) // SECTOR_SIZE
MAX_DISCARD_SEGMENTS = 16
MAX_WRITE_ZEROES_SEGMENTS = 1

_unpack_header = blk.REQUEST_HEADER_CODEC.unpack
_HEADER_SIZE = blk.REQUEST_HEADER_CODEC.size
# A plain int: the complement of an IntFlag has only the bits that the flag knows.
_UNMAP = int(SegmentFlags.UNMAP)


@dataclass(slots=True)
class Request:
    """One request, taken apart. Its views may be touched as long as its chain is pinned, or until the next await."""

    chain: Chain
    kind: int
    sector: int
    status: memoryview
    room: int
    """Bytes of the writable part in front of the status byte."""

    @property
    def name(self) -> str:
        """For messages."""
        return RequestType(self.kind).name

    def finish(self, status: Status, fills: int = 0) -> None:
        """Give the request back; the first ``fills`` bytes of the writable part hold data."""
        self.status[0] = status
        # The used length counts from the start (2.7.8.2): the status only when there is no gap in front of it.
        self.chain.written = fills + 1 if fills == self.room else fills  # known to fit, so `complete` need not look
        self.chain.complete()


@dataclass(slots=True)
class Plan:
    """What a request asks of the backend: an operation at once, the same one with patience, and their arguments.

    ``start`` is the same once more, for a backend that needs no task for it.
    """

    nowait: Callable[..., bool]
    patiently: Callable[..., Awaitable[None]]
    arguments: tuple[Any, ...]
    writes: bool = False
    fills: int = 0
    """Bytes from the start of the writable part that it stores."""
    start: Callable[..., Cancel | None] | None = None


class Refused(Exception):
    """The request ends with this status, and nothing has been touched."""

    def __init__(self, status: Status) -> None:
        super().__init__(status)
        self.status = status


def parse(chain: Chain) -> Request:
    """Take header and status off a chain, however it is cut. Raises GuestError when one is missing (5.2.6.1)."""
    kind, _, sector = _unpack_header(chain.readable.read(_HEADER_SIZE))
    [status] = chain.writable.take_last(1)
    return Request(chain, kind, sector, status, chain.writable.length)


class Planner:
    """Turns requests into plans for one disk. ``unmaps`` says that discards, and the flag UNMAP, are to be honoured.

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
            raise Refused(Status.UNSUPP)
        return make(request)

    def _read(self, request: Request) -> Plan:
        backend, room = self.backend, request.room
        offset = self._check(request.sector, room)
        arguments = offset, request.chain.writable.take_pieces(room)
        return Plan(backend.read_nowait, backend.read, arguments, fills=room, start=self._start_read)

    def _write(self, request: Request) -> Plan:
        backend, readable = self.backend, request.chain.readable
        if backend.readonly:
            raise Refused(Status.IOERR)
        offset = self._check(request.sector, readable.length)
        arguments = offset, readable.take_pieces(readable.length)
        return Plan(backend.write_nowait, backend.write, arguments, writes=True, start=self._start_write)

    def _flush(self, request: Request) -> Plan:  # noqa: ARG002 - its sector means nothing
        return Plan(self.backend.flush_nowait, self.backend.flush, (), start=self._start_flush)

    def _get_id(self, request: Request) -> Plan:
        room = min(request.room, blk.ID_BYTES)
        request.chain.writable.write(self._serial.ljust(blk.ID_BYTES, b"\0")[:room])
        return Plan(_done, trio.lowlevel.checkpoint, (), fills=room)

    def _discard(self, request: Request) -> Plan:
        ranges, _ = self._ranges(request, MAX_DISCARD_SEGMENTS, known_flags=0)
        return Plan(self.backend.discard_nowait, self.backend.discard, (ranges,), writes=True)

    def _write_zeroes(self, request: Request) -> Plan:
        [(offset, length)], flags = self._ranges(request, MAX_WRITE_ZEROES_SEGMENTS, known_flags=_UNMAP)
        arguments = offset, length, bool(flags) and self._unmaps
        return Plan(self.backend.write_zeroes_nowait, self.backend.write_zeroes, arguments, writes=True)

    def _ranges(self, request: Request, limit: int, *, known_flags: int) -> tuple[list[Range], int]:
        """The segments of a discard or of a write of zeros, all checked before any is used, and their flags."""
        count, rest = divmod(request.chain.readable.length, blk.SEGMENT_CODEC.size)
        if rest or not 0 < count <= limit:
            raise Refused(Status.IOERR)
        segments = list(blk.SEGMENT_CODEC.iter_unpack(request.chain.readable.read()))
        all_flags = 0
        for _, _, flags in segments:
            all_flags |= flags
        if all_flags & ~known_flags:
            raise Refused(Status.UNSUPP)
        ranges: list[Range] = []
        for sector, sectors, _ in segments:
            if sectors > MAX_RANGE_SECTORS:
                raise Refused(Status.IOERR)
            length = sectors * SECTOR_SIZE
            ranges.append((self._check(sector, length), length))
        return ranges, all_flags

    def _check(self, sector: int, length: int) -> int:
        """The offset of a sector, if ``length`` bytes from there are whole sectors of the disk."""
        if length % SECTOR_SIZE or sector + length // SECTOR_SIZE > self.sectors:
            raise Refused(Status.IOERR)
        return sector * SECTOR_SIZE


def _done() -> bool:
    return True
