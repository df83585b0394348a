"""Device with a register of which each write counts, and the order of all of them."""

import construct as c

from vfiouser_virtio.protocols.record import Record
from vfiouser_virtio.transports.pci import DEVICE
from vfiouser_virtio.virtio import Device, queue

_CONFIG = c.Struct("add" / c.Int32ul, "padding" / c.Bytes(4), "total" / c.Int64ul)
ADD, TOTAL = DEVICE, DEVICE + 8
"""Where the registers are in the BAR."""


def added(total: int, value: int) -> int:
    """Value of TOTAL after a write to ADD."""
    return (total * 31 + value) % (1 << 64)


class Adder(Device):
    """The device. It needs no DRIVER_OK, but FEATURES_OK to be resumed."""

    device_id = 42
    driver_writes = frozenset({"add", "total"})
    requestq = queue()

    def __init__(self) -> None:
        super().__init__(config=Record(_CONFIG))

    def can_resume(self) -> bool:
        return True

    def config_written(self, field: str, value: int | bytes) -> None:
        total = self.config["total"]
        assert field == "add"
        assert isinstance(total, int)
        assert isinstance(value, int)
        self.config.update(total=added(total, value))  # a change that is told, in the middle of the write

    def reset(self) -> None:
        self.config.set(add=0, total=0)
