"""SIGINT, SIGTERM and SIGHUP end the work in an orderly way: cancelled, with all that it holds let go of."""

import signal
from collections.abc import Awaitable, Callable

import trio

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


async def run_until_signal(work: Callable[[], Awaitable[int]]) -> int | signal.Signals:
    """What ``work`` returns, or the signal that has cancelled it."""
    outcome: int | signal.Signals = 0

    async def watch() -> None:
        nonlocal outcome
        async for number in received:
            outcome = signal.Signals(number)
            nursery.cancel_scope.cancel()
            return

    with trio.open_signal_receiver(*_SIGNALS) as received:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            outcome = await work()
            nursery.cancel_scope.cancel()
    return outcome
