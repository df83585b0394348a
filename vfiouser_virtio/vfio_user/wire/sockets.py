"""Non-blocking AF_UNIX stream of vfio-user messages and their fds (SCM_RIGHTS), both ways."""

import os
import select
import socket
import struct
from array import array
from collections import deque
from collections.abc import Sequence

import trio

from vfiouser_virtio.fds import close_all
from vfiouser_virtio.vfio_user.wire.connection import Connection

# SCM_MAX_FD is 253: with room for that many, the kernel never has to drop one for want of space.
_ANCILLARY_SIZE = socket.CMSG_SPACE(253 * 4)
# Plain ints: `&` with an enum's member costs a microsecond.
# DONTWAIT: a socket given by --fd is one open file with whoever gave it, who can clear O_NONBLOCK.
_DONTWAIT = int(socket.MSG_DONTWAIT)
_RECEIVE = int(socket.MSG_CMSG_CLOEXEC) | _DONTWAIT
_CTRUNC = int(socket.MSG_CTRUNC)


class MessageSocket:
    """Receives into a `Connection` and sends whole messages, never blocking. Owns the socket and all unread fds."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.connection = Connection()
        self.queued = 0
        """Bytes that the peer has not taken yet."""
        self.broken = False
        """The peer is gone: what is sent is dropped."""
        self._queue: deque[tuple[memoryview, list[int]]] = deque()
        self._recvmsg_into = sock.recvmsg_into
        self._send = sock.send

    def receive_nowait(self) -> bool:
        """Take what is there. Returns False at the end of the stream; raises BlockingIOError when there is nothing.

        PeerError as `Connection.received`.
        """
        connection = self.connection
        try:
            count, ancillary, flags, _ = self._recvmsg_into((connection.room(),), _ANCILLARY_SIZE, _RECEIVE)
        except ConnectionError:  # reset by a peer that went with unread bytes of ours
            return False
        if not ancillary and not flags & _CTRUNC:
            connection.end += count  # what `received` does then
            return bool(count)
        fds = array("i")
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
        if count == 0:
            close_all(fds)
            return False
        connection.received(count, fds, fds_lost=bool(flags & _CTRUNC))
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
                sent = self._sendmsg(message, fds) if fds else self._send(message, _DONTWAIT)
            except BlockingIOError:
                sent = 0
            except OSError:
                self.broken = True
                return False
            if sent == len(message):
                return False
            if sent:
                fds = ()
            message = message[sent:]
        copies: list[int] = []
        try:
            copies.extend(os.dup(fd) for fd in fds)  # the caller may close its own before ours have left
        except OSError:  # no room in our fd table: better no answer than half of one
            close_all(copies)
            self.broken = True
            return False
        self._queue.append((memoryview(message), copies))
        self.queued += len(message)
        return True

    async def flush(self) -> None:
        """Send what is queued as the peer takes it, until nothing is left or the peer is gone."""
        while self._queue and not self.broken:
            rest, fds = self._queue[0]
            try:
                sent = self._sendmsg(rest, fds) if fds else self._send(rest, _DONTWAIT)
            except BlockingIOError:
                await trio.lowlevel.wait_writable(self.socket)
                continue
            except OSError:
                self.broken = True
                return
            close_all(fds)
            self.queued -= sent
            if sent == len(rest):
                self._queue.popleft()
            else:
                self._queue[0] = (rest[sent:], [])

    def _sendmsg(self, data: bytes | memoryview, fds: Sequence[int]) -> int:
        return self.socket.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))], _DONTWAIT)

    def peer_hung_up(self) -> bool:
        """Whether the peer has closed its end, even if there is something left to read; also after `close`."""
        if self.broken:
            return True
        poll = select.poll()
        poll.register(self.socket, select.POLLRDHUP)  # POLLHUP and POLLERR are always reported
        return bool(poll.poll(0))

    def close(self) -> bool:
        """Close the socket and every fd that nobody took. Returns whether the stream ended inside a message."""
        self.socket.close()
        for _rest, fds in self._queue:
            close_all(fds)
        self._queue.clear()
        self.queued = 0
        self.broken = True
        return self.connection.close()


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
