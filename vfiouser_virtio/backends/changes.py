"""Changes at the other end of a device that its driver is told of, but not of each where there is one after another."""

from collections.abc import Awaitable, Callable

import trio

PAUSE = 0.1
"""Seconds after a change that a driver was told of in which it is told of no other.

A peer that connects and leaves again all the time is no interrupt, and no line in the log, for each time.
"""


def _nothing() -> None:
    pass


async def tell_changes(
    wait_change: Callable[[], Awaitable[None]], tell: Callable[[], bool], follow: Callable[[], None] = _nothing
) -> None:
    """Call ``follow`` at once and at each change, and ``tell`` not more than once in `PAUSE`, until cancelled.

    ``tell`` shows the driver how it is, and returns whether that is news.
    """
    while True:
        follow()
        if tell():
            with trio.move_on_after(PAUSE):
                while True:
                    await wait_change()
                    follow()
        else:
            await wait_change()
