"""Callbacks of faults that come after some time, for as long as a device is served."""

from collections.abc import Awaitable, Callable

import trio

MAX_PENDING = 4096
"""Callbacks that wait; more are called at once, since a guest makes as many as it likes."""

Later = Callable[[float, Callable[[], None]], None]
"""Call something after so many seconds; at once for 0, and where nothing runs that could wait."""


class Timer:
    """Timer of one device; `serve` runs it."""

    def __init__(self) -> None:
        self._nursery: trio.Nursery | None = None
        self._pending = 0

    def later(self, seconds: float, callback: Callable[[], None]) -> None:
        """As `Later` says."""
        if seconds <= 0 or self._nursery is None or self._pending >= MAX_PENDING:
            callback()
            return
        self._pending += 1
        self._nursery.start_soon(self._wait, seconds, callback)

    async def _wait(self, seconds: float, callback: Callable[[], None]) -> None:
        try:
            await trio.sleep(seconds)
        finally:
            self._pending -= 1
        callback()

    async def serve(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run ``work``, which is async, and the callbacks beside it; what still waits when it ends does not come."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                await work()
            finally:
                self._nursery = None
                nursery.cancel_scope.cancel()
