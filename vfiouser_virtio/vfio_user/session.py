"""One client, from its first byte to its last ("Message Protocol"): reads without ever blocking, answers in order.

::

    socket ──▶ _read ──▶ _process ──▶ dispatch ──▶ Function
                            │             │ Hold
                            │ held        ▼
                            └─▶ backlog ─▶ _finish_holds ──▶ reply, then the backlog, in order

QEMU's vCPUs hold its global lock while they wait for an answer, and it has no flow control: so the socket is always
drained, also while a reply is held, and a reply to our own DMA requests never waits behind anything.
"""

import errno
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter
from typing import TypeAlias

import trio

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.function import Function, Hold
from vfiouser_virtio.protocols.vfio_user import (
    HEADER_AND_REGION_ACCESS,
    HEADER_CODEC,
    MESSAGE_TYPE_MASK,
    Command,
    Direction,
    MessageFlags,
)
from vfiouser_virtio.vfio_user.client_memory import ClientMemory
from vfiouser_virtio.vfio_user.complaints import Complaints
from vfiouser_virtio.vfio_user.connection import (
    HEADER_SIZE,
    MAX_DATA_XFER_SIZE,
    Message,
    error_reply,
    name_of,
    reply,
)
from vfiouser_virtio.vfio_user.dispatch import Answer, check_region_data, dispatch
from vfiouser_virtio.vfio_user.sockets import MessageSocket
from vfiouser_virtio.vfio_user.version import Negotiated, negotiate

HOLD_PATIENCE = 2.0
"""Seconds until the work behind a held reply is told to fail: well within QEMU's 5 s, after which it gives up on us."""

MAX_BACKLOG = 16 << 20
"""Bytes of messages behind a held reply, or of replies that the client does not read, beyond which we stop reading."""

TIME_SLICE = 0.001
"""Seconds after which the other tasks get their turn, however much the client sends."""

Trace: TypeAlias = Callable[[Direction, Message], None]
"""Is called with every message, either way; its body is only valid during the call."""

log = logging.getLogger(__name__)

_BATCH = 32  # messages between two looks at the clock
# What a message in the backlog counts besides its payload, in bytes: a million empty ones take memory, too, and the
# process has a thousand fds or so for all its clients.
_MESSAGE_COST = 256
_FD_COST = 64 * 1024

# Clients ask these to find out what there is; no is an answer. (QEMU always asks for the ERR interrupt.)
_PROBES = frozenset({Command.DEVICE_GET_IRQ_INFO, Command.DEVICE_FEATURE})

# Plain ints: comparing with an enum's member costs four times as much.
_READ = int(Command.REGION_READ)
_WRITE = int(Command.REGION_WRITE)
_REPLY = int(MessageFlags.REPLY)
_NO_REPLY = int(MessageFlags.NO_REPLY)
_ACCESS_SIZE = HEADER_AND_REGION_ACCESS.size
_pack_access = HEADER_AND_REGION_ACCESS.pack


async def wait_hold(hold: Hold, patience: float | None = None) -> None:
    """Wait until ``hold`` has ended; after ``patience`` seconds (default `HOLD_PATIENCE`) tell its work to fail."""
    done = trio.Event()
    hold.when_done(done.set)
    with trio.move_on_after(HOLD_PATIENCE if patience is None else patience):
        await done.wait()
    if not done.is_set():
        hold.expire()
        await done.wait()


def _cost(message: Message) -> int:
    return len(message.body) + _MESSAGE_COST + len(message.fds) * _FD_COST


