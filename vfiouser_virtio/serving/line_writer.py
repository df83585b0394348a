"""Line writer thread for a file descriptor that may block: no caller waits for its reader.

::

    any thread: write() ──▶ queue of lines, bounded ──▶ thread: os.write() ──▶ terminal, pipe, journal, file
                     └── full: counted, and said when there is room again

The descriptor stays as it is: O_NONBLOCK would change the open file that the shell and QEMU share with us. Where no
reader ever comes, the thread stays in its write(2), and the process ends without it: it is a daemon, and `flush` has a
deadline.
"""

import os
import select
import threading
import time
from collections import deque
from collections.abc import Callable

from vfiouser_virtio.output_file import wait_writable, write_all

ROOM = 1 << 20
"""Bytes that wait for their reader; a guest that can cause log lines fills no more of our memory than this."""

# Written at once, whole lines where they fit: what other processes write to the same pipe does not get in between.
_CHUNK = select.PIPE_BUF
IDLE = 1.0
"""Seconds after which an idle thread ends: one that is not there costs nothing, and is not in fork()'s way."""
# Seconds that fork(), or `LineWriter.rest`, may take to get rid of the thread.
_END_TIMEOUT = 0.5


class LineWriter:
    """Writer of lines to ``fd``, which stays the caller's.

    ``lost`` makes a line of the number of lines that found no room. ``idle`` is called in the thread when all is
    written: it may call `write`, and returns the seconds after which it wants to be called again, None for never.
    ``failed`` is told, once, of the error that has ended all writing. They must not block.
    """

    def __init__(
        self,
        fd: int,
        *,
        room: int = ROOM,
        lost: Callable[[int], str],
        idle: Callable[[], float | None] | None = None,
        failed: Callable[[OSError], None] | None = None,
    ) -> None:
        self.idle = idle
        self.in_line = False
        """Whether a line of another writer has begun on the same terminal: the next one of this begins on its own."""
        self._fd = fd
        self._room = room
        self._lost_line = lost
        self._failed = failed
        self._broken = False
        self._start_empty()
        os.register_at_fork(
            before=self._before_fork, after_in_parent=self._after_fork, after_in_child=self._after_fork_in_child
        )

    def _start_empty(self) -> None:
        # Its lock is reentrant: a signal handler may have something to say while it is held.
        self._changed = threading.Condition()
        self._lines: deque[bytes] = deque()
        self._size = 0  # of the lines, and of what is being written
        self._lost = 0
        self._thread: threading.Thread | None = None
        self._ending = False

    def write(self, text: str) -> None:
        """Put whole lines, each with its newline, into the queue; drop and count them where there is no room."""
        if self._broken:
            return
        data = text.encode(errors="backslashreplace")
        with self._changed:
            if self._size + len(data) > self._room:
                self._lost += text.count("\n")
                return
            self._report_lost()
            self._append(data)
            self._wake()

    def wake(self) -> None:
        """Have ``idle`` called soon."""
        with self._changed:
            self._wake()

    def flush(self, timeout: float) -> bool:
        """Wait until all is written, ``timeout`` seconds at most; returns whether it is."""
        deadline = time.monotonic() + timeout
        with self._changed:
            if self._size:
                self._wake()
            while self._size and not self._broken:
                left = deadline - time.monotonic()
                if left <= 0 or not (self._thread and self._thread.is_alive()):
                    break
                self._changed.wait(left)
            if self._thread is None:
                self._drain(deadline)  # no thread can be started any more: Python is about to end
            return not self._size

    def _append(self, data: bytes) -> None:
        self._size += len(data)
        self._lines.append(data)

    def _report_lost(self) -> None:
        """In the place of what is missing: before the line that finds room again."""
        if self._lost:
            self._append(f"{self._lost_line(self._lost)}\n".encode(errors="backslashreplace"))
            self._lost = 0

    def _wake(self) -> None:
        if self._thread is None and not self._ending:
            thread = threading.Thread(target=self._run, name="line-writer", daemon=True)
            self._thread = thread
            try:
                thread.start()
            except RuntimeError:  # "can't start new thread": no memory, or too late
                self._thread = None
        self._changed.notify_all()

    def _run(self) -> None:
        while True:
            chunk = self._next()
            if not chunk:
                return
            self._write_out(chunk)
            with self._changed:
                self._size -= len(chunk)
                self._changed.notify_all()

    def _next(self) -> bytes:
        """What is to be written next; empty when this thread is to end."""
        waited = False
        while True:
            with self._changed:
                if self._lines or self._lost:
                    return self._take()
            # Without the lock: it may take others, whose holders have something to write.
            again = self.idle() if self.idle is not None else None
            with self._changed:
                if self._lines or self._lost:
                    continue
                if self._ending or (waited and again is None):
                    self._thread = None
                    return b""
                waited = not self._changed.wait(IDLE if again is None else again)

    def _take(self) -> bytes:
        """The next lines, as many as go into one write, or a part of a long one."""
        if not self._lines:
            self._report_lost()
        chunk = self._lines.popleft()
        if len(chunk) > _CHUNK:
            self._lines.appendleft(chunk[_CHUNK:])
            return chunk[:_CHUNK]
        while self._lines and len(chunk) + len(self._lines[0]) <= _CHUNK:
            chunk += self._lines.popleft()
        return chunk

    def _write_out(self, data: bytes) -> None:
        if self._broken:
            return
        if self.in_line:
            self.in_line = False
            data = b"\n" + data
        try:
            write_all(self._fd, data)  # it is non-blocking where another process has made the open file so
        except OSError as error:
            self._broken = True
            if self._failed is not None:
                self._failed(error)

    def _drain(self, deadline: float) -> None:
        """Write without a thread, what is taken at once."""
        while self._lines and not self._broken:
            if not wait_writable(self._fd, max(0, int((deadline - time.monotonic()) * 1000))):
                return
            chunk = self._take()
            self._write_out(chunk)
            self._size -= len(chunk)

    # ---- fork(): the child has no thread, and what is queued is the parent's to write --------------------------------

    def rest(self) -> None:
        """End the thread, unless its reader keeps it for longer than half a second; the next `write` starts another."""
        self._end_thread()
        self._ending = False

    def _end_thread(self) -> None:
        with self._changed:
            thread, self._ending = self._thread, True
            self._changed.notify_all()
        if thread is not None and thread is not threading.current_thread():
            thread.join(_END_TIMEOUT)

    def _before_fork(self) -> None:
        self._end_thread()
        self._changed.acquire()

    def _after_fork(self) -> None:
        self._ending = False
        self._changed.release()

    def _after_fork_in_child(self) -> None:
        self._start_empty()
