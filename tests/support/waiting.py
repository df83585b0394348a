"""A test that something never waits, which fails where it does, instead of hanging."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

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
