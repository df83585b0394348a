"""Non-blocking AF_UNIX stream of vfio-user messages and their fds (SCM_RIGHTS), and adaptive waiting for the next one.

A client that waits for one answer after the other (a guest that probes a device, or reads the ISR register at every
interrupt) asks again within microseconds. To wait for that in trio takes 8 µs of the processor, more than all else that
an access takes; one poll() takes 1 µs. So a session whose client asks that fast blocks the whole process in poll() for
a moment (`Linger`), and watches with it all that trio would wait for: trio's own epoll instance is a file descriptor,
too.
"""

import math
import os
import select
import socket
import struct
from array import array
from collections import deque
from collections.abc import Sequence
from functools import partial
from time import perf_counter

import trio

from vfiouser_virtio.fds import close_all
from vfiouser_virtio.trio_epoll import trio_epoll
from vfiouser_virtio.vfio_user.wire.connection import CAPACITY, Connection

# SCM_MAX_FD is 253: with room for that many, the kernel never has to drop one for want of space.
_ANCILLARY_SIZE = socket.CMSG_SPACE(253 * 4)
# Plain ints: `&` with an enum's member costs a microsecond.
# DONTWAIT: a socket given by --fd is one open file with its giver, which can clear O_NONBLOCK.
DONTWAIT = int(socket.MSG_DONTWAIT)
_RECEIVE = int(socket.MSG_CMSG_CLOEXEC) | DONTWAIT
CTRUNC = int(socket.MSG_CTRUNC)

Ancillary = list[tuple[int, int, bytes]]

LINGER_MS = 1
"""Milliseconds that we wait at most, and within which a client must have asked for us to wait the next time.

Input or output for another task ends the wait at once. Only what was woken together with our own task, and a time-out,
can be late by this much, once at the end of a burst of reads.
"""

SPIN = 50e-6
"""Seconds that we look again and again first, if the client was faster than that the last time.

To be woken on another processor takes 20 µs, twice what a spinning server needs for all of an access. It gives way to
any process that wants the processor, the client for one; on a busy machine clients are slower, so it ends by itself.
"""

# A client that reads nothing may have a million answers of 16 bytes wait, which take 500 bytes each; or such as bring
# file descriptors, of which the whole process has few.
_MESSAGE_COST = 512
_FD_COST = 64 << 10


