"""Connection of a vfio-user client ("Message Protocol"): requests and their replies, and DMA for the server.

::

    request, post ──▶ Outbox ──▶ (Chaos) ──▶ socket
    Pending ◀── Requests ◀─┐
                           ├── _read ◀── socket, twin socket
    Outbox ◀── DmaServer ◀─┘

One task reads, and answers DMA requests at once, whatever else waits.
"""

import errno
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import trio

from vfiouser_virtio.errors import PeerError
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.vfio_user import HEADER_CODEC, MESSAGE_TYPE_MASK, Command, Direction, MessageFlags
from vfiouser_virtio.vfio_device import Buffer
from vfiouser_virtio.vfio_user.client.dma import DmaServer
from vfiouser_virtio.vfio_user.client.options import ClientOptions
from vfiouser_virtio.vfio_user.client.outbox import Outbox
from vfiouser_virtio.vfio_user.client.requests import (
    MAY_HAVE_FDS,
    RemoteError,
    Reply,
    Requests,
    protocol_error,
    reply_limit,
)
from vfiouser_virtio.vfio_user.client.version import Version, VersionProposal, parse_version
from vfiouser_virtio.vfio_user.wire.connection import HEADER_SIZE, MAX_DATA_XFER_SIZE, Message, name_of
from vfiouser_virtio.vfio_user.wire.sockets import MessageSocket

MAX_UNREAD = 16 << 20
"""Bytes of replies that the server does not take, beyond which nothing more of it is read: with 32 bytes it asks for a
MiB of memory, as often as it likes."""
_ID_SPACE = 1 << 16
_DMA = (Command.DMA_READ, Command.DMA_WRITE)


