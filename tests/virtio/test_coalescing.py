"""Coalescing of interrupts: by number, by time, and what ends it."""

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from vfiouser_virtio.testing.driver import EVENT_IDX, VERSION_1, Driver, running
from vfiouser_virtio.virtio import Device, Queue, queue
from vfiouser_virtio.virtio.coalescing import SHORTEST, Coalescing

MS = 1000
ways = pytest.mark.parametrize(
    "features", [1 << VERSION_1, 1 << VERSION_1 | 1 << EVENT_IDX], ids=["flags", "event-idx"]
)


class Both(Device):
    """Completes what it gets, in two queues, with a setting for the first."""

    device_id = 63
    first = queue(max_size=16)
    second = queue(max_size=16)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for each in self.queues:
                nursery.start_soon(self.serve, each)

    async def serve(self, served: Queue) -> None:
        async for burst in served.bursts(at_once=True):
            for chain in burst:
                chain.complete()


async def send(driver: Driver, index: int = 0, count: int = 1) -> None:
    """Chains one at a time, each of which the device has completed, and shown, before the next."""
    for _ in range(count):
        before = shown(driver, index)
        driver.add(index, [b"x"])
        driver.kick(index, force=True)
        await wait_all_tasks_blocked()
        assert shown(driver, index) == before + 1


def shown(driver: Driver, index: int = 0) -> int:
    """``used.idx``, of which the driver may look at any time."""
    return int.from_bytes(driver.ram.read(driver.rings[index].device + 2, 2), "little")


def look(driver: Driver, index: int = 0) -> None:
    """The driver takes what is used, and asks for an interrupt at the next."""
    driver.is_used(index, -1)


@ways
async def test_as_many_as_the_driver_says(features: int, mock_clock: MockClock) -> None:
    device = Both()
    async with running(device, features=features) as driver:
        device.first.coalesce(5, 100 * MS)
        for interrupts in (1, 2, 3):
            await send(driver, count=4)
            assert driver.queue_interrupts[0] == interrupts - 1
            await send(driver)
            assert driver.queue_interrupts[0] == device.first.interrupts == interrupts
            look(driver)
        await send(driver, 1)  # the other queue has its own
        assert driver.queue_interrupts[1] == 1
        assert device.first.notifications == 15


@ways
async def test_as_long_as_the_driver_says(features: int, mock_clock: MockClock) -> None:
    device = Both()
    async with running(device, features=features) as driver:
        device.first.coalesce(5, 100 * MS)
        for interrupts in range(3):
            await send(driver)
            mock_clock.jump(0.06)
            await send(driver)  # does not begin another delay
            mock_clock.jump(0.039)
            await wait_all_tasks_blocked()
            assert driver.queue_interrupts[0] == interrupts
            mock_clock.jump(0.002)
            await wait_all_tasks_blocked()
            assert driver.queue_interrupts[0] == interrupts + 1
            look(driver)
            mock_clock.jump(1000)
            await wait_all_tasks_blocked()
        assert driver.queue_interrupts[0] == 3


async def test_the_delay_begins_with_the_first_after_an_interrupt(mock_clock: MockClock) -> None:
    device = Both()
    async with running(device) as driver:
        device.first.coalesce(2, 100 * MS)
        await send(driver)
        mock_clock.jump(0.09)
        await send(driver)  # two: an interrupt
        look(driver)
        await send(driver)
        mock_clock.jump(0.02)
        await wait_all_tasks_blocked()
        assert driver.queue_interrupts[0] == 1  # not at the time of the one before
        mock_clock.jump(0.081)
        await wait_all_tasks_blocked()
        assert driver.queue_interrupts[0] == 2


@ways
async def test_what_the_driver_has_seen_by_itself_takes_none(features: int, mock_clock: MockClock) -> None:
    device = Both()
    async with running(device, features=features) as driver:
        device.first.coalesce(8, 100 * MS)
        await send(driver, count=3)
        look(driver)
        if not driver.event_idx:  # it says so in another way
            driver.ram.write(driver.rings[0].driver, b"\1\0")
        mock_clock.jump(1)
        await wait_all_tasks_blocked()
        assert driver.queue_interrupts[0] == 0
        driver.ram.write(driver.rings[0].driver, b"\0\0")
        await send(driver)
        mock_clock.jump(1)
        await wait_all_tasks_blocked()
        assert driver.queue_interrupts[0] == 1


