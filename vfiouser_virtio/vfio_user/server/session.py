"""Session with one client ("Message Protocol"): reads without ever blocking, answers in order.

::

    socket ──▶ _read ──▶ _process ──▶ _serve_accesses ──▶ VfioDevice
                            │  └────▶ dispatch ──────────────┘
                            │            │ Hold
                            │ held       ▼
                            └─▶ backlog ─▶ _finish_holds ──▶ reply, then the backlog, in order

QEMU's vCPUs hold its global lock while they wait for an answer, and it has no flow control: so the socket is always
drained, also while a reply is held, and a reply to our own DMA requests never waits behind anything.

What a running guest sends ("VFIO_USER_REGION_READ", "VFIO_USER_REGION_WRITE") is nearly all of the traffic, and a vCPU
stands still for every read. So plain accesses go from the receive buffer to the device and back with no object built in
between; `dispatch`, which takes three times as long, handles the others.

A long file, since all of it is about the order of one client's messages, which every part may hold up.
"""

import errno
import logging
import socket
from collections.abc import Awaitable, Callable, Sequence
from time import perf_counter

import trio

from vfiouser_virtio.device_log import DeviceLog
from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.holds import wait_hold
from vfiouser_virtio.protocols.vfio_user import (
    HEADER_AND_REGION_ACCESS,
    HEADER_CODEC,
    MESSAGE_TYPE_MASK,
    Command,
    Direction,
    MessageFlags,
)
from vfiouser_virtio.turns import turns
from vfiouser_virtio.vfio_device import AnswerLater, Hold, PciRegion, VfioDevice
from vfiouser_virtio.vfio_user.server.backlog import Backlog
from vfiouser_virtio.vfio_user.server.dispatch import Handler, Response, check_region_data, dispatch, late_access
from vfiouser_virtio.vfio_user.server.dma_proxy import DmaProxy
from vfiouser_virtio.vfio_user.server.version import Negotiated, negotiate
from vfiouser_virtio.vfio_user.wire.connection import (
    CAPACITY,
    HEADER_SIZE,
    MAX_DATA_XFER_SIZE,
    Message,
    Trace,
    error_reply,
    name_of,
    reply,
)
from vfiouser_virtio.vfio_user.wire.sockets import CTRUNC, DONTWAIT, Linger, MessageSocket, peer_uid

MAX_BACKLOG = 16 << 20
"""Bytes of messages behind a held reply, or of replies that the client does not read, beyond which we stop reading."""
BATCH = 32
"""Reads of a register between two looks at the clock; there is one behind every write, and every longer read: the write
may be a reset of 64 queues, and 1 MiB of a BAR takes 0.8 ms to be read, 4096 registers 8 ms."""
_REGISTER = 8  # bytes of the widest

# Plain ints: comparing with an enum's member costs four times as much.
_READ = int(Command.REGION_READ)
_WRITE = int(Command.REGION_WRITE)
_CONFIG = int(PciRegion.CONFIG)
_REPLY = int(MessageFlags.REPLY)
_NO_REPLY = int(MessageFlags.NO_REPLY)
_IN, _OUT = Direction.CLIENT_TO_SERVER, Direction.SERVER_TO_CLIENT
_ACCESS_SIZE = HEADER_AND_REGION_ACCESS.size
_unpack = HEADER_AND_REGION_ACCESS.unpack_from
_pack = HEADER_AND_REGION_ACCESS.pack

logger = logging.getLogger(__name__)

# Clients ask these to find out what there is; no is an answer.
_PROBES = frozenset({Command.DEVICE_GET_IRQ_INFO, Command.DEVICE_FEATURE})


