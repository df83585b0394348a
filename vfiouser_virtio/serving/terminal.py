"""Terminal output: log lines and errors on stderr, with colour where that is a terminal.

Nothing here waits for the reader of stderr, and nothing that a peer has sent reaches the terminal as more than text.
"""

import atexit
import errno
import io
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from vfiouser_virtio.device_log import printable
from vfiouser_virtio.serving.line_writer import LineWriter
from vfiouser_virtio.serving.log_limits import LogLimits

PROGRAM = "vfiouser-virtio"

_COLOURS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "31"}

# Seconds for which our end waits for a reader of stderr: SIGTERM ends a server in any case.
_LAST_WORDS = 0.5
# Of one log record: a guest's or client's text is in it, and an ExceptionGroup can have any number of tracebacks.
_MAX_LINE = 2000
_MAX_LINES = 300


class _Stderr(io.TextIOBase):
    """`sys.stderr` that never blocks: lines go to a `LineWriter`, what has no end yet waits for it."""

    encoding = "utf-8"
    errors = "backslashreplace"

    def __init__(self, writer: LineWriter) -> None:
        self.writer = writer
        self._begun = ""
        # Once: a file system may be asked for it, which may hang later on.
        self.terminals = {fd for fd in (1, 2) if os.isatty(fd)}

    def write(self, text: str) -> int:
        whole, newline, self._begun = (self._begun + text).rpartition("\n")
        if newline:
            self.writer.write(whole + newline)
        return len(text)

    def flush(self) -> None:
        """Nothing to wait for."""

    def fileno(self) -> int:
        return 2

    def isatty(self) -> bool:
        return 2 in self.terminals

    def writable(self) -> bool:
        return True


def set_up_streams() -> None:
    """Make the standard streams safe to use: stderr never blocks, and a closed one (``2>&-``) is /dev/null.

    Without that, the next file to be opened would be number 2, and messages of a C library would go into a disk.
    """
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError as error:
            if error.errno != errno.EBADF:
                raise
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest free number, which is fd
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115 - for the whole life of the process
    if sys.stderr is None or sys.stderr is sys.__stderr__:  # not in a test, which has put its own there
        sys.stderr = _Stderr(LineWriter(2, lost=lambda lines: f"{PROGRAM}: {lines} lines were lost, unread"))
        atexit.register(flush_stderr)


_written_at_end: list[LineWriter] = []


def at_end(writer: LineWriter) -> None:
    """What ``writer`` has is written before the process ends, if that takes but a moment."""
    _written_at_end.append(writer)
    atexit.register(flush_stderr)


def flush_stderr() -> None:
    """Before the process ends: give the readers of stderr, and of traces, a moment to take what there is."""
    for writer in _written_at_end:
        writer.flush(_LAST_WORDS)
    stream = sys.stderr
    if isinstance(stream, _Stderr):
        for handler in logging.root.handlers:
            if isinstance(handler, _Handler):
                handler.say_owed(final=True)
        stream.writer.flush(_LAST_WORDS)


def rest_writers() -> None:
    """End the threads that write for us, where their readers let them; they come again with what is written next."""
    for writer in _written_at_end:
        writer.rest()
    if isinstance(sys.stderr, _Stderr):
        sys.stderr.writer.rest()


def has_colour() -> bool:
    """Whether stderr is a terminal whose user has not asked for NO_COLOR (no-color.org)."""
    return sys.stderr.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


