"""Block requests (virtio 1.4, 5.2.6): taken, parsed, checked, performed by the backend, and completed.

::

    burst ─▶ chain ─▶ read or write at once (page cache, RAM) ─────────────────▶ status byte, used ring: one interrupt
                  └─▶ Request ─▶ Plan ─▶ io_uring, or a task each: threads ─▶

Reads and writes go straight between the backend and the guest's own buffers. Requests may end in any order, as the
specification lets them; a flush covers the writes that had been completed before it.
"""

import errno
import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import trio

from vfiouser_virtio.backends.block import BlockBackend, Cancel, Range, Segments, StartingBackend
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.protocols.virtio import blk
from vfiouser_virtio.protocols.virtio.blk import SECTOR_SIZE, BlkStatus, RequestType, SegmentFlags
from vfiouser_virtio.virtio import Chain, Pinned, Queue, copy_into

# One segment of a discard or of a write of zeros. Where the host has to write the zeros, this takes about a second.
MAX_RANGE_SECTORS = (256 << 20) // SECTOR_SIZE
MAX_DISCARD_SEGMENTS = 16
MAX_WRITE_ZEROES_SEGMENTS = 1
MAX_TASKS = 256
"""Requests of a disk that have a task each; what comes then stays in the rings. A reset cancels all in one round of the
loop: 16,384, of 64 queues, held up all devices for 0.9 s."""
_SEGMENTS = 64  # for which a request counts as one more: to let go of 1022 takes three times as long as to end a task
_ENOUGH = MAX_TASKS // 4 * 3  # once there are so few, others are taken again

# Plain ints: the complement of an IntFlag has only the bits that the flag knows.
_UNMAP = int(SegmentFlags.UNMAP)
# For each request, to look up a member of an enumeration takes longer than to compare with it.
_IN, _OUT, _OK = RequestType.IN.value, RequestType.OUT.value, BlkStatus.OK.value


@dataclass(slots=True, eq=False, repr=False)
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
    def cost(self) -> int:
        """What it counts of `MAX_TASKS`."""
        return 1 + (len(self.data) + len(self.buffers)) // _SEGMENTS

    @property
    def name(self) -> str:
        """For messages."""
        return RequestType(self.kind).name

    def finish(self, status: BlkStatus, fills: int = 0) -> None:
        """Give the request back; the first ``fills`` bytes of the writable part hold data."""
        self.chain.finish_request(status, fills)


@dataclass(slots=True, eq=False, repr=False)
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
        # Asked once: such a look at a protocol takes 0.1 ms.
        self.starting = starting = backend if isinstance(backend, StartingBackend) else None
        """The disk, where it needs no task for each request."""
        self._start_read = self._start_write = self._start_flush = None
        if starting is not None:
            self._start_read, self._start_write = starting.start_read, starting.start_write
            self._start_flush = starting.start_flush
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


