"""Faults of rings, as a driver sees them that looks at everything the device writes: each of them, and nothing else."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.core import faulty_core
from vfiouser_virtio.testing.driver import Driver, running
from vfiouser_virtio.testing.raw.split import RawSplitRing
from vfiouser_virtio.virtio import Chain, Device, Offer, queue

SIZE = 16


class Kept(Device):
    """It completes buffers when it is told to, and each with as many bytes as its number says."""

    device_id = 4
    requestq = queue(max_size=SIZE)
    otherq = queue(max_size=SIZE)

    def __init__(self) -> None:
        super().__init__()
        self.chains: list[Chain] = []

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._take, 0)
            nursery.start_soon(self._take, 1)

    async def _take(self, index: int) -> None:
        async for chain in self.queues[index]:
            self.chains.append(chain)


class Bench:
    """A device with faults, and its driver's view of the used ring."""

    def __init__(self, driver: Driver, device: Kept, plan: FaultPlan) -> None:
        self.driver, self.device, self.plan = driver, device, plan

    @property
    def ring(self) -> RawSplitRing:
        ring = self.driver.rings[0]
        assert isinstance(ring, RawSplitRing)
        return ring

    async def offer(self, count: int, queue: int = 0) -> list[Chain]:
        """Make buffers with room for eight bytes available; the device has them then, in this order."""
        before = len(self.device.chains)
        for _ in range(count):
            self.driver.add(queue, [], [8])
        self.driver.kick(queue, force=True)
        with trio.fail_after(60):
            while len(self.device.chains) < before + count:
                await trio.lowlevel.checkpoint()
        return self.device.chains[before:]

    def used(self, queue: int = 0) -> list[tuple[int, int]]:
        """All that is in the used ring, as used.idx says."""
        ring = self.driver.rings[queue]
        return [ring.used_element(index) for index in range(ring.used_idx)]

    async def complete(self, *chains: Chain) -> None:
        for chain in chains:
            chain.writable.write(b"good")
            chain.complete()
        await trio.testing.wait_all_tasks_blocked()

    @property
    def did(self) -> list[tuple[str, int, int]]:
        return [(entry["fault"], entry["queue"], entry["n"]) for entry in self.plan.log.entries]


@asynccontextmanager
async def bench(*faults: str, private: bool = False, event_idx: bool = True) -> AsyncIterator[Bench]:
    plan, device = FaultPlan(faults, seed=1), Kept()
    offer = Offer(event_idx=event_idx, poll="off")
    async with running(device, private=private, offer=offer, core=faulty_core(plan)) as driver:
        yield Bench(driver, device, plan)


