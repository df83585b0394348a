"""Busy wait for a client's next request, before trio's event loop sleeps.

A client that waits for one answer after the other (a guest that probes a device, or reads the ISR register at every
interrupt) asks again within microseconds. To wait for that in trio takes 8 µs of the processor, more than all else that
an access takes; one poll() takes 1 µs. So a session whose client asks that fast blocks the whole process in poll() for
a moment, and watches with it all that trio would wait for: trio's own epoll instance is a file descriptor, too.
"""

import math
import os
import select
import socket
from time import perf_counter

import trio

from vfiouser_virtio.trio_epoll import trio_epoll

LINGER_MS = 1
"""Milliseconds that we wait at most, and within which a client must have asked for us to wait the next time.

Input or output for another task ends the wait at once. Only what was woken together with our own task, and a time-out,
can be late by this much, once at the end of a burst of reads.
"""

SPIN = 50e-6
"""Seconds that we look again and again first, if the client was faster than that the last time.

To be woken on another processor takes 20 µs, twice what a spinning server needs for all of an access. It gives way to
whoever wants the processor, the client for one; on a busy machine clients are not as fast, so it ends by itself.
"""


class Linger:
    """How the task that serves ``sock`` waits for its client."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._fd = sock.fileno()
        self._alone = select.poll()
        self._alone.register(sock, select.POLLIN)
        self._with_trio: select.poll | None = None
        self._gap = math.inf  # seconds that we had to wait the last time

    def is_readable(self) -> bool:
        """Whether there is something to read now. A third of what a recvmsg costs that finds nothing."""
        return bool(self._alone.poll(0))

    def wait_nearby(self) -> bool:
        """Block until there is something to read, if the client has been fast lately. False: better wait in trio.

        That is so when the client is slow, or when another task has something to do.
        """
        if self._gap > LINGER_MS / 1000:
            return False
        if self._with_trio is None:
            self._with_trio = self._poll_with_trio()
            if self._with_trio is None:
                self._gap = math.inf
                return False
        look = self._with_trio.poll
        begin = perf_counter()
        ready: list[tuple[int, int]] = []
        if self._gap < SPIN:
            while not (ready := look(0)) and perf_counter() - begin < SPIN:
                os.sched_yield()  # 0.3 µs where nobody wants the processor
        ready = ready or look(LINGER_MS)
        self._gap = perf_counter() - begin if ready else math.inf
        return any(fd == self._fd for fd, _events in ready)

    async def wait_readable(self) -> None:
        """Wait in trio until there is something to read, and learn from how long it takes."""
        begin = perf_counter()
        await trio.lowlevel.wait_readable(self._socket)
        self._gap = perf_counter() - begin

    def _poll_with_trio(self) -> "select.poll | None":  # at run time poll is a function
        epoll_fd = trio_epoll(self._fd)
        if epoll_fd is None:
            return None
        both = select.poll()
        both.register(self._fd, select.POLLIN)
        both.register(epoll_fd, select.POLLIN)
        return both
