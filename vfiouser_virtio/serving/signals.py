"""Signal handling: SIGINT, SIGTERM and SIGHUP cancel the work, and release all that it holds.

A device that does not yield is no way around that. In steps of `_TIMEOUT_S` it is interrupted by an exception at the
line where it is, as Ctrl-C does in any program, and if that does not help either (it is in C code, or catches
everything), the process ends without it: sockets are removed, QEMU and our processes end with us. Only C code that
holds the interpreter's lock and never looks for signals keeps us from all that: SIGQUIT and SIGKILL end it.

An end that comes by itself, such as that of `run --exec`, waits for no hung disk of the host either (`EndVerdict`).
"""

import logging
import os
import signal
import threading
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType

import trio

from vfiouser_virtio.briefly import briefly
from vfiouser_virtio.lock_holder import LockHolder, stderr_for_stacks
from vfiouser_virtio.serving.errors import StuckError
from vfiouser_virtio.serving.terminal import complain, flush_stderr
from vfiouser_virtio.watchdog import TaskPlace, give_turn, watchdog, where

logger = logging.getLogger(__name__)

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

# From a signal to the interruption of a device that does not yield, and from that to the end without it.
_TIMEOUT_S = 2.0
# From a signal that the loop has not noticed to the next turn of the watchdog, which C code may keep from the lock.
_TURN_EVERY_S = 0.5
# For how long a device has not yielded when it is said for the first time; then at twice the time, and so on.
_SAY_AFTER_S = 1.0
# From a signal to the end without what does not come to its end: a request that a hung disk of the host has got.
GIVE_UP_S = 1.5
# Then nothing must have happened in the loop for this long: a busy machine is no hung disk.
_IDLE_S = 0.1
# A task that never rests is not waited for longer than this.
_MOST_S = 5.0
# One device may stop the loop again and again: it is said more seldom each time, until nothing was said for this long.
_FORGET_AFTER_S = 60.0


class EndVerdict:
    """End of a program, known before it has come: what is left to do then is waited for only so long."""

    def __init__(self) -> None:
        self.known = trio.Event()
        self.status = 0
        self.error: Exception | None = None

    def give(self, status: int, error: Exception | None = None) -> None:
        """The exit status, and the user's mistake, or the failure, that is shown for it."""
        self.status, self.error = status, error
        self.known.set()


class _Interruption(BaseException):
    """Raised in the middle of whatever does not yield; like KeyboardInterrupt, no ``except Exception`` takes it."""


class _Ending:
    """End by a signal, and what is done about a device that does not yield."""

    def __init__(
        self,
        received: Callable[[signal.Signals], None],
        abandoned: Sequence[Callable[[], None]],
        signals: Sequence[signal.Signals],
    ) -> None:
        self.signals = signals
        self._received = received
        self._abandoned = abandoned
        self._token = trio.lowlevel.current_trio_token()
        self._loop_thread = threading.get_ident()
        self._signal: signal.Signals | None = None
        self._next_step = 0.0
        self._raise = False
        self._say_after = _SAY_AFTER_S
        self._said_at = 0.0
        self._said = False
        self.interrupted: TaskPlace | None = None
        """What had to be; None while nothing had."""

    # ---- in the loop's thread ------------------------------------------------------------------------------------

    def handle(self, number: int, _frame: FrameType | None) -> None:
        """Python's handler of the signals."""
        signal.setitimer(signal.ITIMER_REAL, _TURN_EVERY_S, _TURN_EVERY_S)
        self._token.run_sync_soon(self._received, signal.Signals(number))
        # Perhaps the first that this thread notices of a signal: the kernel gives it to any thread of the process.
        if self._raise:
            self._raise = False
            raise _Interruption

    # ---- in the watchdog's thread --------------------------------------------------------------------------------

    def signalled(self, number: int) -> None:
        """There was a signal; the second one is impatient."""
        if number in self.signals and not self.interrupted:
            self._next_step = time.monotonic() + (_TIMEOUT_S if self._signal is None else 0)
            self._signal = signal.Signals(number)

    def stuck(self, seconds: float) -> None:
        """The loop has not answered for so long."""
        now = time.monotonic()
        if not self._said and now - self._said_at > _FORGET_AFTER_S:
            self._say_after = _SAY_AFTER_S
        if seconds >= self._say_after:
            self._say_after *= 2
            self._said, self._said_at = True, now
            self._say(seconds)
        if self._signal is None or now < self._next_step:
            return
        self._next_step = now + _TIMEOUT_S
        if not self.interrupted:
            self.interrupted = where(self._loop_thread)
            self._raise = True
            signal.pthread_kill(self._loop_thread, self._signal)
            return
        error = _stuck_error("ended without", self.interrupted, self._signal)
        self._end(error.status, error)

    def give_up(self, verdict: EndVerdict | None) -> None:
        """The loop answers, but what it waits for does not end."""
        what = "ended without waiting for a request that the host does not end"
        if self._signal is not None or verdict is None or not verdict.known.is_set():
            number = self._signal or signal.SIGTERM
            error = StuckError(f"{number.name}: {what}", number)
            self._end(error.status, error)
        elif verdict.error is None:
            self._end(verdict.status, StuckError(what))
        else:
            self._end(verdict.status, verdict.error, StuckError(what))

    def _end(self, status: int, *errors: Exception) -> None:
        briefly(self._let_go)
        for error in errors:
            complain(error, with_traceback=False)
        flush_stderr()
        os._exit(status)

    def _let_go(self) -> None:
        for let_go in self._abandoned:
            with suppress(Exception):
                let_go()

    def back(self) -> None:
        """The loop answers again."""
        if self._said:
            logger.warning("the event loop goes on")
        self._said = False

    def _say(self, seconds: float) -> None:
        place = where(self._loop_thread)
        text = (
            "%s: has not yielded for %d s; every device of this process waits for it (a device must await: "
            "docs/writing-a-device.md). It is here:"
        )
        arguments = (place.device or "a device", seconds)
        # As logging's own ``stack_info``, which would be ours: a message has but one line.
        logger.handle(
            logger.makeRecord(logger.name, logging.ERROR, __file__, 0, text, arguments, None, sinfo=place.lines)
        )


