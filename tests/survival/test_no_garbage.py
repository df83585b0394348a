"""What clients do leaves nothing for Python's collector, and they take their memory along without its help."""

import gc
import os
import struct
from collections.abc import Awaitable, Callable
from functools import partial

import pytest
import trio
import trio.testing
from support.boot_devices import BOOT_DEVICES, BootDevice, GatedDisk
from support.garbage import check_no_garbage, until_3_11
from support.reset_states import WAYS, ResettingDriver
from support.survival_stage import Served, stage

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.protocols.vfio_user import Command
from vfiouser_virtio.testing.fuzz.case import Memory
from vfiouser_virtio.testing.fuzz.driver import FuzzDriver
from vfiouser_virtio.testing.fuzz.oracle import Resources
from vfiouser_virtio.virtio import Offer

BAR, STATUS, DRIVER_FEATURE = 4, 0x14, 0x0C
FREE = 0x80_0000_0000
both_memories = pytest.mark.parametrize("memory", ["shared", "private"])
every_device = pytest.mark.parametrize("name", BOOT_DEVICES)


def offer_of(device: BootDevice) -> Offer:
    return Offer(packed=device.offer.packed, suspend=True)


def disk_of(served: Served) -> GatedDisk | None:
    device = served.function.device
    return device.backend if isinstance(device, Blk) and isinstance(device.backend, GatedDisk) else None


async def accesses(driver: FuzzDriver) -> None:
    for _ in range(5):
        driver.write(BAR, DRIVER_FEATURE, bytes(4))
    await driver.read(BAR, STATUS, 1)


async def questions(driver: FuzzDriver) -> None:
    call = driver.client.call
    await call(Command.DEVICE_GET_INFO, struct.pack("<4I", 16, 0, 0, 0))
    for index in range(9):
        await call(Command.DEVICE_GET_REGION_INFO, struct.pack("<4I2Q", 32, 0, index, 0, 0, 0))
    for index in range(5):
        await call(Command.DEVICE_GET_IRQ_INFO, struct.pack("<4I", 16, 0, index, 0))


async def mappings(driver: FuzzDriver) -> None:
    call = driver.client.call
    fd = os.memfd_create("mapped")
    os.ftruncate(fd, 0x1000)
    for fds in ([], [fd]):
        await call(Command.DMA_MAP, struct.pack("<2I3Q", 32, 3, 0, FREE, 0x1000), fds)
        await call(Command.DMA_UNMAP, struct.pack("<2I2Q", 24, 0, FREE, 0x1000))
    os.close(fd)


async def interrupts(driver: FuzzDriver) -> None:
    eventfd = os.eventfd(0)
    await driver.client.call(Command.DEVICE_SET_IRQS, struct.pack("<5I", 20, 0x24, 2, 0, 1), [eventfd])
    await driver.client.call(Command.DEVICE_SET_IRQS, struct.pack("<5I", 20, 0x21, 2, 0, 0))
    os.close(eventfd)


async def mistakes(driver: FuzzDriver) -> None:
    call = driver.client.call
    await call(Command.DEVICE_GET_INFO)
    await call(99, b"1234")
    await call(Command.REGION_WRITE_MULTI, struct.pack("<2Q2I8s", 1, 1 << 40, BAR, 4, bytes(8)))
    await call(Command.REGION_READ, struct.pack("<Q2I", 1 << 40, BAR, 4))
    await call(Command.DMA_MAP, struct.pack("<2I3Q", 32, 3, 0, FREE, 0x123))
    await call(Command.DMA_UNMAP, struct.pack("<2I2Q", 24, 0, FREE, 0x1000))
    await call(Command.DEVICE_SET_IRQS, struct.pack("<5I", 20, 99, 9, 9, 9))


async def device_resets(driver: FuzzDriver) -> None:
    await driver.client.call(Command.DEVICE_RESET)


@both_memories
@pytest.mark.parametrize("work", [accesses, questions, mappings, interrupts, mistakes, device_resets])
async def test_messages(work: Callable[[FuzzDriver], Awaitable[None]], memory: Memory) -> None:
    device = BOOT_DEVICES["blk"]
    async with stage(device.make(), device.works, name="blk") as place, place.served.driven(memory) as driver:
        await driver.bring_up()
        await check_no_garbage(lambda: work(driver))


@until_3_11
@both_memories
@every_device
async def test_requests_and_resets(name: str, memory: Memory) -> None:
    device = BOOT_DEVICES[name]
    async with stage(device.make(), device.works, name=name, offer=offer_of(device)) as place:
        served = place.served
        async with served.driven(memory) as driver:
            await driver.bring_up()
            await check_no_garbage(lambda: device.works(driver), 50)
            resetting = ResettingDriver(driver, device.requests, disk_of(served))
            await driver.reset()
            running, asked = resetting.states() - 2, resetting.states() - 1
            for way in WAYS:
                for state in () if way == "hang_up" else (1, running, asked):

                    async def turn(state: int = state, way: str = way) -> None:
                        await resetting.bring_to(state)
                        await resetting.reset(way)

                    await check_no_garbage(turn, 10)


@until_3_11
@both_memories
@every_device
async def test_clients_that_leave_take_their_memory_along(name: str, memory: Memory) -> None:
    device = BOOT_DEVICES[name]
    async with stage(device.make(), device.works, name=name, offer=offer_of(device)) as place:
        served, disk = place.served, disk_of(place.served)
        states = 0

        async def turn(state: int) -> None:
            nonlocal states
            async with served.driven(memory) as driver:
                await driver.bring_up()
                resetting = ResettingDriver(driver, device.requests, disk)
                states = resetting.states()
                await driver.reset()
                await resetting.bring_to(state)
            if disk is not None:
                disk.open()
            await trio.testing.wait_all_tasks_blocked()

        await turn(0)
        for state in (1, states - 2, states - 1):
            await check_no_garbage(partial(turn, state), 10)
            before = Resources.now()
            gc.disable()
            try:
                await turn(state)
                after = Resources.now()
            finally:
                gc.enable()
            assert (after.fds, after.mappings) == (before.fds, before.mappings)


async def test_clients_that_say_nothing() -> None:
    device = BOOT_DEVICES["blk"]
    async with stage(device.make(), device.works, name="blk") as place:

        async def turn() -> None:
            place.served.connect().close()
            await trio.testing.wait_all_tasks_blocked()

        await check_no_garbage(turn)
