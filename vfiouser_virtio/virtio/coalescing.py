"""Coalescing of used buffer notifications: what was used is shown at once, the interrupt for it comes later.

::

    chains shown ──▶ as many as ``max_packets``? ──▶ does the driver want an interrupt? ──▶ interrupt
           └───────▶ ``max_usecs`` since the first of them? ──▶┘

Whether the driver wants one is only looked at then: what it has seen by itself meanwhile takes none.
"""

from collections.abc import Callable

import trio

from vfiouser_virtio.trio_timer import sleep_briefly
from vfiouser_virtio.virtio.queue_ring import QueueRing, Spawn

SHORTEST = 20
"""Microseconds, the shortest delay that is kept to. A timer takes as long by itself, and twice that of the CPU: who
wants less gets an interrupt after each burst, as without (5.1.9.5.10: "more or less frequently")."""
_TRIO_SECONDS = 1e-3
"""From here on trio's own time-outs are exact enough."""

# Seconds after which an interrupt is tried again that could not be sent.
_RETRY = 0.1


class Coalescing:
    """Delay of one queue's notifications. ``notify`` sends one if it is due; False: that cannot be told now."""

    def __init__(self, max_chains: int, delay: float, notify: Callable[[], bool]) -> None:
        self._max_chains = max_chains
        self._delay = delay
        self._notify = notify
        self._count = 0
        self._deadline = 0.0
        self._waiting = False
        self._scope: trio.CancelScope | None = None  # of the task that waits, or of the last that did

    def shown(self, count: int, spawn: Spawn | None) -> None:
        """So many chains were shown to the driver. ``spawn`` starts a task in the device's run, if there is one."""
        if not self._count:
            self._deadline = trio.current_time() + self._delay
        self._count += count
        if (self._count >= self._max_chains or spawn is None) and self.end():
            return
        if not self._waiting and spawn is not None:
            self._waiting = True
            spawn(self._wait)

    def resume(self, spawn: Spawn) -> None:
        """There is a run of the device again, with what is held back since the one before."""
        self._waiting = False  # a task ends with its run, and ``spawn`` starts none in a run that is ending
        if self._count:
            self.shown(0, spawn)

    def end(self) -> bool:
        """Send now what is held back; False where that cannot be done now."""
        if self._count and not self._notify():
            return False
        self._count = 0
        return True

    def close(self) -> bool:
        """`end`, and hold back nothing more: False where what was held back could not be sent.

        The task ends too, or a driver that changes its settings with each packet would have one for each of them, for
        71 minutes (2^32 microseconds).
        """
        sent = self.end()
        self._count = 0
        if self._scope is not None:
            self._scope.cancel()
        return sent

    async def _wait(self) -> None:
        """One task for many delays: when it wakes up, the time of the next one may have begun."""
        try:
            with trio.CancelScope() as self._scope:
                while self._count:
                    left = self._deadline - trio.current_time()
                    if left >= _TRIO_SECONDS:
                        await trio.sleep_until(self._deadline)
                    elif left > 0:
                        await sleep_briefly(left)
                    elif not self.end():  # while memory is being remapped
                        self._deadline = trio.current_time() + max(self._delay, _RETRY)
        finally:
            self._waiting = False


class CoalescedQueue(QueueRing):
    """Virtqueue whose notifications may be coalesced."""

    # What few queues have is no attribute of all: of more than 30, CPython 3.11 looks each up in a slower way.
    coalescing = (0, 0)
    """See `Queue.coalesce`."""
    _coalescing: Coalescing | None = None
    _lasting = (0, 0)

    def forget_counts(self) -> None:
        """Count notifications and interrupts from 0 on."""
        self.counts = [0, 0]

    def coalesce(self, max_packets: int, max_usecs: int, *, until_reset: bool = False) -> None:
        """See `Queue.coalesce`."""
        if (max_packets, max_usecs) == self.coalescing == self._lasting and self._coalescing is None:
            return  # as at each reset of a device that does not coalesce: it must not get the attributes for that
        if not until_reset:
            self._lasting = max_packets, max_usecs
        self.coalescing = max_packets, max_usecs
        before, self._coalescing = self._coalescing, None
        if max_packets and max_usecs >= SHORTEST:
            # A driver whose buffers are all used, and who does not know it, has none for what comes next.
            at_most = max(1, self.size // 2)
            self._coalescing = Coalescing(min(max_packets, at_most), max_usecs / 1e6, self._notify_if_due)
        if before is not None and not before.close():
            self._notify()  # one too many does no harm

    def begin_run(self, spawn: Spawn) -> None:
        super().begin_run(spawn)
        if self._coalescing is not None:
            self._coalescing.resume(spawn)

    def end_run(self) -> None:
        super().end_run()
        if self._coalescing is not None:
            self._coalescing.end()

    def enable(self) -> None:
        super().enable()
        if self.coalescing != (0, 0):
            self.coalesce(*self.coalescing, until_reset=True)  # with this size

    def reset(self) -> None:
        super().reset()
        if self.coalescing != self._lasting or self._coalescing is not None:
            self.coalesce(*self._lasting)

    def _notify_if_due(self) -> bool:
        """Interrupt the driver if it wants that for what it was shown; False while its ring is out of reach."""
        bound = self._bound
        if bound is None:
            return True
        try:
            if self._usable() is None:
                return False
            if bound.by_message or bound.ring.interrupt_due():
                self._notify()
        except Exception as error:  # as in `Virtqueue._publish`
            self._failed(error)
        return True

    def _notify(self) -> None:
        self.counts[1] += 1
        self._interrupt()
