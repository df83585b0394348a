"""Other memory is mapped where buffers were that the device has taken from the ring, and not looked at yet."""

import trio
import trio.testing

from vfiouser_virtio.testing.driver import NEEDS_RESET, RAM_BASE, RAM_SIZE, running
from vfiouser_virtio.virtio import Device, queue


class OneAtATime(Device):
    """Takes the next chain when it may."""

    device_id = 42
    requestq = queue()

    def __init__(self) -> None:
        super().__init__()
        self.gate = trio.Event()

    async def run(self) -> None:
        async for chain in self.requestq:
            chain.writable.write(chain.readable.read())
            chain.complete()
            await self.gate.wait()


async def test_a_chain_of_moved_memory_is_not_waited_for() -> None:
    """The device is told, and so the driver: it must not wait for ever for a buffer that nobody will return."""
    device = OneAtATime()
    async with running(device) as driver:
        for _ in range(2):
            driver.add(0, [b"data"], [4])
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()  # one is done, the other waits in the burst
        driver.ram.unmap()
        # The same bytes at the same addresses, but by messages.
        driver.memory.map(RAM_BASE, RAM_SIZE, readable=True, writable=True, fd=None, offset=0)
        driver.kick(0)
        device.gate.set()
        await driver.wait_broken()
        assert driver.status & NEEDS_RESET


async def test_a_chain_of_memory_that_comes_back_is_served() -> None:
    device = OneAtATime()
    async with running(device) as driver:
        tokens = [driver.add(0, [b"data"], [4]) for _ in range(2)]
        driver.kick(0)
        await trio.testing.wait_all_tasks_blocked()
        driver.ram.unmap()
        device.gate.set()
        await trio.testing.wait_all_tasks_blocked()
        driver.ram.map()
        for token in tokens:
            assert (await driver.wait(0, token)).data == [b"data"]
