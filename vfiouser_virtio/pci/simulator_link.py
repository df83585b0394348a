"""Connection of a `Bridge` to one simulator: bytes in, messages out, and a bounded queue of what it has not taken."""

import socket
from contextlib import suppress
from typing import NamedTuple

import trio

from vfiouser_virtio.protocols.rtl_bridge import HEADER_CODEC, MAX_MESSAGE, REPLY, RtlMessage

MAX_UNSENT = 1 << 20
"""Bytes of replies that a simulator does not read, beyond which nothing that it has asked is done."""
_PIECE = 64 << 10
_KINDS = frozenset(RtlMessage)


class SimulatorError(Exception):
    """Error of the simulator's end: it sent what the protocol does not allow. Its connection ends."""


class SimulatorMessage(NamedTuple):
    """Message as it came."""

    kind: RtlMessage
    is_reply: bool
    status: int
    number: int
    body: bytes


class SimulatorLink:
    """Connection that is a non-blocking ``sock``. `send` never waits; `flush` is a task that sends what is left."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.greeted = False
        """Whether HELLO has been answered, and the simulator can be asked."""
        self.gone = ""
        """Why it has ended."""
        self._received = bytearray()
        self._unsent = bytearray()
        self._broken = False
        self._changed = trio.lowlevel.ParkingLot()

    def send(self, data: bytes) -> None:
        """Send, or keep for `flush`. To a peer that is gone nothing is sent; `receive` tells of that."""
        if not self._unsent and not self._broken:
            data = data[self._send_now(data) :]
        if data and not self._broken:
            self._unsent += data
            self._changed.unpark_all()

    def _send_now(self, data: bytes | bytearray) -> int:
        try:
            return self.socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            self._broken = True
            self._unsent.clear()
            self._changed.unpark_all()
            return 0

    async def flush(self) -> None:
        """Send what is kept as soon as the peer takes it, until cancelled."""
        while True:
            while not self._unsent:
                await self._changed.park()
            await trio.lowlevel.wait_writable(self.socket)
            del self._unsent[: self._send_now(self._unsent)]
            self._changed.unpark_all()

    async def wait_taken(self) -> None:
        """Wait until the peer has taken so much that there is room for another reply."""
        while len(self._unsent) > MAX_UNSENT:
            await self._changed.park()

    async def receive(self) -> None:
        """Wait for bytes, and take them, or see that it has `gone`. Cancelled, nothing of them is lost."""
        await trio.lowlevel.wait_readable(self.socket)
        try:
            data = self.socket.recv(_PIECE)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        self._received += data
        if not data:
            self.gone = self.gone or "it has closed its socket"

    def next(self) -> SimulatorMessage | None:
        """The next message that is complete. Raises SimulatorError for a header that cannot be."""
        if len(self._received) < HEADER_CODEC.size:
            return None
        size, kind, status, number = HEADER_CODEC.unpack_from(self._received)
        if not HEADER_CODEC.size <= size <= MAX_MESSAGE:
            raise SimulatorError(
                f"a message of {size:#x} bytes; {HEADER_CODEC.size:#x} to {MAX_MESSAGE:#x} are allowed"
            )
        if kind & ~REPLY not in _KINDS:
            raise SimulatorError(f"a message of kind {kind:#x}, which is unknown")
        if len(self._received) < size:
            return None
        body = bytes(self._received[HEADER_CODEC.size : size])
        del self._received[:size]
        return SimulatorMessage(RtlMessage(kind & ~REPLY), bool(kind & REPLY), status, number, body)

    def cut_off(self, why: str) -> None:
        """End it, where another task may be in `receive`."""
        self.greeted = False
        self.gone = why
        with suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """No more of it."""
        self.socket.close()
