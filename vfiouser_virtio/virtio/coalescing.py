"""Coalescing of used buffer notifications: what was used is shown at once, the interrupt for it comes later.

::

    chains shown ──▶ as many as ``max_packets``? ──▶ does the driver want an interrupt? ──▶ interrupt
           └───────▶ ``max_usecs`` since the first of them? ──▶┘

Whether the driver wants one is only looked at then: what it has seen by itself meanwhile takes none. trio's time-outs
are milliseconds, as epoll's are: a driver that wants shorter ones gets an interrupt after each burst, as without.
"""

from collections.abc import Awaitable, Callable

import trio

RESOLUTION = 1000
"""Microseconds, the shortest delay that is kept to: trio would lengthen others to that, too much for a round trip."""

# Seconds after which an interrupt is tried again that could not be sent.
_RETRY = 0.1

Spawn = Callable[[Callable[[], Awaitable[None]]], None]


class Coalescing:
    """Delay of one queue's notifications. ``notify`` sends one if it is due; False: that cannot be told now."""

    def __init__(self, max_chains: int, delay: float, notify: Callable[[], bool]) -> None:
        self._max_chains = max_chains
        self._delay = delay
        self._notify = notify
        self._count = 0
        self._deadline = 0.0
        self._waiting = False

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
        if self._count:
            self.shown(0, spawn)

    def end(self) -> bool:
        """Send now what is held back; False where that cannot be done now."""
        if self._count and not self._notify():
            return False
        self._count = 0
        return True

    async def _wait(self) -> None:
        """One task for many delays: when it wakes up, the time of the next one may have begun."""
        try:
            while self._count:
                if trio.current_time() < self._deadline:
                    await trio.sleep_until(self._deadline)
                elif not self.end():  # while memory is being remapped
                    self._deadline = trio.current_time() + max(self._delay, _RETRY)
        finally:
            self._waiting = False
