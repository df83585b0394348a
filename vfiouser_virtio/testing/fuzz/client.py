"""Fuzzing vfio-user client: sends anything, checks every answer: in order, of the right size, to what was asked.

It serves the DMA requests of the server out of `FuzzRam`, truthfully or as the case tells it to (`FuzzClient.answers`).
"""

import errno
import json
import math
import os
import socket
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import trio

from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.vfio_user import (
    DMA_ACCESS,
    HEADER_CODEC,
    MESSAGE_TYPE_MASK,
    REGION_ACCESS_CODEC,
    Command,
    MessageFlags,
)
from vfiouser_virtio.testing.fuzz.deadline import ends_within
from vfiouser_virtio.testing.fuzz.message_step import command_name
from vfiouser_virtio.testing.fuzz.oracle import Found
from vfiouser_virtio.testing.fuzz.ram import SIZE, FuzzRam
from vfiouser_virtio.testing.fuzz.store_bounds import StoreBounds
from vfiouser_virtio.testing.raw.client import HEADER_SIZE, MAX_MESSAGE_SIZE, RawClient, RawMessage, raw_message

TIMEOUT = 6.0
"""Seconds that a reply may take: a held one takes up to two, and QEMU gives up after five."""

ANSWERS = ("ok", "error", "short", "long", "empty", "wrong_id", "wrong_command", "twice", "lie", "late", "never")
"""How a DMA request can be answered."""
NO_ANSWER = ("wrong_id", "wrong_command", "never")
"""After these the server still waits for an answer."""

# Plain ints: an enum's member takes ten times as long, and there are dozens of messages in each case.
_TYPE, _REPLY, _ERROR = int(MESSAGE_TYPE_MASK), int(MessageFlags.REPLY), int(MessageFlags.ERROR)
_NO_REPLY = int(MessageFlags.NO_REPLY)
_ACCESS_SIZE = HEADER_SIZE + REGION_ACCESS_CODEC.size
_DMA_SIZE = DMA_ACCESS.sizeof()
_MAX_DMA_READ = 32 << 10  # more would make QEMU lose part of its reply


@dataclass(slots=True, eq=False)
class Asked:
    """Request whose reply is due."""

    id: int
    command: int
    count: int | None
    """Bytes of data that the reply to a REGION_READ has."""
    limit: int
    """Bytes of the largest reply."""
    done: trio.Event = field(default_factory=trio.Event)
    reply: RawMessage | None = None


def hello(*, twin: bool = False, text: str | None = None) -> bytes:
    """The payload of VERSION, as QEMU sends it but for ``twin``."""
    capabilities: dict[str, object] = {"max_msg_fds": 16, "max_data_xfer_size": 1 << 20, "pgsizes": 4096}
    capabilities |= {"max_dma_maps": 65535, "write_multiple": True}
    if twin:
        capabilities["twin_socket"] = {"supported": True}
    return bytes(4) + (text or json.dumps({"capabilities": capabilities})).encode() + b"\0"