class BlockRequests:
    """Requests of one disk, from its queues to ``backend`` and back. ``serial`` and ``unmaps`` are for `Planner`."""

    def __init__(self, backend: BlockBackend, log: DeviceLog, *, serial: bytes, unmaps: bool) -> None:
        self.planner = Planner(backend, serial=serial, unmaps=unmaps)
        self.write_through = False
        """Writes are stable before they are completed."""
        self._backend = backend
        self._log = log
        self._tasks = 0
        self._fewer = trio.lowlevel.ParkingLot()

    async def serve(self, queue: Queue, nursery: trio.Nursery) -> None:
        """Take, parse, perform, complete; what a burst has completed is shown to the driver at once."""
        planner, backend = self.planner, self._backend
        readonly, read, write = backend.readonly, backend.read_nowait, backend.write_nowait
        header, offset = blk.REQUEST_HEADER_CODEC, planner.offset
        reap = planner.starting.reap if planner.starting is not None else None
        async for burst in queue.bursts(at_once=True, reap=reap):
            for chain in burst:
                (kind, _, sector), data, length, buffers, room = chain.take_request(header)
                outcome, fills = _OK, 0
                try:
                    # Most requests are one of these two, and done at once: no object is made for them.
                    if kind == _IN:
                        done, fills = read(offset(sector, room), buffers), room
                    elif kind == _OUT and not readonly:
                        done = write(offset(sector, length), data)
                        if done and self.write_through:  # what cannot be made stable at once is simply done again
                            done = backend.flush_nowait()
                    else:
                        done = False
                    if not done:
                        request = Request(chain, kind, sector, data, length, buffers, room)
                        self._perform(queue, nursery, request)
                        if self._tasks >= MAX_TASKS:
                            break
                        continue
                except Refused as refused:
                    outcome, fills = refused.status, 0
                except OSError as error:
                    self.complain(RequestType(kind).name, sector * SECTOR_SIZE, error, queue)
                    outcome, fills = BlkStatus.IOERR, 0
                chain.finish_request(outcome, fills)
            if self._tasks >= MAX_TASKS:
                del burst  # what is left of it comes with the next one
                while self._tasks >= MAX_TASKS:
                    await self._fewer.park()

    def _perform(self, queue: Queue, nursery: trio.Nursery, request: Request) -> None:
        """Any request: at once where that can be, else by the backend, which will tell its end, or by a task of ours.

        Raises Refused and OSError for what has failed at once.
        """
        plan = self.planner.plan(request)
        # A write that was done, but cannot be made stable at once, is simply done again.
        if (
            plan.nowait is not None
            and plan.nowait(*plan.arguments)
            and not (plan.writes and self.write_through and not self._backend.flush_nowait())
        ):
            request.finish(BlkStatus.OK, plan.fills)
        elif not self._start(queue, request, plan):
            self._tasks += request.cost
            nursery.start_soon(self._wait, queue, queue.pinned(request.chain), request, plan)

    def _start(self, queue: Queue, request: Request, plan: Plan) -> bool:
        """Leave the request to the backend, which will tell its end; False where that needs a task of ours."""
        if plan.start is None or (plan.writes and self.write_through):
            return False
        cancel: Cancel | None = None

        def give_up() -> None:
            if cancel is not None:
                cancel()

        def ended(error: OSError | None) -> None:
            try:
                if error is None:
                    request.finish(BlkStatus.OK, plan.fills)
                else:
                    self.complain(request.name, request.sector * SECTOR_SIZE, error, queue)
                    request.finish(BlkStatus.IOERR)
            finally:
                release()

        release = queue.hold(request.chain, give_up)
        cancel = plan.start(*plan.arguments, ended)
        if cancel is None:
            release()
            return False
        return True

    async def _wait(self, queue: Queue, pinned: Pinned, request: Request, plan: Plan) -> None:
        try:
            with pinned:
                status, fills = BlkStatus.IOERR, 0
                try:
                    await plan.patiently(*plan.arguments)
                    if plan.writes and self.write_through:
                        await self._backend.flush()
                    status, fills = BlkStatus.OK, plan.fills
                except OSError as error:
                    self.complain(request.name, request.sector * SECTOR_SIZE, error, queue)
                finally:
                    # Also when the memory is to go away, or at a reset: both wait until nothing is pinned any more.
                    request.finish(status, fills)
        finally:
            before = self._tasks
            self._tasks -= request.cost
            if before > _ENOUGH >= self._tasks:
                self._fewer.unpark_all()

    def complain(self, what: str, offset: int, error: OSError, queue: Queue | None = None) -> None:
        """Log a failure of the host: the first of each kind and errno since the last reset."""
        message = "%s%s at offset %#x failed on the host: %s (%s)"
        where = "" if queue is None else f"queue {queue.index}: "
        name = errno.errorcode.get(error.errno or 0, "no errno")
        self._log.once((what, error.errno), message, where, what, offset, error, name, level=logging.ERROR)


def _done() -> bool:
    return True
