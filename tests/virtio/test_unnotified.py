"""Drivers that never notify, and rings whose memory is gone: served or told of, on trio's own clock."""

import logging
from types import SimpleNamespace

import pytest
import trio
import trio.testing

from vfiouser_virtio.testing.driver import TIMEOUT, running
from vfiouser_virtio.virtio import Device, Offer, queue, unnotified
from vfiouser_virtio.virtio.offer import Poll

LINE = "does not notify"


class Echo(Device):
    device_id = 63
    idleq = queue(max_size=8)
    requestq = queue(max_size=8)

    async def run(self) -> None:
        async for chain in self.requestq:
            chain.writable.write(chain.readable.read())
            chain.complete()


def lines(caplog: pytest.LogCaptureFixture, part: str = LINE) -> int:
    return sum(part in record.message for record in caplog.records)


async def test_a_driver_that_never_notifies_is_served(caplog: pytest.LogCaptureFixture) -> None:
    async with running(Echo()) as driver:
        for number in range(20):
            token = driver.add(1, [b"%4d" % number], [4])
            assert (await driver.wait(1, token)).data == [b"%4d" % number]
        assert lines(caplog) == 1
        await driver.reset()
        await trio.testing.wait_all_tasks_blocked()
        assert not any(each.polling.always for each in driver.core.queues)


@pytest.mark.parametrize(("poll", "served", "said"), [("off", False, 0), ("adaptive", True, 1), ("on", True, 0)])
async def test_the_switch(
    poll: Poll, served: bool, said: int, autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(Echo(), offer=Offer(poll=poll)) as driver:
        # The search for silent drivers is at its longest pause then; with "on" there is none, but a look at each turn.
        await trio.sleep(1 if poll == "on" else 60)
        token = driver.add(1, [b"ping"], [4])
        with trio.move_on_after(TIMEOUT / 2 + unnotified.LONGEST_PAUSE):
            while not driver.is_used(1, token):
                await trio.sleep(0.01)
        assert driver.is_used(1, token) is served
        assert lines(caplog) == said


async def test_a_driver_that_notifies_is_not_looked_at(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeps: list[float] = []
    sleep = trio.sleep

    async def counted(seconds: float) -> None:
        sleeps.append(seconds)
        await sleep(seconds)

    async with running(Echo()) as driver:
        await driver.request([b"ping"], [4], queue=1)
        await sleep(unnotified.LONGEST_PAUSE)
        monkeypatch.setattr(unnotified, "trio", SimpleNamespace(sleep=counted))
        # Available, and the notification is late: it is a driver that notifies, as was seen before.
        token = driver.add(1, [b"ping"], [4])
        await sleep(3600)
        assert not driver.is_used(1, token)
        driver.kick(1)
        await driver.wait(1, token)
    assert sleeps == []
    assert lines(caplog) == 0


async def test_an_idle_device_is_looked_at_ever_more_rarely(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeps: list[float] = []
    sleep = trio.sleep

    async def counted(seconds: float) -> None:
        sleeps.append(seconds)
        await sleep(seconds)

    monkeypatch.setattr(unnotified, "trio", SimpleNamespace(sleep=counted))
    async with running(Echo()):
        await sleep(3600)
    assert len(sleeps) <= 3600 / unnotified.LONGEST_PAUSE + 15


async def test_a_ring_whose_memory_stays_away_is_named(
    autojump_clock: trio.testing.MockClock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    async with running(Echo()) as driver:
        await driver.request([b"ping"], [4], queue=1)
        driver.ram.unmap()
        driver.core.notify_queue(1)
        await trio.sleep(0.5)
        driver.ram.map()  # as QEMU does it all the time
        await trio.sleep(5)
        assert lines(caplog, "ring's memory") == 0
        driver.ram.unmap()
        await trio.sleep(5)
        assert lines(caplog, "ring's memory") == 0, "nobody waits for it"
        for _ in range(50):
            driver.core.notify_queue(1)
            await trio.sleep(0.1)
        assert lines(caplog, "queue 1 waits for its ring's memory") == lines(caplog, "ring's memory") == 1
        driver.ram.map()
        await driver.request([b"ping"], [4], queue=1)


async def test_a_ring_that_firmware_has_left_behind_is_not_believed_by_messages_either() -> None:
    """With 22 disks Linux's initramfs lies where SeaBIOS had its rings: an early look finds anything."""
    async with running(Echo(), private=True) as driver:
        driver.ram.write(driver.core.queues[1].driver, b"\x5f\x75" * 8)
        seen = driver.ram.messages
        assert driver.core.queues[1].peek(by_message=True)
        await trio.testing.wait_all_tasks_blocked()
        assert driver.ram.messages > seen
        assert driver.core.running
        driver.kick(1, force=True)  # now it is meant
        await driver.wait_broken()


async def test_a_buffer_is_found_by_messages_without_a_notification() -> None:
    async with running(Echo(), private=True) as driver:
        token = driver.add(1, [b"ping"], [4])
        assert driver.core.queues[1].peek(by_message=True)
        assert (await driver.wait(1, token)).data == [b"ping"]
