"""Cyclic garbage that work leaves: it stays until Python's collector runs, and that stops all devices of the process.

An exception that a local variable of one of its own frames refers to is the usual reason::

    except OSError as error:                  request.error = error     # some frame of its traceback has ``request``
        end = error

With it stays whatever the frames have: buffers, rings, views of a client's memory.
"""

import gc
import sys
from collections import Counter
from collections.abc import Awaitable, Callable
from types import FrameType
from typing import Any

import pytest
import trio
import trio.testing

ROUNDS = 100
until_3_11 = pytest.mark.skipif(
    sys.version_info >= (3, 12),
    reason="from Python 3.12 on a task that is cancelled, or fails, leaves cycles of contextlib's and trio's frames",
)
"""Of tests in which tasks are cancelled or fail, hundreds of times."""


async def check_no_garbage(turn: Callable[[], Awaitable[object]], rounds: int = ROUNDS) -> None:
    """Raise AssertionError if each ``turn`` leaves something that only Python's collector finds.

    What is left once, whatever the number of turns (a thread was started), may be.
    """
    for _ in range(3):
        await turn()
    await trio.testing.wait_all_tasks_blocked()
    gc.collect()
    gc.disable()
    try:
        for _ in range(rounds):
            await turn()
        await trio.testing.wait_all_tasks_blocked()
        gc.set_debug(gc.DEBUG_SAVEALL)
        found = gc.collect()
        kinds = Counter(_kind(each) for each in gc.garbage)
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    most = ", ".join(f"{count / rounds:.2f} {kind}" for kind, count in kinds.most_common(20))
    assert found < rounds // 2, f"{found / rounds:.2f} objects of cyclic garbage each time: {most}"


def _kind(found: Any) -> str:
    if isinstance(found, FrameType):
        return f"frame of {found.f_code.co_qualname}"
    return found.__qualname__ if callable(found) and hasattr(found, "__qualname__") else type(found).__name__