class _Formatter(logging.Formatter):
    """One line, and a traceback's indented lines behind it: no text in them can pass for a line of its own."""

    def __init__(self, colour: bool) -> None:
        super().__init__("%(asctime)s.%(msecs)03d %(levelname)s %(message)s", "%H:%M:%S")
        self._colour = colour

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        record.message = _short(printable(record.message))
        line = super().formatMessage(record)
        code = _COLOURS.get(record.levelno) if self._colour else None
        return f"\x1b[{code}m{line}\x1b[0m" if code else line

    def formatException(self, ei: object) -> str:  # noqa: N802 - logging's name
        lines = super().formatException(ei).split("\n")  # type: ignore[arg-type] # as logging's stubs have it
        if len(lines) > _MAX_LINES:
            lines[_MAX_LINES // 2 : -_MAX_LINES // 2] = [f"… {len(lines) - _MAX_LINES} lines …"]
        return "\n".join(f"    {_short(printable(line))}" for line in lines)


class _Handler(logging.Handler):
    """Log lines to `sys.stderr`, as many of each device as `LogLimits` admits."""

    def __init__(self, limits: LogLimits) -> None:
        super().__init__()
        self._limits = limits
        self._owes = False  # the writer's thread knows that lines were dropped
        self._writer = sys.stderr.writer if isinstance(sys.stderr, _Stderr) else None
        if self._writer is not None:
            self._writer.idle = self.say_owed

    def emit(self, record: logging.LogRecord) -> None:
        try:
            device = getattr(record, "device", None)  # None: a line that only the user can cause
            if device is None:
                self._write(self.format(record))
                return
            if owed := self._limits.owed(device):
                self._say(owed)
            if self._limits.admits(device):
                text = self.format(record)
                self._limits.charge(device, text.count("\n") + 1)
                self._write(text)
            elif self._writer is not None and not self._owes:
                self._owes = True
                self._writer.wake()  # to say what was dropped, when it may
        except Exception:
            self.handleError(record)

    def say_owed(self, *, final: bool = False) -> float | None:
        """Say what was dropped of devices that may speak again. Returns the seconds after which others may."""
        self.acquire()
        try:
            for line in self._limits.all_owed(final=final):
                self._say(line)
            again = self._limits.next_report()
            self._owes = again is not None
            return again
        finally:
            self.release()

    def _say(self, line: str) -> None:
        self._write(self.format(logging.LogRecord(__name__, logging.WARNING, "", 0, line, None, None)))

    def _write(self, text: str) -> None:
        sys.stderr.write(f"{text}\n")


def set_up_logging(level: str, rate: float) -> None:
    """Log to stderr, from ``level`` (debug, info, warning, error) on; of each device ``rate`` lines a second."""
    if not logging.root.handlers:
        handler = _Handler(LogLimits(rate))
        handler.setFormatter(_Formatter(has_colour()))
        logging.root.addHandler(handler)
        logging.root.setLevel(level.upper())


def note(message: str) -> None:
    """A line for the user on stderr."""
    print(f"{PROGRAM}: {_printable_lines(message)}", file=sys.stderr)


def complain(error: Exception, *, with_traceback: bool) -> None:
    """Show the user's mistake as one line; with a traceback only where that was asked for."""
    if with_traceback:
        traceback.print_exception(error)
    who = f"\x1b[31m{PROGRAM}:\x1b[0m" if has_colour() else f"{PROGRAM}:"
    print(f"{who} {_printable_lines(str(error))}", file=sys.stderr)


def say(text: str) -> None:
    """Print on stdout at once. A closed pipe is no reason to stop serving."""
    with _reader_may_be_gone():
        print(text, flush=True)


async def write_patiently(fd: int, data: bytes) -> None:
    """Write to a standard stream of ours while everything else goes on, however slow its reader, or its disk, is.

    Raises OSError. Where it is cancelled, some of it may be written later.
    """
    import trio  # only here: most commands do without

    def write() -> None:
        # Past Python's own buffers, of whose lock the thread might die in possession.
        rest = memoryview(data)
        while rest:
            rest = rest[os.write(fd, rest) :]

    await trio.to_thread.run_sync(write, abandon_on_cancel=True)
    log = sys.stderr
    if isinstance(log, _Stderr) and {fd, 2} <= log.terminals and data:
        log.writer.in_line = not data.endswith(b"\n")


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


def _printable_lines(text: str) -> str:
    """Of some mistakes several lines are shown: what QEMU, or the guest's console, had to say."""
    return "\n".join(map(printable, text.split("\n")))


def _short(line: str) -> str:
    return line if len(line) <= _MAX_LINE else f"{line[:_MAX_LINE]}… ({len(line) - _MAX_LINE} more characters)"