class _Steps(trio.abc.Instrument):
    """Count of how often any task goes on."""

    def __init__(self) -> None:
        self.count = 2

    def task_scheduled(self, task: trio.lowlevel.Task) -> None:  # noqa: ARG002 - trio calls it so
        self.count += 1


def _stuck_error(done: str, place: TaskPlace, number: signal.Signals) -> StuckError:
    return StuckError(
        f"{number.name}: {done} {place.device or 'a device'}, which did not yield at {place.innermost}", number
    )


async def run_until_signal(
    work: Callable[[], Awaitable[int]],
    abandoned: Sequence[Callable[[], None]] = (),
    *,
    give_up_after: float = GIVE_UP_S,
    verdict: EndVerdict | None = None,
    signals: Sequence[signal.Signals] = SIGNALS,
) -> int | signal.Signals:
    """What ``work`` returns, or the signal that has cancelled it.

    Raises StuckError when a device had to be interrupted. Where that did not help, ``abandoned`` are called in
    another thread, for what may not be left behind, and the process ends. So it does some ``give_up_after`` seconds
    after the signal where the work only waits by then: a hung disk of the host ends no request, and what is under way
    in the kernel cannot be cancelled. And so it does, with that status, after `work` itself has given its ``verdict``.
    With other ``signals``, none for example, the rest is as it was before.
    """
    outcome: int | signal.Signals = 0
    asked = signal.SIGTERM

    def received(number: signal.Signals) -> None:
        nonlocal outcome, asked
        outcome = asked = number
        signal.setitimer(signal.ITIMER_REAL, 0)
        begin_to_give_up()
        nursery.cancel_scope.cancel()

    begun = False

    def begin_to_give_up() -> None:
        nonlocal begun
        if not begun:  # two of them would keep each other from finding the loop at rest
            begun = True
            trio.lowlevel.spawn_system_task(give_up)  # which nothing cancels before the end

    async def give_up() -> None:
        await trio.sleep(give_up_after)
        steps = _Steps()
        trio.lowlevel.add_instrument(steps)
        with trio.move_on_after(_MOST_S):
            while steps.count > 1:  # there is this task's own
                steps.count = 0
                await trio.sleep(_IDLE_S)
        ending.give_up(verdict)

    async def give_up_after_verdict(given: EndVerdict) -> None:
        await given.known.wait()
        begin_to_give_up()

    ending = _Ending(received, abandoned, signals)
    try:
        async with trio.open_nursery() as nursery:
            # Masked only where the caller is in `signals_blocked`.
            with _watched(ending), _masked(signal.SIG_UNBLOCK, signals):
                if verdict is not None:
                    nursery.start_soon(give_up_after_verdict, verdict)
                outcome = await work()
            nursery.cancel_scope.cancel()
    except BaseException:
        if not ending.interrupted:
            raise
        # Whatever has come of it: the signal is why we end.
        logger.debug("interrupted", exc_info=True)
    if ending.interrupted:
        # Not the outcome: work that has caught the interruption may have come to an end of its own since.
        raise _stuck_error("interrupted", ending.interrupted, asked)
    return outcome


@contextmanager
def _watched(ending: _Ending) -> Iterator[None]:
    before = {number: signal.signal(number, ending.handle) for number in ending.signals}
    before[signal.SIGALRM] = signal.signal(signal.SIGALRM, give_turn)
    stacks = stderr_for_stacks()
    lock_holder = None if stacks is None else LockHolder(stacks)
    try:
        with watchdog(ending.stuck, back=ending.back, signalled=ending.signalled, lock_holder=lock_holder) as wakeup:
            trios = signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)
            try:
                yield
            finally:
                signal.set_wakeup_fd(trios, warn_on_full_buffer=False)
    finally:
        if stacks is not None:
            os.close(stacks)
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Block in which the signals wait, for `run_until_signal` or for the end of the block: what it does is whole."""
    late: list[int] = []

    def later(number: int, _frame: FrameType | None) -> None:
        late.append(number)

    # The mask is that of this thread. Those that `run_until_signal` has left behind, such as trio's, have another one,
    # and what one of them gets is for the whole process.
    before = {number: signal.signal(number, later) for number in SIGNALS}
    try:
        with _masked(signal.SIG_BLOCK, SIGNALS):
            yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if late:
            signal.raise_signal(late[0])


@contextmanager
def _masked(how: int, signals: Sequence[signal.Signals]) -> Iterator[None]:
    before = signal.pthread_sigmask(how, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
