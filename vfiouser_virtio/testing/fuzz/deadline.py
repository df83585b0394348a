"""Time limits that leave out waits for a CPU: a machine that is busy says nothing of what is tested."""

import os
import time
from collections.abc import Awaitable, Callable

import trio

_LEAST = 0.05
"""Part of a limit that is worth another look."""
_MOST = 5
"""So many times as long it takes at most, on a machine that has no time at all."""


def waited_for_cpu(pid: int | str = "self") -> float:
    """Seconds for which the threads of a process were ready to run and had no CPU; 0 of one that is gone.

    Linux, Documentation/scheduler/sched-stats.rst: ``/proc/PID/task/TID/schedstat``.
    """
    total = 0
    try:
        threads = os.listdir(f"/proc/{pid}/task")
    except OSError:
        return 0.0
    for thread in threads:
        try:
            with open(f"/proc/{pid}/task/{thread}/schedstat") as file:
                total += int(file.read().split()[1])
        except (OSError, IndexError, ValueError):
            pass  # it has ended meanwhile, or the kernel does not count
    return total / 1e9


class Deadline:
    """End of a time that leaves out waits for a CPU; ``waited`` says how long there were such, so far.

    A limit is made for each message and seldom reached, and a look at waits takes longer than most messages. So the
    first look is when the time has passed without one, and then it begins anew. ``at_once`` looks before: for what is
    to last just so long.
    """

    __slots__ = ("_before", "_end", "_is_over", "_last", "_seconds", "_waited")

    def __init__(self, seconds: float, waited: Callable[[], float] = waited_for_cpu, *, at_once: bool = False) -> None:
        self._seconds = seconds
        self._waited = waited
        begun = time.monotonic()
        self._end, self._last = begun + seconds, begun + _MOST * seconds
        self._before = waited() if at_once else None
        self._is_over = False

    @property
    def left(self) -> float:
        """Seconds after which it is worth asking whether it is `over`."""
        return max(self._end - time.monotonic(), 0.0)

    def over(self) -> bool:
        """Whether the time has passed."""
        if self._is_over or time.monotonic() < self._end:
            return self._is_over
        before, self._before = self._before, self._waited()
        # A thread that has ended takes its waits with it.
        more = self._seconds if before is None else min(max(self._before - before, 0.0), self._seconds)
        self._end = time.monotonic() + more
        self._is_over = more <= _LEAST * self._seconds or self._end > self._last
        return self._is_over


async def ends_within(seconds: float, wait: Callable[[], Awaitable[object]]) -> bool:
    """Whether a wait has come to its end; it is cancelled and begun again."""
    limit = Deadline(seconds)
    while True:
        with trio.move_on_after(limit.left):
            await wait()
            return True
        if limit.over():
            return False
