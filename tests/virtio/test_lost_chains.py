"""A chain that nobody can complete any more is one warning; one that somebody still has is none."""

import logging
from pathlib import Path

import pytest
import trio
import trio.testing

from vfiouser_virtio.testing.driver import running
from vfiouser_virtio.virtio import Chain, Device, Offer, queue

HERE = Path(__file__).name
LOST = "was not completed, and nothing in the device will do it any more"


class Base(Device):
    device_id = 63
    requestq = queue(max_size=8)
    otherq = queue(max_size=8)

    def __init__(self) -> None:
        super().__init__()
        self.kept: list[Chain] = []


class Forgets(Base):
    """Never completes anything: the first mistake of everybody."""

    async def run(self) -> None:
        async for chain in self.requestq:
            chain.writable.write(b"x")


class DropsOne(Base):
    """Loses one chain on the way, and goes on with the others."""

    async def run(self) -> None:
        async for chain in self.requestq:
            if chain.readable.read() != b"bad":
                chain.complete()


class DropsInTask(Base):
    """As `DropsOne`, in a task for each, which an error ends."""

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            async for chain in self.requestq:
                nursery.start_soon(self.work, chain)

    async def work(self, chain: Chain) -> None:
        await trio.sleep(0.5)
        if chain.readable.read() == b"bad":
            return
        chain.complete()


class Keeps(Base):
    async def run(self) -> None:
        async for chain in self.requestq:
            self.kept.append(chain)


class Pairs(Base):
    """Takes two, then completes both."""

    async def run(self) -> None:
        while True:
            first = await anext(self.requestq)
            second = await anext(self.requestq)
            first.complete()
            second.complete()


class Slow(Base):
    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            async for chain in self.requestq:
                nursery.start_soon(self.work, chain)

    async def work(self, chain: Chain) -> None:
        with self.requestq.pinned(chain):
            await trio.sleep(1000)
            chain.complete()


class Good(Base):
    async def run(self) -> None:
        async for chain in self.requestq:
            chain.complete()


@pytest.fixture(params=[False, True], ids=["mapped", "by-message"])
def private(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    ours = [each for each in caplog.records if each.name.startswith("vfiouser_virtio.virtio")]
    return [each.getMessage() for each in ours if each.levelno >= logging.WARNING]


async def seconds(count: float) -> None:
    """Of the clock that jumps."""
    await trio.sleep(count)


async def test_a_loop_that_never_completes(
    private: bool, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(Forgets(), private=private) as driver:
        token = driver.add(0, [], [4])
        driver.kick(0)
        await seconds(200)
        [line] = warnings(caplog)
        assert line.startswith(f"forgets: queue 0: chain {token:#x} {LOST}")
        assert f"{HERE}:{Forgets.run.__code__.co_firstlineno + 1})" in line
        # One for each device, and not for each chain, run or reset.
        driver.add(0, [], [4])
        driver.kick(0)
        await seconds(200)
        await driver.reset()
        driver.probe()
        driver.add(0, [], [4])
        driver.kick(0)
        await seconds(200)
    assert len(warnings(caplog)) == 1


@pytest.mark.parametrize("device_class", [DropsOne, DropsInTask])
@pytest.mark.parametrize("offer", [Offer(), Offer(in_order=True)], ids=["any-order", "in-order"])
async def test_one_of_many(
    device_class: type[Base],
    offer: Offer,
    private: bool,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: trio.testing.MockClock,
) -> None:
    async with running(device_class(), private=private, offer=offer) as driver:
        for content in (b"good", b"good", b"bad", b"good", b"good"):
            driver.add(0, [content], [])
            driver.kick(0)
            await seconds(10)
    [line] = warnings(caplog)
    assert f"queue 0: chain 0x2 {LOST}" in line


@pytest.mark.parametrize("device_class", [Keeps, Pairs, Slow, Good])
async def test_what_somebody_has_is_not_lost(
    device_class: type[Base], private: bool, caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    async with running(device_class(), private=private) as driver:
        for _ in range(3):
            driver.add(0, [], [4])
            driver.kick(0)
            await seconds(500)
    assert not warnings(caplog)


async def test_the_last_reference_goes_late(
    caplog: pytest.LogCaptureFixture, autojump_clock: trio.testing.MockClock
) -> None:
    device = Keeps()
    async with running(device) as driver:
        for _ in range(2):
            driver.add(0, [], [4])
            driver.kick(0)
        await seconds(500)
        driver.ram.unmap()
        driver.ram.map()  # chains in flight look again
        assert not warnings(caplog)
        device.kept.clear()
        await seconds(100)
        assert len(warnings(caplog)) == 1


async def test_an_idle_device_is_not_looked_at(autojump_clock: trio.testing.MockClock) -> None:
    """Nothing is due to run: neither before the first request, nor a while after the last."""
    device = Good()
    async with running(device, offer=Offer(poll="off")) as driver:  # nor is a driver looked for that never notifies
        for _ in range(2):
            await seconds(3)
            assert trio.lowlevel.current_statistics().seconds_to_next_deadline == float("inf")
            await driver.request([], [4])
