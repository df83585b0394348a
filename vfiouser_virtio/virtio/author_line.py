"""Source line of a device author's mistake: what log lines and errors name."""

import inspect
import logging
import os
import sys
import traceback
from collections.abc import Callable

import trio

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import AuthorError
from vfiouser_virtio.groups import leaves

# Modules whose frames say nothing to the author of a device: ours, those of what we stand on, Python's own.
_NOT_AUTHORS = frozenset({"vfiouser_virtio", "trio", "outcome", "construct", *sys.stdlib_module_names})
_QUEUE = "vfiouser_virtio.virtio.queue"


def author_line(error: BaseException) -> str:
    """``FILE:LINE`` of the author's code that the error has come through last; empty where there is none of it.

    Also empty where the author's code was only waiting for the next chain, and the driver has broken the ring.
    """
    found = ""
    for frame, line in traceback.walk_tb(next(leaves(error)).__traceback__):
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] not in _NOT_AUTHORS:
            found = f"{shown(frame.f_code.co_filename)}:{line}"
        elif module == _QUEUE:
            found = ""
    return found


def waiting_at(task: trio.lowlevel.Task) -> list[str]:
    """Where the task and those that it has started are in the author's code: ``FILE:LINE in run``, the innermost."""
    found: list[str] = []
    for frame, line in task.iter_await_frames():
        module = str(frame.f_globals.get("__name__", ""))
        if module.partition(".")[0] not in _NOT_AUTHORS:
            found = [f"{shown(frame.f_code.co_filename)}:{line} in {frame.f_code.co_name}"]
    for nursery in task.child_nurseries:
        for child in nursery.child_tasks:
            found += waiting_at(child)
    return found


def definition(of: type | Callable[..., object]) -> str:
    """``FILE:LINE`` where a class or a function is defined; its name where no file is known."""
    try:
        file = inspect.getsourcefile(of)
        return f"{shown(file)}:{inspect.getsourcelines(of)[1]}" if file else of.__qualname__
    except (OSError, TypeError):
        return of.__qualname__


def shown(path: str) -> str:
    """A file as its author knows it: from the current folder on, where it is below that."""
    try:
        relative = os.path.relpath(path)
    except OSError:  # the current folder is gone
        return path
    return path if relative.startswith("..") else relative


def log_bug(log: DeviceLog, what: str, error: BaseException) -> None:
    """Log a bug in a device: where it is, and what. One line for a known mistake, with the traceback for any other."""
    where = author_line(error)
    at = f"{where}: " if where else ""
    if isinstance(error, AuthorError):
        log.error("%s: %s%s", what, at, error, exc_info=error if log.isEnabledFor(logging.DEBUG) else None)
    else:
        log.error("%s: %s%s: %s", what, at, type(error).__name__, error, exc_info=error)
