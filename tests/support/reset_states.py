"""Resets of a device in every state that its driver brings it to, in every way that there is."""

from collections.abc import Awaitable, Callable

import trio
import trio.testing
from support.boot_devices import GatedDisk, Request
from support.survival_stage import PATIENCE, Served

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.protocols.codec import offsets
from vfiouser_virtio.protocols.pci import EXP_CAP, TYPE0_HEADER, CapId, ExpDevCtl
from vfiouser_virtio.protocols.vfio_user import Command, PciRegion
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.testing.fuzz.case import Memory
from vfiouser_virtio.testing.fuzz.driver import FuzzDriver
from vfiouser_virtio.testing.fuzz.ram import RING_STRIDE
from vfiouser_virtio.testing.raw.bring_up import DRIVER_OK, RegisterWrite, enable_queue, negotiate
from vfiouser_virtio.testing.raw.ring import RawRing

Requests = Callable[[int], list[Request]]
WAYS = ("status", "flr", "device_reset", "hang_up", "queues", "suspend")
"""A 0 to device_status; a function level reset; DEVICE_RESET; the client leaves; each queue, then status; suspended,
then status."""


class ResettingDriver:
    """Driver on one connection that brings its device only so far, and resets it."""

    def __init__(self, driver: FuzzDriver, requests: Requests, disk: GatedDisk | None) -> None:
        """``driver`` has brought its device up once."""
        self.driver, self.client = driver, driver.client
        self._requests, self._disk = requests, disk
        self._shapes = [(type(ring), ring.addresses, ring.size) for ring in driver.rings]
        self._exp: int | None = None

    def states(self) -> int:
        """How many there are: before each register write of an initialisation, running, and with requests."""
        return len(self._writes()) + 2

    def _writes(self) -> list[RegisterWrite]:
        writes = list(negotiate(self.driver.features, 4))
        for index, (_, addresses, size) in enumerate(self._shapes):
            writes += enable_queue(index, addresses, size=size)
        return [*writes, ("device_status", DRIVER_OK)]

    async def bring_to(self, state: int) -> None:
        """From a reset device to one of the states."""
        driver = self.driver
        await driver.wake()
        driver.bounds.check()
        driver.bounds.forget()
        for _, addresses, _ in self._shapes:
            driver.ram.write(addresses[0], bytes(RING_STRIDE))
        for name, value in self._writes()[:state]:
            driver.set_common(name, value)
        await driver.common("device_status")
        driver.rings = [make(driver.ram, size, at, index) for index, (make, at, size) in enumerate(self._shapes)]
        driver.bounds.note()
        if state > len(self._writes()):
            await self._ask()

    async def _ask(self) -> None:
        if self._disk is not None:
            self._disk.shut()
        for ring in self.driver.rings:
            for readable, writable in self._requests(ring.index):
                self.driver.offer(ring.index, readable, writable)
            await self.driver.kick(ring.index)
        await trio.testing.wait_all_tasks_blocked()
        assert self._disk is None or self._disk.under_way, "nothing is under way"

    async def reset(self, way: str) -> None:
        """In one of `WAYS` but ``hang_up``; returns when it is complete."""
        ways: dict[str, Callable[[], Awaitable[None]]] = {
            "status": self._by_status,
            "flr": self._by_flr,
            "device_reset": self._by_device_reset,
            "queues": self._by_queues,
            "suspend": self._by_suspend,
        }
        await ways[way]()
        self.driver.bounds.note()
        self._open()
        await self._wait_reset()
        self.driver.bounds.check()

    def _open(self) -> None:
        if self._disk is not None:
            self._disk.open()

    async def _wait_reset(self) -> None:
        await self.driver.wake()  # with the function, its memory decode was reset
        with trio.fail_after(PATIENCE):
            while await self.driver.common("device_status"):
                await trio.sleep(0.0005)

    async def _by_status(self) -> None:
        self.driver.set_common("device_status", 0)
        status = await self.driver.common("device_status")
        assert status or self._disk is None or not self._disk.under_way, "a reset that is over before its requests are"

    async def _by_flr(self) -> None:
        if self._exp is None:
            space = (await self.driver.read(PciRegion.CONFIG, 0, 256)).to_bytes(256, "little")
            self._exp = space[offsets(TYPE0_HEADER)["capability_list"][0]]
            while space[self._exp] != CapId.EXP:
                self._exp = space[self._exp + 1]
        at = self._exp + offsets(EXP_CAP)["devctl"][0]
        self.driver.write(PciRegion.CONFIG, at, int(ExpDevCtl.BCR_FLR).to_bytes(2, "little"))

    async def _by_device_reset(self) -> None:
        if self._disk is None or not self._disk.under_way:
            await self.client.call(Command.DEVICE_RESET)
            return
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.client.call, Command.DEVICE_RESET)
            await trio.testing.wait_all_tasks_blocked()
            self._open()  # the reply waits for it

    async def _by_queues(self) -> None:
        if self.driver.has(Feature.RING_RESET) and await self._running():
            for ring in self.driver.rings:
                self.driver.set_common("queue_select", ring.index)
                self.driver.set_common("queue_reset", 1)
            await self.driver.common("device_status")
            self._open()
            for ring in self.driver.rings:
                await self._reset_again(ring)
        self.driver.set_common("device_status", 0)

    async def _reset_again(self, ring: RawRing) -> None:
        """Wait until the queue's reset is complete; every other one is enabled once more."""
        self.driver.set_common("queue_select", ring.index)
        with trio.fail_after(PATIENCE):
            while await self.driver.common("queue_reset"):
                await trio.sleep(0.0005)
        if ring.index % 2:
            self.driver.ram.write(ring.desc, bytes(RING_STRIDE))
            for name, value in enable_queue(ring.index, ring.addresses, size=ring.size):
                self.driver.set_common(name, value)

    async def _by_suspend(self) -> None:
        if self.driver.has(Feature.SUSPEND) and await self._running():
            self.driver.set_common("device_status", DRIVER_OK | DeviceStatus.SUSPEND)
            await self.driver.common("device_status")
        self.driver.set_common("device_status", 0)

    async def _running(self) -> bool:
        return bool(await self.driver.common("device_status") & DeviceStatus.DRIVER_OK)


async def reset_often(
    served: Served, requests: Requests, number: int, memory: Memory, after_each: Callable[[], Awaitable[None]]
) -> int:
    """So many resets, by turns in each state and each way; returns how many combinations of the two there were."""
    device = served.function.device
    disk = device.backend if isinstance(device, Blk) and isinstance(device.backend, GatedDisk) else None
    seen: set[tuple[int, str]] = set()
    done = 0
    while done < number:
        async with served.driven(memory) as driver:
            await driver.bring_up()
            resetting = ResettingDriver(driver, requests, disk)
            await driver.reset()
            while done < number:
                # Each state in turn, then again with the next way for each.
                turn, state = divmod(done, resetting.states())
                way = WAYS[(state + turn) % len(WAYS)]
                seen.add((state, way))
                done += 1
                await resetting.bring_to(state)
                if way == "hang_up":
                    break
                await resetting.reset(way)
        if disk is not None:
            disk.open()
        await after_each()
    return len(seen)
