"""Thread pool for system calls that may block, one for each disk, so that a slow disk delays only itself.

A call costs 10 to 30 µs when several are under way (``trio.to_thread``: 130 to 230 µs), some 90 µs of wake-ups alone.
"""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import Any, Generic, TypeVar, cast

import trio

T = TypeVar("T")


class _Job(Generic[T]):
    """One call on its way to a thread and back."""

    __slots__ = ("_claim", "call", "error", "result", "task", "token")

    def __init__(self, call: Callable[[], T]) -> None:
        self.call = call
        self.task = trio.lowlevel.current_task()
        self.token = trio.lowlevel.current_trio_token()
        self.result: T | None = None
        self.error: BaseException | None = None
        self._claim = threading.Lock()

    def claim(self) -> bool:
        """True once: for the thread that starts the call, or for the task that gives up before that."""
        return self._claim.acquire(blocking=False)

    def run(self) -> None:
        try:
            self.result = self.call()
        except BaseException as error:  # raised in the task that waits
            self.error = error
        try:
            self.token.run_sync_soon(trio.lowlevel.reschedule, self.task)
        except trio.RunFinishedError:
            pass  # the program was ended without waiting for us


class Workers:
    """Pool of at most ``limit`` daemon threads, started when they are needed and ended by `close`."""

    def __init__(self, name: str, limit: int = 4) -> None:
        self._name = name
        self._limit = limit
        self._jobs: SimpleQueue[_Job[Any] | None] = SimpleQueue()
        self._threads = 0
        self._under_way = 0

    async def run(self, call: Callable[[], T]) -> T:
        """What ``call`` returns or raises, in a thread.

        Can be cancelled only until a thread has started it: afterwards this returns when the call does.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        job = _Job(call)
        self._under_way += 1
        if self._under_way > self._threads < self._limit:
            threading.Thread(target=self._work, name=f"{self._name}-{self._threads}", daemon=True).start()
            self._threads += 1
        self._jobs.put(job)

        def abort(_: object) -> trio.lowlevel.Abort:
            return trio.lowlevel.Abort.SUCCEEDED if job.claim() else trio.lowlevel.Abort.FAILED

        try:
            await trio.lowlevel.wait_task_rescheduled(abort)
        finally:
            self._under_way -= 1
        if job.error is not None:
            error, job.error = job.error, None
            try:
                raise error
            finally:
                del error  # else it and this frame keep each other, and the buffers of the request
        return cast("T", job.result)

    def close(self) -> None:
        """End the threads when they have done what was asked of them."""
        for _ in range(self._threads):
            self._jobs.put(None)
        self._threads = 0

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if job.claim():
                job.run()
            del job  # an idle thread must not keep a request's buffers alive
