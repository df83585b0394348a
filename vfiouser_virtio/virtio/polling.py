"""Adaptive busy polling of virtqueues: no notification for the driver to send, none for us to wake up for.

::

    the ring is empty ──▶ was the driver quick lately? ── no ──▶ ask for a notification, park
                            │ yes
                            └──▶ look, give the CPU to others, look, … for `BUDGET` at most

Of a queue in which the driver replies to what it is given in another one (`Queue.replied_in`) both times are known:
since the ring was empty, and since the driver was given something last. Whom it talks with takes a part of the first.

There is no look while nothing can come: when as many requests are under way as the driver has had at a time of late (a
write of a driver that sends one at a time), we sleep until one of them ends, or there is input for any task.

While that lasts notifications stay suppressed (virtio 1.4, 2.7.10, 2.8.10). A notification through QEMU is a message,
two wake-ups, and 30 to 60 µs of our CPU. Random reads of 4 KiB, one at a time in a TCG guest on two CPUs, are some two
times as fast so when other programs leave the CPUs alone, and as fast as ever when they do not; for each the server
takes 0.8 to 1.1 of the CPU time. With 32 at a time they are 1.1 times as fast.

What makes polling no burden: sched_yield() before each look lets QEMU's threads have the CPU at once (without it
nothing was gained), and polling rests when that has cost more than it can gain, because others want the CPU for long
(without that, writes took 2.4 times as long beside two busy programs).
"""

import os
from collections.abc import Callable, Sequence
from itertools import count
from time import perf_counter

import trio

from vfiouser_virtio.trio_epoll import TrioInput, input_of_others
from vfiouser_virtio.virtio.offer import Poll

# All times are in seconds.
BUDGET = 400e-6
"""How long to look for: the next request of a TCG guest comes 100 to 300 µs after the interrupt for the last one."""
BUDGET_ON = 10e-3
"""With ``on``, for how long after some work a queue is looked at without a rest."""
NOTIFICATION = 150e-6
"""What a notification takes by itself, of the wait for it. It does not count: a driver that was slow once, and is asked
for notifications, would never be found quick again."""
STRETCH = 50e-6
"""How long one task looks without a round of trio, while it is the only one that looks: a round takes 4 to 8 µs, a look
at the ring and at trio's epoll less than one."""
PERIOD = 1e-3
"""With ``on``, how often a queue is looked at after that."""
# How many of these periods there are between two looks that take messages, and while no queue can be looked at.
_IDLE_PERIODS = 20
# What is found after we had left the CPU to others for so much of the budget (300 µs) has waited for them: a process
# that sleeps would have been woken. The threads of QEMU need less at a time. Only the time within sched_yield() counts:
# what our own tasks take, or Python's garbage collector, is no reason to rest.
_LOST_PART = 0.75
# For each second that was lost so there are so many without polling: no more than 5 % is lost. But for what is lost now
# and then, as to the timer of another guest: so much without polling is gone without, or each ms lost took 17 round
# trips of packets some 0.2 ms.
_REST = 20
_REST_BORNE = 20e-3
# The average is that of about so many gaps, and the longest that is counted is so many times the budget: an idle minute
# is forgotten after a few requests, but requests in pairs do not make us poll in vain after each.
_WEIGHT = 4
_LONGEST = 3
# So often in turn a driver may be given something and not reply, as TCP acknowledges two packets, or more, at a time.
# After that each time counts as a long wait: who only receives is not to be waited for.
_IGNORED = 3
NAP = 1e-3
"""How long one task sleeps at a time while the driver has nothing to send before something comes back."""
# The most requests that a driver has had under way at a time is that of about so many looks.
_MEMORY = 16


