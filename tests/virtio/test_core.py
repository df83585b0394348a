"""The life of a device as its driver sees it: status, features, run(), resets, who is blamed (virtio 1.4, 2 and 3)."""

import logging

import pytest
import trio
import trio.testing
from construct import Const, Int32ul, Struct
from support.core_device import Echo, both_memories

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.testing.driver import (
    ACKNOWLEDGE,
    DRIVER,
    DRIVER_OK,
    FEATURES_OK,
    NEEDS_RESET,
    RAM_BASE,
    Driver,
    running,
)
from vfiouser_virtio.testing.raw.ring import WRITE


@both_memories
@pytest.mark.parametrize("features", [None, 0], ids=["event-idx", "flags"])
async def test_requests(private: bool, features: int | None) -> None:
    async with running(Echo(), private=private, features=features) as driver:
        for number in range(30):
            message = b"request %d" % number
            used = await driver.request([message[:3], message[3:]], [4, 100])
            assert (b"".join(used.data)[: len(message)], used.written) == (message, len(message))


@both_memories
async def test_what_the_device_does_not_write_stays(private: bool) -> None:
    async with running(Echo(), private=private) as driver:
        used = await driver.request([b"abc"], [2, 4])
        assert used.data == [b"ab", b"c\xaa\xaa\xaa"]


@both_memories
async def test_a_batch_costs_few_interrupts(private: bool) -> None:
    async with running(Echo(), private=private) as driver:
        tokens = [driver.add(0, [b"x"], [1], indirect=True) for _ in range(8)]
        driver.kick(0)
        for token in tokens:
            assert (await driver.wait(0, token)).data == [b"x"]
        assert driver.queue_interrupts[0] <= (8 if private else 2)


@both_memories
async def test_ram_may_be_remapped_under_a_live_ring(private: bool) -> None:
    async with running(Echo(), private=private) as driver:
        for _ in range(25):
            token = driver.add(0, [b"abc"], [3])
            driver.ram.unmap()
            driver.kick(0, force=True)
            await trio.testing.wait_all_tasks_blocked()
            assert not driver.status & NEEDS_RESET
            driver.ram.map()
            assert (await driver.wait(0, token)).data == [b"abc"]


async def test_a_chain_of_a_burst_waits_while_its_memory_is_away() -> None:
    class Pausing(Echo):
        async def run(self) -> None:
            async for chain in self.requestq:
                chain.writable.write(chain.readable.read())
                chain.complete()
                await trio.testing.wait_all_tasks_blocked()

    async with running(Pausing()) as driver:
        tokens = [driver.add(0, [b"%d" % number], [1]) for number in range(3)]
        driver.kick(0)
        assert (await driver.wait(0, tokens[0])).data == [b"0"]
        driver.ram.unmap()
        await trio.testing.wait_all_tasks_blocked(0.05)
        assert not driver.status & NEEDS_RESET
        driver.ram.map()
        for number in (1, 2):
            assert (await driver.wait(0, tokens[number])).data == [b"%d" % number]


async def test_run_lives_from_driver_ok_to_reset() -> None:
    device = Echo()
    async with running(device) as driver:
        for turn in range(1, 4):
            await driver.request([b"ping"], [4])
            assert (device.runs, device.ended) == (turn, turn - 1)
            await driver.reset()
            await trio.testing.wait_all_tasks_blocked()
            assert (device.ended, device.resets) == (turn, turn)
            driver.probe()


async def test_reset_and_start_at_once() -> None:
    """SPDK writes 0, reads 0 back and goes on: the next run waits for the one before to have ended."""
    device = Echo()
    async with running(device) as driver:
        for _ in range(3):
            await driver.request([b"ping"], [4])
            await driver.reset()
            driver.probe()
            assert (await driver.request([b"pong"], [4])).data == [b"pong"]
    assert device.runs == device.ended == 4


async def test_nothing_is_consumed_before_driver_ok() -> None:
    """ST1."""
    device = Echo()
    async with running(device, probe=False) as driver:
        driver.probe()
        driver.core.reset()
        for status in (ACKNOWLEDGE, ACKNOWLEDGE | DRIVER):
            driver.core.write_status(status)
        driver.core.write_driver_features(1, 1)
        driver.core.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
        ring = driver.rings[0]
        driver.core.queues[0].configure(desc=ring.desc, driver=ring.driver, device=ring.device)
        driver.core.enable_queue(0)
        token = driver.add(0, [b"early"], [5])
        driver.core.notify_queue(0)
        await trio.testing.wait_all_tasks_blocked()
        assert not driver.is_used(0, token)
        driver.core.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
        assert (await driver.wait(0, token)).data == [b"early"]