class FuzzClient:
    """Client on one connection. `run` reads it until it ends; everything else may be called meanwhile."""

    def __init__(self, sock: socket.socket, ram: FuzzRam, bounds: StoreBounds, *, timeout: float = TIMEOUT) -> None:
        self.timeout = timeout
        """Seconds that a reply may take, and the server to read a message."""
        self.closed = trio.Event()
        """The server has hung up, or we have."""
        self.in_step = True
        """Both sides agree where a message begins; after a wrong size they do not, and nothing is promised any more."""
        self.doomed = False
        """What was sent ends the connection for sure."""
        self.ours = False
        """We have hung up."""
        self.answers: deque[str] = deque()
        """How to answer the next DMA requests; then truthfully."""
        self.lied = False
        """A DMA request was not answered as it should be: the device may wait, or give up."""
        self.silent = False
        """One was never answered: while the connection lasts it counts as under way, and others may have to wait."""
        self._socket = RawClient(sock, timeout=timeout)
        self._twin: RawClient | None = None
        self._ram = ram
        self._bounds = bounds
        self._asked: deque[Asked] = deque()
        self._late: list[tuple[RawClient, bytes]] = []
        self._last_id = 0x100
        self._posted = b""
        self._sending = trio.Lock()
        self._nursery: trio.Nursery | None = None

    @property
    def twin(self) -> bool:
        """DMA requests have a socket of their own, so that nothing orders them with replies."""
        return self._twin is not None

    @property
    def heard(self) -> bool:
        """What is sent is taken for what it is: a reset, say. Else the device may go on as it was."""
        return self.in_step and not self.doomed and not self.closed.is_set()

    # ---- sending -------------------------------------------------------------------------------------------------

    async def call(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> RawMessage | None:
        """A request as it should be, and its reply; None where the server hung up."""
        return await self.result(await self.ask(command, payload, fds))

    async def ask(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Asked | None:
        """A request as it should be; `result` waits for its reply."""
        self._last_id = self._last_id + 1 & 0xFFFF
        return await self.send(raw_message(command, payload, message_id=self._last_id), fds)

    def post(self, command: int, payload: bytes) -> None:
        """A request that wants no reply; it goes out together with the next `send` or `flush`."""
        if self.in_step:
            self._posted += raw_message(command, payload, flags=MessageFlags.NO_REPLY)

    async def flush(self) -> None:
        """Send what was posted, and let the server have its turn."""
        await self._put(self._socket, b"")
        await trio.lowlevel.checkpoint()

    async def send(self, data: bytes, fds: Sequence[int] = (), cuts: Sequence[int] = ()) -> Asked | None:
        """Any bytes at all, in pieces that end at ``cuts``; the fds ride on the first. What to expect is worked out."""
        asked = self._expect(data)
        await self._put(self._socket, data, fds, cuts)
        return asked

    async def _put(self, sock: RawClient, data: bytes, fds: Sequence[int] = (), cuts: Sequence[int] = ()) -> None:
        """Send ``data`` behind what is being sent, and what was posted. No checkpoint where the socket has room."""
        try:
            self._sending.acquire_nowait()
        except trio.WouldBlock:
            await self._sending.acquire()
        try:
            if sock is self._socket:
                posted, self._posted = self._posted, b""
                if fds or cuts:
                    await self._send(sock, posted)
                else:
                    data = posted + data
            await self._send(sock, data, fds, cuts)
        finally:
            self._sending.release()

    def _expect(self, data: bytes) -> Asked | None:
        if not self.in_step or self.doomed or self.closed.is_set():
            return None
        if len(data) < HEADER_SIZE:
            self.in_step = not data
            return None
        message_id, command, size, flags, _ = HEADER_CODEC.unpack_from(data)
        if size != len(data):
            self.in_step = False
            self.doomed = size < HEADER_SIZE or size > MAX_MESSAGE_SIZE
            return None
        kind = flags & _TYPE
        self.doomed = kind > _REPLY
        if kind or flags & _NO_REPLY:
            return None
        count = None
        if command == Command.REGION_READ and size >= _ACCESS_SIZE:
            count = REGION_ACCESS_CODEC.unpack_from(data, HEADER_SIZE)[2]
        argsz = int.from_bytes(data[HEADER_SIZE : HEADER_SIZE + 4], "little")
        # facts of QEMU: no reply may be longer than its request, but for those that bring what was asked for.
        limit = max(size, HEADER_SIZE + argsz if command in _WITH_ARGSZ else 0)
        asked = Asked(message_id, command, count, limit if count is None else _ACCESS_SIZE + count)
        self._asked.append(asked)
        return asked

    async def result(self, asked: Asked | None) -> RawMessage | None:
        """The reply to what was sent; None where none is due any more. Raises Found where it does not come."""
        if asked is None:
            return None
        if asked.done.is_set():  # it came with another one's
            return asked.reply
        if await ends_within(self.timeout, asked.done.wait):
            return asked.reply
        name = command_name(asked.command)
        raise Found("hang", f"no reply to {name} within {self.timeout} s", name)

    async def _send(self, sock: RawClient, data: bytes, fds: Sequence[int] = (), cuts: Sequence[int] = ()) -> None:
        if self.closed.is_set() or not data:
            return
        try:
            await sock.send(data, fds, cuts)
        except trio.TooSlowError:
            raise Found("hang", f"the server has not read its socket for {self.timeout} s", "socket") from None
        except OSError as error:
            if error.errno not in (errno.EPIPE, errno.ECONNRESET, errno.EBADF):
                raise

    # ---- receiving -----------------------------------------------------------------------------------------------

    async def run(self) -> None:
        """Read until the end of the connection."""
        async with trio.open_nursery() as self._nursery:
            await self._receive(self._socket)
            self._nursery.cancel_scope.cancel()
        self.closed.set()
        for asked in self._asked:
            asked.done.set()
        self._asked.clear()

    async def _receive(self, sock: RawClient) -> None:
        while True:
            try:
                message = await sock.receive(math.inf)
            except (EOFError, OSError, trio.ClosedResourceError):
                return
            except ValueError as error:
                raise Found("reply", str(error)) from None
            try:
                await self._message(sock, message)
            finally:
                close_all(message.fds)

    async def _message(self, sock: RawClient, message: RawMessage) -> None:
        message_id, command, flags, number = message.id, message.command, message.flags, message.error
        if flags & _TYPE == 0:
            await self._dma(sock, message_id, command, message.body)
            return
        if flags & ~(_REPLY | _ERROR) or not flags & _REPLY:
            raise Found("reply", f"{_called(message)}: no such flags", "flags")
        if bool(flags & _ERROR) != bool(number) or (number and message.body):
            raise Found("reply", f"{_called(message)}: an error that is none, or has a body", "error")
        if not self._asked:
            if self.in_step:
                raise Found("reply", f"{_called(message)}, which was not asked for", "unasked")
            return
        asked = self._asked.popleft()
        if (asked.id, asked.command) != (message_id, command):
            first = f"{command_name(asked.command)} {asked.id:#x}"
            raise Found("reply", f"{_called(message)}, but {first} comes first", "order")
        if not number and asked.count is not None and message.size != asked.limit:
            raise Found("reply", f"{_called(message)}: {message.size:#x} bytes, {asked.limit:#x} expected", "size")
        if message.size > asked.limit:
            raise Found("reply", f"{_called(message)}: {message.size:#x} bytes, {asked.limit:#x} are allowed", "size")
        if command == Command.VERSION and message.fds and self._twin is None:
            self._twin = RawClient(socket.socket(fileno=os.dup(message.fds[0])), timeout=self.timeout)
            assert self._nursery is not None
            self._nursery.start_soon(self._receive, self._twin)
        asked.reply = message
        asked.done.set()

    # ---- memory without a file descriptor ------------------------------------------------------------------------

    async def _dma(self, sock: RawClient, message_id: int, command: int, body: bytes) -> None:
        if command not in (Command.DMA_READ, Command.DMA_WRITE) or len(body) < _DMA_SIZE:
            raise Found("reply", f"the server asks for {command_name(command)} with {len(body):#x} bytes", "request")
        address, count = int.from_bytes(body[:8], "little"), int.from_bytes(body[8:16], "little")
        data = body[_DMA_SIZE:]
        writes = command == Command.DMA_WRITE
        if len(data) != count * writes or count == 0 or count > (1 << 20 if writes else _MAX_DMA_READ):
            raise Found(
                "reply", f"{command_name(command)} of {count:#x} bytes at {address:#x} with {len(data):#x}", "dma"
            )
        how = self.answers.popleft() if self.answers else "ok"
        self.lied |= how != "ok"
        self.silent |= how in NO_ANSWER
        if writes and address < SIZE:
            self._bounds.check_store(address, data)
            self._ram.write(address, data)
        answer = b"" if writes else self._ram.read(address, count)
        if address >= SIZE and how == "ok":
            how = "error"
            self.lied = True
        if how == "lie" and answer:
            self._bounds.blind = True
            answer = bytes(byte ^ 0x5A if at % 3 == 1 else byte for at, byte in enumerate(answer))
        await self._answer(sock, how, message_id, command, body[:_DMA_SIZE] + answer)

    async def _answer(self, sock: RawClient, how: str, message_id: int, command: int, payload: bytes) -> None:
        if how == "never":
            return
        if how == "error":
            flags = MessageFlags.REPLY | MessageFlags.ERROR
            reply = raw_message(command, message_id=message_id, flags=flags, error=errno.EFAULT)
        else:
            message_id ^= 0x8000 if how == "wrong_id" else 0
            command = Command.DEVICE_RESET if how == "wrong_command" else command
            changed = {"short": payload[:-1], "long": payload + bytes(7), "empty": b""}
            payload = changed.get(how, payload)
            reply = raw_message(command, payload, message_id=message_id, flags=MessageFlags.REPLY)
        if how == "late":
            self._late.append((sock, reply))
            return
        for _ in range(2 if how == "twice" else 1):
            await self._put(sock, reply)

    async def answer_late(self) -> None:
        """Send the replies that were held back."""
        late, self._late = self._late, []
        for sock, reply in late:
            await self._put(sock, reply)

    def close(self) -> None:
        """Hang up."""
        self.ours = True
        for sock in (self._socket, self._twin):
            if sock is not None and sock.socket.fileno() >= 0:
                trio.lowlevel.notify_closing(sock.socket)
                sock.close()


def _called(message: RawMessage) -> str:
    name, flags, error = command_name(message.command), message.flags, message.error
    return f"reply {message.id:#x} to {name}, flags {flags:#x}, error {error}"


_WITH_ARGSZ = (Command.DEVICE_GET_REGION_INFO, Command.DEVICE_GET_REGION_IO_FDS, Command.DEVICE_FEATURE)
