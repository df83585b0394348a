"""Control messages that a console has not sent, as its driver finds them among the others."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio.testing
from support.console_driver import ADD, CONTROL_RX, NAME, OPEN, READY, REMOVE, RESIZE, Control, control, tell

from vfiouser_virtio.devices.console import Console
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.core import faulty_core
from vfiouser_virtio.faults.virtqueue import MAX_SAID
from vfiouser_virtio.testing.driver import NEEDS_RESET, Driver, running

TRUE = [control(0, ADD), control(1, ADD)]


@pytest.fixture(params=[False, True], ids=["mapped", "by-message"])
def private(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@asynccontextmanager
async def console(*faults: str, private: bool = False) -> AsyncIterator[tuple[Driver, FaultPlan]]:
    plan = FaultPlan(faults, seed=1)
    device = Console(chardev=["null", "null"], name=["", "org.example"])
    async with running(device, private=private, core=faulty_core(plan)) as driver:
        yield driver, plan
        assert not driver.status & NEEDS_RESET, "the device does not blame the driver"


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("console-port-add", control(0, ADD)),
        ("console-port-add:id=99", control(99, ADD)),
        ("console-port-remove:id=1", control(1, REMOVE)),
        ("console-message", control(0, 0xFFFF)),
        ("console-message:id=0xffffffff:event=6:value=0", control(0xFFFFFFFF, OPEN, 0)),
        ("console-message-short", control(0, OPEN)[:3]),
        ("console-message-short:len=0", b""),
        ("console-message-long:len=100", control(0, OPEN) + b"\xff" * 92),
        ("console-message-long:len=1000000", control(0, OPEN) + b"\xff" * 248),
        ("console-resize:cols=1:rows=65536", control(0, RESIZE, 0) + b"\1\0\0\0"),
        ("console-name", control(0, NAME) + b"../../../dev/null"),
    ],
)
async def test_one_message_more(fault: str, message: bytes, private: bool) -> None:
    """Those that the device has sent come as well, and are what is counted."""
    async with console(f"{fault}:at=1", private=private) as (driver, plan):
        inbox = Control(driver)
        await tell(driver, control(0, READY))
        found = await inbox.take(3)
        assert [each for each in found if each != message or each in TRUE][:2] == TRUE
        assert sorted(found) == sorted([*TRUE, message])
        assert [entry["n"] for entry in plan.log.entries] == [1]


async def test_no_more_is_said_than_there_is_room_for(autojump_clock: trio.testing.MockClock) -> None:
    """Of a driver that gives a buffer for each message of the device, and none for the others."""
    async with console("console-message") as (driver, plan):
        driver.add(CONTROL_RX, [], [64])
        await tell(driver, *[control(0, READY)] * 2)
        await trio.testing.wait_all_tasks_blocked()
        for _ in range(MAX_SAID):
            driver.add(CONTROL_RX, [], [64])
            driver.kick(CONTROL_RX, force=True)
            await trio.testing.wait_all_tasks_blocked()
        assert len(plan.log.entries) == 2, "what faults say is no opportunity"
        await driver.reset()


async def test_a_console_without_control_messages() -> None:
    plan = FaultPlan(["console-resize"])
    with pytest.raises(ConfigError, match="this console has no control messages"):
        async with running(Console(chardev=["null"]), core=faulty_core(plan)):
            pass
