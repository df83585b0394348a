"""What dropped writes have kept back, while the real backend takes its time: nothing else is lost, old or forgotten."""

from collections.abc import Sequence

import pytest
import trio
import trio.testing

from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.disk import FaultyDisk

SECTOR = 512
SIZE = 1 << 20


class SlowBackend:
    """A disk in memory, each of whose requests takes a second and reads what was there when it began."""

    size, readonly, can_discard, block_size = SIZE, False, True, SECTOR

    def __init__(self) -> None:
        self.data = bytearray(SIZE)

    def read_nowait(self, offset: int, segments: Sequence[memoryview]) -> bool:
        return False

    async def read(self, offset: int, segments: Sequence[memoryview]) -> None:
        found = bytes(self.data[offset : offset + sum(map(len, segments))])
        await trio.sleep(1)
        for segment in segments:
            segment[:], found = found[: len(segment)], found[len(segment) :]

    def write_nowait(self, offset: int, segments: Sequence[memoryview]) -> bool:
        return False

    async def write(self, offset: int, segments: Sequence[memoryview]) -> None:
        await trio.sleep(1)
        data = b"".join(segments)
        self.data[offset : offset + len(data)] = data

    def discard_nowait(self, ranges: Sequence[tuple[int, int]]) -> bool:
        return False

    async def discard(self, ranges: Sequence[tuple[int, int]]) -> None:
        await trio.sleep(1)
        for offset, length in ranges:
            self.data[offset : offset + length] = bytes(min(length, SIZE - offset))

    def write_zeroes_nowait(self, offset: int, length: int, unmap: bool) -> bool:
        return False

    async def write_zeroes(self, offset: int, length: int, unmap: bool) -> None:
        await self.discard([(offset, length)])

    def flush_nowait(self) -> bool:
        return False

    async def flush(self) -> None:
        await trio.sleep(1)

    async def refresh(self) -> int:
        return self.size

    async def wait_size_changed(self) -> None:
        await trio.sleep_forever()

    async def resize(self, size: int) -> None:
        raise NotImplementedError

    def close(self) -> None:
        pass


class Drive:
    def __init__(self, *faults: str) -> None:
        self.real = SlowBackend()
        self.disk = FaultyDisk(self.real)
        self.plan = FaultPlan(faults, seed=1)
        self.disk.arm(self.plan)

    async def write(self, sector: int, value: int) -> None:
        segments = [memoryview(bytes([value]) * SECTOR)]
        if not self.disk.write_nowait(sector * SECTOR, segments):
            await self.disk.write(sector * SECTOR, segments)

    async def read(self, sector: int) -> int:
        data = bytearray(SECTOR)
        if not self.disk.read_nowait(sector * SECTOR, [memoryview(data)]):
            await self.disk.read(sector * SECTOR, [memoryview(data)])
        [value] = set(data)
        return value

    async def discard(self, *ranges: tuple[int, int]) -> None:
        if not self.disk.discard_nowait(ranges):
            await self.disk.discard(ranges)

    async def zero(self, offset: int, length: int) -> None:
        if not self.disk.write_zeroes_nowait(offset, length, False):
            await self.disk.write_zeroes(offset, length, False)


async def test_reads_during_a_flush_see_what_was_written(autojump_clock: trio.testing.MockClock) -> None:
    drive = Drive("write-dropped:count=3")
    for sector in range(3):
        await drive.write(sector, 1)
    seen: list[int] = []

    async def look(after: float) -> None:
        await trio.sleep(after)
        seen.extend([await drive.read(sector) for sector in range(3)])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(drive.disk.flush)
        for number in range(14):
            nursery.start_soon(look, 0.1 + number / 4)
    assert seen == [1] * 42
    assert drive.real.data[: 3 * SECTOR] == b"\1" * (3 * SECTOR)


