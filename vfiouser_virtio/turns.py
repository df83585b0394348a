"""Fair scheduling of busy tasks: how the devices and clients of one process share the time of trio's event loop.

trio runs every task that is ready before it looks for input again. So a register access waits for one slice of time of
each busy task: with ten queues at work and a millisecond for each, for ten milliseconds. Here all that are ready share
one `SLICE`, and who needs more waits in one line: the first of it goes on in the next round of the loop, alone.

::

    round of the loop   │ input ─▶ tasks that were woken: SLICE together, SHARE each at least │ one of the line: SLICE │
"""

from collections import OrderedDict
from time import perf_counter

import trio

# All times are in seconds.
SLICE = 0.0005
"""What the tasks that were woken in one round of the loop may take together, and one that has waited in line alone."""
SHARE = 0.0001
"""What a task that was woken may take at least, before it waits in line: mostly that is enough."""


class Turns:
    """Shares of one run of trio. Each busy task compares the time with the end that it was given here last.

    That a round of the loop has ended is seen by who comes a second time: to be told of each, as an instrument of trio
    is, would cost 2 µs for each, and so every request. Until one does, those that come get a `SHARE`.
    """

    def __init__(self) -> None:
        self._round = 0
        self._end = 0.0
        """Of the slice of this round of the loop."""
        self._line: OrderedDict[trio.lowlevel.Task, None] = OrderedDict()
        self._called = False
        """A task was called out of the line, or is the first of it, and has not gone on yet."""

    def woken(self, last: int) -> tuple[float, int]:
        """A task has waited for something, and goes on: when it must `wait`, by ``perf_counter``, and the round.

        ``last`` is the round that it was told when it was woken before; 0 for the first time.
        """
        now = perf_counter()
        if last == self._round:  # no task is woken twice in one round, so this is the next one
            self._round = last + 1
            self._end = now + SLICE
        elif self._end < now + SHARE:
            return now + SHARE, self._round
        return self._end, self._round

    async def wait(self) -> float:
        """Wait in line; when to do it again, by ``perf_counter``. A checkpoint."""
        if self._called:
            task = trio.lowlevel.current_task()
            self._line[task] = None

            def abort(_: object) -> trio.lowlevel.Abort:
                del self._line[task]
                return trio.lowlevel.Abort.SUCCEEDED

            await trio.lowlevel.wait_task_rescheduled(abort)
            self._call_next()
        else:
            self._called = True
            try:
                await trio.lowlevel.checkpoint()
            finally:
                self._call_next()
        return perf_counter() + SLICE

    def _call_next(self) -> None:
        """Let the first of the line go on, in the next round of the loop."""
        self._called = bool(self._line)
        if self._called:
            task, _ = self._line.popitem(last=False)
            trio.lowlevel.reschedule(task)


_turns: trio.lowlevel.RunVar[Turns] = trio.lowlevel.RunVar("vfiouser_virtio turns")


def turns() -> Turns:
    """Those of the current run of trio."""
    try:
        return _turns.get()
    except LookupError:
        made = Turns()
        _turns.set(made)
        return made
