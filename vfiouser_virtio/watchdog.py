"""Watchdog of the event loop: a thread that notices a task which does not yield, and shows where it is.

All devices of a process share one event loop. A device that calls ``time.sleep``, waits for a lock or computes for long
stops them all, and nothing that runs in the loop can say so::

    loop idle ──── wakes: `after_io_wait`, once ───▶ watchdog waits 0.3 s ───▶ asks the loop for an answer
        ▲                                                                        │              │
        └────────────────────────────────────── an answer ◀──────────────────────┘   none: `stuck(seconds)`, each 0.2 s

An idle loop is not woken, and a busy one is asked three times a second, whatever it does: between two questions no hook
is installed. C code that holds the interpreter's lock stops this thread too: `lock_holder` shows where that is, and
`give_turn` lets the thread work where such code looks for signals, as that of ``re`` and of large numbers does.
"""

import linecache
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

import trio

from vfiouser_virtio.lock_holder import LockHolder

# From what wakes the loop to the question, and from one look for the answer to the next.
_BEFORE_ASKING_S = 0.3
_LOOK_EVERY_S = 0.2
# What `give_turn` leaves to the watchdog's thread: more than it needs to find out where the loop is, and to log it.
_TURN_S = 0.05

_PACKAGE = str(Path(__file__).parent)
_DEVICES = os.path.join(_PACKAGE, "devices", "")
_TRIO = os.path.join(os.path.dirname(trio.__file__), "")
_LIBRARY = os.path.join(os.path.dirname(os.__file__), "")
# More lines than an author reads, and less than a recursion without end has.
_MOST_LINES = 20

# What is told through the pipe, beside numbers of signals, which are 1 to 64.
_END, _WORKS, _ANSWERED = 0, 254, 255


class _Watchdog(trio.abc.Instrument):
    def __init__(
        self,
        stuck: Callable[[float], None],
        back: Callable[[], None],
        signalled: Callable[[int], None],
        lock_holder: LockHolder | None,
    ) -> None:
        self._lock_holder = lock_holder
        self._stuck = stuck
        self._back = back
        self._signalled = signalled
        self._token = trio.lowlevel.current_trio_token()
        self._reader, self.writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._poll = select.poll()
        self._poll.register(self._reader, select.POLLIN)
        self._working = True
        self._asked = self._over = self._closed = False
        # A daemon: if the thread of the loop is gone without a word, the process may end.
        self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    # ---- the loop's side -----------------------------------------------------------------------------------------

    def start(self) -> None:
        """The loop is at work, and will be asked."""
        if self._lock_holder is not None:
            self._lock_holder.arm()
        self.thread.start()

    def after_io_wait(self, timeout: float) -> None:  # noqa: ARG002 - trio's hook
        """The loop has work. It is asked for an answer later; until then no hook is in its way."""
        trio.lowlevel.remove_instrument(self)
        self._tell(_WORKS)
        # Not by the thread: before it has the lock, C code may have it for good.
        if self._lock_holder is not None:
            self._lock_holder.arm()

    def _answer(self) -> None:
        if self._closed:
            return
        if self._lock_holder is not None:
            self._lock_holder.disarm()
        # Only from the next time on that the loop waits: the question itself is no work.
        trio.lowlevel.add_instrument(self)
        self._tell(_ANSWERED)

    def close(self) -> None:
        """The loop is watched no more."""
        self._closed = True
        self.close_thread()
        os.close(self._reader)
        os.close(self.writer)

    def _tell(self, message: int) -> None:
        os.write(self.writer, bytes([message]))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Block during which the thread is not there, and nothing is watched; signals are told after it."""
        self.close_thread()
        try:
            yield
        finally:
            self._working, self._asked, self._over = True, False, False
            self.thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
            self.start()

    def close_thread(self) -> None:
        """End the thread. Until it is started again no hook is installed."""
        try:
            trio.lowlevel.remove_instrument(self)
        except KeyError:
            pass  # it is at work
        self._tell(_END)
        self.thread.join()
        if self._lock_holder is not None:
            self._lock_holder.disarm()

    # ---- the thread's side ---------------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over:
            while not self._working and not self._over:
                self._hear(None)
            self._hear(_BEFORE_ASKING_S)
            self._working, self._asked = False, True
            self._wake(self._answer)
            silent = 0.0
            while self._asked and not self._over:
                # Counted, not measured: of the time that the whole process was stopped (SIGSTOP), one look passes.
                if not self._hear(_LOOK_EVERY_S):
                    silent += _LOOK_EVERY_S
                    if self._lock_holder is not None:
                        self._lock_holder.again()
                    self._stuck(silent)
            if silent:
                self._back()

    def _hear(self, seconds: float | None) -> bool:
        """Wait for the loop or a signal; whether anything came."""
        if not self._poll.poll(None if seconds is None else seconds * 1000):
            return False
        for message in os.read(self._reader, 4096):
            if message == _WORKS:
                self._working = True
            elif message == _ANSWERED:
                self._asked = False
            elif message == _END:
                self._over = True
            else:
                # Python's handler runs in the thread of the loop only, which the kernel may have spared.
                self._wake(_nothing)
                self._signalled(message)
        return True

    def _wake(self, function: Callable[[], None]) -> None:
        try:
            self._token.run_sync_soon(function)
        except trio.RunFinishedError:
            self._over = True


def _nothing() -> None:
    pass


def _ignore(_number: int) -> None:
    pass


@contextmanager
def watchdog(
    stuck: Callable[[float], None],
    *,
    back: Callable[[], None] = _nothing,
    signalled: Callable[[int], None] = _ignore,
    lock_holder: LockHolder | None = None,
) -> Iterator[int]:
    """Watch the event loop that is running this, for as long as the block runs.

    ``stuck`` gets the seconds for which the loop has not answered, again and again while it does not; ``back`` is
    called when it answers again. The block's value is a file descriptor for ``signal.set_wakeup_fd``: ``signalled``
    then gets the number of each signal. All three are called in the watchdog's own thread, and must not wait for the
    loop. ``lock_holder`` shows what they cannot, because C code in the loop holds the interpreter's lock.
    """
    watching = _Watchdog(stuck, back, signalled, lock_holder)
    watching.start()
    _PRESENT.append(watching)
    try:
        yield watching.writer
    finally:
        _PRESENT.remove(watching)
        watching.close()


_PRESENT: list[_Watchdog] = []


@contextmanager
def without_watchdog() -> Iterator[None]:
    """Block without the watchdog's thread, if there is one: for what must be alone in its process.

    To be used in the event loop that is watched; the block must not wait.
    """
    with ExitStack() as stack:
        for watching in _PRESENT:
            stack.enter_context(watching.paused())
        yield


def give_turn(*_: object) -> None:
    """A signal handler that lets go of the interpreter's lock, so that the watchdog's thread can work for a moment."""
    time.sleep(_TURN_S)


class TaskPlace(NamedTuple):
    """Position of a thread that runs a device."""

    device: str
    """The name of the device; empty where it cannot be known."""
    lines: str
    """The device's own lines as Python prints them in a traceback, the innermost last; all where none is a device's."""
    innermost: str
    """The last of the device's own: ``mine.py:12 in run``."""


