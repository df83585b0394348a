"""A server's session without its socket: what it makes of bytes, beside what `message_model` says.

Found is an exception that is not declared, calls of the device or replies that differ from the model's, a file
descriptor that stays open, and fields that construct's schema and the hot path's codec read differently.
"""

import os
import socket
from array import array
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from struct import Struct
from typing import Any, cast

import trio
from construct import ConstructError

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.codec import Schema, codec
from vfiouser_virtio.protocols.vfio_user import COMMANDS, HEADER, HEADER_CODEC, Command
from vfiouser_virtio.testing.fuzz.oracle import Found
from vfiouser_virtio.testing.fuzz.parsers.bench import Op
from vfiouser_virtio.testing.fuzz.parsers.message_model import ReceivedFds, RecordedDevice, StreamOutcome, outcome
from vfiouser_virtio.vfio_user.server.dispatch import dispatch
from vfiouser_virtio.vfio_user.server.dma_proxy import DmaProxy
from vfiouser_virtio.vfio_user.server.session import Session, logger
from vfiouser_virtio.vfio_user.server.version import Negotiated
from vfiouser_virtio.vfio_user.wire.connection import HEADER_SIZE

PARAMETERS: dict[str, tuple[str, ...]] = {"session": ("write_multiple",), "receive": ("data", "eventfds", "others")}
"""Of each step: ``receive`` is what one recvmsg(2) brings, and its file descriptors."""

_RIGHTS = socket.SOL_SOCKET, socket.SCM_RIGHTS
_AGREE = 15
"""Bits of a message's id that are 0 where construct reads it, too, which takes as long as all the rest."""
_FIXED: dict[int, tuple[Schema, Struct]] = {}
for _command in (2, 3, 4, 5, 6, 7, 9):
    _FIXED[_command] = COMMANDS[Command(_command)].request, codec(COMMANDS[Command(_command)].request)


class _Pieces:
    """In the place of a socket: what is to be received, and what was sent."""

    def __init__(self) -> None:
        self.waiting: deque[tuple[bytes, list[int]]] = deque()
        self.sent: list[bytes] = []

    def setblocking(self, blocking: bool) -> None:
        pass

    def recvmsg_into(self, buffers: Sequence[memoryview], *_: object) -> tuple[int, list[Any], int, None]:
        if not self.waiting:
            raise BlockingIOError
        data, fds = self.waiting.popleft()
        buffers[0][: len(data)] = data
        return len(data), [(*_RIGHTS, array("i", fds).tobytes())] if fds else [], 0, None

    def send(self, data: bytes | memoryview, _flags: int = 0) -> int:
        self.sent.append(bytes(data))
        return len(data)


class _Later:
    """In the place of a nursery: what is to be done later."""

    def __init__(self) -> None:
        self.tasks: list[tuple[Callable[..., Awaitable[object]], tuple[Any, ...]]] = []
        self.cancel_scope = self
        self.cancelled = False

    def start_soon(self, work: Callable[..., Awaitable[object]], *arguments: Any) -> None:
        self.tasks.append((work, arguments))

    def cancel(self) -> None:
        self.cancelled = True


class _SocketlessSession(Session):
    """Session after VERSION, which is fed by hand."""

    def __init__(self) -> None:
        self.pieces = _Pieces()
        self.later = _Later()
        self.device = RecordedDevice()
        # Looked up here, where tests plant others.
        super().__init__(cast("socket.socket", self.pieces), self.device, "fuzz", "client", handler=dispatch)
        self.client = DmaProxy("client", self.pieces.sent.append, 1 << 20)

    def begin(self, *, write_multiple: bool) -> None:
        """A new case."""
        connection = self._main.connection
        connection.close()
        connection.position = connection.end = 0
        self.pieces.waiting.clear()
        self.pieces.sent = []
        self.device.calls = []
        self.later = _Later()
        self._nursery = cast("trio.Nursery", self.later)
        self._negotiated = Negotiated(write_multiple=write_multiple, max_msg_fds=8)
        # As `_negotiate` leaves it.
        self._fast, self._held, self._only_reads = True, False, False
        self._log = DeviceLog(logger, "fuzz")

    def feed(self) -> bool:
        """Receive and process all of it; whether the connection has ended."""
        try:
            while self.pieces.waiting:
                self._only_reads = True
                self._main.receive_nowait()
                while self._process():
                    pass
            if self.later.tasks:
                trio.run(self._do_later)
        except PeerError as error:
            if not error.fatal:
                raise
            return True
        return self.later.cancelled

    async def _do_later(self) -> None:
        while self.later.tasks:
            work, arguments = self.later.tasks.pop(0)
            await work(*arguments)

    def drop(self) -> None:
        """Close what has not been taken, or not been received."""
        for _, fds in self.pieces.waiting:
            close_all(fds)
        self._backlog.close()
        while self._backlog:
            self._backlog.popleft()
        self._main.connection.close()


