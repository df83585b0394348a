"""Commands of an NVMe controller's I/O queues, carried out by a block backend.

Facts: NVM Express NVM Command Set Specification 1.0c, §3 (Read, Write, Flush, Write Zeroes, Dataset Management).

::

    command ─▶ blocks, ranges of memory ─▶ at once (page cache, RAM) ──────────────────────▶ completion
                                        ├▶ io_uring: the memory is held until it has ended ─▶
                                        └▶ a task: threads; memory that takes messages ─────▶
"""

import errno
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import Protocol

import trio
from pci.nvme_formats import ALL_NAMESPACES, NAMESPACE, PAGE, RANGE, Command, Failed, Io, Status
from pci.nvme_queues import Ranges, SubmissionQueue, data_ranges

from vfiouser_virtio.backends.block import BlockBackend, Cancel, StartingBackend
from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.pci import Dma, DmaFault

TRANSFER_SHIFT = 8
"""MDTS: 2⁸ pages, 1 MiB, is the most that one command moves."""
MAX_TASKS = 256
"""Commands that have a task each; what comes then stays in the queues. A reset cancels all of them in one go, for which
all devices of the process wait: a driver could have 65,536."""
MAX_COPIES = 16
"""Commands whose data is copied at a time, where memory takes messages: of those a driver could send 64,000."""
FUA = 1 << 30
DEALLOCATE = 1 << 2
_READ, _WRITE = int(Io.READ), int(Io.WRITE)

Work = Callable[[], Awaitable[None]]


class Complete(Protocol):
    """What tells the driver how a command has ended."""

    def __call__(self, queue: SubmissionQueue, cid: int, status: int = 0, result: int = 0) -> None: ...