class MessageSocket:
    """Socket that receives into a `Connection` and sends whole messages. Owns the socket and all unread fds."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.connection = Connection()
        self.queued = 0
        """About how many bytes of our memory wait for the peer to take them; 0 for none."""
        self.broken = False
        """The peer is gone, or there was a ``failure``: what is sent is dropped."""
        self.failure = ""
        """Why a message could not be sent although the peer is there; mostly for want of file descriptors."""
        self._queue: deque[tuple[memoryview, list[int]]] = deque()
        self._recvmsg_into = sock.recvmsg_into
        self.send_now = sock.send
        """As `socket.socket.send`: where every microsecond counts, while nothing is ``queued`` and it is not broken."""
        self.receive_to_begin = partial(sock.recvmsg_into, (self.connection.view,), _ANCILLARY_SIZE, _RECEIVE)
        """As `socket.socket.recvmsg_into` the beginning of the connection's usual buffer, while that is empty, and has
        no longer one; what is received is for `received`."""

    def receive_nowait(self) -> bool:
        """Take what is there. Returns False at the end of the stream; raises BlockingIOError when there is nothing.

        PeerError as `Connection.received`.
        """
        connection = self.connection
        if connection.position == connection.end and len(connection.buffer) == CAPACITY:
            connection.position = connection.end = 0  # what `room` does then, and nearly always
            room = connection.view
        else:
            room = connection.room()
        try:
            count, ancillary, flags, _ = self._recvmsg_into((room,), _ANCILLARY_SIZE, _RECEIVE)
        except ConnectionError:  # reset by a peer that went with unread bytes of ours
            return False
        if not ancillary and not flags & CTRUNC:
            connection.end += count  # what `received` does then
            return bool(count)
        return self.received(count, ancillary, flags)

    def received(self, count: int, ancillary: Ancillary, flags: int) -> bool:
        """Take what recvmsg(2) has put into the connection's room. Returns and raises as `receive_nowait`."""
        fds = array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        if count == 0:
            close_all(fds)
            return False
        self.connection.received(count, fds, fds_lost=bool(flags & CTRUNC))
        return True

    def send(self, message: bytes, fds: Sequence[int] = ()) -> bool:
        """Send one message with copies of ``fds``, or what the socket takes of it and queue the rest for `flush`.

        Returns whether something is queued now.
        """
        if self.broken:
            return False
        if not self.queued:
            try:
                # One system call per message: QEMU wants a header in one piece.
                sent = self._sendmsg(message, fds) if fds else self.send_now(message, DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError as error:
                self._break(error)
                return False
            if sent == len(message):
                return False
            if sent:
                fds = ()
            message = message[sent:]
        copies: list[int] = []
        try:
            copies.extend(os.dup(fd) for fd in fds)  # the caller may close its own before ours have left
        except OSError as error:  # no room in our fd table: better no answer than half of one
            close_all(copies)
            self._break(error)
            return False
        self._queue.append((memoryview(message), copies))
        self.queued += len(message) + _MESSAGE_COST + len(copies) * _FD_COST
        return True

    async def flush(self) -> None:
        """Send what is queued as the peer takes it, until nothing is left or the peer is gone."""
        while not self.flush_nowait():
            await trio.lowlevel.wait_writable(self.socket)

    def flush_nowait(self) -> bool:
        """Send of what is queued what the peer takes now; whether nothing is left, or the peer is gone."""
        while self._queue and not self.broken:
            rest, fds = self._queue[0]
            try:
                sent = self._sendmsg(rest, fds) if fds else self.send_now(rest, DONTWAIT)
            except BlockingIOError:
                return False
            except OSError as error:
                self._break(error)
                break
            close_all(fds)
            self.queued -= sent + len(fds) * _FD_COST
            if sent == len(rest):
                self.queued -= _MESSAGE_COST
                self._queue.popleft()
            else:
                self._queue[0] = (rest[sent:], [])
        return True

    def _sendmsg(self, data: bytes | memoryview, fds: Sequence[int]) -> int:
        return self.socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))], DONTWAIT)

    def peer_hung_up(self) -> bool:
        """Whether the peer has closed its end, even if there is something left to read; also after `close`."""
        if self.broken:
            return True
        poll = select.poll()
        poll.register(self.socket, select.POLLRDHUP)  # POLLHUP and POLLERR are always reported
        return bool(poll.poll(0))

    def _break(self, error: OSError | None = None) -> None:
        """The peer is gone: what it has not taken is not ``queued`` any more, else a reader waits for it for ever."""
        self.broken = True
        if error is not None and not isinstance(error, ConnectionError):
            self.failure = error.strerror or repr(error)
        for _rest, fds in self._queue:
            close_all(fds)
        self._queue.clear()
        self.queued = 0

    def fds(self) -> list[int]:
        """All file descriptors that it owns: the socket, those that were not taken, and those that are to be sent."""
        return [self.socket.fileno(), *self.connection.fds(), *(fd for _rest, fds in self._queue for fd in fds)]

    def close(self) -> bool:
        """Close the socket and every fd that was not taken. Returns whether the stream ended inside a message."""
        self.socket.close()
        self._break()
        return self.connection.close()


class Linger:
    """Busy wait of the task that serves ``sock``."""

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
                os.sched_yield()  # 0.3 µs where no other process wants the processor
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


def peer_pid(sock: socket.socket) -> int:
    """The process id of the peer, 0 where it is in another pid namespace (unix(7): SO_PEERCRED)."""
    return _peer_credentials(sock)[0]


def peer_uid(sock: socket.socket) -> int:
    """The user of the peer's process when it connected, as this process's user namespace knows it."""
    return _peer_credentials(sock)[1]


def _peer_credentials(sock: socket.socket) -> tuple[int, int, int]:
    layout = struct.Struct("iII")
    pid, uid, gid = layout.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size))
    return pid, uid, gid
