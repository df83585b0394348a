"""What goes to the terminal: log lines and errors on stderr, with colour where that is a terminal."""

import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

PROGRAM = "vfiouser-virtio"

_COLOURS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "31"}


def has_colour() -> bool:
    """Whether stderr is a terminal whose user has not asked for NO_COLOR (no-color.org)."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class _Formatter(logging.Formatter):
    def __init__(self, colour: bool) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)s %(message)s", "%H:%M:%S")
        self._colour = colour

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        line = super().formatMessage(record)
        code = _COLOURS.get(record.levelno) if self._colour else None
        return f"\x1b[{code}m{line}\x1b[0m" if code else line


def set_up_logging(level: str) -> None:
    """Log to stderr, from ``level`` (debug, info, warning, error) on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(has_colour()))
    logging.basicConfig(level=level.upper(), handlers=[handler])


def note(message: str) -> None:
    """A line for the user on stderr."""
    print(f"{PROGRAM}: {message}", file=sys.stderr)


def complain(error: Exception, *, with_traceback: bool) -> None:
    """Show the user's mistake as one line; with a traceback only where that was asked for."""
    if with_traceback:
        traceback.print_exception(error)
    who = f"\x1b[31m{PROGRAM}:\x1b[0m" if has_colour() else f"{PROGRAM}:"
    print(f"{who} {error}", file=sys.stderr)


def say(text: str) -> None:
    """Print on stdout at once. That nobody reads it any more is no reason to stop serving."""
    with _reader_may_be_gone():
        print(text, flush=True)


def flush() -> None:
    """Likewise for what has been printed before: by a device, perhaps."""
    with _reader_may_be_gone():
        sys.stdout.flush()


@contextmanager
def _reader_may_be_gone() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        # Nothing is left in Python's buffer that it would complain about at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