class Session:
    """The conversation with one client; `run` it once.

    After `run`, ``client`` says whether `Function.connected` was called, so that `Function.disconnected` is due,
    and ``hold`` is what the last reply was still waiting for.
    """

    def __init__(
        self,
        sock: socket.socket,
        function: Function,
        name: str,
        *,
        write_multiple: bool = False,
        trace: Trace | None = None,
    ) -> None:
        self.name = name
        self.client: ClientMemory | None = None
        self.hold: Hold | None = None
        self._function = function
        self._write_multiple = write_multiple
        self._trace = trace
        self._main = MessageSocket(sock)
        self._twin: MessageSocket | None = None
        self._negotiated = Negotiated()
        self._complaints = Complaints(log, name)
        self._fast = False  # region accesses go straight to the function: negotiated, nothing held, nobody traces
        self._held = False
        self._backlog: deque[Message] = deque()
        self._backlog_size = 0
        self._relief = trio.Event()
        self._flushing: set[MessageSocket] = set()
        self._nursery: trio.Nursery | None = None

    async def run(self) -> None:
        """Serve until the client leaves or breaks the protocol beyond repair. Closes everything it got."""
        try:
            async with trio.open_nursery() as self._nursery:
                await self._guard(self._read)
                self._nursery.cancel_scope.cancel()
        finally:
            self._close()

    def peer_hung_up(self) -> bool:
        """Whether the client is gone already, even if we have not read its last words."""
        return self._main.peer_hung_up()

    async def _guard(self, work: Callable[[], Awaitable[None]]) -> None:
        """A fatal mistake of the client ends the session, whichever task finds it."""
        try:
            await work()
        except PeerError as error:
            self._complaints.log("fatal", f"{error}; connection closed")
            assert self._nursery is not None
            self._nursery.cancel_scope.cancel()

    def _close(self) -> None:
        if self._main.close():
            self._complaints.log("cut", "the client went in the middle of a message")
        if self._twin is not None:
            self._twin.close()
        for message in self._backlog:
            close_all(message.take_fds())
        if self.client is not None:
            self.client.close()
        self._complaints.summarize()

    # Receiving

    async def _read(self) -> None:
        main = self._main
        slice_end = perf_counter() + TIME_SLICE
        while True:
            # Reading until there is nothing costs one failed recv, waiting first would cost five times that.
            try:
                alive = main.receive_nowait()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(main.socket)
                slice_end = perf_counter() + TIME_SLICE
                continue
            if not alive:
                return
            more = True
            while more:
                more = self._process()
                while main.queued > MAX_BACKLOG or self._backlog_size > MAX_BACKLOG:
                    self._relief = trio.Event()
                    await self._relief.wait()
                if perf_counter() > slice_end:
                    await trio.lowlevel.checkpoint()
                    slice_end = perf_counter() + TIME_SLICE

    def _process(self) -> bool:
        """Deal with a batch of the messages that are buffered. Returns whether there may be more."""
        connection = self._main.connection
        function = self._function
        for _ in range(_BATCH):
            fields = connection.next()
            if fields is None:
                return False
            message_id, command, size, flags, _error, offset, region, count = fields
            if self._fast and 0 < count <= MAX_DATA_XFER_SIZE and not connection.fds:
                try:
                    if command == _WRITE and size == _ACCESS_SIZE + count and (flags == _NO_REPLY or not flags):
                        function.region_write(region, offset, connection.body(_ACCESS_SIZE - HEADER_SIZE))
                        if not flags:
                            self._send(_pack_access(message_id, _WRITE, _ACCESS_SIZE, _REPLY, 0, offset, region, count))
                        continue
                    if command == _READ and size == _ACCESS_SIZE and not flags:
                        data = function.region_read(region, offset, count)
                        check_region_data(data, count)
                        size += count
                        self._send(_pack_access(message_id, _READ, size, _REPLY, 0, offset, region, count) + data)
                        continue
                except Exception as error:  # anything: it must not take the other devices of the process down
                    self._refuse(message_id, command, flags, error)
                    continue
            self._receive(connection.message())
        return True

    def _receive(self, message: Message) -> None:
        """A message off the fast path: to be handled now, or when the held reply has gone."""
        if message.flags & MESSAGE_TYPE_MASK:
            self._receive_reply(message)
        elif self._held:
            message.body = bytes(message.body)
            self._backlog.append(message)
            self._backlog_size += _cost(message)
        else:
            answer = self._handle(message)
            if answer is not None:
                self._held = True
                self._fast = False
                assert self._nursery is not None
                self._nursery.start_soon(self._guard, lambda: self._finish_holds(message, answer))

    def _receive_reply(self, message: Message) -> None:
        if self._trace is not None:
            self._trace(Direction.CLIENT_TO_SERVER, message)
        close_all(message.take_fds())
        if not message.is_reply:
            raise PeerError(f"{name_of(message.command)}: flags 0x{message.flags:x} is no message type", fatal=True)
        try:
            if self.client is None:
                raise PeerError(f"{name_of(message.command)}: a reply before VERSION")
            self.client.reply(message)
        except PeerError as error:
            self._complaints.log("reply", str(error))

    async def _read_twin(self, twin: MessageSocket) -> None:
        """The replies to our DMA requests, where they have a socket of their own."""
        while True:
            try:
                alive = twin.receive_nowait()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(twin.socket)
                continue
            if not alive:
                if self._main.peer_hung_up():
                    return  # it has closed both, and `_read` has not come to its end yet
                raise PeerError("the client closed its twin socket", fatal=True)
            while twin.connection.next() is not None:
                message = twin.connection.message()
                if not message.is_reply:
                    close_all(message.take_fds())
                    raise PeerError(f"{name_of(message.command)}: a request on the twin socket", fatal=True)
                self._receive_reply(message)
            await trio.lowlevel.checkpoint()

    # Handling

    def _handle(self, message: Message) -> Answer | None:
        """Carry out one request and answer it. Returns the answer instead where its hold has not ended.

        Raises only fatal PeerErrors, after the client was told.
        """
        if self._trace is not None:
            self._trace(Direction.CLIENT_TO_SERVER, message)
        begins = self.client is None
        try:
            if begins:
                self._negotiate(message)
                return None
            answer = dispatch(self._function, message, self._negotiated)
        except Exception as error:
            self._refuse(message.id, message.command, message.flags, error)
            if isinstance(error, PeerError) and error.fatal:
                raise
            if begins:
                raise PeerError("VERSION: the device cannot be used", errno.EIO, fatal=True) from error
            return None
        if answer.hold is not None and not answer.hold.done:
            return answer
        self._answer(message, answer)
        return None

    def _negotiate(self, message: Message) -> None:
        close_all(message.take_fds())
        if message.command != Command.VERSION or not message.wants_reply:
            raise PeerError(f"{name_of(message.command)}: the first message must be VERSION", fatal=True)
        self._negotiated, payload = negotiate(message.body, write_multiple=self._write_multiple)
        theirs: socket.socket | None = None
        channel = self._main
        if self._negotiated.twin_socket:
            ours, theirs = socket.socketpair()
            channel = self._twin = MessageSocket(ours)
        self.client = ClientMemory(
            self.name, lambda data: self._send(data, (), channel), self._negotiated.max_data_xfer_size
        )
        try:
            self._function.connected(self.client)
            self._send(reply(message.id, message.command, payload), [theirs.fileno()] if theirs else [])
        finally:
            if theirs is not None:
                theirs.close()
        self._fast = self._trace is None
        if self._twin is not None:
            assert self._nursery is not None
            self._nursery.start_soon(self._guard, lambda: self._read_twin(channel))

    async def _finish_holds(self, message: Message, answer: Answer | None) -> None:
        """Wait for the hold of ``answer``, send it, and handle the messages that have come behind it, in order."""
        slice_end = perf_counter() + TIME_SLICE
        while answer is not None:
            self.hold = answer.hold
            assert self.hold is not None
            await wait_hold(self.hold)
            self.hold = None
            self._answer(message, answer)
            answer = None
            while self._backlog and answer is None:
                message = self._backlog.popleft()
                self._backlog_size -= _cost(message)
                answer = self._handle(message)
                if perf_counter() > slice_end:
                    await trio.lowlevel.checkpoint()
                    slice_end = perf_counter() + TIME_SLICE
            if self._backlog_size <= MAX_BACKLOG:
                self._relief.set()
        self._held = False
        self._fast = self._trace is None

    # Answering

    def _answer(self, message: Message, answer: Answer) -> None:
        if message.wants_reply:
            self._send(reply(message.id, message.command, answer.payload), answer.fds)

    def _refuse(self, message_id: int, command: int, flags: int, error: Exception) -> None:
        """Log a failed request, its kind once, and answer it with an errno if the client wants to know."""
        if isinstance(error, PeerError):
            number = error.errno
            if not error.fatal:  # `_guard` logs the others
                level = logging.INFO if command in _PROBES else logging.WARNING
                self._complaints.log((command, number), str(error), level)
        else:
            number = errno.EIO
            self._complaints.log(
                (command, type(error)), f"{name_of(command)}: a bug of the device", logging.ERROR, error
            )
        if not flags & (_NO_REPLY | MESSAGE_TYPE_MASK):
            self._send(error_reply(message_id, command, number))

    def _send(self, data: bytes, fds: Sequence[int] = (), channel: MessageSocket | None = None) -> None:
        if self._trace is not None:
            message_id, command, _size, flags, error = HEADER_CODEC.unpack_from(data)
            body = memoryview(data)[HEADER_SIZE:]
            self._trace(Direction.SERVER_TO_CLIENT, Message(message_id, command, flags, error, body, list(fds)))
        channel = channel or self._main
        if channel.send(data, fds) and channel not in self._flushing:
            self._flushing.add(channel)
            assert self._nursery is not None
            self._nursery.start_soon(self._flush, channel)

    async def _flush(self, channel: MessageSocket) -> None:
        await channel.flush()
        self._flushing.discard(channel)
        self._relief.set()
