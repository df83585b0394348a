"""Rate limits: what a device with them takes, when, and what becomes of what has to wait. All in virtual time."""

from random import Random

import pytest
import trio
from trio.testing import MockClock, wait_all_tasks_blocked

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.testing.driver import RING_PACKED, VERSION_1, Driver, running
from vfiouser_virtio.virtio import Chain, Device, Limits, Offer, Queue, queue

FIVE_MINUTES = 300.0


class Taker(Device):
    """Notes when it takes what, one way or another, in two queues, and completes it at once."""

    device_id = 63
    first = queue(max_size=64)
    second = queue(max_size=64)

    def __init__(self, way: str = "chains") -> None:
        super().__init__()
        self.way = way
        self.taken: list[tuple[float, int]] = []
        """When, and how many bytes."""

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for each in self.queues:
                nursery.start_soon(self.serve, each)

    async def serve(self, served: Queue) -> None:
        if self.way == "chains":
            async for chain in served:
                self.take(chain)
        elif self.way == "nowait":
            while True:
                await served.wait()
                while (found := served.next_nowait()) is not None:
                    self.take(found)
        else:
            async for burst in served.bursts(at_once=True):
                if self.way == "singles" and (singles := served.take_singles(64, writable=False)) is not None:
                    self.taken += [(trio.current_time(), length) for _, _, length in singles.buffers]
                    singles.end([0] * len(singles.buffers))
                    continue
                for chain in burst:
                    self.take(chain)

    def take(self, chain: Chain) -> None:
        self.taken.append((trio.current_time(), chain.readable.length + chain.room))
        chain.complete(chain.room)


async def until_taken(device: Taker, count: int) -> None:
    with trio.fail_after(FIVE_MINUTES):
        while len(device.taken) < count:
            await trio.sleep(0.001)


ways = pytest.mark.parametrize("way", ["chains", "bursts", "nowait", "singles"])


@ways
@pytest.mark.parametrize("packed", [False, True], ids=["split", "packed"])
async def test_requests_come_at_their_rate(way: str, packed: bool, autojump_clock: MockClock) -> None:
    features = 1 << VERSION_1 | (1 << RING_PACKED if packed else 0)
    device = Taker(way)
    limits = Limits(iops=100, iops_burst=5)
    async with running(device, offer=Offer(packed=packed), features=features, limits=limits) as driver:
        tokens = [driver.add(0, [b"x" * 100]) for _ in range(40)]
        driver.kick(0)
        for token in tokens:
            await driver.wait(0, token)
    began = device.taken[0][0]
    times = [round(when - began, 3) for when, _ in device.taken]
    assert times[:5] == [0.0] * 5
    assert times[5:] == pytest.approx([0.01 * number for number in range(1, 36)], abs=0.002)


@ways
async def test_bytes_are_paid_for_whatever_a_request_has(way: str, autojump_clock: MockClock) -> None:
    """One that is larger than what is left is taken whole, and paid off before the next."""
    device = Taker(way)
    async with running(device, limits=Limits(bps=1000, bps_burst=1000)) as driver:
        for size in (900, 3000, 10, 10):
            driver.add(0, [bytes(size)])
        driver.kick(0)
        await until_taken(device, 4)
    began = device.taken[0][0]
    assert [size for _, size in device.taken] == [900, 3000, 10, 10]
    assert [when - began for when, _ in device.taken] == pytest.approx([0, 0, 2.901, 2.911], abs=0.003)


@ways
@pytest.mark.parametrize("seed", range(4))
async def test_no_schedule_gets_more_than_its_share(way: str, seed: int, autojump_clock: MockClock) -> None:
    """Of both kinds of limit, in any window; and something is taken as soon as both have a token."""
    random = Random(seed)
    iops, bps = random.choice([50, 300]), random.choice([4000, 50_000])
    limits = Limits(iops=iops, iops_burst=random.choice([1, 20]), bps=bps, bps_burst=random.choice([100, 5000]))
    device = Taker(way)
    sizes: list[int] = []
    async with running(device, limits=limits) as driver:
        for _ in range(60):
            index, size = random.randrange(2), random.choice([1, 64, 700, 1500])
            token = driver.add(index, [bytes(size)])
            driver.kick(index)
            sizes.append(size)
            if random.random() < 0.3:
                await trio.sleep(random.choice([0.001, 0.05, 0.4]))
            if random.random() < 0.1:
                await driver.wait(index, token)
        await until_taken(device, len(sizes))
    assert sorted(size for _, size in device.taken) == sorted(sizes)  # nothing is lost, nothing comes twice
    requests, octets = limits.buckets(0)
    for position, (begin, _) in enumerate(device.taken):
        total = 0
        for number, (when, size) in enumerate(device.taken[position:]):
            # What was taken before this one; it may be larger than what there was.
            assert number < requests.burst + iops * (when - begin) + 0.01
            assert total < octets.burst + bps * (when - begin) + 0.01
            total += size


async def test_nothing_waits_longer_than_it_must(autojump_clock: MockClock) -> None:
    device = Taker()
    async with running(device, limits=Limits(iops=10, iops_burst=1)) as driver:
        for _ in range(50):
            driver.add(0, [b"x"])
        driver.kick(0)
        await until_taken(device, 50)
    assert device.taken[-1][0] - device.taken[0][0] == pytest.approx(4.9, abs=0.01)


