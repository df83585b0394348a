"""Client's end of a connection to a server under test: what was sent, what is owed for it, and whether that comes.

DMA requests of the server are answered out of the RAM of the case. What is wrong is kept in `ServerConnection.found`
and raised by the next call, so that no other task has to be asked.
"""

import errno
import math
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.vfio_user import (
    COMMANDS,
    DMA_ACCESS,
    HEADER_CODEC,
    MESSAGE_TYPE_MASK,
    Command,
    MessageFlags,
)
from vfiouser_virtio.testing.fuzz.message_step import command_name
from vfiouser_virtio.testing.fuzz.oracle import Found
from vfiouser_virtio.testing.fuzz.ram import SIZE, FuzzRam
from vfiouser_virtio.testing.fuzz.servers.replies import body_complaint, fds_complaint, header_complaint
from vfiouser_virtio.testing.raw.client import HEADER_SIZE, RawClient, RawMessage, raw_message

_DMA_SIZE = DMA_ACCESS.sizeof()
_MAX_DMA = 1 << 20
# Of one connection: a server that asks for ever is not answered for ever.
_MAX_DMA_REQUESTS = 2000
_EARLY = 20
"""A message before VERSION is given so small a part of the time that a reply may take: it need not be answered."""
_HUNG_UP = (errno.EPIPE, errno.ECONNRESET, errno.EBADF, errno.ENOTCONN)


@dataclass(slots=True, eq=False)
class Owed:
    """Reply that is due, or may come."""

    id: int
    command: int
    body: bytes
    """Of the request."""
    sent: float
    due: bool
    """It must come; else it may."""
    early: bool = False
    """Sent before VERSION was answered, which some servers mind."""
    done: trio.Event = field(default_factory=trio.Event)
    reply: RawMessage | None = None