def where(thread: int) -> TaskPlace:
    """What the thread of an event loop does, known by its ``threading.get_ident()``."""
    frames = _in_loop(_frames(sys._current_frames().get(thread)))  # noqa: SLF001 - documented, for debuggers
    own = [frame for frame in frames if _is_device(frame.f_code.co_filename)] or frames
    lines = [_line(frame) for frame in own[-_MOST_LINES:]]
    if own and own[-1] is not frames[-1]:
        lines.append(f"  (now in {_short(frames[-1])})\n")
    name = next(filter(None, map(_name, reversed(frames))), "")
    return TaskPlace(name, "".join(lines).rstrip("\n"), _short(own[-1]) if own else "a place unknown")


def _frames(innermost: FrameType | None) -> list[FrameType]:
    """Outermost first."""
    found = []
    while innermost is not None:
        if innermost.f_code is not give_turn.__code__:
            found.append(innermost)
        innermost = innermost.f_back
    return found[::-1]


def _in_loop(frames: list[FrameType]) -> list[FrameType]:
    """Those that the event loop has called; all where it has called none."""
    inner = len(frames)
    while inner and not frames[inner - 1].f_code.co_filename.startswith(_TRIO):
        inner -= 1
    return frames[inner:] or frames


def _is_device(path: str) -> bool:
    """Whether a file is neither the package's, whose devices are devices too, nor trio's, nor Python's own."""
    if path.startswith((_PACKAGE, _TRIO, "<frozen")):
        return path.startswith(_DEVICES)
    return not path.startswith(_LIBRARY) or "-packages" in path


def _line(frame: FrameType) -> str:
    code, number = frame.f_code, frame.f_lineno
    source = linecache.getline(code.co_filename, number).strip()
    return f'  File "{code.co_filename}", line {number}, in {code.co_name}\n' + (f"    {source}\n" if source else "")


def _short(frame: FrameType) -> str:
    return f"{frame.f_code.co_filename}:{frame.f_lineno} in {frame.f_code.co_name}"


def _name(frame: FrameType) -> str:
    """The device's name where the frame is of what runs a device: that has both."""
    if not frame.f_code.co_filename.startswith(_PACKAGE):
        return ""
    runner = frame.f_locals.get("self")
    name = getattr(runner, "name", "") if hasattr(runner, "device") else ""
    return name if isinstance(name, str) else ""
