"""Device Suspend: what is under way ends first, then nothing happens until the driver resumes the device."""

import logging

import pytest
import trio
import trio.testing
from construct import Byte, Int32ul, Struct

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.protocols.record import record
from vfiouser_virtio.protocols.virtio import blk
from vfiouser_virtio.protocols.virtio.features import DeviceStatus
from vfiouser_virtio.testing.driver import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, NEEDS_RESET, Driver, running
from vfiouser_virtio.virtio import Chain, Device, Offer, queue, suspend
from vfiouser_virtio.virtio.options import Duration, Size

both_memories = pytest.mark.parametrize("private", [False, True], ids=["mapped", "by-message"])
SUSPEND = int(DeviceStatus.SUSPEND)
RUNNING = ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK
SUSPENDED = RUNNING & ~DRIVER_OK | SUSPEND
OFFER = Offer(suspend=True)
Config = record(Struct("value" / Int32ul, "knob" / Byte))


class Echo(Device):
    """Waits before it answers, if it is told to; either with its buffer pinned, or just so."""

    device_id = 63
    driver_writes = frozenset({"knob"})
    requestq = queue(max_size=64)
    otherq = queue(max_size=4)

    def __init__(self, *, pins: bool = False) -> None:
        super().__init__(config=Config(value=7))
        self.go = trio.Event()
        self.go.set()
        self.pins = pins
        self.taken = 0

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            async for chain in self.requestq:
                self.taken += 1
                if self.pins:
                    nursery.start_soon(self.answer_pinned, chain)
                else:
                    await self.go.wait()
                    self.answer(chain)

    async def answer_pinned(self, chain: Chain) -> None:
        with self.requestq.pinned(chain), trio.CancelScope(shield=True):
            await self.go.wait()
            self.answer(chain)

    def answer(self, chain: Chain) -> None:
        chain.writable.write(chain.readable.read())
        chain.complete()


async def suspend_device(driver: Driver) -> int:
    """As a driver does: write, then read until it is over."""
    driver.core.write_status(RUNNING | SUSPEND)
    return await suspension_ended(driver)


async def suspension_ended(driver: Driver) -> int:
    with trio.fail_after(60):
        while driver.status & DRIVER_OK and not driver.status & NEEDS_RESET:
            await trio.sleep(0.001)
    return driver.status


def resume_device(driver: Driver) -> None:
    driver.core.write_status(driver.status | DRIVER_OK)
    assert driver.status == RUNNING


@both_memories
async def test_suspend_and_resume(private: bool) -> None:
    async with running(Echo(), private=private, offer=OFFER) as driver:
        for number in range(3):
            assert (await driver.request([b"%d" % number], [1])).data == [b"%d" % number]
            assert await suspend_device(driver) == SUSPENDED
            token = driver.add(0, [b"late"], [4])  # what a driver must not do
            before = driver.queue_interrupts[0]
            driver.kick(0, force=True)
            await trio.testing.wait_all_tasks_blocked(0.02)
            assert not driver.is_used(0, token)
            assert driver.queue_interrupts[0] == before
            resume_device(driver)
            assert (await driver.wait(0, token)).data == [b"late"]


async def test_an_idle_device_is_suspended_at_once() -> None:
    async with running(Echo(), offer=OFFER) as driver:
        driver.core.write_status(RUNNING | SUSPEND)
        assert driver.status == SUSPENDED


@both_memories
async def test_what_is_under_way_ends_first(private: bool) -> None:
    """Used, and notified, before the status says so; what the device has not begun with stays in its ring."""
    device = Echo(pins=True)
    async with running(device, private=private, offer=OFFER) as driver:
        device.go = trio.Event()
        tokens = [driver.add(0, [b"%d" % number], [1]) for number in range(5)]
        driver.kick(0)
        while device.taken < 5:
            await trio.sleep(0.001)
        driver.core.write_status(RUNNING | SUSPEND)
        late = driver.add(0, [b"x"], [1])
        driver.kick(0, force=True)
        await trio.testing.wait_all_tasks_blocked()
        assert driver.status == RUNNING
        device.go.set()
        for number, token in enumerate(tokens):
            assert (await driver.wait(0, token)).data == [b"%d" % number]
        assert await suspension_ended(driver) == SUSPENDED
        assert device.taken == 5
        assert not driver.is_used(0, late)
        resume_device(driver)
        assert (await driver.wait(0, late)).data == [b"x"]


