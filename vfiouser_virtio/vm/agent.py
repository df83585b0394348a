"""Host end of the guest's agent (guest/agent): commands over the second ISA serial port, one after another."""

import re
import secrets
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass

import trio

# Fits the kernel's receive buffers (64 KiB): the port has no flow control in this direction.
MAX_COMMAND = 32 << 10
MAX_OUTPUT = 256 << 20
"""Bytes of a command's output: a guest that says it has more to say, and says it, gets no more of our memory."""
# Bytes without a newline: a guest that writes to its port without one is not listened to for longer.
_MAX_LINE = 64 << 10

_READY = re.compile(rb"vm-agent ready ([0-9a-f-]{36})\r?$")
_PIECE = re.compile(rb"vm-agent piece ([0-9a-f]+) ([12]) (\d{1,9})$")
_DONE = re.compile(rb"vm-agent done ([0-9a-f]+) (\d{1,9}) (\d{1,9})$")


class AgentClosedError(Exception):
    """Closed serial port: QEMU has ended."""


class GuestRebootedError(Exception):
    """Restart of the guest while a command ran."""


@dataclass(frozen=True, slots=True)
class CommandResult:
    """Output of a command in the guest (standard output and error as they came) and its exit status.

    Nothing is in ``output`` that was given away piece by piece.
    """

    output: str
    status: int
    raw_output: bytes


@dataclass(frozen=True, slots=True)
class _Ready:
    boot_id: str


@dataclass(frozen=True, slots=True)
class _Done:
    token: str
    status: int
    output: bytes


@dataclass(frozen=True, slots=True)
class _Piece:
    token: str
    stream: int
    data: bytes


class _Streams:
    """A command's standard output and error, each ended by the command's token."""

    def __init__(self, token: str, output: "Output") -> None:
        self._end = token.encode()
        self._output = output
        self._held = {1: b"", 2: b""}
        self._ended = {1: False, 2: False}

    async def take(self, piece: _Piece) -> None:
        """Give away what cannot be the beginning of the end."""
        stream = piece.stream
        if piece.token.encode() != self._end or self._ended[stream]:
            return
        data = self._held[stream] + piece.data
        given, end, _ = data.partition(self._end)
        self._ended[stream] = bool(end)
        held = 0 if end else next(n for n in range(len(self._end) - 1, -1, -1) if data.endswith(self._end[:n]))
        self._held[stream] = data[len(data) - held :]
        if given := given[: len(given) - held]:
            await self._output(stream, given)


Output = Callable[[int, bytes], Awaitable[None]]
"""Gets what a command prints, as it comes: 1 for standard output or 2 for standard error, and the bytes."""


class Agent:
    """Client of one guest's agent. What a cancelled call received is kept, an answer that comes too late is skipped."""

    def __init__(self, sock: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._buffer = bytearray()
        self._lock = trio.Lock()
        self._piece = ("", 0, 0)  # the token, the stream and how many bytes are still to come of it
        self.boot_id: str | None = None

    async def wait_ready(self, *, new_boot: bool = False) -> None:
        """Wait for the guest's agent, or, with `new_boot`, for the agent of a boot after the one known.

        Raises AgentClosedError when QEMU ends first.
        """
        async with self._lock:
            if self.boot_id is not None and not new_boot:
                return
            while True:
                message = await self._receive()
                if isinstance(message, _Ready) and message.boot_id != self.boot_id:
                    self.boot_id = message.boot_id
                    return

    async def execute(self, script: str, *, answers: bool = True, output: Output | None = None) -> CommandResult | None:
        """Run a shell script in the guest; with `answers` false, return at once, as it ends this boot.

        With `output`, that gets what the script prints, as it comes; the guest waits for it.

        Raises ValueError when the script is too long, AgentClosedError when QEMU ends, GuestRebootedError when the
        guest starts again.
        """
        content = script.encode()
        if len(content) > MAX_COMMAND:
            raise ValueError(
                f"a command of {len(content)} bytes: the guest's serial port takes {MAX_COMMAND} at a time"
            )
        async with self._lock:
            token = secrets.token_hex(8)
            streams = None if output is None else _Streams(token, output)
            how = "together" if output is None else "apart"
            try:
                await self._stream.send_all(f"{token} {len(content)} {how}\n".encode() + content)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                raise AgentClosedError from None
            while answers:
                match await self._receive():
                    case _Done(token=answered, status=status, output=printed) if answered == token:
                        return CommandResult(printed.decode(errors="replace"), status, printed)
                    case _Ready(boot_id=boot_id):
                        self.boot_id = boot_id
                        raise GuestRebootedError
                    case _Piece() as piece if streams is not None:
                        await streams.take(piece)
                    case _:
                        pass
        return None

    def shut_down(self) -> None:
        """End all waits for the guest with AgentClosedError: it will say nothing more."""
        try:
            self._stream.socket.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass

    def close(self) -> None:
        """Close the socket, which must not be in use."""
        self._stream.socket.close()

    async def _receive(self) -> _Ready | _Done | _Piece:
        while (message := self._parse()) is None:
            try:
                received = await self._stream.receive_some()
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                received = b""
            if not received:
                raise AgentClosedError
            self._buffer += received
        return message

    def _parse(self) -> _Ready | _Done | _Piece | None:
        """Take the next whole message off the buffer; lines that are none are skipped (a boot's noise).

        Of a piece there is what has come: a guest that hangs in the middle of it has said that much.
        """
        if not self._buffer:
            return None
        token, stream, left = self._piece
        if left:
            data = bytes(self._buffer[:left])
            del self._buffer[:left]
            self._piece = (token, stream, left - len(data))
            return _Piece(token, stream, data)
        while (end := self._buffer.find(b"\n")) >= 0:
            line = bytes(self._buffer[:end])
            if (match := _DONE.search(line)) and (size := int(match[3])) <= MAX_OUTPUT:
                if len(self._buffer) < end + 1 + size:
                    return None
                output = bytes(self._buffer[end + 1 : end + 1 + size])
                del self._buffer[: end + 1 + size]
                return _Done(match[1].decode(), int(match[2]), output)
            del self._buffer[: end + 1]
            if match := _PIECE.search(line):
                self._piece = (match[1].decode(), int(match[2]), int(match[3]))
                return self._parse()
            if match := _READY.search(line):
                return _Ready(match[1].decode())
        del self._buffer[:-_MAX_LINE]
        return None
