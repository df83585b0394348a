"""Interrupt counters, for a check to wait on."""

from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from vfiouser_virtio.testing.conformance.verdicts import fail


@dataclass(slots=True)
class InterruptCounts:
    """Number of interrupts on each vector (INTx: number 0)."""

    counts: list[int]
    timeout: float
    _lot: trio.lowlevel.ParkingLot = field(default_factory=trio.lowlevel.ParkingLot)

    def handler(self, vector: int) -> Callable[[], None]:
        """What the client calls when the vector fires."""

        def fired() -> None:
            self.counts[vector] += 1
            self._lot.unpark_all()

        return fired

    async def wait(self, vector: int, count: int, why: str) -> None:
        """Wait until a vector has fired ``count`` times in all. Raises Failed, with ``why`` it should have."""
        with trio.move_on_after(self.timeout):
            while self.counts[vector] < count:
                await self._lot.park()
        if self.counts[vector] < count:
            fail(f"no interrupt within {self.timeout:g} s: {why}")