class ClientConnection:
    """Connection that sends messages and matches replies. `close` it, and cancel the nursery of its tasks.

    The tasks that wait get a PeerError when the connection ends: ENOTCONN where the server went, EPROTO (and
    ``fatal``) where it broke the protocol. Later calls get the same.
    """

    def __init__(self, sock: socket.socket, name: str, options: ClientOptions, nursery: trio.Nursery) -> None:
        self.name = name
        self.timeout = options.timeout
        """Seconds to wait for each reply."""
        self.version: Version | None = None
        """What was negotiated."""
        self._strict = options.strict
        self._chaos = options.chaos
        self._trace = options.trace
        self._next_id = options.next_id or _counter()
        self._nursery = nursery
        self._main = MessageSocket(sock)
        self._twin: MessageSocket | None = None
        self._outbox = Outbox(self._main, nursery, self._chaos)
        self._twin_outbox: Outbox | None = None
        self._requests = Requests(strict=options.strict)
        self._dma = DmaServer()
        self.dma_messages = 0
        """How many DMA_READ and DMA_WRITE have come, on either socket."""
        self._replies_with_fds: list[Reply] = []
        self._reason: PeerError | None = None
        self._ended = trio.Event()
        nursery.start_soon(self._read, self._main, self._outbox)

    # Asking

    async def request(
        self, command: int, payload: Buffer = b"", fds: Sequence[int] = (), *, timeout: float | None = None
    ) -> Reply:
        """Send a request and wait for its reply; other tasks may do so at the same time.

        ``fds`` stay the caller's: the server gets copies. Raises RemoteError when the server refuses, PeerError with
        ETIMEDOUT when it has not answered after ``timeout`` seconds, and PeerError when the connection has ended.
        """
        reply = await self.exchange(command, payload, fds, timeout=timeout)
        if reply.flags & MessageFlags.ERROR:
            reply.close()
            raise RemoteError(command, reply.error)
        return reply

    async def exchange(
        self,
        command: int,
        payload: Buffer = b"",
        fds: Sequence[int] = (),
        *,
        flags: int = 0,
        message_id: int | None = None,
        size: int | None = None,
        timeout: float | None = None,
    ) -> Reply:
        """As `request`, but an error reply is returned as well, and the header may say what it should not.

        ``size`` is that of the header, by default the right one.
        """
        message_id = self._send_request(command, payload, fds, flags, message_id, size)
        pending = self._requests.add(message_id, command, reply_limit(command, payload))
        return await pending.wait(self.timeout if timeout is None else timeout)

    def post(self, command: int, payload: Buffer = b"", fds: Sequence[int] = ()) -> None:
        """Send a request that has no reply (NO_REPLY), in order with all others."""
        self._send_request(command, payload, fds, MessageFlags.NO_REPLY, None, None)

    def send_raw(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """Put any bytes on the wire, behind what was sent but past the chaos."""
        self._check_open()
        self._outbox.send_raw(data, fds)

    async def flush(self) -> None:
        """Wait until all that was sent is with the kernel, or the server is gone."""
        await self._outbox.flush()

    async def negotiate(self, proposal: VersionProposal) -> Version:
        """Send VERSION, and do what the answer says. `connect` does that, unless it is told not to.

        Raises RemoteError when the server refuses, and a fatal PeerError as `parse_version`.
        """
        reply = await self.request(Command.VERSION, proposal.payload())
        try:
            version = parse_version(proposal, reply.payload)
            if version.twin_fd_index is not None:
                self._open_twin(reply.take_fds(), version.twin_fd_index)
        except PeerError as error:
            self._end(error)
            raise
        finally:
            reply.close()
        size = (proposal.capabilities or {}).get("max_data_xfer_size")
        self._dma.max_data_xfer_size = min(size, MAX_DATA_XFER_SIZE) if isinstance(size, int) else MAX_DATA_XFER_SIZE
        self.version = version
        return version

    def _open_twin(self, fds: list[int], index: int) -> None:
        try:
            if index >= len(fds):
                raise protocol_error(f"VERSION: the twin socket has fd_index {index:#x} of {len(fds):#x} fds")
            try:
                sock = socket.socket(fileno=fds[index])
            except OSError as error:
                raise protocol_error(f"VERSION: the twin socket's fd is no socket ({error.strerror})") from None
            del fds[index]
        finally:
            close_all(fds)
        self._twin = MessageSocket(sock)
        self._twin_outbox = Outbox(self._twin, self._nursery, self._chaos)
        self._nursery.start_soon(self._read, self._twin, self._twin_outbox)

    # Ending

    @property
    def alive(self) -> bool:
        """Whether the connection has not ended, as far as we know."""
        return self._reason is None

    async def wait_closed(self) -> PeerError:
        """Wait until the connection has ended; returns why."""
        await self._ended.wait()
        assert self._reason is not None
        return self._reason

    def disconnect(self) -> None:
        """Close the connection now, in the middle of whatever; all that wait get a PeerError."""
        self._end(PeerError("the client has disconnected", errno.ENOTCONN))

    def close(self) -> None:
        """`disconnect`, and close all fds that came with replies."""
        self.disconnect()
        for reply in self._replies_with_fds:
            reply.close()

    def _end(self, reason: PeerError) -> None:
        if self._reason is not None:
            return
        self._reason = PeerError(f"{self.name}: {reason}", reason.errno, fatal=reason.fatal)
        for sock, outbox in ((self._main, self._outbox), (self._twin, self._twin_outbox)):
            if sock is not None and outbox is not None:
                trio.lowlevel.notify_closing(sock.socket)
                sock.close()
                outbox.close()
        self._requests.close(self._reason)
        self._ended.set()

    def _check_open(self) -> None:
        if self._reason is not None:
            raise PeerError(str(self._reason), self._reason.errno, fatal=self._reason.fatal)

    # Sending

    def _send_request(
        self, command: int, payload: Buffer, fds: Sequence[int], flags: int, message_id: int | None, size: int | None
    ) -> int:
        self._check_open()
        if message_id is None:
            message_id = self._next_id()
        size = HEADER_SIZE + len(payload) if size is None else size
        self._send(self._outbox, HEADER_CODEC.pack(message_id, command, size, flags, 0) + payload, fds)
        return message_id

    def _send(self, outbox: Outbox, data: bytes, fds: Sequence[int] = ()) -> None:
        if self._trace is not None:
            message_id, command, _size, flags, error = HEADER_CODEC.unpack_from(data)
            body = memoryview(data)[HEADER_SIZE:]
            self._trace(Direction.CLIENT_TO_SERVER, Message(message_id, command, flags, error, body, list(fds)))
        outbox.send(data, fds)

    # Receiving

    async def _read(self, sock: MessageSocket, outbox: Outbox) -> None:
        try:
            while not self._ended.is_set():
                await trio.lowlevel.wait_readable(sock.socket)
                if self._ended.is_set():  # between the kernel's word and our turn
                    return
                try:
                    alive = sock.receive_nowait()
                except BlockingIOError:
                    continue
                if not alive:
                    where = " in the middle of a message" if sock.connection.close() else ""
                    which = " the twin socket" if sock is self._twin else " the connection"
                    raise PeerError(f"the server closed{which}{where}", errno.ENOTCONN)
                while not self._ended.is_set() and sock.connection.next():
                    self._receive(sock, outbox, sock.connection.message())
                    if sock.queued > MAX_UNREAD:
                        await outbox.flush()
        except trio.ClosedResourceError:
            pass  # by `_end`
        except PeerError as error:
            # What the framing refuses (`Connection`) says EINVAL: the errno that a server would answer with.
            self._end(protocol_error(str(error)) if error.fatal else error)

    def _receive(self, sock: MessageSocket, outbox: Outbox, message: Message) -> None:
        try:
            if self._trace is not None:
                self._trace(Direction.SERVER_TO_CLIENT, message)
            if message.is_reply and sock is self._main:
                self._receive_reply(message)
            elif message.flags & MESSAGE_TYPE_MASK:
                where = "twin" if sock is self._twin else "main"
                raise protocol_error(
                    f"{name_of(message.command)}: flags {message.flags:#x} are not of a message for the {where} socket"
                )
            else:
                self._serve(sock, outbox, message)
        finally:
            close_all(message.take_fds())

    def _receive_reply(self, message: Message) -> None:
        pending = self._requests.match(message)
        if pending is None:
            return
        if message.fds_lost:
            text = f"{name_of(message.command)}: not all fds of the reply arrived; are there too many open?"
            pending.finish(None, PeerError(text, errno.EMFILE))
            return
        # Those of other replies are closed: a server that puts them on each would use up all numbers that we have.
        fds = message.take_fds() if message.command in MAY_HAVE_FDS else []
        reply = Reply(bytes(message.body), fds, message.flags, message.error)
        if reply.fds:
            self._replies_with_fds.append(reply)
        pending.finish(reply, None)

    def _serve(self, sock: MessageSocket, outbox: Outbox, message: Message) -> None:
        """A request of the server: DMA_READ and DMA_WRITE; anything else gets QEMU's answer, ENOSYS."""
        self.dma_messages += message.command in _DMA
        if self._twin is not None and sock is self._main and message.command in _DMA:
            raise protocol_error(f"{name_of(message.command)}: on the main socket, although there is a twin socket")
        reply = self._dma.answer(message)
        if not message.wants_reply:
            return
        if self._chaos is None:
            self._send(outbox, reply)
        else:
            kept = replace(message, body=bytes(message.body), fds=[])
            self._play(outbox, iter(self._chaos.dma_reply(kept, reply)))

    def _play(self, outbox: Outbox, answers: Iterator[bytes | float]) -> None:
        """Send until there is a pause; then go on in a task."""
        for answer in answers:
            if isinstance(answer, bytes):
                self._send(outbox, answer)
            else:
                self._nursery.start_soon(self._play_later, outbox, answers, answer)
                return

    async def _play_later(self, outbox: Outbox, answers: Iterator[bytes | float], pause: float) -> None:
        await trio.sleep(pause)
        self._play(outbox, answers)


def _counter() -> Callable[[], int]:
    last = -1

    def count() -> int:
        nonlocal last
        last = (last + 1) % _ID_SPACE
        return last

    return count