class MessageBench:
    """Bench for messages; `run` it for case after case."""

    def __init__(self) -> None:
        self._session = _SocketlessSession()
        self._eventfd, self._other = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK), os.open(os.devnull, os.O_RDWR)

    def close(self) -> None:
        """Close its file descriptors."""
        os.close(self._eventfd)
        os.close(self._other)

    def run(self, ops: Sequence[Op]) -> None:
        """Play a case. Raises `Found`, or what a parser raises that it may not."""
        session = self._session
        write_multiple = False
        stream = b""
        fds: list[int] = []
        received: list[tuple[int, int, int]] = []
        pieces: list[tuple[bytes, list[int]]] = []
        for op in ops:
            if op[0] == "session":
                write_multiple = bool(op[1])
                continue
            _, data, eventfds, others = op
            mine = [os.dup(self._eventfd) for _ in range(eventfds)] + [os.dup(self._other) for _ in range(others)]
            fds += mine
            if data:
                pieces.append((data, mine))
                if mine:
                    received.append((len(stream), eventfds, others))
                stream += data
        if stream and not stream[0] & _AGREE and len(stream) >= HEADER_SIZE:
            agree(stream)
        session.begin(write_multiple=write_multiple)
        session.pieces.waiting.extend(pieces)
        try:
            ended = session.feed()
        finally:
            session.drop()
        self._check_fds(fds)
        expected = outcome(
            stream, _owners(stream, received, [len(data) for data, _ in pieces]), write_multiple=write_multiple
        )
        self._compare(expected, ended)

    def _compare(self, expected: StreamOutcome, ended: bool) -> None:
        calls, replies = self._session.device.calls, self._session.pieces.sent
        if ended != expected.fatal:
            raise Found("differs", f"the connection {'ends' if ended else 'goes on'}, which is wrong", "end")
        if ended and self._session.later.tasks:  # what was to be answered later is not answered any more
            expected = StreamOutcome(expected.calls[: len(calls)], expected.replies[: len(replies)], True)
        if calls != expected.calls:
            raise Found("differs", f"the device is asked {calls}, where {expected.calls} should be", "calls")
        if replies != expected.replies:
            shown = [[each[:64].hex() for each in some] for some in (replies, expected.replies)]
            raise Found("differs", f"the replies are {shown[0]}, where {shown[1]} should be", "replies")

    def _check_fds(self, fds: list[int]) -> None:
        left = []
        for fd in fds:
            try:
                os.close(fd)
                left.append(fd)
            except OSError:
                pass
        if left:
            raise Found("leak", f"{len(left)} of {len(fds)} file descriptors stay open", "fds")


def agree(message: bytes) -> None:
    """Raise `Found` where construct reads a message otherwise than the codec of the hot path."""
    header = HEADER.parse(message)
    values = HEADER_CODEC.unpack_from(message)
    if tuple(header[name] for name in ("id", "command", "size", "flags", "error")) != values:
        raise Found("differs", f"header {header} is {values}", "construct HEADER")
    if values[1] not in _FIXED:
        return
    schema, layout = _FIXED[values[1]]
    body = message[16:]
    try:
        parsed = [value for name, value in schema.parse(body).items() if not name.startswith("_")]
    except ConstructError:
        parsed = None
    unpacked = list(layout.unpack_from(body)) if len(body) >= layout.size else None
    if parsed != unpacked:
        raise Found("differs", f"{Command(values[1]).name}: {parsed} is {unpacked}", f"construct {values[1]}")


def _owners(stream: bytes, received: Sequence[tuple[int, int, int]], sizes: Sequence[int]) -> list[ReceivedFds]:
    """To which message fds belong: the last that begins in what has come with them, or is unfinished before that."""
    found: dict[int, list[int]] = {}
    ends = []
    total = 0
    for size in sizes:
        total += size
        ends.append(total)
    for begin, eventfds, others in received:
        end = next(each for each in ends if each > begin)
        at = owner = 0
        while at < end:
            owner = at
            if end - at < 16:
                break
            size = int.from_bytes(stream[at + 4 : at + 8], "little")
            if size < 16:
                break
            at += size
        pair = found.setdefault(owner, [0, 0])
        pair[0] += eventfds
        pair[1] += others
    return [ReceivedFds(at, *pair) for at, pair in found.items()]
