"""Queues that never run empty: what others wait for is counted in chains, and in rounds of the event loop."""

import itertools
import sys

import pytest
import trio
import trio.testing

from vfiouser_virtio import turns
from vfiouser_virtio.testing.driver import running
from vfiouser_virtio.virtio import Device, Queue, queue

QUEUES = 8


class Counter(Device):
    """Gives every chain back, and says which queue it was of."""

    device_id = 63
    requestq = queue(max_size=32)

    def __init__(self) -> None:
        super().__init__()
        for _ in range(QUEUES - 1):
            self.add_queue(32)
        self.taken: list[int] = []

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            for each in self.queues:
                nursery.start_soon(self.serve, each)

    async def serve(self, each: Queue) -> None:
        async for chain in each:
            self.taken.append(each.index)
            chain.complete()


async def test_busy_queues_of_all_devices_wait_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight queues whose time is always up: a neighbour waits for one chain in a round, not for eight."""
    clock = itertools.count(0.0, 0.6 * turns.SLICE)  # whoever looks at the clock twice has had its time
    for name in ("virtio.virtqueue", "turns"):
        monkeypatch.setattr(sys.modules[f"vfiouser_virtio.{name}"], "perf_counter", lambda: next(clock))
    device = Counter()
    rounds: list[int] = []

    class Rounds(trio.abc.Instrument):
        def after_io_wait(self, timeout: float) -> None:
            rounds.append(len(device.taken))

    async with running(device) as driver:
        await trio.testing.wait_all_tasks_blocked()
        for index in range(QUEUES):
            for _ in range(16):
                driver.add(index, [b"x"])
            driver.kick(index)
        trio.lowlevel.add_instrument(Rounds())
        with trio.fail_after(60):
            while len(device.taken) < 16 * QUEUES:
                await trio.lowlevel.checkpoint()
    assert max(after - before for before, after in itertools.pairwise(rounds)) <= 2
    # And fairly: after so many chains every queue has had some.
    assert set(device.taken[: 3 * QUEUES]) == set(range(QUEUES))