@pytest.mark.parametrize("after", [0.5, 1.5, 2.5, 3.5])
@pytest.mark.parametrize("how", ["write", "discard", "zero"])
async def test_what_is_written_during_a_flush_stays(
    how: str, after: float, autojump_clock: trio.testing.MockClock
) -> None:
    drive = Drive("write-dropped:count=3")
    for sector in range(3):
        await drive.write(sector, 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drive.disk.flush)
        await trio.sleep(after)
        if how == "write":
            await drive.write(1, 2)
        else:
            await (drive.discard((SECTOR, SECTOR)) if how == "discard" else drive.zero(SECTOR, SECTOR))
        expected = 2 if how == "write" else 0
        assert await drive.read(1) == expected
    assert [await drive.read(sector) for sector in range(3)] == [1, expected, 1]
    drive.disk.device_reset()
    assert [await drive.read(sector) for sector in range(3)] == [1, expected, 1]


async def test_a_write_that_is_dropped_during_a_flush_is_kept_back(autojump_clock: trio.testing.MockClock) -> None:
    drive = Drive("write-dropped")
    await drive.write(0, 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drive.disk.flush)
        await trio.sleep(0.5)
        await drive.write(0, 2)
    assert await drive.read(0) == 2
    drive.disk.device_reset()
    assert await drive.read(0) == 1


async def test_a_read_during_a_write_over_what_was_kept_back(autojump_clock: trio.testing.MockClock) -> None:
    """It sees one or the other, and not what was there before both."""
    drive = Drive("write-dropped:count=1")
    await drive.write(0, 1)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(drive.write, 0, 2)
        await trio.sleep(0.5)
        assert await drive.read(0) in (1, 2)
    assert await drive.read(0) == 2


async def test_a_large_discard_is_no_walk_over_all_its_sectors(autojump_clock: trio.testing.MockClock) -> None:
    """16 ranges of 16 TiB: half a million million sectors would be no matter of patience."""
    drive = Drive("write-dropped:count=2")
    await drive.write(3, 1)
    await drive.write(5, 1)
    await drive.discard((5 * SECTOR, SECTOR), *[(1 << 20, 1 << 44)] * 15)
    await drive.discard(*[(0, 1 << 44)] * 16)
    assert [await drive.read(sector) for sector in (3, 5)] == [0, 0]


async def test_dropped_writes_under_way_count(
    monkeypatch: pytest.MonkeyPatch, autojump_clock: trio.testing.MockClock
) -> None:
    """None of them has come to the overlay when the last is decided."""
    monkeypatch.setattr("vfiouser_virtio.faults.disk.MAX_OVERLAY", 4)
    drive = Drive("write-dropped", "disk-slow:time=5s")
    for _ in range(2):  # what a reset ends gives its room back
        async with trio.open_nursery() as nursery:
            for sector in range(8):
                nursery.start_soon(drive.write, sector, 7)
            await trio.sleep(1)
            nursery.cancel_scope.cancel()
        drive.disk.device_reset()
    async with trio.open_nursery() as nursery:
        for sector in range(8):
            nursery.start_soon(drive.write, sector, 7)
    assert drive.real.data[: 8 * SECTOR].count(7) == 4 * SECTOR
    assert [await drive.read(sector) for sector in range(8)] == [7] * 8
    drive.disk.device_reset()
    assert sorted([await drive.read(sector) for sector in range(8)]) == [0] * 4 + [7] * 4


async def test_requests_are_counted_by_all_faults(autojump_clock: trio.testing.MockClock) -> None:
    drive = Drive("io-error:at=1", "disk-slow:at=2", "read-flipped:at=1+3", "write-torn:at=1+2", "write-dropped:at=3")
    with pytest.raises(OSError, match="asked for"):
        await drive.read(0)
    for sector in range(3):
        await drive.write(sector, 1)
    did = [(entry["fault"], entry["n"]) for entry in drive.plan.log.entries]
    assert did == [("io-error", 1), ("disk-slow", 2), ("write-torn", 1), ("write-torn", 2), ("write-dropped", 3)]