async def test_no_work_while_it_waits(autojump_clock: MockClock) -> None:
    """No spinning: a minute without a token takes a few rounds of the event loop, polled or not."""
    device = Taker()
    async with running(device, offer=Offer(poll="off"), limits=Limits(bps=1, bps_burst=1)) as driver:
        for _ in range(3):
            driver.add(0, [bytes(100)])
        driver.kick(0)
        await wait_all_tasks_blocked()
        assert len(device.taken) == 1
        rounds = Rounds()
        trio.lowlevel.add_instrument(rounds)
        await trio.sleep(60)
        trio.lowlevel.remove_instrument(rounds)
        assert len(device.taken) == 1
        assert rounds.count < 50


class Rounds(trio.abc.Instrument):
    def __init__(self) -> None:
        self.count = 0

    def before_io_wait(self, timeout: float) -> None:
        self.count += 1


async def test_what_was_not_written_comes_back(autojump_clock: MockClock) -> None:
    """Room that the device leaves is not what it has moved."""

    class Short(Taker):
        def take(self, chain: Chain) -> None:
            self.taken.append((trio.current_time(), chain.room))
            chain.complete(10)

    device = Short()
    async with running(device, limits=Limits(bps=1000, bps_burst=1000)) as driver:
        for _ in range(20):
            driver.add(0, [], [900])
        driver.kick(0)
        await until_taken(device, 20)
    assert device.taken[-1][0] - device.taken[0][0] < 0.1


async def test_a_reset_ends_what_waits_and_forgives_nothing(autojump_clock: MockClock) -> None:
    device = Taker()
    async with running(device, limits=Limits(iops=1, iops_burst=2)) as driver:
        for _ in range(5):
            driver.add(0, [b"x"])
        driver.kick(0)
        await wait_all_tasks_blocked()
        assert len(device.taken) == 2
        await driver.reset()
        driver.probe()
        token = driver.add(0, [b"new"])
        driver.kick(0)
        await wait_all_tasks_blocked()
        assert len(device.taken) == 2
        await driver.wait(0, token)
        assert [size for _, size in device.taken] == [1, 1, 3]
        assert device.taken[2][0] - device.taken[0][0] == pytest.approx(1, abs=0.01)


async def test_a_device_ends_while_requests_wait(autojump_clock: MockClock) -> None:
    device = Taker()
    async with running(device, limits=Limits(iops=1, iops_burst=1)) as driver:
        for _ in range(5):
            driver.add(0, [b"x"])
        driver.kick(0)
        await wait_all_tasks_blocked()
    assert len(device.taken) == 1


async def test_chains_that_go_together_are_promised_together(autojump_clock: MockClock) -> None:
    """`Queue.wait` says that so many can be had, and then they can: what they cost more is owed."""

    class Pairs(Taker):
        async def serve(self, served: Queue) -> None:
            while True:
                await served.wait(2)
                pair = [served.next_nowait(), served.next_nowait()]
                for chain in pair:
                    assert chain is not None
                    self.take(chain)

    device = Pairs()
    async with running(device, limits=Limits(iops=1, iops_burst=1)) as driver:
        for _ in range(4):
            driver.add(0, [b"x"])
        driver.kick(0)
        await until_taken(device, 4)
    began = device.taken[0][0]
    assert [when - began for when, _ in device.taken] == pytest.approx([0, 0, 2, 2], abs=0.01)


async def test_one_that_is_put_back_costs_once(autojump_clock: MockClock) -> None:
    class Hesitant(Taker):
        async def serve(self, served: Queue) -> None:
            for _ in range(3):
                served.put_back(await served.next())
            async for chain in served:
                self.take(chain)

    device = Hesitant()
    async with running(device, limits=Limits(iops=10, iops_burst=1)) as driver:
        began = trio.current_time()
        driver.add(0, [b"x"])
        driver.kick(0)
        await until_taken(device, 1)
    assert device.taken[0][0] - began < 0.05


async def test_a_disk_is_as_slow_as_asked_for(autojump_clock: MockClock) -> None:
    async with running(Blk(size=1 << 20), limits=Limits(iops=10, iops_burst=1)) as driver:
        began = trio.current_time()
        for sector in range(11):
            used = await driver.request([bytes(8) + sector.to_bytes(8, "little")], [512, 1])
            assert used.data[1] == b"\0"
        assert trio.current_time() - began == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("private", [False, True], ids=["mapped", "by-message"])
async def test_whatever_the_memory(private: bool, autojump_clock: MockClock) -> None:
    device = Taker("bursts")
    async with running(device, private=private, limits=Limits(iops=10, iops_burst=1)) as driver:
        for _ in range(6):
            driver.add(0, [b"x"])
        driver.kick(0)
        await until_taken(device, 6)
    assert device.taken[-1][0] - device.taken[0][0] == pytest.approx(0.5, abs=0.02)


def test_without_limits_nothing_is_measured() -> None:
    driver = Driver(Taker())
    assert all(type(each.burst).__name__ == "deque" and each.meter is None for each in driver.core.queues)
    driver.ram.close()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"iops": 0}, "iops=0: expected 1 or more"),
        ({"bps": 0}, "bps=0: expected 1 or more"),
        ({"iops_burst": 5}, "iops-burst=5 goes with iops, and there is none"),
        ({"bps": 5, "bps_burst": 0}, "bps-burst=0: expected 1 or more"),
    ],
)
def test_limits_that_cannot_be(given: dict[str, int], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Limits(**given)