@both_memories
async def test_a_buffer_that_a_device_keeps_does_not_hold_a_suspension(
    private: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(suspend, "KEPT_TIMEOUT", 0.02)
    device = Echo()
    async with running(device, private=private, offer=OFFER) as driver:
        device.go = trio.Event()
        first, second = (driver.add(0, [text], [1]) for text in (b"1", b"2"))
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        assert await suspend_device(driver) == SUSPENDED
        device.go.set()
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert not driver.is_used(0, first)
        assert driver.queue_interrupts[0] == 0
        resume_device(driver)
        assert (await driver.wait(0, first)).data == [b"1"]
        assert (await driver.wait(0, second)).data == [b"2"]


async def test_a_request_that_does_not_end_is_needs_reset(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(suspend, "DRAIN_TIMEOUT", 0.05)
    device = Echo(pins=True)
    async with running(device, offer=OFFER) as driver:
        device.go = trio.Event()
        driver.add(0, [b"1"], [1])
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        seen = driver.config_interrupts
        assert await suspend_device(driver) == RUNNING | NEEDS_RESET
        assert driver.config_interrupts == seen + 1
        device.go.set()
        await driver.reset()
        driver.probe()
        assert (await driver.request([b"on"], [2])).data == [b"on"]
    assert "echo: SUSPEND: requests still use guest memory after 0.05 s; the device needs a reset" in caplog.text
    assert "Traceback" not in caplog.text


async def test_a_disk_ends_its_requests() -> None:
    header = blk.REQUEST_HEADER_CODEC.pack(blk.RequestType.IN, 0, 0)
    async with running(Blk(size=Size(1 << 20), delay=Duration(0.05)), offer=OFFER) as driver:
        tokens = [driver.add(0, [header], [512, 1]) for _ in range(4)]
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        assert await suspend_device(driver) == SUSPENDED
        assert all(driver.is_used(0, token) for token in tokens)
        assert driver.queue_interrupts[0] > 0


# ---- configuration -------------------------------------------------------------------------------------------------


async def test_configuration_does_not_change_while_suspended() -> None:
    device = Echo()
    async with running(device, offer=OFFER) as driver:
        generation, seen = driver.core.read_generation(), driver.config_interrupts
        await suspend_device(driver)
        device.config.update(value=9)
        assert driver.config(0, 4) == 7
        assert driver.core.read_generation() == generation
        assert driver.config_interrupts == seen
        resume_device(driver)
        assert driver.config_interrupts == seen + 1
        assert driver.config(0, 4) == 9
        assert driver.core.read_generation() != generation
        await suspend_device(driver)
        resume_device(driver)
        assert driver.config_interrupts == seen + 1


async def test_writes_to_the_configuration_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    device = Echo()
    async with running(device, offer=OFFER) as driver:
        await suspend_device(driver)
        for _ in range(2):
            driver.core.write_config(4, b"\x05")
        assert device.config["knob"] == 0
        assert caplog.text.count("wrote configuration at 0x4 of a suspended device; ignored") == 1
        resume_device(driver)
        driver.core.write_config(4, b"\x05")
        assert device.config["knob"] == 5


async def test_a_bug_while_suspended_is_told_at_resume(caplog: pytest.LogCaptureFixture) -> None:
    device = Echo()
    async with running(device, offer=OFFER) as driver:
        await suspend_device(driver)
        seen = driver.config_interrupts
        driver.core.needs_reset(ZeroDivisionError("a bug"))
        assert driver.status == SUSPENDED | NEEDS_RESET
        assert driver.config_interrupts == seen
        driver.core.write_status(driver.status | DRIVER_OK)
        assert driver.status == RUNNING | NEEDS_RESET
        assert driver.config_interrupts == seen + 1


# ---- what a driver may do at the wrong time ------------------------------------------------------------------------


@pytest.mark.parametrize("status", [ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK])
def test_suspend_is_ignored_before_the_device_runs(status: int) -> None:
    """SU1."""
    driver = Driver(Echo(), offer=OFFER)
    core = driver.core
    core.write_driver_features(1, (1 | 1 << 11))
    for value in (ACKNOWLEDGE, ACKNOWLEDGE | DRIVER, ACKNOWLEDGE | DRIVER | FEATURES_OK):
        if value <= status:
            core.write_status(value)
    core.write_status(status | SUSPEND)
    assert driver.status == status
    core.write_status(status | SUSPEND | DRIVER_OK)
    assert not driver.status & SUSPEND


async def test_suspend_is_ignored_where_it_was_not_negotiated() -> None:
    async with running(Echo(), offer=OFFER, features=0) as driver:
        driver.core.write_status(RUNNING | SUSPEND)
        assert driver.status == RUNNING
        assert (await driver.request([b"ping"], [4])).data == [b"ping"]


async def test_a_driver_that_takes_driver_ok_away_itself() -> None:
    async with running(Echo(), offer=OFFER) as driver:
        driver.core.write_status(SUSPENDED)
        assert driver.status == SUSPENDED
        driver.core.write_status(SUSPENDED)
        assert driver.status == SUSPENDED
        resume_device(driver)
        assert (await driver.request([b"ping"], [4])).data == [b"ping"]


@pytest.mark.parametrize("when", ["draining", "suspended"])
async def test_reset(when: str, caplog: pytest.LogCaptureFixture) -> None:
    device = Echo(pins=True)
    async with running(device, offer=OFFER) as driver:
        if when == "draining":
            device.go = trio.Event()
            driver.add(0, [b"1"], [1])
            driver.kick(0)
            await trio.testing.wait_all_tasks_blocked()
        driver.core.write_status(RUNNING | SUSPEND)
        driver.core.write_status(0)
        device.go.set()
        await trio.testing.wait_all_tasks_blocked()
        assert driver.status == 0
        driver.probe()
        assert (await driver.request([b"ping"], [4])).data == [b"ping"]
    assert not [each for each in caplog.records if each.levelno >= logging.WARNING]


async def test_a_queue_may_be_reset_while_it_is_drained() -> None:
    device = Echo(pins=True)
    async with running(device, offer=OFFER) as driver:
        device.go = trio.Event()
        driver.add(0, [b"1"], [1])
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        driver.core.write_status(RUNNING | SUSPEND)
        hold = driver.core.reset_queue(0)
        assert hold is not None
        assert not hold.done
        device.go.set()
        assert await suspension_ended(driver) == SUSPENDED


@both_memories
async def test_memory_may_go_and_come_while_suspended(private: bool) -> None:
    async with running(Echo(), private=private, offer=OFFER) as driver:
        assert (await driver.request([b"ping"], [4])).data == [b"ping"]
        await suspend_device(driver)
        driver.ram.unmap()
        driver.ram.map()
        messages = driver.ram.messages
        await trio.testing.wait_all_tasks_blocked(0.02)
        assert driver.ram.messages == messages
        resume_device(driver)
        assert (await driver.request([b"pong"], [4])).data == [b"pong"]
