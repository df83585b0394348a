"""Saving a virtqueue's state at any point, and going on with another: the driver notices nothing.

The rings themselves are saved and restored against the model of the specification, see `tests/vring/test_model.py`.
"""

import os
import pickle
import random

import pytest
import trio

from vfiouser_virtio.memory import GuestMemory
from vfiouser_virtio.testing.driver import RAM_BASE, Driver
from vfiouser_virtio.virtio import Chain, Device, DeviceCore, Offer, Stop, Virtqueue, queue


class Echo(Device):
    """Answers requests in any order, some of them late."""

    device_id = 63
    requestq = queue(max_size=16)

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self.rng = rng

    async def run(self) -> None:
        held: list[Chain] = []
        while True:
            chain = self.requestq.next_nowait()
            if chain is None and not held:
                chain = await self.requestq.next()
            if chain is not None:
                held.append(chain)
            if self.rng.random() < 0.6:
                done = held.pop(self.rng.randrange(len(held)))
                done.writable.write(done.readable.read()[::-1])
                done.complete()
            await trio.lowlevel.checkpoint()


def handed_over(driver: Driver, device: Device, **offer: bool) -> None:
    """Another core goes on with the state of the driver's, which is left as if its process had been killed."""
    before = driver.core
    states = [pickle.loads(pickle.dumps(each.state())) for each in before.queues]
    before.stop(Stop.SUSPENDED)  # of a process that was killed nothing stores to memory any more
    driver.core = core = DeviceCore(device, driver.memory, driver, offer=Offer(poll="off", **offer))
    core.write_status(3)
    for select in range(4):
        core.write_driver_features(select, before.driver_features >> 32 * select & 0xFFFF_FFFF)
    core.write_status(11)
    for each, state in zip(core.queues, states, strict=True):
        each.restore(state)
        again = each.state()
        assert again.ring is not None
        assert state.ring is not None
        assert again.ring.buffers == state.ring.buffers
        assert sorted(again.ring.completed) == sorted(state.ring.completed)
        assert again._replace(ring=None) == state._replace(ring=None)
    core.write_status(15)


@pytest.mark.parametrize("private", [False, True])
@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("event_idx", [False, True])
async def test_a_queue_is_saved_at_any_point(event_idx: bool, in_order: bool, private: bool) -> None:
    rng = random.Random(f"{event_idx} {in_order} {private}")
    offer = {"event_idx": event_idx, "in_order": in_order}
    device: Device = Echo(rng)
    driver = Driver(device, private=private, offer=Offer(poll="off", **offer))
    requests: dict[int, bytes] = {}
    answered = 0
    scope = trio.CancelScope()

    async def serve(core: DeviceCore, scope: trio.CancelScope) -> None:
        with scope:
            await core.serve()

    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(serve, driver.core, scope)
            driver.probe()
            ring = driver.rings[0]
            for step in range(600):
                if ring.free >= 2 and rng.random() < 0.7:
                    text = b"%06d" % step
                    requests[driver.add(0, [text], [6], indirect=rng.random() < 0.3)] = text
                    driver.kick(0)
                for _ in range(rng.randrange(6)):
                    await trio.lowlevel.checkpoint()
                if rng.random() < 0.1:
                    # In the middle of it: what the device did with its chains, or sends at the moment, is cut off.
                    handed_over(driver, Echo(rng), **offer)
                    scope.cancel()
                    scope = trio.CancelScope()
                    nursery.start_soon(serve, driver.core, scope)
                for token in [token for token in requests if driver.is_used(0, token)]:
                    used = await driver.wait(0, token)
                    assert used.data == [requests.pop(token)[::-1]]
                    assert used.written == 6
                    answered += 1
            while requests:
                await trio.lowlevel.checkpoint()
                for token in [token for token in requests if driver.is_used(0, token)]:
                    assert (await driver.wait(0, token)).data == [requests.pop(token)[::-1]]
                    answered += 1
            nursery.cancel_scope.cancel()
    assert answered > 200
    driver.ram.close()


def bare(memory: GuestMemory | None = None, size: int = 16) -> Virtqueue:
    def nothing(*_: object) -> None:
        pass

    return Virtqueue(0, size, memory or GuestMemory(), interrupt=nothing, failed=nothing, warn=nothing)


async def test_memory_need_not_be_there_yet() -> None:
    driver = Driver(Echo(random.Random(0)), offer=Offer(poll="off"))
    driver.probe()
    driver.add(0, [b"abc"], [3])
    state = driver.core.queues[0].state()
    memory = GuestMemory()
    other = bare(memory)
    other.restore(state)
    other.start(Stop.NOT_DRIVER_OK)
    assert not other.fill_nowait()
    assert driver.ram.region.fd is not None
    memory.map(RAM_BASE, 1 << 20, readable=True, writable=True, fd=os.dup(driver.ram.region.fd), offset=0)
    other.memory_changed()
    assert other.fill_nowait()
    assert other.burst[0].readable.read() == b"abc"
    driver.ram.close()


def test_what_cannot_be_restored() -> None:
    driver = Driver(Echo(random.Random(0)))
    driver.probe()
    state = driver.core.queues[0].state()
    with pytest.raises(ValueError, match="queue 0 is in use already"):
        driver.core.queues[0].restore(state)
    with pytest.raises(ValueError, match="cannot have 0x10 entries, but up to 0x8"):
        bare(size=8).restore(state)
    assert state.ring is not None
    broken = state._replace(ring=state.ring._replace(completed=((3, 1),)))
    with pytest.raises(ValueError, match="are no state of a ring"):
        bare().restore(broken)
    idle = bare()
    idle.restore(bare().state())
    assert not idle.enabled
    driver.ram.close()
