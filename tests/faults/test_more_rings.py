"""Faults of rings that a driver has to find in its own memory, or waits for in vain; on both kinds of ring."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.core import faulty_core
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.testing.driver import NEEDS_RESET, Driver, running
from vfiouser_virtio.testing.raw.packed import RawPackedRing
from vfiouser_virtio.testing.raw.split import RawSplitRing
from vfiouser_virtio.virtio import Device, Offer, queue

SIZE = 16


class Four(Device):
    """It writes four bytes to each buffer."""

    device_id = 4
    requestq = queue(max_size=SIZE)

    async def run(self) -> None:
        async for chain in self.requestq:
            chain.writable.write(b"good")
            chain.complete()


@pytest.fixture(params=[False, True], ids=["mapped", "by-message"])
def private(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@asynccontextmanager
async def bench(
    *faults: str, private: bool = False, packed: bool = False, event_idx: bool = True
) -> AsyncIterator[tuple[Driver, FaultPlan]]:
    plan, offer = FaultPlan(faults, seed=1), Offer(packed=packed, event_idx=event_idx, poll="off")
    features = Feature.EVENT_IDX.mask | Feature.RING_RESET.mask | (Feature.RING_PACKED.mask if packed else 0)
    async with running(Four(), private=private, offer=offer, features=features, core=faulty_core(plan)) as driver:
        await trio.testing.wait_all_tasks_blocked()  # the device has asked to be notified for the first time
        yield driver, plan
        assert not driver.status & NEEDS_RESET, "the device does not blame the driver"


async def give(driver: Driver, *, kick: bool = True) -> int:
    """A buffer, and time for the device."""
    token = driver.add(0, [], [8])
    if kick:
        driver.kick(0, force=True)
    await trio.testing.wait_all_tasks_blocked()
    return token


def split(driver: Driver) -> RawSplitRing:
    ring = driver.rings[0]
    assert isinstance(ring, RawSplitRing)
    return ring


def ring_bytes(driver: Driver, part: str, count: int, at: int = 0) -> bytes:
    return driver.ram.read(getattr(driver.rings[0], part) + at, count)


async def test_an_index_that_does_not_move(private: bool) -> None:
    async with bench("used-idx-stuck:at=2+3", private=private) as (driver, plan):
        seen = []
        for _ in range(4):
            await give(driver)
            seen.append(split(driver).used_idx)
        assert seen == [1, 1, 1, 4]
        assert len(plan.log.entries) == 2


async def test_a_descriptor_of_the_drivers(private: bool) -> None:
    async with bench("desc-rewritten:at=2", private=private) as (driver, _):
        before = []
        for number in range(3):
            token = await give(driver)
            before.append(ring_bytes(driver, "desc", 16, 16 * token))
            assert (before[-1] == b"\xff" * 16) == (number == 1)


@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
@pytest.mark.parametrize("whole", [True, False], ids=["device", "queue"])
async def test_used_after_a_reset(
    private: bool, packed: bool, whole: bool, autojump_clock: trio.testing.MockClock
) -> None:
    """What the driver has written over the ring since is not left alone."""
    async with bench("used-after-reset:at=1:time=9s:id=7:len=8", private=private, packed=packed) as (driver, plan):
        await give(driver)
        part, at = ("desc", 16 + 8) if packed else ("device", 4 + 8)
        place = getattr(driver.rings[0], part) + at
        if whole:
            await driver.reset()
        else:
            driver.core.reset_queue(0)
        driver.ram.write(place, b"\xee" * 8)
        await trio.sleep(8)
        assert driver.ram.read(place, 8) == b"\xee" * 8
        await trio.sleep(2)
        ghost = driver.ram.read(place, 8)
        assert ghost[:6] == bytes([8, 0, 0, 0, 7, 0]) if packed else ghost == bytes([7, 0, 0, 0, 8, 0, 0, 0])
        assert len(plan.log.entries) == 1


async def test_an_event_far_away(private: bool) -> None:
    """The driver is not asked to notify for a long time: a split ring's is half of all indexes away."""
    async with bench("event-far:after=1", private=private) as (driver, plan):
        await give(driver)
        assert not split(driver).wants_notification(event_idx=True)
        event = int.from_bytes(ring_bytes(driver, "device", 2, 4 + 8 * SIZE), "little")
        assert event == (1 + (1 << 15)) & 0xFFFF
        await give(driver, kick=False)
        assert split(driver).used_idx == 1, "it waits"
        assert plan.log.entries
    async with bench("event-far", event_idx=False) as (driver, plan):
        await give(driver)
        assert split(driver).used_idx == 1
        assert not plan.log.entries, "there is no event"


@pytest.mark.parametrize(
    ("fault", "structure"), [("event-far:by=3", (4 | 1 << 15, 2)), ("packed-event-reserved", (0x7FFF, 3))]
)
async def test_event_suppression_of_a_packed_ring(fault: str, structure: tuple[int, int], private: bool) -> None:
    async with bench(f"{fault}:after=1", private=private, packed=True) as (driver, _):
        assert isinstance(driver.rings[0], RawPackedRing)
        await give(driver)
        seen = ring_bytes(driver, "device", 4)
        assert (int.from_bytes(seen[:2], "little"), int.from_bytes(seen[2:], "little")) == structure


async def test_a_notification_that_is_lost(private: bool) -> None:
    async with bench("notify-lost:at=2", private=private) as (driver, plan):
        await give(driver)
        await give(driver)
        assert split(driver).used_idx == 1
        await give(driver)
        assert split(driver).used_idx == 3
        assert [entry["n"] for entry in plan.log.entries] == [2]