async def test_never_more_than_half_of_the_ring_waits(mock_clock: MockClock) -> None:
    device = Both()
    async with running(device) as driver:
        device.first.coalesce(1_000_000, 100 * MS)
        await send(driver, count=7)
        assert driver.queue_interrupts[0] == 0
        await send(driver)
        assert driver.queue_interrupts[0] == 1


@pytest.mark.parametrize(("chains", "usecs"), [(0, 100 * MS), (100, 0), (0, 0), (100, SHORTEST - 1), (1, 100 * MS)])
async def test_what_is_no_delay(chains: int, usecs: int, mock_clock: MockClock) -> None:
    device = Both()
    async with running(device) as driver:
        device.first.coalesce(chains, usecs)
        assert device.first.coalescing == (chains, usecs)
        for interrupts in (1, 2, 3):
            await send(driver)
            assert driver.queue_interrupts[0] == interrupts
            look(driver)


@pytest.mark.parametrize(("usecs", "brief"), [(SHORTEST, [20e-6]), (999, [999e-6]), (1500, [])])
async def test_less_than_a_millisecond(
    usecs: int, brief: list[float], mock_clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is slept with a timer of its own, since trio's are of milliseconds."""
    asked: list[float] = []
    over = trio.Event()

    async def sleep_briefly(seconds: float) -> None:
        asked.append(seconds)
        await over.wait()

    monkeypatch.setattr("vfiouser_virtio.virtio.coalescing.sleep_briefly", sleep_briefly)
    device = Both()
    async with running(device) as driver:
        device.first.coalesce(5, usecs)
        await send(driver, count=3)
        assert driver.queue_interrupts[0] == 0
        assert asked == pytest.approx(brief)
        mock_clock.jump(2e-3)
        over.set()
        await wait_all_tasks_blocked()
        assert driver.queue_interrupts[0] == 1


async def test_less_than_a_millisecond_with_a_real_clock() -> None:
    device = Both()
    async with running(device) as driver:
        device.first.coalesce(5, 200)
        for _ in range(3):
            token = driver.add(0, [b"x"])
            driver.kick(0)
            await driver.wait(0, token)
        assert driver.queue_interrupts[0] == 3


async def test_another_setting_sends_what_waits(mock_clock: MockClock) -> None:
    device = Both()
    async with running(device) as driver:
        device.first.coalesce(8, 100 * MS)
        await send(driver, count=2)
        device.first.coalesce(4, 200 * MS)
        assert driver.queue_interrupts[0] == 1
        look(driver)
        device.first.coalesce(0, 0)
        assert driver.queue_interrupts[0] == 1  # nothing waits
        await send(driver)
        assert driver.queue_interrupts[0] == 2
        mock_clock.jump(1)
        await wait_all_tasks_blocked()
        assert driver.queue_interrupts[0] == 2


async def test_a_reset_of_the_device_forgets_it(mock_clock: MockClock) -> None:
    device = Both()
    async with running(device) as driver:
        device.first.coalesce(8, 100 * MS)
        await send(driver, count=2)
        await driver.reset()
        mock_clock.jump(1)
        await wait_all_tasks_blocked()
        assert driver.queue_interrupts[0] == 0
        assert device.first.coalescing == (0, 0)
        assert (device.first.notifications, device.first.interrupts) == (0, 0)
        driver.probe()
        await wait_all_tasks_blocked()
        await send(driver)
        assert driver.queue_interrupts[0] == 1


async def test_a_reset_of_the_queue_brings_back_what_holds_longer(mock_clock: MockClock) -> None:
    device = Both()
    async with running(device) as driver:
        device.first.coalesce(3, 100 * MS)
        device.first.coalesce(5, 100 * MS, until_reset=True)
        await send(driver, count=2)
        assert driver.core.reset_queue(0) is None
        assert not device.first.enabled
        assert device.first.coalescing == (3, 100 * MS)
        mock_clock.jump(1)
        await wait_all_tasks_blocked()
        assert driver.queue_interrupts[0] == 0
        await driver.reset()
        assert not device.first.enabled
        driver.probe()
        assert device.first.enabled


async def test_memory_that_is_away_delays_it(mock_clock: MockClock) -> None:
    device = Both()
    async with running(device) as driver:
        device.first.coalesce(8, 100 * MS)
        await send(driver)
        assert driver.ram.unmap() is None
        mock_clock.jump(0.2)
        await wait_all_tasks_blocked()
        assert driver.queue_interrupts[0] == 0
        driver.ram.map()
        mock_clock.jump(0.2)
        await wait_all_tasks_blocked()
        assert driver.queue_interrupts[0] == 1


async def test_one_task_for_many_delays(mock_clock: MockClock) -> None:
    device = Both()
    async with running(device) as driver:
        device.first.coalesce(2, 1_000_000 * MS)
        await send(driver)
        tasks = trio.lowlevel.current_statistics().tasks_living
        for _ in range(50):  # each other one ends a delay and begins another
            look(driver)
            await send(driver)
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        assert driver.queue_interrupts[0] == 25


@pytest.mark.parametrize("until_reset", [False, True])
async def test_one_task_for_many_settings(until_reset: bool, mock_clock: MockClock) -> None:
    """A driver that sets 71 minutes again after each packet does not have a task for each of them."""
    device = Both()
    async with running(device) as driver:
        await wait_all_tasks_blocked()
        tasks = trio.lowlevel.current_statistics().tasks_living
        for _ in range(50):
            device.first.coalesce(8, 0xFFFF_FFFF, until_reset=until_reset)
            look(driver)
            await send(driver)
        assert trio.lowlevel.current_statistics().tasks_living == tasks + 1
        device.first.coalesce(0, 0, until_reset=until_reset)
        await wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().tasks_living == tasks
        assert driver.queue_interrupts[0] == 50


async def test_a_reset_of_the_queue_leaves_no_task(mock_clock: MockClock) -> None:
    device = Both()
    async with running(device) as driver:
        await wait_all_tasks_blocked()
        tasks = trio.lowlevel.current_statistics().tasks_living
        device.first.coalesce(8, 0xFFFF_FFFF)
        await send(driver)
        assert trio.lowlevel.current_statistics().tasks_living == tasks + 1
        assert driver.core.reset_queue(0) is None
        await wait_all_tasks_blocked()
        assert trio.lowlevel.current_statistics().tasks_living == tasks


async def test_a_task_that_an_ending_run_did_not_start_is_started_by_the_next(mock_clock: MockClock) -> None:
    coalescing = Coalescing(8, 0.1, lambda: True)
    coalescing.shown(1, lambda _: None)
    assert coalescing.end()
    started: list[object] = []
    coalescing.resume(started.append)
    coalescing.shown(1, started.append)
    coalescing.shown(1, started.append)
    assert len(started) == 1


async def test_by_messages_each_is_sent(mock_clock: MockClock) -> None:
    device = Both()
    async with running(device, private=True) as driver:
        device.first.coalesce(8, 100 * MS)
        await send(driver)
        assert driver.queue_interrupts[0] == device.first.interrupts == 1


async def test_another_device_goes_on_with_it(mock_clock: MockClock) -> None:
    device = Both()
    async with running(device) as driver:
        device.first.coalesce(8, 100 * MS)
        await send(driver, count=2)
        successor = Both()
        await driver.core.replace(successor)
        assert driver.queue_interrupts[0] == 1  # what waited
        look(driver)
        assert successor.first.coalescing == (8, 100 * MS)
        await send(driver, count=7)
        assert driver.queue_interrupts[0] == 1
        await send(driver)
        assert driver.queue_interrupts[0] == 2


async def test_queues_that_do_not_coalesce_keep_few_attributes() -> None:
    """CPython 3.11 looks up each attribute of an object in a slower way once it has more than 30."""
    device = Both()
    async with running(device) as driver:
        driver.core.write_status(0)
        assert [len(vars(queue)) <= 30 for queue in driver.core.queues] == [True] * len(driver.core.queues)