@pytest.mark.parametrize(
    "features", [0, 1 << Feature.VERSION_1 | 1 << 6, 1 << Feature.VERSION_1 | 1 << 100, 1 << Feature.RING_PACKED]
)
async def test_features_ok_is_refused(features: int) -> None:
    driver = Driver(Echo())
    core = driver.core
    core.write_status(ACKNOWLEDGE | DRIVER)
    for select in range(4):
        core.write_driver_features(select, features >> 32 * select & 0xFFFF_FFFF)
    core.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
    assert core.status == ACKNOWLEDGE | DRIVER
    # FB3: a set that is right is accepted afterwards.
    for select, value in enumerate((1 << 5, 1, 0, 0)):
        core.write_driver_features(select, value)
    core.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
    assert core.status & FEATURES_OK
    assert driver.device.negotiated(5)
    core.write_driver_features(0, 0)
    assert core.read_driver_features(0) == 1 << 5
    assert core.read_device_features(4) == core.read_device_features(0xFFFF_FFFF) == 0


async def test_driver_ok_without_features_ok() -> None:
    async with running(Echo(), probe=False) as driver:
        driver.core.write_status(ACKNOWLEDGE | DRIVER | DRIVER_OK)
        await driver.wait_broken()
        await driver.reset()
        driver.probe()
        assert (await driver.request([b"fine"], [4])).data == [b"fine"]


@both_memories
async def test_a_broken_ring_needs_a_reset_and_is_logged_once(private: bool, caplog: pytest.LogCaptureFixture) -> None:
    device = Echo()
    async with running(device, private=private) as driver:
        before = driver.config_interrupts
        driver.add_raw(0, [(RAM_BASE, 4, WRITE), (RAM_BASE, 4, 0)])
        driver.kick(0)
        await driver.wait_broken()
        assert driver.config_interrupts == before + 1  # ST2
        driver.add(0, [b"more"], [4])
        driver.core.notify_queue(0)
        driver.core.notify_queue(7)
        await trio.testing.wait_all_tasks_blocked()
        assert [entry.levelno for entry in caplog.records if entry.levelno >= logging.ERROR] == [logging.ERROR]
        assert "follows writable" in caplog.text
        assert "Traceback" not in caplog.text
        await driver.reset()
        driver.probe()
        assert (await driver.request([b"well"], [4])).data == [b"well"]


async def test_a_bug_of_the_device_is_told_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    class Buggy(Echo):
        async def run(self) -> None:
            async for _ in self.requestq:
                raise ZeroDivisionError("oops")

    async with running(Buggy()) as driver:
        driver.add(0, [b"x"])
        driver.kick(0)
        await driver.wait_broken()
    assert "a bug in the device" in caplog.text
    assert "ZeroDivisionError: oops" in caplog.text


async def test_guest_errors_of_several_tasks_are_one_guest_error(caplog: pytest.LogCaptureFixture) -> None:
    class Two(Echo):
        async def run(self) -> None:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self.fail)
                nursery.start_soon(self.fail)

        async def fail(self) -> None:
            raise GuestError("0x17 is not a request")

    async with running(Two()) as driver:
        await driver.wait_broken()
    assert "0x17 is not a request" in caplog.text
    assert "Traceback" not in caplog.text


async def test_a_chain_that_does_not_parse_is_the_guests_fault(caplog: pytest.LogCaptureFixture) -> None:
    class Parser(Echo):
        async def run(self) -> None:
            async for chain in self.requestq:
                chain.parse(Struct("magic" / Const(b"ok"), "value" / Int32ul))
                chain.complete()

    async with running(Parser()) as driver:
        await driver.request([b"ok1234"])
        driver.add(0, [b"no1234"])
        driver.kick(0)
        await driver.wait_broken()
    assert "6e6f31323334" in caplog.text


# ---- configuration ---------------------------------------------------------------------------------------------------


async def test_config_update_interrupts_and_changes_the_generation() -> None:
    device = Echo()
    async with running(device) as driver:
        seen = driver.core.read_generation()
        assert driver.core.read_generation() == seen
        before = driver.config_interrupts
        device.config.update(value=0x11223344)
        assert driver.config_interrupts == before + 1
        assert driver.config(0, 4) == 0x11223344
        assert driver.core.read_generation() != seen
        # CC4: not one step per change, or 256 changes would look like none.
        seen = driver.core.read_generation()
        for value in range(256):
            device.config.update(value=value)
        assert driver.core.read_generation() != seen


async def test_no_config_interrupt_before_driver_ok() -> None:
    device = Echo()
    async with running(device, probe=False) as driver:
        device.config.update(value=1)
        assert driver.config_interrupts == 0


async def test_the_driver_writes_only_what_it_may() -> None:
    device = Echo()
    driver = Driver(device)
    driver.core.write_config(0, b"\xff" * 7)
    assert driver.core.read_config(0, 10) == b"\x07\0\0\0\xff\0\0\0\0\0"
    assert device.knobs == [0xFF]
    driver.core.write_config(5, b"\xff")
    driver.core.write_config(100, b"\xff")
    assert device.knobs == [0xFF]
