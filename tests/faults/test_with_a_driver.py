"""What a driver that checks everything makes of faults, on both kinds of ring and both kinds of memory."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
import trio.testing

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.core import faulty_core
from vfiouser_virtio.guest import DeviceBroken, Disk, VirtioDevice, bound
from vfiouser_virtio.transports import Loopback
from vfiouser_virtio.virtio import Offer

NEEDS_RESET = 64


@asynccontextmanager
async def disk(plan: FaultPlan, *, packed: bool, private: bool = False) -> AsyncIterator[tuple[VirtioDevice, Loopback]]:
    offer = Offer(packed=packed, poll="off")
    async with (
        Loopback(Blk(size=1 << 20), private=private, core=faulty_core(plan), offer=offer) as transport,
        bound(transport) as found,
    ):
        yield found, transport


async def read(found: VirtioDevice, count: int) -> None:
    drive: Disk = found.driver_data
    for sector in range(count):
        assert await drive.read(sector, 1) == bytes(512)


@pytest.fixture(params=[False, True], ids=["split", "packed"])
def packed(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(params=[False, True], ids=["mapped", "by-message"])
def private(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("used-id-out-of-range:at=150", "the used id is 0x173, which is not a buffer in flight"),
        ("used-id-not-in-flight:at=150", "the used id is 0xbc, which is not a buffer in flight"),
        ("used-twice:at=150", "can follow|is not a buffer in flight"),
        ("used-len-long:at=150", "used length 0x202 of buffer 0x95, which has room for 0x201"),
        ("used-rewritten:at=150", "the used id is 0xdead, which is not a buffer in flight"),
    ],
)
async def test_a_lie_is_found(fault: str, complaint: str, packed: bool, private: bool) -> None:
    """After the ring has gone round, with the request that has the fault and with no other."""
    plan = FaultPlan([fault], seed=1)
    async with disk(plan, packed=packed, private=private) as (found, transport):
        await read(found, 148)
        assert not plan.log.entries
        with trio.fail_after(60), pytest.raises(DeviceBroken, match=complaint):
            await read(found, 4)
        assert [entry["n"] for entry in plan.log.entries] == [150]
        assert not transport.core.status & NEEDS_RESET, "the device does not blame the driver"


@pytest.mark.parametrize(
    ("fault", "kind"),
    [
        ("used-never:at=3", "both"),
        ("interrupt-lost:at=3", "both"),
        ("packed-wrap-flipped:at=3", "packed"),
        ("packed-gap:at=3", "packed"),
        ("notify-not-asked:after=2", "both"),
    ],
)
async def test_a_request_does_not_end(
    fault: str, kind: str, packed: bool, autojump_clock: trio.testing.MockClock
) -> None:
    if kind == "packed" and not packed:
        return
    plan = FaultPlan([fault], seed=1)
    async with disk(plan, packed=packed) as (found, transport):
        with trio.move_on_after(1000) as scope:
            await read(found, 10)
        assert scope.cancelled_caught
        assert len(plan.log.entries) == 1
        assert not transport.core.status & NEEDS_RESET


@pytest.mark.parametrize(
    "fault",
    [
        "used-late:p=0.3:time=50ms",
        "used-out-of-order:p=0.5",
        "used-storm:p=0.5:size=4",
        "interrupt-spurious:p=0.5",
        "interrupt-late:p=0.5",
        "interrupt-storm:every=10:times=20",
        "config-interrupt-spurious:p=0.5",
    ],
)
async def test_what_breaks_no_rule_does_no_harm(
    fault: str, packed: bool, private: bool, autojump_clock: trio.testing.MockClock
) -> None:
    plan = FaultPlan([fault], seed=1)
    async with disk(plan, packed=packed, private=private) as (found, _):
        drive: Disk = found.driver_data

        async def use(sector: int) -> None:
            for number in range(10):
                data = bytes([sector, number]) * 256
                await drive.write(sector, data)
                assert await drive.read(sector, 1) == data

        with trio.fail_after(10_000):
            async with trio.open_nursery() as nursery:
                for sector in range(8):
                    nursery.start_soon(use, sector)
    assert plan.log.entries
