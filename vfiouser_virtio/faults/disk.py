"""Block backend with faults: a wrapper around the one that has the disk's contents.

::

    blk_requests ─▶ read_nowait: is a fault due? ─── no ──▶ the real backend, at once or later
                                                └─ yes ─▶ an error, or later `read`, which does it wrong

Faults are decided when a request is first looked at, in the order of the ring: in what order requests end makes no
difference to a replay. What `write-dropped` has kept back is an overlay here, gone with the next reset.
"""

import errno
from collections.abc import Sequence
from dataclasses import dataclass

import trio

from vfiouser_virtio.backends.block import BlockBackend, Range, Segments
from vfiouser_virtio.faults.plan import FaultPlan, Hit
from vfiouser_virtio.protocols.virtio.blk import SECTOR_SIZE

MAX_OVERLAY = 32768
"""Sectors (16 MiB) that dropped writes keep in memory: a guest writes as much as it likes. More are stored."""


@dataclass(slots=True)
class _Todo:
    """Request to do wrong."""

    seconds: float = 0.0
    short: Hit | None = None
    flipped: Hit | None = None
    torn: Hit | None = None
    dropped: bool = False


class FaultyDisk:
    """Backend with the faults that `arm` names; until then an honest one. Owns ``backend``."""

    def __init__(self, backend: BlockBackend) -> None:
        self._backend = backend
        self._faults = FaultPlan()
        self._decided: dict[tuple[int, int], _Todo] = {}
        self._overlay: dict[int, bytes] = {}

    def arm(self, faults: FaultPlan) -> None:
        """These faults, from now on."""
        self._faults = faults

    def device_reset(self) -> None:
        """The device is reset: dropped writes are gone."""
        self._overlay.clear()
        self._decided.clear()

    # ---- as it is ------------------------------------------------------------------------------------------------

    @property
    def size(self) -> int:
        return self._backend.size

    @property
    def readonly(self) -> bool:
        return self._backend.readonly

    @property
    def can_discard(self) -> bool:
        return self._backend.can_discard

    @property
    def block_size(self) -> int:
        return self._backend.block_size

    def discard_nowait(self, ranges: Sequence[Range]) -> bool:
        self._forget(ranges)
        return self._backend.discard_nowait(ranges)

    async def discard(self, ranges: Sequence[Range]) -> None:
        await self._backend.discard(ranges)

    def write_zeroes_nowait(self, offset: int, length: int, unmap: bool) -> bool:
        self._forget([(offset, length)])
        return self._backend.write_zeroes_nowait(offset, length, unmap)

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        await self._backend.write_zeroes(offset, length, unmap)

    async def refresh(self) -> int:
        return await self._backend.refresh()

    async def wait_size_changed(self) -> None:
        await self._backend.wait_size_changed()

    async def resize(self, size: int) -> None:
        await self._backend.resize(size)

    def close(self) -> None:
        self._backend.close()

    # ---- reads ---------------------------------------------------------------------------------------------------

    def read_nowait(self, offset: int, segments: Segments) -> bool:
        length = sum(map(len, segments))
        self._fail("read", offset, length)
        todo = _Todo(self._delay(), short=self._faults.hit("read-short"), flipped=self._faults.hit("read-flipped"))
        if todo.short is not None:
            todo.short.did(f"sector {offset // SECTOR_SIZE:#x}: {length // 2:#x} of {length:#x} bytes are read")
        if todo.seconds or todo.short or todo.flipped or self._overlay:
            self._decided[offset, id(segments)] = todo
            return False
        return self._backend.read_nowait(offset, segments)

    async def read(self, offset: int, segments: Segments) -> None:
        todo = self._decided.pop((offset, id(segments)), None) or _Todo()
        await trio.sleep(todo.seconds)
        before = b"".join(segments) if todo.short else b""
        await self._backend.read(offset, segments)
        length = sum(map(len, segments))
        sectors = length // SECTOR_SIZE if self._overlay else 0
        for number in range(sectors):
            data = self._overlay.get(offset // SECTOR_SIZE + number)
            if data is not None:
                _store(segments, number * SECTOR_SIZE, data)
        if todo.short is not None:
            _store(segments, length // 2, before[length // 2 :])
        if todo.flipped is not None and length:
            at = todo.flipped.draw(length)
            bit = 1 << todo.flipped.draw(8)
            _store(segments, at, bytes([_load(segments, at) ^ bit]))
            todo.flipped.did(f"bit {bit:#x} of byte {offset + at:#x} is inverted")

    # ---- writes --------------------------------------------------------------------------------------------------

    def write_nowait(self, offset: int, segments: Segments) -> bool:
        length = sum(map(len, segments))
        self._fail("write", offset, length)
        todo = _Todo(self._delay(), torn=self._faults.hit("write-torn"))
        if todo.torn is not None:
            keep = self._kept(todo.torn, length)
            todo.torn.did(f"sector {offset // SECTOR_SIZE:#x}: {keep:#x} of {length:#x} bytes are stored")
        if dropped := self._faults.hit("write-dropped"):
            todo.dropped = len(self._overlay) + length // SECTOR_SIZE <= MAX_OVERLAY
            what = "until it is flushed, or dropped by a reset" if todo.dropped else "for ever: there are too many"
            dropped.did(f"sector {offset // SECTOR_SIZE:#x}, {length:#x} bytes: kept {what}")
        if todo.seconds or todo.torn or todo.dropped or self._overlay:
            self._decided[offset, id(segments)] = todo
            return False
        return self._backend.write_nowait(offset, segments)

    async def write(self, offset: int, segments: Segments) -> None:
        todo = self._decided.pop((offset, id(segments)), None) or _Todo()
        await trio.sleep(todo.seconds)
        length = sum(map(len, segments))
        if todo.dropped:
            data = b"".join(segments)
            for at in range(0, length, SECTOR_SIZE):
                self._overlay[(offset + at) // SECTOR_SIZE] = data[at : at + SECTOR_SIZE]
            return
        self._forget([(offset, length)])
        if todo.torn is None:
            await self._backend.write(offset, segments)
        elif keep := self._kept(todo.torn, length):
            await self._backend.write(offset, _front(segments, keep))

    @staticmethod
    def _kept(torn: Hit, length: int) -> int:
        keep = length // 2 if torn["keep"] is None else torn["keep"]
        return max(0, min(int(keep), length)) // SECTOR_SIZE * SECTOR_SIZE

    # ---- flushes -------------------------------------------------------------------------------------------------

    def flush_nowait(self) -> bool:
        if ignored := self._faults.hit("flush-ignored"):
            ignored.did("nothing is made durable")
            return True
        return not self._overlay and self._backend.flush_nowait()

    async def flush(self) -> None:
        overlay, self._overlay = self._overlay, {}
        for sector, data in overlay.items():
            await self._backend.write(sector * SECTOR_SIZE, [memoryview(data)])
        await self._backend.flush()

    # ---- what is common ------------------------------------------------------------------------------------------

    def _fail(self, operation: str, offset: int, length: int) -> None:
        first, last = offset // SECTOR_SIZE, (offset + length - 1) // SECTOR_SIZE

        def wanted(given: object) -> bool:
            assert isinstance(given, dict)
            sector = given["sector"]
            touched = sector is None or (first < sector + given["sectors"] and sector <= last)
            return touched and given["op"] in ("any", operation)

        if hits := self._faults.hits("io-error", wanted):
            for hit in hits:
                hit.did(f"{operation} of sectors {first:#x} to {last:#x} fails")
            raise OSError(errno.EIO, "a fault that was asked for")

    def _delay(self) -> float:
        slow = self._faults.hit("disk-slow")
        if slow is None:
            return 0.0
        slow.did(f"begins {slow['time']:g} s later")
        return float(slow["time"])

    def _forget(self, ranges: Sequence[Range]) -> None:
        """These bytes are written past the overlay."""
        if self._overlay:
            for offset, length in ranges:
                for sector in range(offset // SECTOR_SIZE, (offset + length) // SECTOR_SIZE):
                    self._overlay.pop(sector, None)


def _front(segments: Segments, length: int) -> list[memoryview]:
    found = []
    for segment in segments:
        found.append(segment[:length])
        length -= len(found[-1])
        if not length:
            break
    return found


def _store(segments: Segments, at: int, data: bytes) -> None:
    for segment in segments:
        if at < len(segment):
            count = min(len(segment) - at, len(data))
            segment[at : at + count] = data[:count]
            data, at = data[count:], 0
        else:
            at -= len(segment)
        if not data:
            return


def _load(segments: Segments, at: int) -> int:
    for segment in segments:
        if at < len(segment):
            return int(segment[at])
        at -= len(segment)
    raise IndexError(at)
