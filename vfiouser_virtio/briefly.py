"""Calls that may be left behind: what asks a file system when something ends, and the file system may hang."""

import threading
from collections.abc import Callable
from contextlib import suppress

TIMEOUT_S = 0.5


def briefly(call: Callable[[], object]) -> None:
    """Call it in a thread, and wait half a second for that at most; what it raises is lost.

    For what is to be done before the process may end, but not at any price: to remove a name from a file system.
    """
    thread = threading.Thread(target=_ignoring_errors, args=(call,), name="briefly", daemon=True)
    try:
        thread.start()
    except RuntimeError:  # no thread can be started any more: Python is about to end
        _ignoring_errors(call)
    else:
        thread.join(TIMEOUT_S)


def _ignoring_errors(call: Callable[[], object]) -> None:
    with suppress(Exception):  # nothing can be done about it
        call()