class Polling:
    """Whether, and for how long, one queue is looked at while it is empty."""

    def __init__(self, mode: Poll = "off") -> None:
        self.always = mode == "on"
        """No notification will come: look without one."""
        self._budget = BUDGET_ON if self.always else BUDGET
        # With a single CPU the driver could not do anything meanwhile.
        self._wanted = self.always or (mode == "adaptive" and len(os.sched_getaffinity(0)) > 1)
        self._gap = self._reply = _LONGEST * self._budget
        """Averages: how long the ring is empty, and how long it is from `expect` on."""
        self._depth = 0.0
        self._empty_since: float | None = None
        self._expected_since: float | None = None
        self._ignored = 0
        self._looked = False
        """Whether it was worth to `spin`, when that was asked last."""
        self._until = 0.0
        self._rest_until = 0.0
        self._spinning: _Spinning | None = None

    def filled(self) -> None:
        """The driver has made something available."""
        if self._empty_since is not None:
            now = perf_counter() - (0 if self._looked else NOTIFICATION)
            self._gap = self._average(self._gap, now - self._empty_since)
            if self._expected_since is not None:
                self._reply = self._average(self._reply, now - self._expected_since)
                self._expected_since = None
            self._empty_since = None
            self._ignored = 0

    def expect(self) -> bool:
        """The driver was given what it may reply to here; whether to `spin` for that where the ring is empty.

        The time for which it is looked for begins anew: what came before, of others, is no time that the driver took.
        """
        if self._empty_since is None or not self._wanted:
            return False
        now = perf_counter()
        if self._expected_since is not None:
            self._ignored += 1
            if self._ignored > _IGNORED:
                self._reply = self._average(self._reply, _LONGEST * self._budget)
        self._expected_since = now
        self._until = now + self._budget
        return self.always or (self._reply < self._budget and now >= self._rest_until)

    def should_spin(self) -> bool:
        """The ring is empty: whether to `spin` before the driver is asked to notify."""
        if not self._wanted:
            return False
        now = perf_counter()
        if self._empty_since is None:
            self._empty_since = now
            self._until = now + self._budget
        usual = self._gap if self._expected_since is None else self._reply
        worth = self.always or (usual < self._budget and now >= self._rest_until)
        # Else it was woken for nothing, after we have polled already.
        self._looked = worth and now <= self._until
        return self._looked

    def _average(self, average: float, gap: float) -> float:
        return average + (max(0.0, min(gap, _LONGEST * self._budget)) - average) / _WEIGHT

    async def spin(
        self,
        news: Callable[[], bool],
        outstanding: Callable[[], int] = lambda: 0,
        *,
        held: Callable[[], int] = lambda: 0,
        reap: Callable[[], bool] = lambda: False,
        serve: Callable[[], bool] = lambda: False,
    ) -> bool:
        """Return when there are ``news``, or when it has taken too long; whether other tasks had their turn meanwhile.

        ``serve`` may deal with the news in the call, and says whether to go on: for what comes next, that is.

        They have it when there is input for one of them, and after each `STRETCH`: in what was woken together with this
        task, and in time-outs, it does not look. At once where requests are ``outstanding``: it may have begun a
        task, but for those that are ``held``, which have none. While they are as many as the driver has had at a time
        of late, it waits for one of them, and we do. ``reap`` ends what it can without a task, and says whether there
        was any: input that only tells of that costs no round of trio.
        """
        had_turn = False
        # Looked up once, in the run of trio that this object is for: each time is 5 % of a request.
        spinning = self._spinning = self._spinning or _spinning()
        spinning.count += 1
        try:
            if spinning.input is None:
                spinning.input = await input_of_others()
            others = spinning.input
            now = perf_counter()
            lost = 0.0
            turn_at = now + STRETCH
            has_yielded = False
            # What is woken in a round of trio may have its turn after us: by the second checkpoint it has had it.
            # No request ends, nor is one taken, but in such a round.
            waiting = outstanding()
            owed = 2 if waiting > held() else 0
            # All that the driver has made available was taken: this is its depth, if it does not go on.
            self._depth = max(waiting, self._depth - self._depth / _MEMORY)
            while True:
                if news():
                    if lost > _LOST_PART * self._budget:
                        self._rest_until = max(self._rest_until, now - _REST_BORNE) + _REST * lost
                    if not serve():
                        break
                if now >= self._until:
                    break
                lost = 0.0
                if others is None or owed or spinning.count > 1:
                    os.sched_yield()
                    lost = perf_counter() - now
                elif waiting and waiting >= round(self._depth):
                    # What the driver could send comes after an answer of ours, which is input for another task.
                    if others.wait(NAP):
                        owed = 0 if reap() else 2
                        waiting = outstanding()
                elif has_yielded := not has_yielded:
                    os.sched_yield()
                    lost = perf_counter() - now
                elif others.is_there():  # one system call between two looks: the driver is seen half a µs earlier
                    owed = 0 if reap() else 2
                    waiting = outstanding()
                if owed or others is None or spinning.count > 1 or now >= turn_at:
                    await trio.lowlevel.checkpoint()
                    had_turn = True
                    owed = max(owed - 1, 0)
                    waiting = outstanding()
                    turn_at = perf_counter() + STRETCH
                now = perf_counter()
        finally:
            spinning.count -= 1
        return had_turn


class _Spinning:
    """The queues of one run of trio that are being looked at without a rest."""

    def __init__(self) -> None:
        self.count = 0
        self.input: TrioInput | None = None


_run: trio.lowlevel.RunVar[_Spinning] = trio.lowlevel.RunVar("vfiouser_virtio spinning")


def _spinning() -> _Spinning:
    try:
        return _run.get()
    except LookupError:
        made = _Spinning()
        _run.set(made)
        return made


async def pulse(looks: Sequence[Callable[[bool], bool]]) -> None:
    """``on``, while nothing happens: call ``looks`` once in a `PERIOD`. It costs some 5 % of a CPU for each device.

    They are told whether looking may take messages, and return whether there was anything to look at.
    """
    for number in count(1):
        used = [look(number % _IDLE_PERIODS == 0) for look in looks]
        await trio.sleep(PERIOD if any(used) else _IDLE_PERIODS * PERIOD)
