"""Faults that are due at times: in seconds since DRIVER_OK, by themselves or at the first opportunity after that."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import trio
from support.console_driver import READY, RESIZE, Control, control, tell
from trio.testing import MockClock

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.console import Console
from vfiouser_virtio.devices.input import Input
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults import FAULTS, FaultPlan, replay
from vfiouser_virtio.faults.core import FaultyCore, faulty_core
from vfiouser_virtio.faults.pci import FaultyPci
from vfiouser_virtio.testing.driver import NEEDS_RESET, Driver, running
from vfiouser_virtio.transports.pci import VIRTIO_BAR
from vfiouser_virtio.vfio_device import PciRegion
from vfiouser_virtio.virtio import Device, Offer

OFF = Offer(poll="off")
READ = bytes([0, 0, 0, 0]) + bytes(12)


@asynccontextmanager
async def disk(plan: FaultPlan) -> AsyncIterator[Driver]:
    async with running(Blk(size=1 << 20), core=faulty_core(plan), offer=OFF) as driver:
        yield driver


def did(plan: FaultPlan) -> list[tuple[Any, ...]]:
    """Queue, count, number of DRIVER_OK and seconds since of each fault."""
    entries = [entry for entry in plan.log.entries if "fault" in entry]
    return [(entry["queue"], entry["n"], entry.get("life"), entry.get("since")) for entry in entries]


async def test_by_itself_after_each_driver_ok(autojump_clock: MockClock) -> None:
    plan = FaultPlan(["needs-reset:at=5s"])
    async with disk(plan) as driver:
        for life in (1, 2):
            await driver.request([READ], [512, 1])  # which is an opportunity, and none that counts
            await trio.sleep(4.9)
            assert not driver.status & NEEDS_RESET
            await trio.sleep(0.2)
            assert driver.status & NEEDS_RESET
            await driver.reset()
            await trio.sleep(100)
            assert len(did(plan)) == life, "without a driver there is no time"
            driver.probe()
        assert did(plan) == [(0, 1, 1, 5.0), (0, 2, 2, 5.0)]


async def test_no_more_often_and_not_before(autojump_clock: MockClock) -> None:
    plan = FaultPlan(["config-interrupt-spurious:every=2s:after=10s:count=3", "interrupt-spurious:at=500ms+1s"])
    async with disk(plan) as driver:
        await trio.sleep(11)
        assert (driver.config_interrupts, driver.queue_interrupts) == (0, [2])
        await trio.sleep(1000)
        assert driver.config_interrupts == 3
        assert [since for *_, since in did(plan)] == [0.5, 1.0, 12.0, 14.0, 16.0]


async def test_at_the_first_opportunity(autojump_clock: MockClock) -> None:
    """Each queue has its own; what was missed does not come twice."""
    plan = FaultPlan(["used-len-short:at=5s:queue=0", "data-zeros:every=10s", "data-random:after=34s"])
    async with disk(plan) as driver:
        for _ in range(9):
            await trio.sleep(4)
            await driver.request([READ], [512, 1])
        found = [(entry["fault"], entry["n"]) for entry in plan.log.entries]
        # At 4, 8, 12, … s.
        assert found == [
            ("used-len-short", 2),
            ("data-zeros", 3),
            ("data-zeros", 5),
            ("data-zeros", 8),
            ("data-random", 9),
        ]
        await trio.sleep(100)
        await driver.request([READ], [512, 1])
        await driver.request([READ], [512, 1])
        assert [entry["n"] for entry in plan.log.entries if entry["fault"] == "data-zeros"] == [3, 5, 8, 10]


async def test_probability(autojump_clock: MockClock) -> None:
    plan = FaultPlan(["config-interrupt-spurious:every=1s:p=0.5"], seed=3)
    async with disk(plan) as driver:
        await trio.sleep(200.5)
        assert 70 < driver.config_interrupts < 130


async def test_a_plan_that_is_stopped(autojump_clock: MockClock) -> None:
    plan = FaultPlan(["config-interrupt-spurious:every=1s"])
    async with disk(plan) as driver:
        plan.stop()
        await trio.sleep(10.5)
        assert driver.config_interrupts == 0
        plan.start()
        await trio.sleep(2)
        assert driver.config_interrupts == 2


async def test_one_of_them_is_stopped(autojump_clock: MockClock) -> None:
    plan = FaultPlan(["config-interrupt-spurious:every=1s", "interrupt-spurious:every=1s"])
    async with disk(plan) as driver:
        plan.stop("config-interrupt-spurious")
        await trio.sleep(10.5)
        assert (driver.config_interrupts, driver.queue_interrupts) == (0, [10])
        plan.start("config-interrupt-spurious")
        await trio.sleep(2)
        assert (driver.config_interrupts, driver.queue_interrupts) == (2, [12])


@pytest.mark.parametrize("name", [None, "used-len-short"])
async def test_what_was_due_while_it_was_stopped_does_not_come_later(
    name: str | None, autojump_clock: MockClock
) -> None:
    plan = FaultPlan(["used-len-short:at=5s+20s"])
    async with disk(plan) as driver:
        plan.stop(name)
        await trio.sleep(10)
        plan.start(name)
        await driver.request([READ], [512, 1])
        assert did(plan) == []
        await trio.sleep(11)
        await driver.request([READ], [512, 1])
        assert did(plan) == [(0, 2, None, None)]


async def use(plan: FaultPlan) -> tuple[list[Any], list[float]]:
    """Two lives; what was done, and when there were configuration interrupts."""
    seen: list[float] = []
    async with disk(plan) as driver:
        began = trio.current_time()
        for _ in range(2):
            for _ in range(20):
                before = driver.config_interrupts
                await trio.sleep(0.25)
                seen += [trio.current_time() - began] * (driver.config_interrupts - before)
                await driver.request([READ], [512, 1])
            await driver.reset()
            driver.probe()
    return [dict(entry) for entry in plan.log.entries], seen


async def test_replay(tmp_path: Path, autojump_clock: MockClock) -> None:
    """By themselves at the same times after the same DRIVER_OK; the others at the same buffers."""
    faults = ["config-interrupt-spurious:every=310ms:p=0.4", "used-len-short:at=1s+2s", "data-zeros:every=3"]
    log, lines = tmp_path / "faults.jsonl", list[str]()
    first = await use(FaultPlan(faults, seed=7, write=lines.append))
    log.write_text("".join(lines))
    assert {entry["fault"] for entry in first[0]} == {fault.partition(":")[0] for fault in faults}
    assert {entry.get("life") for entry in first[0]} == {1, 2, None}
    assert await use(replay(str(log))) == first


async def test_messages_that_a_console_sends_by_itself(autojump_clock: MockClock) -> None:
    plan = FaultPlan(["console-resize:every=1s:count=2"])
    async with running(Console(chardev=["null", "null"]), core=faulty_core(plan), offer=OFF) as driver:
        inbox = Control(driver)
        await trio.sleep(10)
        assert await inbox.take(2) == [control(0, RESIZE, 0) + b"\0\0\xff\xff"] * 2
        await tell(driver, control(0, READY))
        assert len(await inbox.take(2)) == 2


async def test_registers_that_vanish(autojump_clock: MockClock) -> None:
    plan = FaultPlan(["registers-all-ones:at=5s:time=1s"])
    function = FaultyPci(Blk(size=1 << 20), faults=plan)
    function.region_write(PciRegion.CONFIG, 4, b"\x06\x00")
    async with trio.open_nursery() as nursery:
        nursery.start_soon(function.serve)
        for status in (1, 3):
            function.core.write_status(status)
        function.core.write_driver_features(1, 1)
        for status in (11, 15):
            function.core.write_status(status)
        seen = []
        for _ in range(4):
            await trio.sleep(1.9)
            seen.append(bytes(function.region_read(VIRTIO_BAR, 20, 1)))
        nursery.cancel_scope.cancel()
    assert seen == [b"\x0f", b"\x0f", b"\xff", b"\x0f"]


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("used-never:at=3+5s", "expected a number from 1, or several: 3.7.9; or a time"),
        ("used-never:every=0s", "expected a number from 1; or a time from 1ms"),
        ("used-never:every=2s+3s", "expected a number from 1; or a time"),
        ("capability-loop:at=5s", "is there from the beginning"),
    ],
)
def test_what_is_no_time(fault: str, complaint: str) -> None:
    with pytest.raises(ConfigError, match=complaint):
        FaultPlan([fault])


@pytest.mark.parametrize(
    ("type_name", "device"),
    [
        ("blk", lambda: Blk(size=1 << 20)),
        ("net", Net),
        ("console", lambda: Console(chardev=["null", "null"])),
        ("input", Input),
    ],
)
def test_what_happens_by_itself_can_be_done(type_name: str, device: Any) -> None:
    made: Device = device()
    wanted = {fault.name for fault in FAULTS.values() if fault.by_itself and fault.devices in ("any", type_name)}
    core = FaultyPci(made, faults=FaultPlan()).core
    assert isinstance(core, FaultyCore)
    assert wanted <= core.acts.keys()
    made.close()