class ServerConnection:
    """One connection. `run` reads it until it ends; everything else may be called meanwhile."""

    def __init__(self, sock: socket.socket, ram: FuzzRam, *, wait: float, trusted: bool = True) -> None:
        """``wait``: seconds for a reply. Not ``trusted``: a second client, which a server may leave waiting."""
        self.closed = trio.Event()
        """The server has hung up, or we have."""
        self.found: Found | None = None
        self.in_step = True
        """Both sides agree where a message begins."""
        self.deaf = False
        """Replies are no longer read."""
        self.agreed = False
        """VERSION was answered, and not with an error."""
        self.ours = False
        """We have hung up."""
        self.slowest = 0.0
        """Seconds of the slowest reply."""
        self.last_command = 0
        self._raw = RawClient(sock, timeout=math.inf)
        self._ram = ram
        self._wait = wait
        self._trusted = trusted
        self._owed: list[Owed] = []
        self._reading = trio.CancelScope()
        self._dma_requests = 0
        self._sending = trio.Lock()

    @property
    def socket(self) -> socket.socket:
        """The socket itself."""
        return self._raw.socket

    # ---- sending -------------------------------------------------------------------------------------------------

    async def send(self, data: bytes, fds: Sequence[int] = (), cuts: Sequence[int] = ()) -> list[Owed]:
        """Any bytes, which may be several messages; what is owed for them. Raises Found if they are not taken."""
        if self.closed.is_set():
            return []
        owed = self._expect(data)
        async with self._sending:
            await self._send(data, fds, cuts)
        return owed

    def _expect(self, data: bytes) -> list[Owed]:
        owed: list[Owed] = []
        at = 0
        while self.in_step and at < len(data):
            if len(data) - at < HEADER_SIZE:
                self.in_step = False
                break
            message_id, command, size, flags, _ = HEADER_CODEC.unpack_from(data, at)
            self.last_command = command
            if not HEADER_SIZE <= size <= len(data) - at:
                self.in_step = False
                break
            kind = flags & MESSAGE_TYPE_MASK
            # What a server makes of a reply that it did not ask for, or of no type that there is, is its own affair.
            asks = kind == 0 and self._trusted
            due = asks and (self.agreed or command == Command.VERSION)
            if not flags & MessageFlags.NO_REPLY or kind:
                body = data[at + HEADER_SIZE : at + size]
                one = Owed(message_id, command, body, time.monotonic(), due, early=asks and not due)
                owed.append(one)
                self._owed.append(one)
            at += size
        return owed

    async def _send(self, data: bytes, fds: Sequence[int], cuts: Sequence[int] = ()) -> None:
        try:
            with trio.fail_after(0.2 if self.deaf or not self._trusted else self._wait):
                await self._raw.send(data, fds, cuts)
        except trio.TooSlowError:
            self.in_step = False
            if not self.deaf and self._trusted:
                raise Found("hang", f"the server has not read its socket for {self._wait:g} s", "socket") from None
        except OSError as error:
            if error.errno not in _HUNG_UP:
                raise

    async def result(self, owed: Sequence[Owed]) -> None:
        """All that is due has come, or the server has hung up. Raises Found where it does not come, or is wrong."""
        for one in owed:
            if not one.due or self.deaf or not self.in_step:
                continue
            with trio.move_on_after(self._wait):
                await one.done.wait()
            self.check()
            if not one.done.is_set():
                name = command_name(one.command)
                raise Found("hang", f"no reply to {name} within {self._wait:g} s", name)

    async def drain(self) -> None:
        """All that is due, of all that was sent; and, for a moment, what a server answers that hears no VERSION."""
        await self.result(list(self._owed))
        early = [owed for owed in self._owed if owed.early and self.in_step and not self.deaf]
        with trio.move_on_after(self._wait / _EARLY):
            for owed in early:
                await owed.done.wait()

    async def call(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> RawMessage | None:
        """A good request and its reply; None where the server hangs up. Raises Found."""
        owed = await self.send(raw_message(command, payload, message_id=command), fds)
        await self.result(owed)
        return owed[0].reply if owed else None

    def check(self) -> None:
        """Raise what was found, if anything."""
        if self.found is not None:
            raise self.found

    # ---- receiving -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Read until the end of the connection, or until `stop_reading`."""
        try:
            with self._reading:
                while True:
                    message = await self._raw.receive()
                    try:
                        await self._message(message)
                    finally:
                        close_all(message.fds)
        except (EOFError, OSError, trio.ClosedResourceError):
            pass
        except ValueError as error:
            self.found = Found("reply", str(error), "size")
        except Found as error:
            self.found = error
        if not self._reading.cancelled_caught:
            self._end()

    def _end(self) -> None:
        self.closed.set()
        for owed in self._owed:
            owed.done.set()
        self._owed.clear()

    def stop_reading(self) -> None:
        """What the server sends from now on stays in the socket."""
        self.deaf = True
        self._reading.cancel()

    async def _message(self, message: RawMessage) -> None:
        if message.flags & MESSAGE_TYPE_MASK == 0:
            await self._dma(message)
            return
        # What need not be answered may have the id of what must be.
        same = sorted((owed for owed in self._owed if owed.id == message.id), key=lambda owed: not owed.due)
        owed = next((one for one in same if one.command == message.command), same[0] if same else None)
        if owed is None:
            # What was made of bytes that were no message, nothing can be said about.
            if self.in_step:
                what = f"a reply to {command_name(message.command)}, id {message.id:#x}, which was not asked for"
                known = message.command in COMMANDS
                raise Found("reply", what, f"unasked {command_name(message.command) if known else 'unknown command'}")
            return
        self._owed.remove(owed)
        owed.done.set()
        self.slowest = max(self.slowest, time.monotonic() - owed.sent)
        name = command_name(owed.command)
        what, where = header_complaint(message, owed.command)
        if what:
            raise Found("reply", what, f"{where} {name}")
        if what := fds_complaint(message, owed.command, owed.body):
            raise Found("reply", what, f"fds {name}")
        if what := body_complaint(message, owed.command, owed.body):
            raise Found("reply", what, f"body {name}")
        if owed.command == Command.VERSION and not message.flags & MessageFlags.ERROR:
            self.agreed = True
        owed.reply = message

    async def _dma(self, message: RawMessage) -> None:
        """Answer a DMA request truthfully, out of the RAM."""
        command, body = message.command, message.body
        name = command_name(command)
        if command not in (Command.DMA_READ, Command.DMA_WRITE) or len(body) < _DMA_SIZE:
            raise Found("reply", f"the server asks for {name} with {len(body):#x} bytes", "request")
        address, count = int.from_bytes(body[:8], "little"), int.from_bytes(body[8:16], "little")
        data = body[_DMA_SIZE:]
        writes = command == Command.DMA_WRITE
        if len(data) != count * writes or not 0 < count <= _MAX_DMA:
            raise Found("reply", f"{name} of {count:#x} bytes at {address:#x} comes with {len(data):#x}", "dma")
        self._dma_requests += 1
        if self._dma_requests > _MAX_DMA_REQUESTS:
            return
        flags, error, answer = MessageFlags.REPLY, 0, body[:_DMA_SIZE]
        if address + count > SIZE:
            flags, error, answer = MessageFlags.REPLY | MessageFlags.ERROR, errno.EFAULT, b""
        elif writes:
            self._ram.write(address, data)
        else:
            answer += self._ram.read(address, count)
        if message.flags & MessageFlags.NO_REPLY:
            return
        async with self._sending:
            await self._send(raw_message(command, answer, message_id=message.id, flags=flags, error=error), ())

    def half_close(self) -> None:
        """Nothing more will be sent, which a server may take for the end."""
        self.in_step = False
        try:
            self.socket.shutdown(socket.SHUT_WR)
        except OSError:
            pass

    def close(self) -> None:
        """Hang up."""
        self.ours = True
        if self.socket.fileno() >= 0:
            trio.lowlevel.notify_closing(self.socket)
            self._raw.close()
        self._end()
