"""Death of a device's process between any two lines, without a process."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import vfiouser_virtio

NEVER = 1 << 60
"""Lines."""

_PACKAGE = Path(vfiouser_virtio.__file__).parent
Result = TypeVar("Result")


class Killed(BaseException):
    """End of the device's process."""


@contextmanager
def killing(
    after: int, folder: str, *names: str, at_death: Callable[[], None] = lambda: None
) -> Iterator[Callable[[], int]]:
    """A block that ends with Killed when so many lines have run in a folder of the package, or in functions of these
    names; gives how many have. Whatever is done behind ``at_death``, in a ``finally``, a process would not have done.
    """
    lines, begin = 0, os.path.join(_PACKAGE, folder)

    def on_line(_frame: FrameType, event: str, _argument: Any) -> Any:
        nonlocal lines
        if event == "line":
            lines += 1
            if lines > after:
                at_death()
                raise Killed
        return on_line

    def on_call(frame: FrameType, _event: str, _argument: Any) -> Any:
        code = frame.f_code
        return on_line if code.co_filename.startswith(begin) or code.co_name in names else None

    before = sys.gettrace()
    sys.settrace(on_call)
    try:
        yield lambda: lines
    finally:
        sys.settrace(before)


def apart(work: Callable[[], Result]) -> Result:
    """Call it with handled exceptions of its own, as a generator has them.

    Where a line at the end of an ``except`` or a ``with`` is the last one, CPython 3.11 leaves the exception behind as
    one that is being handled: all that is raised in this thread from then on would have it as its context.
    """

    def steps() -> Iterator[Result]:
        yield work()

    return next(steps())
