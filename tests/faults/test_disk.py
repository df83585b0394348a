"""Faults of disks: what a driver reads, and what is in the file."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
import trio
import trio.testing

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.rng import Rng
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.core import faulty_core
from vfiouser_virtio.faults.disk import FaultyDisk
from vfiouser_virtio.serving.device_setup import setups
from vfiouser_virtio.serving.device_specs import parse_device
from vfiouser_virtio.testing.driver import Driver, running

SECTORS = 64
OLD, NEW = bytes(range(256)) * 4, b"\x55" * 1024
IOERR = b"\1"


class Disk:
    """A disk in a file with faults, and its driver."""

    def __init__(self, driver: Driver, plan: FaultPlan, path: Path) -> None:
        self.driver, self.plan, self.path = driver, plan, path

    async def read(self, sector: int, status: bytes = b"\0") -> bytes:
        """Two sectors."""
        used = await self.driver.request([_header(0, sector)], [1024, 1])
        assert used.data[1] == status
        return used.data[0]

    async def write(self, sector: int, data: bytes, status: bytes = b"\0") -> None:
        used = await self.driver.request([_header(1, sector), data], [1])
        assert used.data == [status]

    async def flush(self) -> None:
        assert (await self.driver.request([_header(4, 0)], [1])).data == [b"\0"]

    async def reset(self) -> None:
        await self.driver.reset()
        self.driver.probe()

    def stored(self, sector: int) -> bytes:
        return self.path.read_bytes()[512 * sector : 512 * sector + 1024]


def _header(kind: int, sector: int) -> bytes:
    return kind.to_bytes(8, "little") + sector.to_bytes(8, "little")


@asynccontextmanager
async def disk(path: Path, *faults: str) -> AsyncIterator[Disk]:
    path.write_bytes(OLD * (SECTORS // 2))
    plan = FaultPlan(faults, seed=1)
    async with running(Blk(path=path, wrap_backend=FaultyDisk), core=faulty_core(plan)) as driver:
        yield Disk(driver, plan, path)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "disk"


async def test_errors_of_sectors(path: Path) -> None:
    async with disk(path, "io-error:sector=11:sectors=2:op=read", "io-error:sector=20:op=write:at=2") as drive:
        for sector in (8, 13, 20):
            assert await drive.read(sector) == (OLD if sector % 2 == 0 else OLD[512:] + OLD[:512])
        for sector in (10, 11, 12):
            await drive.read(sector, IOERR)
        await drive.write(11, NEW)
        await drive.write(20, NEW)
        await drive.write(19, OLD, IOERR)
        await drive.write(20, NEW)
        assert drive.stored(20) == NEW
        assert [(entry["spec"], entry["n"]) for entry in drive.plan.log.entries] == [(0, 1), (0, 2), (0, 3), (1, 2)]


async def test_short_reads(path: Path) -> None:
    async with disk(path, "read-short:at=2") as drive:
        assert await drive.read(0) == OLD
        assert await drive.read(0) == OLD[:512] + b"\xaa" * 512, "the rest is what the driver had there"
        assert await drive.read(0) == OLD


async def test_wrong_bits(path: Path) -> None:
    async with disk(path, "read-flipped:at=2") as drive:
        one, two, three = [await drive.read(0) for _ in range(3)]
        assert one == three == OLD
        assert sum((a ^ b).bit_count() for a, b in zip(one, two, strict=True)) == 1


@pytest.mark.parametrize(("keep", "stored"), [("", NEW[:512] + OLD[512:]), (":keep=0", OLD), (":keep=9999", NEW)])
async def test_torn_writes(path: Path, keep: str, stored: bytes) -> None:
    async with disk(path, f"write-torn:at=2{keep}") as drive:
        for sector in (0, 2, 4):
            await drive.write(sector, NEW)
        await drive.flush()
        assert [drive.stored(sector) for sector in (0, 2, 4)] == [NEW, stored, NEW]


async def test_dropped_writes(path: Path) -> None:
    async with disk(path, "write-dropped:at=1+3") as drive:
        await drive.write(0, NEW)
        assert await drive.read(0) == NEW
        assert drive.stored(0) == OLD
        await drive.write(2, NEW)
        await drive.reset()
        assert [await drive.read(sector) for sector in (0, 2)] == [OLD, NEW]
        await drive.write(4, NEW)
        await drive.flush()
        await drive.reset()
        assert await drive.read(4) == drive.stored(4) == NEW


async def test_a_later_write_is_not_dropped(path: Path) -> None:
    async with disk(path, "write-dropped:at=1") as drive:
        await drive.write(0, b"\1" * 1024)
        await drive.write(1, NEW)
        assert await drive.read(0) == b"\1" * 512 + NEW[:512]
        await drive.reset()
        assert await drive.read(0) == OLD[:512] + NEW[:512]


async def test_ignored_flushes(path: Path) -> None:
    async with disk(path, "write-dropped", "flush-ignored:at=1") as drive:
        await drive.write(0, NEW)
        await drive.flush()
        await drive.reset()
        assert await drive.read(0) == OLD
        await drive.write(0, NEW)
        await drive.flush()
        await drive.reset()
        assert await drive.read(0) == NEW


async def test_dropped_writes_are_bounded(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfiouser_virtio.faults.disk.MAX_OVERLAY", 4)
    async with disk(path, "write-dropped") as drive:
        for sector in (0, 2, 4):
            await drive.write(sector, NEW)
        await drive.reset()
        assert [await drive.read(sector) for sector in (0, 2, 4)] == [OLD, OLD, NEW]


async def test_a_slow_disk(path: Path, autojump_clock: trio.testing.MockClock) -> None:
    async with disk(path, "disk-slow:at=2:time=500s") as drive:
        await drive.read(0)
        assert trio.current_time() < 1
        with pytest.raises(trio.TooSlowError):  # the test driver's patience
            await drive.write(0, NEW)
        await drive.read(2)  # another one is not slow
        await trio.sleep(400)
        assert drive.stored(0) == OLD
        with trio.fail_after(100_000):  # the clock jumps, the kernel takes its time
            while drive.stored(0) != NEW:
                await trio.sleep(1)


def test_the_command_line_makes_such_a_disk() -> None:
    [setup] = setups([parse_device("blk,size=1M,fault=io-error:sector=3,fault=used-never:at=9")])
    function = setup.create()
    assert isinstance(function.device, Blk)
    assert isinstance(function.device.backend, FaultyDisk)
    function.device.close()
    [setup] = setups([parse_device("blk,size=1M,fault=used-never:at=9")])
    function = setup.create()
    assert isinstance(function.device, Blk)
    assert not isinstance(function.device.backend, FaultyDisk)
    function.device.close()


def test_only_disks() -> None:
    [setup] = setups([parse_device("rng,fault=io-error")])
    with pytest.raises(ConfigError, match="needs a disk"):
        setup.create()
    device = Rng()
    with pytest.raises(ConfigError, match="wrap_backend=FaultyDisk"):
        Driver(device, core=faulty_core(FaultPlan(["io-error"])))
