"""Table of rules and of the drivers that break them: what each does, of which device."""

from collections.abc import Awaitable, Callable

from support.bad_driver import BadDriver, bad_driver

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.virtio import Device, Offer

Case = Callable[[BadDriver], Awaitable[None] | None]
SetUp = Callable[[], tuple[Device, Offer]]

CASES: dict[str, tuple[Case, SetUp]] = {}
"""By the id of the rule."""


def disk() -> tuple[Device, Offer]:
    """A disk of two queues."""
    return Blk(size=1 << 20, num_queues=2), Offer(poll="off")


def breaks(rule: str, set_up: SetUp = disk) -> Callable[[Case], Case]:
    """The driver that breaks this rule of a device, and does all else right."""

    def register(case: Case) -> Case:
        assert rule not in CASES, rule
        CASES[rule] = case, set_up
        return case

    return register


async def check(rule: str) -> None:
    """The audit finds that rule broken, and no other."""
    case, set_up = CASES[rule]
    async with bad_driver(*set_up()) as driver:
        result = case(driver)
        if result is not None:
            await result
        await driver.settle()
        assert set(driver.broken) == {rule}, driver.broken
