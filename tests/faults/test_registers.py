"""Faults of registers over PCI: ISR status and INTx, writes that are lost, resets and suspensions without an end."""

import pytest
import trio.testing

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.devices.console import Console
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.core import faulty_core
from vfiouser_virtio.faults.pci import FaultyPci
from vfiouser_virtio.protocols.virtio.features import DeviceStatus, Feature
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS
from vfiouser_virtio.testing.driver import NEEDS_RESET, Driver, running
from vfiouser_virtio.transports.pci import COMMON, DEVICE, ISR, NOTIFY, VIRTIO_BAR
from vfiouser_virtio.vfio_device import PciRegion
from vfiouser_virtio.virtio import Offer

SUSPEND, DRIVER_OK = int(DeviceStatus.SUSPEND), int(DeviceStatus.DRIVER_OK)
QUEUES = 2


class Function:
    """A disk with faults, without MSI-X, and its registers."""

    def __init__(self, *faults: str) -> None:
        self.plan = FaultPlan(faults, seed=1)
        self.function = FaultyPci(Blk(size=1 << 20, num_queues=QUEUES), faults=self.plan, vectors=0)
        self.function.region_write(PciRegion.CONFIG, 4, b"\x06\x00")  # memory, bus master

    def read(self, offset: int, size: int) -> int:
        return int.from_bytes(self.function.region_read(VIRTIO_BAR, offset, size), "little")

    def get(self, name: str) -> int:
        offset, size = COMMON_CFG_OFFSETS[name]
        return self.read(COMMON + offset, size)

    def set(self, name: str, value: int) -> None:
        offset, size = COMMON_CFG_OFFSETS[name]
        self.function.region_write(VIRTIO_BAR, COMMON + offset, value.to_bytes(size, "little"))

    def isr(self) -> int:
        return self.read(ISR, 1)

    @property
    def line(self) -> bool:
        return self.function.intx.level

    @property
    def did(self) -> list[tuple[str, int]]:
        return [(entry["fault"], entry["n"]) for entry in self.plan.log.entries]


@pytest.mark.parametrize(
    ("fault", "reads", "lines"),
    [
        ("isr-value:at=2", [1, 0, 1, 0], [False, False, False, False]),
        ("isr-value:at=2:value=3", [1, 3, 1, 0], [False, False, False, False]),
        ("isr-stuck:at=2", [1, 1, 1, 0], [False, True, False, False]),
        ("intx-stuck:at=2", [1, 1, 1, 0], [False, True, False, False]),
        ("isr-stuck:at=4", [1, 1, 1, 0], [False, False, False, False]),
    ],
)
def test_isr_status(fault: str, reads: list[int], lines: list[bool]) -> None:
    """Three interrupts, and a look without one."""
    at, seen = Function(fault), []
    for number in range(4):
        if number < 3:
            at.function.queue_interrupt(0)
            assert at.line
        seen.append((at.isr(), at.line))
    assert seen == list(zip(reads, lines, strict=True))
    assert len(at.did) == 1


def test_stuck_bits_stay() -> None:
    at = Function("isr-stuck:count=2")
    at.function.queue_interrupt(0)
    assert [at.isr() for _ in range(4)] == [1, 1, 1, 0]
    assert not at.line


def test_intx_without_a_reason() -> None:
    at = Function("intx-spurious:at=2:queue=1")
    for queue in (1, 0, 1):
        at.function.region_write(VIRTIO_BAR, NOTIFY + 4 * queue, queue.to_bytes(2, "little"))
    assert (at.line, at.isr(), at.line) == (True, 0, False)
    assert at.did == [("intx-spurious", 2)]


def test_writes_that_are_lost() -> None:
    at = Function("register-write-lost:at=3:register=queue_size", "register-write-lost:at=6")
    for number, size in enumerate((64, 32, 16, 8), 1):
        at.set("queue_size", size)
        assert at.get("queue_size") == (32 if number == 3 else size)
    at.set("device_status", 1)
    at.set("device_status", 3)
    assert at.get("device_status") == 1
    assert at.did == [("register-write-lost", 3), ("register-write-lost", 6)]


