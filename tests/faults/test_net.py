"""Faults of rings and interrupts on a network device, which takes buffers of one piece by the burst where it may."""

import pytest
import trio.testing
from support.net_cable import Cable, a_frame

from vfiouser_virtio.backends.net.frame import frame_of
from vfiouser_virtio.backends.net.netdev import burst_putter
from vfiouser_virtio.devices.net import Net
from vfiouser_virtio.faults import FAULTS, FaultPlan
from vfiouser_virtio.faults.core import faulty_core
from vfiouser_virtio.faults.declaration import Place
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.testing.driver import ACKNOWLEDGE, DRIVER, DRIVER_OK, FEATURES_OK, RAM_BASE, Driver, running
from vfiouser_virtio.testing.raw.packed import RawPackedRing, packed_areas
from vfiouser_virtio.testing.raw.ring import WRITE, RawRing, lay_out
from vfiouser_virtio.testing.raw.split import RawSplitRing, split_areas
from vfiouser_virtio.virtio import Offer

RX, TX = 0, 1
BURST, ROUNDS = 8, 3
FRAMES = [a_frame(60 + number) for number in range(BURST)]

ELSEWHERE = ("used-flags-set", "event-far", "interrupt-early", "used-after-reset", "config-interrupt-lost")
"""No burst meets these: they are of EVENT_IDX, of the time before DRIVER_OK or after it, and of the configuration."""
CASES = [
    (fault.name, kind)
    for fault in FAULTS.values()
    if fault.place in (Place.RING, Place.INTERRUPT) and fault.name not in ELSEWHERE
    for kind in ("split", "packed")
    if fault.ring in ("", kind)
]


def begin(driver: Driver, *, packed: bool) -> list[RawRing]:
    """From reset to DRIVER_OK with this kind of ring, of receive and transmit queue."""
    core = driver.core
    core.write_status(ACKNOWLEDGE | DRIVER)
    features = Feature.VERSION_1.mask | (Feature.RING_PACKED.mask if packed else 0)
    for select in range(2):
        core.write_driver_features(select, features >> 32 * select & 0xFFFF_FFFF)
    core.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK)
    rings: list[RawRing] = []
    base = RAM_BASE + (1 << 16)
    for index, queue in enumerate(core.queues[:2]):
        queue.size = 64
        addresses, end = lay_out(base, packed_areas(64) if packed else split_areas(64))
        ring: RawRing = (RawPackedRing if packed else RawSplitRing)(driver.ram, 64, addresses, index)
        queue.configure(desc=ring.desc, driver=ring.driver, device=ring.device)
        core.enable_queue(index)
        rings.append(ring)
        base = -(-end // 4096) * 4096
    core.write_status(ACKNOWLEDGE | DRIVER | FEATURES_OK | DRIVER_OK)
    return rings


@pytest.mark.parametrize(("name", "kind"), CASES)
async def test_bursts_meet_each_fault(name: str, kind: str, autojump_clock: trio.testing.MockClock) -> None:
    """In both directions, and all frames pass: what the driver is told of its buffers makes no difference to them."""
    plan = FaultPlan([f"{name}:p=0.5"], seed=1)
    packed = kind == "packed"
    net, offer = Net(netdev=(cable := Cable())), Offer(packed=packed, poll="off")
    async with running(net, core=faulty_core(plan), offer=offer, probe=False) as driver:
        rings = begin(driver, packed=packed)
        put = burst_putter(await cable.wait_device())
        for _ in range(2 * (name == "used-id-of-another")):  # which are never done, and may be named
            rings[RX].add([(RAM_BASE, 256, WRITE)])
        for _ in range(ROUNDS):
            for number, frame in enumerate(FRAMES):
                driver.ram.write(RAM_BASE + 4096 + 256 * number, bytes(12) + frame)
                rings[TX].add([(RAM_BASE + 4096 + 256 * number, 12 + len(frame), 0)])
                rings[RX].add([(RAM_BASE + 8192 + 256 * number, 256, WRITE)])
            for index in (RX, TX):
                driver.core.notify_queue(index)
            await trio.testing.wait_all_tasks_blocked()
            assert put([frame_of(frame) for frame in FRAMES]) == BURST
            await trio.sleep(10)
        assert await cable.wait_sent(ROUNDS * BURST) == ROUNDS * FRAMES
        assert plan.log.entries
        assert not driver.status & 64, "the device blames nobody"
