"""Requests of a block device, and a backend that can fail or take its time."""

import struct
from collections.abc import Sequence

import pytest
import trio
import trio.testing

from vfiouser_virtio.backends.block import Range, Segments
from vfiouser_virtio.backends.ram import RamBackend
from vfiouser_virtio.testing.driver import Used

IN, OUT, FLUSH, GET_ID, DISCARD, WRITE_ZEROES, SECURE_ERASE = 0, 1, 4, 8, 11, 13, 14
OK, IOERR, UNSUPP = 0, 1, 2
SIZE = 1 << 20
SECTORS = SIZE // 512

both_memories = pytest.mark.parametrize("private", [False, True], ids=["shared", "private"])


def header(kind: int, sector: int = 0) -> bytes:
    return struct.pack("<IIQ", kind, 0, sector)


def segment(sector: int, sectors: int, flags: int = 0) -> bytes:
    return struct.pack("<QII", sector, sectors, flags)


def status(used: Used) -> int:
    return used.data[-1][-1]


class Recorder(RamBackend):
    """A RAM disk that tells what it was asked for, and can be made to fail or to take its time."""

    def __init__(self, size: int = SIZE, *, readonly: bool = False) -> None:
        super().__init__(size, readonly=readonly)
        self.calls: list[str] = []
        self.fail: OSError | None = None
        self.gate: trio.Event | None = None

    async def _enter(self, name: str) -> None:
        self.calls.append(name)
        if self.gate is not None:
            await self.gate.wait()
        if self.fail is not None:
            raise self.fail

    def read_nowait(self, offset: int, segments: Segments) -> bool:
        return False

    async def read(self, offset: int, segments: Segments) -> None:
        await self._enter("read")
        super().read_nowait(offset, segments)

    def write_nowait(self, offset: int, segments: Segments) -> bool:
        return False

    async def write(self, offset: int, segments: Segments) -> None:
        await self._enter("write")
        super().write_nowait(offset, segments)

    def flush_nowait(self) -> bool:
        return False

    async def flush(self) -> None:
        await self._enter("flush")

    def discard_nowait(self, ranges: Sequence[Range]) -> bool:
        self.calls.append("discard")
        return True

    def write_zeroes_nowait(self, offset: int, length: int, unmap: bool) -> bool:
        self.calls.append(f"write zeroes, unmap {unmap}")
        return super().write_zeroes_nowait(offset, length, unmap)
