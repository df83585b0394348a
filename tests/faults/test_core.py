"""Faults of status, features, configuration and interrupts, whatever the transport."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.lowlevel
import trio.testing

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.core import faulty_core
from vfiouser_virtio.testing.driver import DRIVER, FEATURES_OK, NEEDS_RESET, Driver, running

CAPACITY, SECTORS = 0, 2048
READ = bytes([0, 0, 0, 0]) + bytes(12)


@asynccontextmanager
async def disk(*faults: str, probe: bool = True) -> AsyncIterator[tuple[Driver, FaultPlan]]:
    plan = FaultPlan(faults, seed=1)
    async with running(Blk(size=SECTORS * 512), core=faulty_core(plan), probe=probe) as driver:
        yield driver, plan


def did(plan: FaultPlan) -> list[int]:
    return [entry["n"] for entry in plan.log.entries]


async def read(driver: Driver) -> None:
    used = await driver.request([READ], [512, 1])
    assert used.data[1] == b"\0"


async def test_features_refused() -> None:
    async with disk("features-refused:at=3") as (driver, plan):
        await driver.reset()
        driver.probe()
        await driver.reset()
        with pytest.raises(AssertionError, match="refuses features"):
            driver.probe()
        await driver.reset()
        driver.probe()
        await read(driver)
        assert did(plan) == [3]


async def test_features_flap() -> None:
    async with disk("features-flap:at=2:mask=0x40000001") as (driver, _):
        true = driver.core.device_features & 0xFFFF_FFFF
        seen = [driver.core.read_device_features(select) for select in (0, 1, 0, 0)]
        assert seen == [true, driver.core.device_features >> 32, true ^ 0x4000_0001, true]


async def test_features_extra_and_missing() -> None:
    async with disk("features-extra:bit=44", "features-missing:bit=32:at=2") as (driver, plan):
        true = driver.core.device_features
        assert driver.core.read_device_features(0) == true & 0xFFFF_FFFF
        assert [driver.core.read_device_features(1) for _ in range(3)] == [
            true >> 32 | 1 << 12,
            (true >> 32 | 1 << 12) & ~1,
            true >> 32 | 1 << 12,
        ]
        assert driver.core.read_device_features(9) == 0
        assert len(did(plan)) == 4


async def test_a_reset_that_does_not_end() -> None:
    async with disk("reset-stuck:at=1") as (driver, plan):
        before = driver.status
        driver.core.write_status(0)
        assert driver.status == before
        await trio.testing.wait_all_tasks_blocked()
        assert driver.status == before
        driver.core.write_status(0)  # it is reset already
        assert driver.status == 0
        driver.probe()
        await read(driver)
        assert did(plan) == [1]


async def test_a_reset_that_ends_late(autojump_clock: trio.testing.MockClock) -> None:
    async with disk("reset-stuck:time=9s") as (driver, _):
        driver.core.write_status(0)
        await trio.sleep(8.9)
        assert driver.status
        await trio.sleep(0.2)
        assert driver.status == 0


async def test_a_reset_of_the_function_does_not_stay_stuck() -> None:
    async with disk("reset-stuck") as (driver, _):
        driver.core.write_status(0)
        assert driver.status
        driver.core.reset()
        assert driver.status == 0


async def test_needs_reset(caplog: pytest.LogCaptureFixture) -> None:
    async with disk("needs-reset:at=3") as (driver, plan):
        for _ in range(2):
            await read(driver)
        assert not driver.status & NEEDS_RESET
        driver.add(0, [READ], [512, 1])
        driver.kick(0, force=True)
        await driver.wait_broken()
        assert driver.config_interrupts == 1
        await driver.reset()
        driver.probe()
        await read(driver)
        assert len(did(plan)) == 1
    assert not caplog.records, "neither the guest nor the device's author is blamed"


async def test_a_field_of_the_configuration() -> None:
    async with disk("config-value:field=capacity:value=0x8000000000000000:at=1+4") as (driver, plan):
        assert driver.config(CAPACITY, 8) == 1 << 63
        assert driver.config(20, 4) == 512  # another field: not counted
        assert [driver.config(CAPACITY, 8), driver.config(CAPACITY, 4)] == [SECTORS, SECTORS]
        assert driver.config(CAPACITY + 4, 4) == 1 << 31
        assert did(plan) == [1, 4]


async def test_a_configuration_that_changes() -> None:
    async with disk("config-changes:at=2") as (driver, _):
        generation = driver.core.read_generation()
        one, two, three = (driver.core.read_config(0, 60) for _ in range(3))
        assert one == three
        assert sum(a != b for a, b in zip(one, two, strict=True)) == 1
        assert driver.core.read_generation() == generation


async def test_generations() -> None:
    async with disk("generation-moves") as (driver, _):
        assert len({driver.core.read_generation() for _ in range(100)}) == 100
    async with disk("generation-stuck") as (driver, _):
        first = driver.core.read_generation()
        device = driver.device
        assert isinstance(device, Blk)
        await device.resize(512)
        assert driver.core.read_generation() == first


async def test_lost_interrupts() -> None:
    async with disk("interrupt-lost:at=2") as (driver, _):
        await read(driver)
        token = driver.add(0, [READ], [512, 1])
        driver.kick(0, force=True)
        with trio.fail_after(60):
            while not driver.is_used(0, token):
                await trio.lowlevel.checkpoint()
        assert driver.queue_interrupts[0] == 1


async def test_late_interrupts(autojump_clock: trio.testing.MockClock) -> None:
    async with disk("interrupt-late:at=1:time=9s") as (driver, _):
        started = trio.current_time()
        await read(driver)
        assert trio.current_time() - started >= 9


async def test_a_storm_of_interrupts(autojump_clock: trio.testing.MockClock) -> None:
    async with disk("interrupt-storm:at=2:times=50:time=10ms") as (driver, _):
        await read(driver)
        assert driver.queue_interrupts[0] == 1
        await read(driver)
        await trio.sleep(1)
        assert driver.queue_interrupts[0] == 51


@pytest.mark.parametrize(("to", "where"), [("", "config"), (":to=1", "other")])
async def test_interrupts_of_another(to: str, where: str) -> None:
    plan = FaultPlan([f"interrupt-wrong-vector:queue=0{to}"])
    async with running(Blk(size=1 << 20, num_queues=2), core=faulty_core(plan)) as driver:
        token = driver.add(0, [READ], [512, 1])
        driver.kick(0, force=True)
        with trio.fail_after(60):
            while not driver.is_used(0, token):
                await trio.lowlevel.checkpoint()
        assert driver.queue_interrupts == [0, int(where == "other")]
        assert driver.config_interrupts == (where == "config")


async def test_spurious_interrupts() -> None:
    async with disk("interrupt-spurious:at=2", "config-interrupt-spurious:at=3") as (driver, _):
        driver.kick(0, force=True)
        assert (driver.queue_interrupts[0], driver.config_interrupts) == (0, 0)
        driver.kick(0, force=True)
        assert (driver.queue_interrupts[0], driver.config_interrupts) == (1, 0)
        driver.kick(0, force=True)
        assert (driver.queue_interrupts[0], driver.config_interrupts) == (1, 1)


async def test_interrupts_before_driver_ok() -> None:
    async with disk("interrupt-early", probe=False) as (driver, _):
        for status in (1, DRIVER, FEATURES_OK):
            driver.core.write_status(status | driver.status)
        driver.core.reset()
        driver.probe()
        assert driver.queue_interrupts == [1]


async def test_lost_configuration_interrupts() -> None:
    async with disk("config-interrupt-lost:at=1") as (driver, _):
        device = driver.device
        assert isinstance(device, Blk)
        await device.resize(512)
        assert driver.config_interrupts == 0
        await device.resize(1024)
        assert driver.config_interrupts == 1


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("used-never:queue=1", "blk has 1 queues"),
        ("interrupt-wrong-vector:to=1", "blk has 1 queues"),
        ("config-value:field=mac", "blk has no field mac (it has capacity,"),
    ],
)
async def test_faults_that_a_device_cannot_have(fault: str, complaint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        async with disk(fault):
            pass
    assert complaint in str(raised.value)
