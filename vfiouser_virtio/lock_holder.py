"""Detection of C code that holds the interpreter's lock (GIL): no Python runs then, not even the watchdog's thread.

The thread of `faulthandler` needs no lock. It writes the stacks of all Python threads as they are ("Timeout
(0:00:05)!", then "most recent call first"), unless it is told in time that the lock was taken::

    arm() ──▶ 5 s ──▶ stacks to stderr             arm() again: 5 s anew;  disarm(): nothing
"""

import faulthandler
import os
import stat
import threading

# The watchdog says of Python code after 1 s that it does not yield.
_AFTER_S = 5.0

# fork() copies no thread, and the child would wait for faulthandler's at its exit.
os.register_at_fork(before=faulthandler.cancel_dump_traceback_later)


class LockHolder:
    """Stack dump of the thread that holds the lock, to ``fd``, which must not block (see `stderr_for_stacks`)."""

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._armed = False
        # `again` comes from another thread than the two others.
        self._lock = threading.Lock()

    def arm(self) -> None:
        """From now on `again`, or the end, must be called every few seconds. Takes some 50 µs."""
        with self._lock:
            self._armed = True
            faulthandler.dump_traceback_later(_AFTER_S, file=self._fd)

    def again(self) -> None:
        """The lock can be had, though it is not over."""
        with self._lock:
            if self._armed:
                faulthandler.dump_traceback_later(_AFTER_S, file=self._fd)

    def disarm(self) -> None:
        """It is over."""
        with self._lock:
            self._armed = False
            faulthandler.cancel_dump_traceback_later()


def stderr_for_stacks() -> int | None:
    """A descriptor of stderr that never blocks: disarming waits for who writes to it. None where there can be none.

    A regular file is used as it is, with its position. A pipe or terminal is opened once more, since O_NONBLOCK would
    be everybody's else; a socket, such as that of systemd's journal, cannot be.
    """
    try:
        if stat.S_ISREG(os.fstat(2).st_mode):
            return os.dup(2)
        return os.open("/proc/self/fd/2", os.O_WRONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    except OSError:
        return None
