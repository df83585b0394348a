"""Decision what becomes of a device whose process has died, or does not answer."""

import time
from collections import deque
from dataclasses import dataclass, field

# Within this many seconds a process may die once without a wait for the next; then the waits double.
_RECENT_S = 3.0
_FIRST_DELAY_S, _MOST_DELAY_S = 0.05, 1.0
LONG_LIFE_S = 10.0
"""Seconds that a process has lived without being asked for anything: then it has not died in vain."""
DEATHS_TO_RESET = 4
"""Deaths in a row, none of them after a request was served, or after a long life: then the device asks for a reset."""
DEATHS_TO_GIVE_UP = 8
"""The same, after which a stand-in takes its place."""


@dataclass(slots=True)
class Restarts:
    """Deaths of one device's processes."""

    in_vain: int = 0
    """Deaths in a row without a request that was served in between."""
    _recent: deque[float] = field(default_factory=deque)

    def died(self, *, served: bool) -> float:
        """One more; whether it has ``served`` requests since the last, or lived long.

        Returns the seconds until the next process is to be started.
        """
        now = time.monotonic()
        self.in_vain = 1 if served else self.in_vain + 1
        while self._recent and now - self._recent[0] > _RECENT_S:
            self._recent.popleft()
        self._recent.append(now)
        again = len(self._recent) - 1
        # A client waits for 5 s at most (QEMU): with the start of the process that is kept.
        return min(_FIRST_DELAY_S * 2 ** (again - 1), _MOST_DELAY_S) if again else 0.0

    @property
    def why_not_resume(self) -> str:
        """Why the next process is not to go on where the last one was; empty where it is to."""
        if self.in_vain < DEATHS_TO_RESET:
            return ""
        return f"its process has died {self.in_vain} times without having served a request"

    @property
    def hopeless(self) -> bool:
        """Whether the device is to be given up."""
        return self.in_vain >= DEATHS_TO_GIVE_UP


MEMORY_LOOK_S = 0.5
"""Seconds from one look at how much memory a process has to the next, where none is taken for hung."""


class Pulse:
    """Heartbeat of a process: it is asked again and again, and silent when it has not answered after all looks.

    Looks are counted, not seconds: of a time in which all of us were stopped (SIGSTOP, a laptop asleep), one passes.
    """

    LOOKS = 6
    LOOKS_AT_THE_BEGINNING = 10 * LOOKS
    """As many for one that is made again: to open what it needs may take longer than any answer."""

    def __init__(self, hang_after: float) -> None:
        self.hang_after = hang_after
        self.look_every = hang_after / self.LOOKS
        """Seconds; 0 where nothing is ever taken for hung."""
        self._silent = 0

    def look(self, *, silent: bool, begins: bool = False) -> bool:
        """One look: whether it has been ``silent`` for too long; ``begins``: it does not serve yet."""
        self._silent = self._silent + 1 if silent else 0
        return self.look_every > 0 and self._silent >= (self.LOOKS_AT_THE_BEGINNING if begins else self.LOOKS)
