"""Thread for one call that may hang: it ends with the call, and is left behind where that is not waited for."""

import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar, cast

import trio

T = TypeVar("T")


async def in_own_thread(call: Callable[[], T]) -> T:
    """What ``call`` returns or raises, in a thread that ends with it, and is left behind where this is cancelled.

    `trio.to_thread` keeps its threads for a while: a process that gives up its rights must have none (`sandbox`).
    """
    token = trio.lowlevel.current_trio_token()
    ended = trio.Event()
    outcome: list[tuple[T | None, BaseException | None]] = []

    def work() -> None:
        try:
            outcome.append((call(), None))
        except BaseException as error:
            outcome.append((None, error))
        with suppress(trio.RunFinishedError):
            token.run_sync_soon(ended.set)

    thread = threading.Thread(target=work, name="making", daemon=True)
    thread.start()
    await ended.wait()
    thread.join()
    [(value, error)] = outcome
    if error is not None:
        raise error
    return cast("T", value)
