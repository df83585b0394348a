"""SIGINT, SIGTERM and SIGHUP end the work in an orderly way: cancelled, with all that it holds let go of."""

import signal
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager

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

    # Masked only where the caller has `held_back` them.
    with trio.open_signal_receiver(*_SIGNALS) as received, _masked(signal.SIG_UNBLOCK):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(watch)
            outcome = await work()
            nursery.cancel_scope.cancel()
    return outcome


@contextmanager
def held_back() -> Iterator[None]:
    """Within the block the signals wait, for `run_until_signal` or for the end of the block: what it does is whole."""
    with _masked(signal.SIG_BLOCK):
        yield


@contextmanager
def _masked(how: int) -> Iterator[None]:
    before = signal.pthread_sigmask(how, _SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
