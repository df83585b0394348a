"""Faults that happen by time alone: a clock that begins with each DRIVER_OK and ends with the reset after it."""

from collections.abc import Callable
from functools import partial

import trio

from vfiouser_virtio.faults.later import Timer
from vfiouser_virtio.faults.plan import Armed, FaultPlan, Hit


class Ticker:
    """Clock of one device, which becomes the plan's; ``act`` makes a fault happen, ``can`` says whether it makes sense.

    ::

        DRIVER_OK ──▶ begin ──▶ at=5s, every=2s ──▶ act(hit)
        reset     ──▶ end
    """

    def __init__(self, faults: FaultPlan, timer: Timer, act: Callable[[Hit], None], can: Callable[[str], bool]) -> None:
        self._faults = faults
        self._timer = timer
        self._act = act
        self._can = can
        self._life = 0
        self._began: float | None = None
        self._scope = trio.CancelScope()
        faults.now = self._now

    def begin(self) -> None:
        """DRIVER_OK."""
        self._life += 1
        self._began = trio.current_time()
        self._scope = trio.CancelScope()
        if self._faults.by_themselves():
            self._timer.start(partial(self._run, self._scope, self._life, self._began))

    def end(self) -> None:
        """The device is reset."""
        self._began = None
        self._scope.cancel()

    def _now(self) -> tuple[int, float] | None:
        return None if self._began is None else (self._life, trio.current_time() - self._began)

    async def _run(self, scope: trio.CancelScope, life: int, began: float) -> None:
        with scope:
            async with trio.open_nursery() as nursery:
                for armed in self._faults.by_themselves():
                    nursery.start_soon(self._tick, armed, life, began)

    async def _tick(self, armed: Armed, life: int, began: float) -> None:
        at = 0.0
        while (following := armed.next_tick(life, at)) is not None:
            at = following
            await trio.sleep_until(began + at)
            name = armed.spec.name
            if hit := armed.tick(life, at, self._faults.running and self._can(name)):
                self._act(hit)
