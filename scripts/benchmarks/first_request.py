"""From nothing to an answer: connect, negotiate, bind the driver and read one block, over carriers without a VM."""

import statistics
import time
from dataclasses import dataclass, field

import trio

from vfiouser_virtio.devices.blk import Blk
from vfiouser_virtio.guest.drivers.blk import Disk
from vfiouser_virtio.testing.carriers import Carrier, carry
from vfiouser_virtio.virtio.options import Size

ROUNDS = 15
LIMITS_MS: dict[Carrier, float] = {"loopback": 5.0, "socket": 50.0, "socket-private": 50.0}


@dataclass(frozen=True)
class Report:
    """Milliseconds, medians."""

    took: dict[str, float] = field(default_factory=dict)
    worst: dict[str, float] = field(default_factory=dict)

    @property
    def met(self) -> bool:
        """Whether every median keeps its limit."""
        return all(self.took[carrier] < limit for carrier, limit in LIMITS_MS.items())

    def __str__(self) -> str:
        lines = [
            f"{carrier} {self.took[carrier]:.1f} ms (limit {limit:g}, worst of {ROUNDS} {self.worst[carrier]:.1f})"
            for carrier, limit in LIMITS_MS.items()
        ]
        return "connect, negotiate, bind and read a block: " + "; ".join(lines)


def run() -> Report:
    """The carriers in turn, so that what else the machine does falls on all of them."""
    taken: dict[Carrier, list[float]] = {carrier: [] for carrier in LIMITS_MS}
    for number in range(ROUNDS + 1):
        for carrier, times in taken.items():
            took = trio.run(_once, carrier)
            if number:  # the first round imports and warms up
                times.append(took)
    medians = {str(carrier): statistics.median(times) for carrier, times in taken.items()}
    return Report(medians, {str(carrier): max(times) for carrier, times in taken.items()})


async def _once(carrier: Carrier) -> float:
    begin = time.perf_counter()
    async with carry(Blk(size=Size(1 << 20)), carrier) as device:
        disk = device.driver_data
        assert isinstance(disk, Disk)
        data = await disk.read(0, 1)
        took = (time.perf_counter() - begin) * 1000
    assert len(data) == 512
    return took
