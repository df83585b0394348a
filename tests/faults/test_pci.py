"""Faults that only a device on PCI can have."""

import pytest

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


def test_a_fault_of_pci_needs_pci() -> None:
    with pytest.raises(ConfigError, match="num-queues is for devices on PCI"):
        Loopback(Blk(size=1 << 20), core=faulty_core(FaultPlan(["num-queues"])))
