"""The audit of a device that lies to its driver: what the driver was told is what it is judged by."""

import json

import pytest
import trio.testing
from support.bad_driver import BadDriver, bad_driver

from vfiouser_virtio.audit import AuditLog
from vfiouser_virtio.audit.report import as_json, as_text
from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.protocols.virtio.blk import REQUEST_HEADER_CODEC
from vfiouser_virtio.protocols.virtio.features import Feature
from vfiouser_virtio.testing.raw.bring_up import DRIVER
from vfiouser_virtio.testing.raw.split import RawSplitRing
from vfiouser_virtio.virtio import Device, Offer, queue

_READ = REQUEST_HEADER_CODEC.pack(0, 0, 0)


async def read(driver: BadDriver, count: int) -> int:
    """So many reads of a sector at a time; how many have come back."""
    return sum([await _read_one(driver) for _ in range(count)])


async def _read_one(driver: BadDriver) -> int:
    driver.add(0, [_READ], [512, 1])
    driver.notify(0)
    await trio.sleep(5)
    return driver.take_used(0)


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize(
    "fault",
    [
        "used-late:every=3",
        "used-out-of-order:every=3",
        "used-storm:size=4",
        "used-len-long",
        "used-len-short",
        "interrupt-spurious",
        "interrupt-lost",
        "interrupt-unwanted",
        "config-interrupt-spurious",
        "register-read-late:every=2",
        "register-write-late:every=2",
    ],
)
async def test_a_driver_that_does_right_is_not_accused(
    fault: str, packed: bool, autojump_clock: trio.testing.MockClock
) -> None:
    plan = FaultPlan([fault], seed=1)
    async with bad_driver(Blk(size=1 << 20), Offer(poll="off", packed=packed), faults=plan) as driver:
        driver.start(size=64)
        assert await read(driver, 20) == 20
        assert driver.broken == {}
        assert plan.log.entries


@pytest.mark.parametrize("fault", ["features-extra:bit=12", "features-missing", "features-missing:bit=33"])
async def test_features_are_those_that_were_shown(fault: str, packed: bool) -> None:
    plan = FaultPlan([fault], seed=1)
    async with bad_driver(Blk(size=1 << 20), Offer(poll="off", packed=packed), faults=plan) as driver:
        driver.reset()
        driver.acknowledge()
        driver.negotiate(without=Feature.RING_PACKED.mask)
        assert plan.log.entries
        assert list(driver.broken) == ["features/ring-packed"] * packed


class KeepsFirst(Device):
    """Keeps the first buffer, and completes the others."""

    device_id = 63
    requestq = queue(max_size=16)

    async def run(self) -> None:
        kept = await self.requestq.next()
        async for chain in self.requestq:
            chain.complete()
        del kept


@pytest.mark.parametrize(
    ("fault", "broken"),
    [
        ("used-never", ["split/in-flight"]),
        ("used-id-out-of-range", ["split/in-flight"]),
        ("used-id-of-another", []),
    ],
)
async def test_a_buffer_is_in_flight_until_the_driver_was_told_that_it_has_it_back(
    fault: str, broken: list[str]
) -> None:
    plan = FaultPlan([f"{fault}:at=1"], seed=1)
    async with bad_driver(KeepsFirst(), Offer(poll="off"), faults=plan) as driver:
        driver.start()
        kept, completed = driver.add(0, [b"kept"]), driver.add(0, [b"completed"])
        driver.notify(0)
        await driver.settle()
        assert [entry["fault"] for entry in plan.log.entries] == [fault]
        assert driver.broken == {}
        ring = driver.rings[0]
        assert isinstance(ring, RawSplitRing)
        ring.offer(kept if fault == "used-id-of-another" else completed)
        driver.notify(0)
        await driver.settle()
        assert list(driver.broken) == broken


async def test_what_is_broken_is_said_with_the_faults_before(
    packed: bool, autojump_clock: trio.testing.MockClock
) -> None:
    plan = FaultPlan(["used-len-long:at=2"], seed=1)
    async with bad_driver(Blk(size=1 << 20), Offer(poll="off", packed=packed), faults=plan) as driver:
        driver.start()
        driver.set("queue_enable", 0)
        await read(driver, 3)
        driver.set("device_status", DRIVER)
        found = driver.findings.by_rule
        assert list(found) == ["queue/enable-zero", "status/clear"]
        assert found["queue/enable-zero"].faults == "none before it"
        after = found["status/clear"].faults
        assert after.startswith("1 before it, the last of them used-len-long, n=2 of queue 0: 0x")

        log = AuditLog()
        log.devices["blk"] = driver.findings
        assert f"faults: {after} " in " ".join(as_text(log).split())
        assert [each["faults"] for each in json.loads(as_json(log))["devices"][0]["findings"]] == [
            "none before it",
            after,
        ]


async def test_descriptors_that_are_changed_while_a_used_buffer_is_late(
    packed: bool, autojump_clock: trio.testing.MockClock
) -> None:
    plan = FaultPlan(["used-late:at=1:time=10s"], seed=1)
    async with bad_driver(Blk(size=1 << 20), Offer(poll="off", packed=packed), faults=plan) as driver:
        driver.start()
        driver.add(0, [_READ], [512, 1])
        driver.notify(0)
        await driver.settle()
        where = driver.rings[0].addresses[0]
        driver.ram.write(where, b"\1")  # of the first descriptor's address
        await trio.sleep(20)
        assert list(driver.broken) == [f"{'packed' if packed else 'split'}/changed"]
