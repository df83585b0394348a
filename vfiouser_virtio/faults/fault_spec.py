"""Type of the option ``fault``: a fault that was asked for. `spec` makes it of what users write.

Each device has that option, nearly none a fault. So this imports none of the declarations, of which there are many:
a server starts without them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vfiouser_virtio.faults.declaration import Fault

COLLECTIONS = ("profile", "replay")
"""What stands for several faults."""


@dataclass(slots=True, repr=False)
class FaultSpec:
    """Fault that was asked for, with all that was said about it converted and checked."""

    name: str
    """Of a `Fault`, or one of `COLLECTIONS`."""
    which: str = ""
    """Of a collection: the profile's name, or the path of the log."""
    p: float | None = None
    at: frozenset[int] = frozenset()
    every: int | None = None
    after: int = 0
    at_times: frozenset[float] = frozenset()
    every_time: float | None = None
    after_time: float = 0.0
    count: int | None = None
    queue: int | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Of the fault, by name; with defaults."""
    text: str = ""
    """As it can be written in an option."""

    @property
    def fault(self) -> "Fault":
        """Its declaration."""
        from vfiouser_virtio.faults.catalogue import FAULTS  # only here: see the module

        return FAULTS[self.name]

    @property
    def timed(self) -> bool:
        """Whether it is due at times; ``after_time`` alone only says from when on."""
        return bool(self.at_times) or self.every_time is not None

    @property
    def happens_by_itself(self) -> bool:
        """Whether it waits for no opportunity."""
        return self.timed and self.fault.by_itself

    def due_time(self, elapsed: float) -> float | None:
        """The last of its times that have come, ``elapsed`` seconds after DRIVER_OK; None before the first."""
        times = [at for at in self.at_times if self.after_time <= at <= elapsed]
        if self.every_time is not None and elapsed - self.after_time >= self.every_time:
            # The nearest number: 0.3 / 0.1 is less than 3.
            periods = int((elapsed - self.after_time) / self.every_time + 1e-9)
            times.append(self.after_time + periods * self.every_time)
        return max(times, default=None)

    def next_time(self, elapsed: float) -> float | None:
        """The first of its times after that; None when there is no other."""
        times = [at for at in self.at_times if at > elapsed and at >= self.after_time]
        if self.every_time is not None:
            periods = max(int((elapsed - self.after_time) / self.every_time + 1e-9), 0) + 1
            times.append(self.after_time + periods * self.every_time)
        return min(times, default=None)
