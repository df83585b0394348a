"""Callbacks of faults that come after some time, for as long as a device is served."""

from collections.abc import Awaitable, Callable

import trio

MAX_PENDING = 4096
"""Callbacks that wait, since a guest makes as many as it likes; the caller does more of them at once."""
MAX_REPEATED = 64
"""Callbacks that are repeated at the same time: a guest that asks for a storm with each request has its neighbours
served between two of a few, not of thousands."""

Later = Callable[[float, Callable[[], None]], bool]
"""Call something after so many seconds. False, with nothing called: for 0, or where nothing can wait."""


class Timer:
    """Timer of one device; `serve` runs it."""

    def __init__(self) -> None:
        self._nursery: trio.Nursery | None = None
        self._pending = self._repeated = 0
        self._early: list[Callable[[], Awaitable[None]]] = []

    def later(self, seconds: float, callback: Callable[[], None]) -> bool:
        """As `Later` says."""
        if seconds <= 0 or self._nursery is None or self._pending >= MAX_PENDING:
            return False
        self._pending += 1
        self._nursery.start_soon(self._wait, seconds, callback)
        return True

    def repeat(self, times: int, pause: float, callback: Callable[[], None]) -> bool:
        """Call something so many times, with so many seconds before each. False, with nothing called, as `later`."""
        if self._nursery is None or self._repeated >= MAX_REPEATED:
            return False
        self._repeated += 1
        self._nursery.start_soon(self._repeat, times, pause, callback)
        return True

    def start(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do something that is async, from `serve` on; not at all if there is too much of that."""
        if self._pending >= MAX_PENDING:
            return
        self._pending += 1
        if self._nursery is None:
            self._early.append(work)
        else:
            self._nursery.start_soon(self._work, work)

    async def _work(self, work: Callable[[], Awaitable[None]]) -> None:
        try:
            await work()
        finally:
            self._pending -= 1

    async def _wait(self, seconds: float, callback: Callable[[], None]) -> None:
        try:
            await trio.sleep(seconds)
        finally:
            self._pending -= 1
        callback()

    async def _repeat(self, times: int, pause: float, callback: Callable[[], None]) -> None:
        try:
            for _ in range(times):
                await trio.sleep(pause)
                callback()
        finally:
            self._repeated -= 1

    async def serve(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run ``work``, which is async, and the callbacks beside it; what still waits when it ends does not come."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            for early in self._early:
                nursery.start_soon(self._work, early)
            self._early.clear()
            try:
                await work()
            finally:
                self._nursery = None
                nursery.cancel_scope.cancel()