@pytest.fixture(params=[False, True], ids=["mapped", "by-message"])
def private(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


async def test_without_a_fault_all_is_as_it_is_without_a_plan(private: bool) -> None:
    async with bench(private=private) as at:
        for _ in range(3 * SIZE):
            [chain] = await at.offer(1)
            await at.complete(chain)
            await at.driver.wait(0, chain.head)
        assert at.ring.used_idx == 3 * SIZE
        assert not at.plan.log.entries


async def test_id_out_of_range(private: bool) -> None:
    async with bench("used-id-out-of-range:at=2:id=999", "used-id-out-of-range:at=3", private=private) as at:
        chains = await at.offer(4)
        for chain in chains:
            await at.complete(chain)
        heads = [chain.head for chain in chains]
        first, second, third, fourth = at.used()
        assert (first, second, fourth) == ((heads[0], 4), (999, 4), (heads[3], 4))
        assert SIZE <= third[0] < SIZE + 1000
        assert at.did == [("used-id-out-of-range", 0, 2), ("used-id-out-of-range", 0, 3)]


async def test_id_that_is_not_in_flight(private: bool) -> None:
    async with bench("used-id-not-in-flight:at=1", private=private) as at:
        chains = await at.offer(2)
        await at.complete(*chains)
        (wrong, length), second = at.used()
        assert wrong < SIZE
        assert wrong not in [chain.head for chain in chains]
        assert (length, second) == (4, (chains[1].head, 4))


async def test_id_of_another_that_is_not_done(private: bool) -> None:
    """The driver may make that one available again, and the device does not blame it."""
    async with bench("used-id-of-another:at=1", private=private) as at:
        first, other = await at.offer(2)
        await at.complete(first)
        assert at.used() == [(other.head, 4)]
        assert at.driver.is_used(0, other.head)
        at.driver.take_used(0)
        again = (await at.offer(SIZE - 1))[-1]
        assert again.head == other.head
        await at.complete(other, again)
        assert at.used()[1:] == [(other.head, 4), (other.head, 4)]
        assert not at.driver.status & 64
        await at.driver.reset()


@pytest.mark.parametrize(("fault", "seen"), [("used-twice:at=2", [0, 1, 1, 2]), ("used-never:at=2", [0, 2])])
async def test_twice_and_never(fault: str, seen: list[int], private: bool) -> None:
    async with bench(fault, private=private) as at:
        chains = await at.offer(3)
        await at.complete(*chains)
        assert at.used() == [(chains[number].head, 4) for number in seen]
        assert len(at.did) == 1


@pytest.mark.parametrize(
    ("fault", "length"),
    [
        ("used-len-long:at=1", 9),
        ("used-len-long:at=1:len=0xffffffff", 0xFFFF_FFFF),
        ("used-len-short:at=1", 0),
        ("used-len-short:at=1:len=3", 3),
    ],
)
async def test_lengths(fault: str, length: int, private: bool) -> None:
    async with bench(fault, private=private) as at:
        chains = await at.offer(2)
        await at.complete(*chains)
        assert at.used() == [(chains[0].head, length), (chains[1].head, 4)]


async def test_late(private: bool, autojump_clock: trio.testing.MockClock) -> None:
    async with bench("used-late:at=1:time=5s", private=private) as at:
        first, second = await at.offer(2)
        started = trio.current_time()
        await at.complete(first)
        assert at.used() == []
        await at.complete(second)
        assert at.used() == [(second.head, 4)]
        await at.driver.wait(0, first.head)
        assert trio.current_time() - started >= 5
        assert at.used() == [(second.head, 4), (first.head, 4)]
        assert len(at.did) == 1


async def test_out_of_order(private: bool, autojump_clock: trio.testing.MockClock) -> None:
    async with bench("used-out-of-order:at=1+3:time=9s", private=private) as at:
        first, second, third = await at.offer(3)
        await at.complete(first)
        assert at.used() == []
        await at.complete(second)
        assert at.used() == [(second.head, 4), (first.head, 4)]
        await at.complete(third)  # no other comes
        assert len(at.used()) == 2
        await at.driver.wait(0, third.head)
        assert trio.current_time() >= 9


async def test_storm(private: bool, autojump_clock: trio.testing.MockClock) -> None:
    async with bench("used-storm:count=6:size=4:time=9s", private=private) as at:
        chains = await at.offer(7)
        for number, chain in enumerate(chains[:3]):
            await at.complete(chain)
            assert at.used() == [], number
        await at.complete(chains[3])
        assert at.used() == [(chain.head, 4) for chain in chains[:4]]
        assert at.driver.queue_interrupts[0] == 1
        await at.complete(*chains[4:])  # two of them in a storm that does not come about
        assert at.used()[4:] == [(chains[6].head, 4)]
        await at.driver.wait(0, chains[5].head)
        assert at.used()[5:] == [(chains[4].head, 4), (chains[5].head, 4)]


async def test_rewritten(private: bool) -> None:
    async with bench("used-rewritten:at=2:id=77:len=78", private=private) as at:
        chains = await at.offer(3)
        for chain in chains:
            await at.complete(chain)
        assert at.used() == [(chains[0].head, 4), (77, 78), (chains[2].head, 4)]


async def test_index_jumps(private: bool) -> None:
    async with bench("used-idx-jump:at=2:by=3", private=private) as at:
        chains = await at.offer(3)
        for chain in chains:
            await at.complete(chain)
        elements = at.used()
        assert len(elements) == 6
        assert elements[0::5] == [(chains[0].head, 4), (chains[2].head, 4)]
        assert elements[1:5] == [(chains[1].head, 4), (0, 0), (0, 0), (0, 0)]


async def test_rewritten_later(private: bool, autojump_clock: trio.testing.MockClock) -> None:
    async with bench("used-rewritten:at=1:id=77:len=78:time=9s", private=private) as at:
        [chain] = await at.offer(1)
        await at.complete(chain)
        assert at.used() == [(chain.head, 4)]
        await trio.sleep(10)
        assert at.used() == [(77, 78)]


@pytest.mark.parametrize("time", ["0", "9s"])
async def test_the_element_comes(time: str, private: bool, autojump_clock: trio.testing.MockClock) -> None:
    async with bench(f"used-idx-early:at=1:time={time}", private=private) as at:
        [chain] = await at.offer(1)
        await at.complete(chain)
        assert at.ring.used_idx == 1
        await trio.sleep(10)
        assert at.used() == [(chain.head, 4)]


async def test_index_before_the_element(autojump_clock: trio.testing.MockClock) -> None:
    async with bench("used-idx-early:at=1:time=9s") as at:
        [chain] = await at.offer(1)
        at.ring.ram.write(at.ring.device + 4, bytes([7] * 8))
        await at.complete(chain)
        assert at.ring.used_idx == 1
        assert at.used() == [(0x07070707, 0x07070707)]
        await trio.sleep(10)
        assert at.used() == [(chain.head, 4)]


async def test_flags_in_spite_of_event_idx() -> None:
    async with bench("used-flags-set:at=2") as at:
        await at.offer(1)
        assert at.ring.used_flags == 0
        await at.offer(1)
        assert at.ring.used_flags == 1


@pytest.mark.parametrize("event_idx", [False, True])
async def test_a_notification_that_is_not_asked_for(event_idx: bool) -> None:
    async with bench("notify-not-asked:queue=0:after=1", event_idx=event_idx) as at:
        await trio.testing.wait_all_tasks_blocked()  # the first wish, which is heard
        await at.offer(1)
        await trio.testing.wait_all_tasks_blocked()
        at.driver.add(0, [], [8])
        assert not at.ring.wants_notification(event_idx=event_idx)
        await trio.testing.wait_all_tasks_blocked()
        assert len(at.device.chains) == 1, "it has seen the buffer without a notification"


async def test_one_queue_only() -> None:
    async with bench("used-never:queue=1") as at:
        for queue in (0, 1):
            chains = await at.offer(2, queue)
            await at.complete(*chains)
        assert len(at.used(0)) == 2
        assert at.used(1) == []
        assert at.did == [("used-never", 1, 1), ("used-never", 1, 2)]


async def test_interrupts_that_were_suppressed() -> None:
    async with bench("interrupt-unwanted:at=2", event_idx=False) as at:
        at.ring.set_avail_flags(1)
        for chain in await at.offer(3):
            await at.complete(chain)
        assert at.driver.queue_interrupts[0] == 1