class DiskCommands:
    """Commands of one namespace, whose contents ``backend`` has; ``complete`` is told how each ends."""

    def __init__(
        self, backend: BlockBackend, block_size: int, dma: Dma, log: DeviceLog, complete: Complete, *, discards: bool
    ) -> None:
        self.backend, self.block_size = backend, block_size
        self.blocks = backend.size // block_size
        self.discards = discards
        self.starting = backend if isinstance(backend, StartingBackend) else None
        self.write_cache = True
        """What a command has written may be lost until a flush, as the driver has chosen."""
        self.counts = [0, 0]
        """Commands that have read, and written."""
        self.moved = [0, 0]
        """What they have moved, in bytes."""
        self.freed: Callable[[], None] = _nothing
        """Called when it is not `full` any more."""
        self.held = 0
        """Commands that the backend has begun, which need no task."""
        self.tasks = 0
        """Commands that have a task each."""
        self._dma, self._log, self._complete = dma, log, complete
        self._copies = trio.Semaphore(MAX_COPIES)

    @property
    def full(self) -> bool:
        """Whether there are so many tasks that no more commands are to be begun, until one of them has ended."""
        return self.tasks >= MAX_TASKS

    def perform(self, queue: SubmissionQueue, command: Command, nursery: trio.Nursery) -> None:
        """Carry a command out, or begin to."""
        try:
            if command.flags:
                raise Failed(Status.INVALID_FIELD)  # fused commands, SGLs
            opcode = command.opcode
            if command.nsid != NAMESPACE and not (opcode == Io.FLUSH and command.nsid == ALL_NAMESPACES):
                raise Failed(Status.INVALID_NAMESPACE)
            if opcode in (_READ, _WRITE):
                work = self._transfer(queue, command, writes=opcode == _WRITE)
            else:
                work = self._other(queue, command)
        except Exception as error:
            self._complete(queue, command.cid, self._status(command, error))
            return
        if work is not None:
            self.tasks += 1
            nursery.start_soon(self._wait, queue, command, work)

    async def _wait(self, queue: SubmissionQueue, command: Command, work: Work) -> None:
        status = Status.SUCCESS
        try:
            await work()
        except Exception as error:
            status = self._status(command, error)
        finally:
            self.tasks -= 1
            if self.tasks == MAX_TASKS - 1:
                self.freed()
        self._complete(queue, command.cid, status)

    def _status(self, command: Command, error: Exception) -> Status:
        """Of a command that has failed. Raises what is a bug."""
        if isinstance(error, Failed):
            return error.status
        if isinstance(error, DmaFault):
            self._log.once("data", "command %#x (opcode %#x): %s", command.cid, command.opcode, error)
            return Status.DATA_TRANSFER_ERROR
        if not isinstance(error, OSError):
            raise error
        name = errno.errorcode.get(error.errno or 0, "no errno")
        what = f"opcode {command.opcode:#x} at block {command.cdw10 | command.cdw11 << 32:#x}"
        self._log.once(
            (command.opcode, error.errno), "%s failed on the host: %s (%s)", what, error, name, level=logging.ERROR
        )
        return Status.READ_ERROR if command.opcode == Io.READ else Status.WRITE_FAULT

    # ---- reads and writes ------------------------------------------------------------------------------------------

    def _transfer(self, queue: SubmissionQueue, command: Command, *, writes: bool) -> Work | None:
        """Do it at once, or begin it; what is to be awaited otherwise. Raises Failed, DmaFault, OSError."""
        offset, length = self._bytes(command.cdw10 | command.cdw11 << 32, (command.cdw12 & 0xFFFF) + 1)
        if length > PAGE << TRANSFER_SHIFT:
            raise Failed(Status.INVALID_FIELD)
        backend = self.backend
        if writes and backend.readonly:
            raise Failed(Status.WRITE_PROTECTED)
        self.counts[writes] += 1
        self.moved[writes] += length
        stable = writes and (bool(command.cdw12 & FUA) or not self.write_cache)
        ranges = self._ranges_nowait(command, length)
        views = None if ranges is None else self._dma.views_nowait(ranges, write=not writes)
        if ranges is None or views is None:
            return partial(self._copy, command, offset, length, stable)
        nowait = backend.write_nowait if writes else backend.read_nowait
        # A write that was done, but cannot be made stable at once, is simply done again.
        if nowait(offset, views) and (not stable or backend.flush_nowait()):
            self._complete(queue, command.cid)
            return None
        if self.starting is not None and not stable:
            start = self.starting.start_write if writes else self.starting.start_read
            if self._start(queue, command, ranges, partial(start, offset, views)):
                return None
        return partial(self._move, command, ranges, offset, stable)

    def _start(
        self, queue: SubmissionQueue, command: Command, ranges: Ranges, start: Callable[..., Cancel | None]
    ) -> bool:
        """Leave it to the backend, which will tell its end; False where that takes a task."""
        cancel: Cancel | None = None

        def give_up() -> None:
            if cancel is not None:
                cancel()

        def ended(error: OSError | None) -> None:
            self.held -= 1
            release()
            self._complete(queue, command.cid, 0 if error is None else self._status(command, error))

        release = self._dma.hold(ranges, give_up)
        self.held += 1
        cancel = start(ended)
        if cancel is None:
            self.held -= 1
            release()
        return cancel is not None

    async def _copy(self, command: Command, offset: int, length: int, stable: bool) -> None:
        """All of it, in memory that takes messages."""
        async with self._copies:
            await self._move(command, await self.ranges(command, length), offset, stable)

    async def _move(self, command: Command, ranges: Ranges, offset: int, stable: bool) -> None:
        writes = command.opcode == _WRITE
        async with self._dma.views(ranges, write=not writes) as views:
            await (self.backend.write if writes else self.backend.read)(offset, views)
            if stable:
                await self.backend.flush()

    def _bytes(self, first: int, count: int) -> tuple[int, int]:
        """Offset and length of blocks, in bytes. Raises Failed where the disk does not have them all."""
        if first + count > self.blocks:
            raise Failed(Status.LBA_OUT_OF_RANGE)
        return first * self.block_size, count * self.block_size

    def _ranges_nowait(self, command: Command, length: int) -> Ranges | None:
        """Where the data lies; None where a list of that takes messages."""
        prp1 = command.prp1
        if length <= PAGE - (prp1 & PAGE - 1) and not prp1 & 3:
            return [(prp1, length)]  # nearly always
        asking = data_ranges(prp1, command.prp2, length)
        try:
            wanted = next(asking)
            while True:
                views = self._dma.views_nowait([wanted])
                if views is None:
                    return None
                wanted = asking.send(b"".join(views))
        except StopIteration as ended:
            ranges: Ranges = ended.value
            return ranges

    async def ranges(self, command: Command, length: int) -> Ranges:
        """Where the data lies. Raises Failed and DmaFault."""
        asking = data_ranges(command.prp1, command.prp2, length)
        try:
            wanted = next(asking)
            while True:
                wanted = asking.send(await self._dma.read(*wanted))
        except StopIteration as ended:
            ranges: Ranges = ended.value
            return ranges

    # ---- the others ------------------------------------------------------------------------------------------------

    def _other(self, queue: SubmissionQueue, command: Command) -> Work | None:
        backend = self.backend
        if command.opcode == Io.FLUSH:
            if backend.flush_nowait():
                self._complete(queue, command.cid)
                return None
            if self.starting is not None and self._start(queue, command, [], self.starting.start_flush):
                return None
            return backend.flush
        if command.opcode == Io.WRITE_ZEROES and not backend.readonly:
            blocks = command.cdw10 | command.cdw11 << 32, (command.cdw12 & 0xFFFF) + 1
            return partial(self._write_zeroes, command, *self._bytes(*blocks))
        if command.opcode == Io.DATASET_MANAGEMENT and self.discards:
            return partial(self._manage, command)
        raise Failed(Status.INVALID_OPCODE)

    async def _write_zeroes(self, command: Command, offset: int, length: int) -> None:
        if not self.backend.write_zeroes_nowait(offset, length, False):
            await self.backend.write_zeroes(offset, length, False)
        if command.cdw12 & FUA or not self.write_cache:
            await self.backend.flush()

    async def _manage(self, command: Command) -> None:
        if not command.cdw11 & DEALLOCATE:
            return  # the rest is advice
        count = (command.cdw10 & 0xFF) + 1
        described = b"".join([await self._dma.read(*each) for each in await self.ranges(command, RANGE.size * count)])
        # All are looked at before any is forgotten.
        ranges = [self._bytes(first, blocks) for _, blocks, first in RANGE.iter_unpack(described) if blocks]
        if not self.backend.discard_nowait(ranges):
            await self.backend.discard(ranges)


def _nothing() -> None:
    """Without an engine."""
