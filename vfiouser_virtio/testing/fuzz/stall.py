"""Watch for a device that stalls the event loop: a hook or a step of `run` that does not come back for long."""

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import trio

from vfiouser_virtio.testing.fuzz.oracle import Finding
from vfiouser_virtio.watchdog import watchdog, where

STALL = 1.0
"""Seconds of one step of a task, without waits for a CPU, that all other devices of a process would wait for it.

A thousand times what a well-made hook takes: a slow machine does not come near it.
"""


class StallWatch(trio.abc.Instrument):
    """Steps of tasks that take long, by the CPU or asleep; it costs two clocks at each. ``finding`` is the first such.

    Waits for a CPU are known for the whole run only, so those before a step count as if they were in it.
    """

    def __init__(self) -> None:
        self._limit = STALL
        self._waited = _waited_for_cpu()
        self._begun, self._begun_cpu = time.perf_counter(), time.thread_time()
        self._thread = threading.get_ident()
        self._place = ""
        self.finding: Finding | None = None

    def before_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - an instrument's
        """A task has its turn."""
        self._begun, self._begun_cpu = time.perf_counter(), time.thread_time()

    def after_task_step(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002
        """A task waits."""
        took = time.perf_counter() - self._begun
        if took <= self._limit or self.finding is not None:
            return
        worked = time.thread_time() - self._begun_cpu
        if max(worked, took - (_waited_for_cpu() - self._waited)) > self._limit:
            at = self._place or "a place unknown"
            self.finding = Finding("stall", f"the event loop stood still for {took:.1f} s at {at}", "event loop")

    def _seen(self, _seconds: float) -> None:
        self._place = where(self._thread).innermost

    @contextmanager
    def looking(self) -> Iterator[None]:
        """In the block another thread looks at where a step is that takes long."""
        with watchdog(self._seen):
            yield


def _waited_for_cpu() -> float:
    """Seconds that this thread has waited for a CPU so far."""
    try:
        with open("/proc/thread-self/schedstat") as file:
            return int(file.read().split()[1]) / 1e9
    except (OSError, IndexError, ValueError):
        return 0.0
