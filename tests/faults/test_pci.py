"""Faults that only a device on PCI can have."""

import pytest
import trio
import trio.testing

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults import FaultPlan
from vfiouser_virtio.faults.core import faulty_core
from vfiouser_virtio.faults.pci import FaultyPci
from vfiouser_virtio.protocols.virtio.pci import COMMON_CFG_OFFSETS, NO_VECTOR
from vfiouser_virtio.transports import Loopback
from vfiouser_virtio.transports.pci import COMMON, VIRTIO_BAR
from vfiouser_virtio.vfio_device import PciRegion

QUEUES = 2


class Registers:
    """The common configuration of a disk with faults."""

    def __init__(self, *faults: str) -> None:
        self.plan = FaultPlan(faults, seed=1)
        self.function = FaultyPci(Blk(size=1 << 20, num_queues=QUEUES), faults=self.plan)
        self.function.region_write(PciRegion.CONFIG, 4, b"\x06\x04")  # memory, bus master, no INTx

    def read(self, name: str) -> int:
        offset, size = COMMON_CFG_OFFSETS[name]
        return int.from_bytes(self.function.region_read(VIRTIO_BAR, COMMON + offset, size), "little")

    def write(self, name: str, value: int) -> None:
        offset, size = COMMON_CFG_OFFSETS[name]
        self.function.region_write(VIRTIO_BAR, COMMON + offset, value.to_bytes(size, "little"))


def test_num_queues() -> None:
    registers = Registers("num-queues:at=2", "num-queues:at=3:value=0")
    assert [registers.read("num_queues") for _ in range(4)] == [QUEUES, 65535, 0, QUEUES]


@pytest.mark.parametrize(
    ("fault", "register", "lie"),
    [
        ("queue-size:queue=1", "queue_size", 0),
        ("queue-size:queue=1:value=3", "queue_size", 3),
        ("queue-notify-off:queue=1", "queue_notify_off", 65535),
        ("vector-refused:queue=1", "queue_msix_vector", NO_VECTOR),
    ],
)
def test_registers_of_a_queue(fault: str, register: str, lie: int) -> None:
    registers, honest = Registers(fault), Registers()
    for each in (registers, honest):
        for queue in range(QUEUES):
            each.write("queue_select", queue)
            each.write("queue_msix_vector", queue)
    for queue in (0, 1, 2):
        registers.write("queue_select", queue)
        honest.write("queue_select", queue)
        assert registers.read(register) == (lie if queue == 1 else honest.read(register))
    assert len(registers.plan.log.entries) == 1
    whole = [each.function.region_read(VIRTIO_BAR, COMMON, 64) for each in (registers, honest)]
    assert whole[0] == whole[1], "queue 2 does not exist"


def capabilities(function: FaultyPci, limit: int = 48) -> list[tuple[int, bytes]]:
    """Offset and first 16 bytes of each; those of a list that does not end are cut off."""

    def config(offset: int, count: int) -> bytes:
        return bytes(function.region_read(PciRegion.CONFIG, offset, count))

    found: list[tuple[int, bytes]] = []
    at = config(0x34, 1)[0]
    while at and len(found) < limit:
        found.append((at, config(at, 16)))
        at = found[-1][1][1]
    return found


def structures(*faults: str) -> dict[int, int]:
    """cfg_type and offset of each structure."""
    found = capabilities(Registers(*faults).function)
    return {data[3]: int.from_bytes(data[8:12], "little") for _, data in found if data[0] == 9}


def test_capabilities_in_a_loop() -> None:
    honest = capabilities(Registers().function)
    found = capabilities(Registers("capability-loop").function)
    assert [at for at, _ in found[: len(honest)]] == [at for at, _ in honest]
    assert found[len(honest)] == found[0]
    assert len(found) == 48


def test_capabilities_that_lie() -> None:
    honest = structures()
    assert structures("capability-outside") == honest | {1: 0x1000_0000}
    assert structures("capability-outside:type=4") == honest | {4: 0x1000_0000}
    assert structures("capability-overlap") == honest | {2: honest[1]}
    assert structures("capability-missing:type=3").keys() == honest.keys() - {3}
    assert len(capabilities(Registers("capability-missing").function)) == len(capabilities(Registers().function))


def test_surprise_removal() -> None:
    async def main() -> None:
        registers = Registers("registers-all-ones:at=3:time=9s")
        assert [registers.read("num_queues") for _ in range(4)] == [QUEUES, QUEUES, 65535, 65535]
        registers.write("queue_select", 1)
        assert registers.function.region_read(PciRegion.CONFIG, 0, 4) == b"\xff" * 4
        await trio.sleep(10)
        assert registers.read("num_queues") == QUEUES
        assert registers.read("queue_select") == 0
        assert len(registers.plan.log.entries) == 1

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_reads_of_a_device_that_is_gone_are_counted() -> None:
    async def main() -> None:
        registers = Registers("registers-all-ones:at=2+4:time=9s")
        assert [registers.read("num_queues") == QUEUES for _ in range(5)] == [True, *[False] * 4]
        await trio.sleep(10)
        assert [registers.read("num_queues") for _ in range(3)] == [QUEUES] * 3
        assert [entry["n"] for entry in registers.plan.log.entries] == [2]

    trio.run(main, clock=trio.testing.MockClock(autojump_threshold=0))


def test_a_fault_of_pci_needs_pci() -> None:
    with pytest.raises(ConfigError, match="num-queues is for devices on PCI"):
        Loopback(Blk(size=1 << 20), core=faulty_core(FaultPlan(["num-queues"])))