class Session:
    """Session with one client, ``client_name``, about the device ``name``; `run` it once.

    ``write_multiple`` and ``twin_socket`` are offered to a client that can use them.

    ``lingers``: whether to block for a moment where the next message is likely to come at once; of no use for a client
    that is a task of the same loop. ``handler`` carries out what is no plain access of a region.

    After `run`, ``client`` says whether `VfioDevice.connected` was called, so that `VfioDevice.disconnected` is due,
    and ``hold`` is what the last reply was still waiting for.
    """

    def __init__(
        self,
        sock: socket.socket,
        device: VfioDevice,
        name: str,
        client_name: str,
        *,
        write_multiple: bool = False,
        twin_socket: bool = True,
        trace: Trace | None = None,
        lingers: bool = True,
        handler: Handler = dispatch,
    ) -> None:
        self.client: DmaProxy | None = None
        self.hold: Hold | None = None
        self._device = device
        self._write_multiple = write_multiple
        self._twin_socket = twin_socket
        self._trace = trace
        self._lingers = lingers
        self._handler = handler
        self._client_name = client_name
        self._main = MessageSocket(sock)
        self._twin: MessageSocket | None = None
        self._negotiated = Negotiated()
        self._log = DeviceLog(logger, name)
        self._fast = False  # region accesses go straight to the device: negotiated, nothing held
        self._only_reads = False  # have come lately: nothing but a client that waits can have been set in motion
        self._slice_end = 0.0  # until when `_read` may go on: others have their turns then
        self._held = False
        self._backlog = Backlog()
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
            self._log.once("fatal", "%s; connection closed", error)
            assert self._nursery is not None
            self._nursery.cancel_scope.cancel()

    def _close(self) -> None:
        if self._main.close():
            self._log.once("cut", "the client went in the middle of a message")
        if self._twin is not None:
            self._twin.close()
        self._backlog.close()
        if self.client is not None:
            self.client.close()
        self._log.summarize()

    # Receiving

    async def _read(self) -> None:
        main = self._main
        linger = Linger(main.socket)
        self._slice_end, number = turns().woken(0)
        while True:
            if not (self._only_reads and self._lingers and linger.wait_nearby()) and not linger.is_readable():
                await linger.wait_readable()
                self._slice_end, number = turns().woken(number)
            try:
                if not main.receive_nowait():
                    return
            except BlockingIOError:
                continue
            self._only_reads = True
            more = True
            while more:
                more = self._process()
                while main.queued > MAX_BACKLOG or self._backlog.size > MAX_BACKLOG:
                    self._relief = trio.Event()
                    await self._relief.wait()
                if perf_counter() > self._slice_end:
                    self._slice_end = await turns().wait()

    def _process(self) -> bool:
        """Deal with some of the messages that are buffered. Returns whether there may be more."""
        connection = self._main.connection
        if self._fast and self._serve_accesses():
            return True
        if connection.position == connection.end or not connection.next():
            return False
        self._only_reads = False
        self._receive(connection.message())
        return True

    def _serve_accesses(self) -> bool:
        """Carry out the region accesses that are next in the connection, in order, until something else is.

        Behind nothing but reads it looks whether their client has asked again already. Returns whether it ended
        because it is time for a look at the clock. What the device raises is an errno for the client; PeerError as
        `MessageSocket.receive_nowait`.
        """
        channel, connection = self._main, self._main.connection
        if connection.pending_fds:
            return False
        receive, send = channel.receive_to_begin, channel.send_now
        region_read, region_write = self._device.region_read, self._device.region_write
        buffer, view, position, end = connection.buffer, connection.view, connection.position, connection.end
        only_reads, trace, slice_end = self._only_reads, self._trace, self._slice_end
        # Steps of MessageSocket.receive_nowait() and send() are done here, each of which would take as long as all else
        # that is done for a read: after a switch from another process the code of each call must come from memory.
        try:
            for _ in range(BATCH):
                if end - position < _ACCESS_SIZE:
                    if not only_reads or position != end or len(buffer) != CAPACITY:
                        return False
                    position = end = 0
                    try:
                        received, ancillary, received_flags, _ = receive()
                    except (BlockingIOError, ConnectionError):
                        return False
                    if not received or ancillary or received_flags & CTRUNC:
                        connection.position = connection.end = 0
                        try:
                            channel.received(received, ancillary, received_flags)
                        finally:
                            end = connection.end
                        return False
                    end = received
                    continue
                message_id, command, size, flags, _error, offset, region, count = _unpack(buffer, position)
                if not 0 < count <= MAX_DATA_XFER_SIZE:
                    return False
                following = position + size
                try:
                    if command == _READ and size == _ACCESS_SIZE and not flags:
                        if trace is not None:
                            asked = view[position + HEADER_SIZE : following]
                            trace(_IN, Message(message_id, _READ, flags, 0, asked))
                        position = following
                        data = region_read(region, offset, count)
                        if len(data) != count:
                            check_region_data(data, count)
                        size += count
                        answer = _pack(message_id, _READ, size, _REPLY, 0, offset, region, count) + data
                        if trace is not None:
                            trace(_OUT, Message(message_id, _READ, _REPLY, 0, answer[HEADER_SIZE:]))
                        try:
                            sent = 0 if channel.queued or channel.broken else send(answer, DONTWAIT)
                        except OSError:
                            sent = 0
                        if sent != size and (channel.send(answer[sent:]) or channel.failure):
                            self._start_flush(channel)
                        if count > _REGISTER and perf_counter() > slice_end:
                            return True
                    elif command == _WRITE and size == _ACCESS_SIZE + count and following <= end:
                        if flags and flags != _NO_REPLY:
                            return False
                        only_reads = False
                        if trace is not None:
                            asked = view[position + HEADER_SIZE : following]
                            trace(_IN, Message(message_id, _WRITE, flags, 0, asked))
                        data = view[position + _ACCESS_SIZE : following]
                        position = following
                        region_write(region, offset, data)
                        if not flags:
                            answer = _pack(message_id, _WRITE, _ACCESS_SIZE, _REPLY, 0, offset, region, count)
                            if trace is not None:
                                trace(_OUT, Message(message_id, _WRITE, _REPLY, 0, answer[HEADER_SIZE:]))
                            if channel.send(answer) or channel.failure:
                                self._start_flush(channel)
                        if region == _CONFIG or perf_counter() > slice_end:  # the former may reset all of its memory
                            return True
                    else:
                        return False
                except AnswerLater as later:
                    message = Message(message_id, command, flags, 0, b"")
                    read = count if command == _READ else 0
                    self._answer_later(message, late_access(offset, region, count, read, later))
                    return False
                except Exception as error:  # anything: it must not take the other devices of the process down
                    self._refuse(message_id, command, flags, error)
        finally:
            connection.position, connection.end = position, end
            self._only_reads = only_reads
        return True

    def _receive(self, message: Message) -> None:
        """A message off the fast path: to be handled now, or when the held reply has gone."""
        if message.flags & MESSAGE_TYPE_MASK:
            self._receive_reply(message)
        elif self._held:
            self._backlog.append(message)
        else:
            answer = self._handle(message)
            if answer is not None:
                self._answer_later(message, answer)

    def _answer_later(self, message: Message, answer: Response) -> None:
        """What comes until the answer has gone waits behind it."""
        self._held = True
        self._fast = False
        assert self._nursery is not None
        self._nursery.start_soon(self._guard, lambda: self._finish_holds(message, answer))

    def _receive_reply(self, message: Message) -> None:
        if self._trace is not None:
            self._trace(Direction.CLIENT_TO_SERVER, message)
        close_all(message.take_fds())
        if not message.is_reply:
            raise PeerError(f"{name_of(message.command)}: flags {message.flags:#x} is no message type", fatal=True)
        try:
            if self.client is None:
                raise PeerError(f"{name_of(message.command)}: a reply before VERSION")
            self.client.reply(message)
        except PeerError as error:
            self._log.once("reply", "%s", error)

    async def _read_twin(self, twin: MessageSocket) -> None:
        """The replies to our DMA requests, where they have a socket of their own."""
        slice_end, number = turns().woken(0)
        while True:
            try:
                alive = twin.receive_nowait()
            except BlockingIOError:
                await trio.lowlevel.wait_readable(twin.socket)
                slice_end, number = turns().woken(number)
                continue
            if not alive:
                if self._main.peer_hung_up():
                    return  # it has closed both, and `_read` has not come to its end yet
                raise PeerError("the client closed its twin socket", fatal=True)
            while twin.connection.next():
                message = twin.connection.message()
                if not message.is_reply:
                    close_all(message.take_fds())
                    raise PeerError(f"{name_of(message.command)}: a request on the twin socket", fatal=True)
                self._receive_reply(message)
                if perf_counter() > slice_end:  # 8192 of them come at once, and none need be an answer to anything
                    slice_end = await turns().wait()
            await trio.lowlevel.checkpoint()

    # Handling

    def _handle(self, message: Message) -> Response | None:
        """Carry out one request and answer it. Returns the answer instead where hold or work have not ended.

        Raises only fatal PeerErrors, after the client was told.
        """
        if self._trace is not None:
            self._trace(Direction.CLIENT_TO_SERVER, message)
        begins = self.client is None
        try:
            if begins:
                self._negotiate(message)
                return None
            answer = self._handler(self._device, message, self._negotiated)
        except Exception as error:
            self._refuse(message.id, message.command, message.flags, error)
            if isinstance(error, PeerError) and error.fatal:
                raise
            if begins:
                raise PeerError("VERSION: the device cannot be used", errno.EIO, fatal=True) from error
            return None
        if answer.work or answer.late is not None or (answer.hold is not None and not answer.hold.done):
            return answer
        self._answer(message, answer)
        return None

    def _negotiate(self, message: Message) -> None:
        close_all(message.take_fds())
        if message.command != Command.VERSION or not message.wants_reply:
            raise PeerError(f"{name_of(message.command)}: the first message must be VERSION", fatal=True)
        self._negotiated, payload = negotiate(
            message.body, write_multiple=self._write_multiple, twin_socket=self._twin_socket
        )
        theirs: socket.socket | None = None
        channel = self._main
        if self._negotiated.twin_socket:
            ours, theirs = socket.socketpair()
            channel = self._twin = MessageSocket(ours)
        self.client = DmaProxy(
            self._client_name,
            lambda data: self._send(data, (), channel),
            self._negotiated.max_data_xfer_size,
            uid=peer_uid(self._main.socket),
        )
        try:
            self._device.connected(self.client)
            self._send(reply(message.id, message.command, payload), [theirs.fileno()] if theirs else [])
        finally:
            if theirs is not None:
                theirs.close()
        self._fast = True
        if self._twin is not None:
            assert self._nursery is not None
            self._nursery.start_soon(self._guard, lambda: self._read_twin(channel))

    async def _finish_holds(self, message: Message, answer: Response | None) -> None:
        """Wait for the hold of ``answer``, do its work, send it, and handle what has come behind it, in order."""
        slice_end, _ = turns().woken(0)
        while answer is not None:
            await self._wait_hold(answer.hold)
            slice_end = await self._finish_work(message, answer, slice_end)
            answer = None
            while self._backlog and answer is None:
                message = self._backlog.popleft()
                answer = self._handle(message)
                if perf_counter() > slice_end:
                    slice_end = await turns().wait()
            if self._backlog.size <= MAX_BACKLOG:
                self._relief.set()
        self._held = False
        self._fast = True

    async def _wait_hold(self, hold: Hold | None) -> None:
        self.hold = hold
        if hold is not None:
            await wait_hold(hold)
            self.hold = None

    async def _finish_work(self, message: Message, answer: Response, slice_end: float) -> float:
        """Do what is left to be done for a request, and answer it; returns when to wait in line again."""
        try:
            for hold in answer.work:
                await self._wait_hold(hold)
                if perf_counter() > slice_end:
                    slice_end = await turns().wait()
            if answer.late is not None:
                answer = answer._replace(payload=answer.payload + answer.late())
        except Exception as error:
            self._refuse(message.id, message.command, message.flags, error)
        else:
            self._answer(message, answer)
        return slice_end

    # Answering

    def _answer(self, message: Message, answer: Response) -> None:
        if message.wants_reply:
            self._send(reply(message.id, message.command, answer.payload), answer.fds)

    def _refuse(self, message_id: int, command: int, flags: int, error: Exception) -> None:
        """Log a failed request, its kind once, and answer it with an errno if the client wants to know."""
        if isinstance(error, PeerError):
            number = error.errno
            if not error.fatal:  # `_guard` logs the others
                level = logging.INFO if command in _PROBES else logging.WARNING
                self._log.once((command, number), "%s", error, level=level)
        else:
            number = errno.EIO
            what = f"{name_of(command)}: a bug of the device"
            self._log.once((command, type(error)), what, level=logging.ERROR, error=error)
        if not flags & (MessageFlags.NO_REPLY | MESSAGE_TYPE_MASK):
            self._send(error_reply(message_id, command, number))

    def _send(self, data: bytes, fds: Sequence[int] = (), channel: MessageSocket | None = None) -> None:
        if self._trace is not None:
            message_id, command, _size, flags, error = HEADER_CODEC.unpack_from(data)
            body = memoryview(data)[HEADER_SIZE:]
            self._trace(Direction.SERVER_TO_CLIENT, Message(message_id, command, flags, error, body, list(fds)))
        channel = channel or self._main
        if channel.send(data, fds):
            self._start_flush(channel)
        elif channel.failure:
            self._give_up(channel)

    def _start_flush(self, channel: MessageSocket) -> None:
        """Send what is queued as soon as the client takes it."""
        if channel not in self._flushing:
            self._flushing.add(channel)
            assert self._nursery is not None
            self._nursery.start_soon(self._flush, channel)

    async def _flush(self, channel: MessageSocket) -> None:
        await channel.flush()
        self._flushing.discard(channel)
        self._relief.set()
        if channel.failure:
            self._give_up(channel)

    def _give_up(self, channel: MessageSocket) -> None:
        """What the client waits for cannot be sent: better no connection than one without an answer.

        Also called where a device asks for memory, which is no place for an exception of ours.
        """
        self._log.once("unsent", "a message cannot be sent: %s; connection closed", channel.failure)
        assert self._nursery is not None
        self._nursery.cancel_scope.cancel()