def test_no_such_register() -> None:
    with pytest.raises(ConfigError, match="register=queue_sise: expected as in register=TEXT"):
        FaultPlan(["register-write-lost:register=queue_sise"])


async def test_a_queue_reset_that_does_not_end(autojump_clock: trio.testing.MockClock) -> None:
    at = Function("queue-reset-stuck:queue=1:at=1:time=9s", "queue-reset-stuck:queue=1:at=2")
    at.set("device_status", 3)
    at.set("driver_feature_select", 1)
    at.set("driver_feature", (Feature.VERSION_1.mask | Feature.RING_RESET.mask) >> 32)
    at.set("device_status", 11)

    def reset(queue: int) -> int:
        at.set("queue_select", queue)
        at.set("queue_reset", 1)
        return at.get("queue_reset")

    assert (reset(0), reset(1)) == (0, 1)
    at.set("queue_select", 0)
    assert at.get("queue_reset") == 0
    await trio.sleep(10)
    at.set("queue_select", 1)
    assert at.get("queue_reset") == 0
    assert reset(1) == 1
    await trio.sleep(1000)
    assert at.get("queue_reset") == 1
    at.set("device_status", 0)
    at.set("queue_select", 1)
    assert at.get("queue_reset") == 0
    assert at.did == [("queue-reset-stuck", 1), ("queue-reset-stuck", 2)]


# ---- whatever the transport ------------------------------------------------------------------------------------------


def ask_to_suspend(driver: Driver) -> int:
    driver.core.write_status(driver.status | SUSPEND)
    return driver.status


async def test_a_suspension_that_does_not_come(autojump_clock: trio.testing.MockClock) -> None:
    plan, offer = FaultPlan(["suspend-stuck:at=1:time=9s", "suspend-stuck:at=2"]), Offer(suspend=True)
    async with running(Blk(size=1 << 20), offer=offer, core=faulty_core(plan)) as driver:
        await trio.testing.wait_all_tasks_blocked()
        assert ask_to_suspend(driver) & (SUSPEND | DRIVER_OK) == DRIVER_OK
        await trio.sleep(10)
        assert driver.status & (SUSPEND | DRIVER_OK) == SUSPEND
        driver.core.write_status(driver.status & ~SUSPEND | DRIVER_OK)
        assert driver.status & (SUSPEND | DRIVER_OK) == DRIVER_OK
        ask_to_suspend(driver)
        await trio.sleep(1000)
        assert driver.status & (SUSPEND | DRIVER_OK) == DRIVER_OK
        await driver.reset()
        driver.probe()
        assert ask_to_suspend(driver) & SUSPEND
        assert len(plan.log.entries) == 2


async def test_a_suspension_that_is_refused() -> None:
    plan, offer = FaultPlan(["suspend-refused:at=1"]), Offer(suspend=True)
    async with running(Blk(size=1 << 20), offer=offer, core=faulty_core(plan)) as driver:
        assert ask_to_suspend(driver) & (SUSPEND | NEEDS_RESET) == NEEDS_RESET
        assert driver.config_interrupts == 1
        await driver.reset()
        driver.probe()
        assert ask_to_suspend(driver) & (SUSPEND | NEEDS_RESET) == SUSPEND


async def test_a_configuration_of_ones() -> None:
    at = Function("config-all-ones:at=2")
    generation = at.get("config_generation")
    assert [at.read(DEVICE, 8) for _ in range(3)] == [2048, 2**64 - 1, 2048]
    assert at.get("config_generation") == generation


async def test_what_the_driver_writes_to_the_configuration() -> None:
    plan = FaultPlan(["config-write-lost:at=2"])
    async with running(Console(chardev=["null"]), core=faulty_core(plan)) as driver:
        emerg_wr = 8
        for number, value in enumerate((65, 66, 67), 1):
            driver.core.write_config(emerg_wr, value.to_bytes(4, "little"))
            assert driver.device.config["emerg_wr"] == (65 if number == 2 else value)
        assert [entry["did"] for entry in plan.log.entries] == ["42000000 at 0x8"]
