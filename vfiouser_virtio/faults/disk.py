"""Block backend with faults: a wrapper around the one that has the disk's contents.

::

    blk_requests ─▶ read_nowait: is a fault due? ─── no ──▶ the real backend, at once or later
                                                └─ yes ─▶ an error, or later `read`, which does it wrong

Faults are decided when a request is first looked at, in the order of the ring: in what order requests end makes no
difference to a replay. What `write-dropped` has kept back is an overlay here, gone with the next reset.

A sector stays in the overlay until the real backend has it, or has something newer: reads see it as long. Flushes, and
what is written over it, take turns, so that neither an old sector is stored over a new one nor a new one forgotten.
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
    dropped: int = 0
    """Sectors for which there is room in the overlay."""


class FaultyDisk:
    """Backend with the faults that `arm` names; until then an honest one. Owns ``backend``."""

    def __init__(self, backend: BlockBackend) -> None:
        self._backend = backend
        self._faults = FaultPlan()
        self._decided: dict[tuple[int, int], _Todo] = {}
        self._overlay: dict[int, bytes] = {}
        self._reserved = 0
        """Sectors of the overlay that are for writes which have not come to it."""
        self._turn = trio.Lock()
        """Held while the real backend writes what is in the overlay, or what comes over it."""

    def arm(self, faults: FaultPlan) -> None:
        """These faults, from now on."""
        self._faults = faults

    def device_reset(self) -> None:
        """The device is reset: dropped writes are gone."""
        self._overlay.clear()
        self._reserved -= sum(todo.dropped for todo in self._decided.values())
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
        return not self._kept_back(ranges) and self._backend.discard_nowait(ranges)

    async def discard(self, ranges: Sequence[Range]) -> None:
        if not self._kept_back(ranges):
            await self._backend.discard(ranges)
            return
        async with self._turn:
            await self._backend.discard(ranges)
            self._forget(ranges)

    def write_zeroes_nowait(self, offset: int, length: int, unmap: bool) -> bool:
        ranges = [(offset, length)]
        return not self._kept_back(ranges) and self._backend.write_zeroes_nowait(offset, length, unmap)

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        ranges = [(offset, length)]
        if not self._kept_back(ranges):
            await self._backend.write_zeroes(offset, length, unmap)
            return
        async with self._turn:
            await self._backend.write_zeroes(offset, length, unmap)
            self._forget(ranges)

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
        bad, hit = self._bad("read", offset, length), self._faults.hit
        # All are counted, whichever happens: a schedule does not depend on other faults.
        todo = _Todo(
            self._delay(possible=not bad),
            short=hit("read-short", possible=not bad),
            flipped=hit("read-flipped", possible=not bad),
        )
        self._fail(bad)
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
        length, overlay = sum(map(len, segments)), self._overlay
        # What a flush stores while the real backend reads may have been too late for that.
        kept = {sector: overlay[sector] for sector in self._kept_back([(offset, length)])}
        await self._backend.read(offset, segments)
        kept.update((sector, overlay[sector]) for sector in self._kept_back([(offset, length)]))
        for sector, data in kept.items():
            _store(segments, sector * SECTOR_SIZE - offset, data)
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
        bad, hit = self._bad("write", offset, length), self._faults.hit
        todo = _Todo(self._delay(possible=not bad), torn=hit("write-torn", possible=not bad))  # counted, as above
        dropped = hit("write-dropped", possible=not (bad or todo.torn))
        self._fail(bad)
        if todo.torn is not None:
            keep = self._kept(todo.torn, length)
            todo.torn.did(f"sector {offset // SECTOR_SIZE:#x}: {keep:#x} of {length:#x} bytes are stored")
        if dropped is not None:
            sectors = length // SECTOR_SIZE
            if len(self._overlay) + self._reserved + sectors <= MAX_OVERLAY:
                todo.dropped = sectors
                self._reserved += sectors
            what = "until it is flushed, or dropped by a reset" if todo.dropped else "for ever: there are too many"
            dropped.did(f"sector {offset // SECTOR_SIZE:#x}, {length:#x} bytes: kept {what}")
        if todo.seconds or todo.torn or todo.dropped or self._overlay:
            self._decided[offset, id(segments)] = todo
            return False
        return self._backend.write_nowait(offset, segments)

    async def write(self, offset: int, segments: Segments) -> None:
        todo = self._decided.pop((offset, id(segments)), None) or _Todo()
        try:
            await trio.sleep(todo.seconds)
        finally:
            self._reserved -= todo.dropped
        length = sum(map(len, segments))
        if todo.dropped:
            data = b"".join(segments)
            for at in range(0, length, SECTOR_SIZE):
                self._overlay[(offset + at) // SECTOR_SIZE] = data[at : at + SECTOR_SIZE]
            return
        if todo.torn is not None:
            length = self._kept(todo.torn, length)
            if not length:
                return
            segments = _front(segments, length)
        ranges = [(offset, length)]
        if not self._kept_back(ranges):
            await self._backend.write(offset, segments)
            return
        async with self._turn:
            await self._backend.write(offset, segments)
            self._forget(ranges)

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
        overlay = self._overlay
        async with self._turn:
            for sector in list(overlay):
                data = overlay.get(sector)
                if data is not None:  # no reset meanwhile
                    await self._backend.write(sector * SECTOR_SIZE, [memoryview(data)])
                    if overlay.get(sector) is data:  # else another write was dropped, after this flush had begun
                        del overlay[sector]
        await self._backend.flush()

    # ---- what is common ------------------------------------------------------------------------------------------

    def _bad(self, operation: str, offset: int, length: int) -> list[Hit]:
        """What makes a request fail."""
        first, last = offset // SECTOR_SIZE, (offset + length - 1) // SECTOR_SIZE

        def wanted(given: object) -> bool:
            assert isinstance(given, dict)
            sector = given["sector"]
            touched = sector is None or (first < sector + given["sectors"] and sector <= last)
            return touched and given["op"] in ("any", operation)

        hits = self._faults.hits("io-error", wanted)
        for hit in hits:
            hit.did(f"{operation} of sectors {first:#x} to {last:#x} fails")
        return hits

    @staticmethod
    def _fail(bad: list[Hit]) -> None:
        if bad:
            raise OSError(errno.EIO, "a fault that was asked for")

    def _delay(self, *, possible: bool) -> float:
        slow = self._faults.hit("disk-slow", possible=possible)
        if slow is None:
            return 0.0
        slow.did(f"begins {slow['time']:g} s later")
        return float(slow["time"])

    def _kept_back(self, ranges: Sequence[Range]) -> list[int]:
        """The sectors of these bytes that are in the overlay."""
        overlay, found = self._overlay, []
        for offset, length in ranges if overlay else ():
            sectors = range(offset // SECTOR_SIZE, (offset + length) // SECTOR_SIZE)
            # By the shorter one: a discard is of gigabytes, and a guest may have 16 such ranges in each.
            few, many = (sectors, overlay) if len(sectors) < len(overlay) else (overlay, sectors)
            found += [sector for sector in few if sector in many]
        return found

    def _forget(self, ranges: Sequence[Range]) -> None:
        """The real backend has something newer for these bytes."""
        for sector in self._kept_back(ranges):
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
