"""Waiting in tests: what must never wait, and what has begun to."""

import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import trio
import trio.testing

PATIENCE = 30.0  # seconds; nothing is measured with it: what waits here waits for ever


@contextmanager
def never_waits() -> Iterator[None]:
    """A system call in the block that would wait for ever fails the test. In the main thread."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError("it waits")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, PATIENCE)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


async def begin_and_cancel(call: Callable[..., Awaitable[object]], *arguments: object) -> None:
    """Begin a call, and cancel it when it waits: whatever the machine does beside, it has come so far."""
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, *arguments)
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
