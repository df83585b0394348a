"""Resets while requests are pending, and devices that fail (virtio 1.4, 2.4)."""

import logging
from typing import Any

import pytest
import trio
import trio.testing
from support.core_device import Echo

from vfiouser_virtio.errors import GuestError
from vfiouser_virtio.testing.driver import (
    DRIVER_OK,
    NEEDS_RESET,
    RAM_BASE,
    DeviceNeedsReset,
    running,
)
from vfiouser_virtio.testing.raw.ring import lay_out
from vfiouser_virtio.testing.raw.split import RawSplitRing, split_areas
from vfiouser_virtio.virtio import Device, queue
from vfiouser_virtio.vring import Chain

# ---- resets while requests are pending -------------------------------------------------------------------------------


class Slow(Device):
    """Completes a chain when it is told; what it holds is pinned, as it is during a disk access."""

    device_id = 62
    requestq = queue(max_size=8)

    def __init__(self) -> None:
        super().__init__()
        self.go = trio.Event()
        self.revoked: list[bool] = []
        self.shielded = False

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            async for chain in self.requestq:
                nursery.start_soon(self.work, chain)

    async def work(self, chain: Chain) -> None:
        with self.requestq.pinned(chain) as pin, trio.CancelScope(shield=self.shielded):
            await self.go.wait()
        self.revoked.append(pin.revoked)
        chain.writable.write(b"bad" if pin.revoked else b"ok!")
        chain.complete()


async def test_a_request_that_awaits_cancellably_does_not_hold_a_reset_for_long() -> None:
    device = Slow()
    async with running(device) as driver:
        driver.add(0, [], [3])
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        await driver.reset()
        assert driver.core.queues[0].pins.busy is False
        device.go.set()
        driver.probe()
        assert (await driver.request([], [3])).data == [b"ok!"]


class Waits(Device):
    """Awaits something for each chain, which it takes one by one, or by bursts."""

    device_id = 62
    requestq = queue(max_size=8)

    def __init__(self, bursts: bool) -> None:
        super().__init__()
        self.bursts = bursts

    async def run(self) -> None:
        if self.bursts:
            async for burst in self.requestq.bursts():
                for chain in burst:
                    await self.work(chain)
        else:
            async for chain in self.requestq:
                await self.work(chain)

    async def work(self, chain: Chain) -> None:
        await trio.lowlevel.checkpoint()
        chain.writable.write(b"ok!")
        chain.complete()


@pytest.mark.parametrize("bursts", [False, True], ids=["one by one", "bursts"])
async def test_a_run_that_a_reset_has_ended_takes_no_buffer_of_the_next_driver(bursts: bool) -> None:
    """It was woken before the reset, and has its turn when another driver is there: all of that came at once."""
    async with running(Waits(bursts)) as driver:
        await driver.request([], [3])
        await trio.testing.wait_all_tasks_blocked()
        driver.add(0, [], [3])
        driver.kick(0)
        assert driver.core.write_status(0) is None
        driver.probe()
        tokens = [driver.add(0, [], [3]) for _ in range(3)]
        driver.kick(0, force=True)
        for token in tokens:
            assert (await driver.wait(0, token)).data == [b"ok!"]
        assert (await driver.request([], [3])).data == [b"ok!"]


async def test_status_is_not_zero_while_the_kernel_has_a_buffer() -> None:
    device = Slow()
    device.shielded = True  # like a preadv in a thread
    async with running(device) as driver:
        driver.add(0, [], [3])
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        hold = driver.core.write_status(0)
        assert hold is not None
        await trio.testing.wait_all_tasks_blocked()
        assert driver.status & DRIVER_OK
        ram = driver.ram.read(RAM_BASE, 0x10000)
        device.go.set()
        await trio.testing.wait_all_tasks_blocked()
        assert hold.done
        assert driver.status == 0
        assert driver.ram.read(RAM_BASE, 0x10000) == ram  # the late completion went nowhere


async def test_unmap_waits_then_fails_the_request() -> None:
    device = Slow()
    async with running(device) as driver:
        token = driver.add(0, [], [3])
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        hold = driver.ram.unmap()
        assert hold is not None
        await trio.testing.wait_all_tasks_blocked()
        assert not hold.done
        hold.expire()
        await trio.testing.wait_all_tasks_blocked()
        assert hold.done
        assert device.revoked == [True]
        assert driver.status & NEEDS_RESET  # it then wrote to memory that is gone, which this device does not expect
        with pytest.raises(DeviceNeedsReset):
            await driver.wait(0, token)


async def test_a_queue_reset_leaves_the_others_running() -> None:
    device = Echo()
    async with running(device) as driver:
        await driver.request([b"one"], [3])
        assert driver.core.reset_queue(0) is None
        assert [queue.enabled for queue in driver.core.queues] == [False, True]
        assert device.ended == 0
        # QR3: at another size and place.
        driver.rings[0] = ring = RawSplitRing(driver.ram, 4, lay_out(RAM_BASE + 0x10_0000, split_areas(4))[0])
        driver.core.queues[0].configure(size=4, desc=ring.desc, driver=ring.driver, device=ring.device)
        driver.core.enable_queue(0)
        for _ in range(9):
            assert (await driver.request([b"two"], [3])).data == [b"two"]


@pytest.mark.parametrize("part", ["desc", "driver", "device"])
async def test_rings_must_be_aligned(part: str) -> None:
    device = Echo()
    async with running(device) as driver:
        driver.core.reset_queue(0)
        driver.core.queues[0].configure(**{part: 0x10_0001})
        driver.core.enable_queue(0)
        assert driver.status & NEEDS_RESET


async def test_rings_outside_of_memory() -> None:
    device = Echo()
    async with running(device) as driver:
        driver.core.reset_queue(0)
        driver.core.queues[0].configure(desc=1 << 50)
        driver.core.enable_queue(0)
        driver.core.notify_queue(0)
        await driver.wait_broken()


def test_queues_are_numbered_in_order_of_declaration() -> None:
    class Sub(Echo):
        thirdq = queue(max_size=2)

    device = Sub()
    assert [queue_.max_size for queue_ in device.queues] == [8, 4, 2]
    assert device.thirdq.index == 2
    assert Sub.name == "sub"
    assert Sub().requestq is not device.requestq


class FailsWhenItIsCancelled(Device):
    device_id = 62

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.work)
            await trio.sleep_forever()

    async def work(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            raise GuestError("half a request")


async def test_a_failure_at_the_end_of_the_server_is_told_and_goes_no_further(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with running(FailsWhenItIsCancelled()):
        await trio.testing.wait_all_tasks_blocked()
    assert "half a request" in caplog.text


class TwoAtOnce(Device):
    device_id = 62
    requestq = queue(max_size=8)

    async def run(self) -> None:
        chains = [await anext(self.requestq), await anext(self.requestq)]
        for chain in chains:
            chain.writable.write(b"answer")
            chain.complete()


async def test_a_client_that_leaves_between_two_answers_breaks_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with running(TwoAtOnce(), private=True) as driver:
        memory = driver.core.memory
        write = memory.write
        answered: list[Any] = []

        async def write_and_leave(address: int, data: bytes) -> None:
            await write(address, data)
            if bytes(data) == b"answer" and not answered:
                answered.append(address)
                memory.clear()

        monkeypatch.setattr(memory, "write", write_and_leave)
        for _ in range(2):
            driver.add(0, [], [6])
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        assert len(answered) == 1
        assert not driver.core.status & NEEDS_RESET
    assert [record.getMessage() for record in caplog.records if record.levelno >= logging.ERROR] == []
