"""Raw vfio-user client ("Message Protocol"), byte by byte: what QEMU would send, or what no client should.

`vfiouser_virtio.vfio_user.Client` is the one that keeps the rules, with `Chaos` for faults in what it does by itself.
"""

import json
import math
import socket
import struct
from array import array
from collections.abc import Sequence

import trio

from vfiouser_virtio.fds import close_all
from vfiouser_virtio.protocols.vfio_user import HEADER_CODEC, Command

HEADER_SIZE = HEADER_CODEC.size
MAX_MESSAGE_SIZE = (1 << 20) + 4096
TIMEOUT = 60.0
"""Seconds for the server to take, or to answer, one message."""

# facts: the JSON of QEMU 11.1's VERSION, key for key; 214 bytes in all with header, version and NUL.
QEMU_CAPABILITIES = (
    '{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "max_data_xfer_size": 1048576, '
    '"migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true}}'
)


def raw_message(
    command: int, payload: bytes = b"", *, message_id: int = 0, flags: int = 0, error: int = 0, size: int | None = None
) -> bytes:
    """Header and payload; ``size`` is that of the header, by default the right one."""
    size = HEADER_SIZE + len(payload) if size is None else size
    return HEADER_CODEC.pack(message_id, command, size, flags, error) + payload


class RawMessage:
    """Message from the server; its fds are the caller's to close."""

    def __init__(self, raw: bytes, fds: list[int]) -> None:
        self.raw = raw
        self.id, self.command, self.size, self.flags, self.error = HEADER_CODEC.unpack_from(raw)
        self.body = raw[HEADER_SIZE:]
        self.fds = fds


class RawClient:
    """Client that sends and receives; `call` does both. Every wait ends with TooSlowError after ``timeout`` seconds."""

    def __init__(self, sock: socket.socket, *, timeout: float = TIMEOUT) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.timeout = timeout
        self.last_id = 0

    async def send(self, data: bytes, fds: Sequence[int] = (), cuts: Sequence[int] = ()) -> None:
        """All of ``data``, in pieces that end at ``cuts``; the fds ride on the first byte. Raises OSError."""
        ends = [*sorted(cut for cut in set(cuts) if 0 < cut < len(data)), len(data)]
        start, deadline = 0, trio.current_time() + self.timeout
        while start < len(data):
            ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
            try:
                start += self.socket.sendmsg([data[start : ends[0]]], ancillary)
            except BlockingIOError:
                with trio.fail_at(deadline):
                    await trio.lowlevel.wait_writable(self.socket)
                continue
            fds = ()
            if start == ends[0] < len(data):
                del ends[0]
                await trio.lowlevel.checkpoint()

    async def receive(self, timeout: float | None = None) -> RawMessage:
        """The next message, within another ``timeout`` if so said.

        Raises EOFError at the end of the stream, ValueError for a size that no message has.
        """
        fds: list[int] = []
        deadline = trio.current_time() + (self.timeout if timeout is None else timeout)
        try:
            header = await self._exactly(HEADER_SIZE, fds, deadline)
            size = HEADER_CODEC.unpack(header)[2]
            if not HEADER_SIZE <= size <= MAX_MESSAGE_SIZE:
                raise ValueError(f"the server sent a message of {size:#x} bytes")
            return RawMessage(header + await self._exactly(size - HEADER_SIZE, fds, deadline), fds)
        except BaseException:
            close_all(fds)
            raise

    async def _exactly(self, count: int, fds: list[int], deadline: float) -> bytes:
        data = b""
        while len(data) < count:
            try:
                piece, ancillary, _flags, _ = self.socket.recvmsg(
                    count - len(data), socket.CMSG_SPACE(64 * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                if deadline == math.inf:  # a scope costs as much as the wait
                    await trio.lowlevel.wait_readable(self.socket)
                    continue
                with trio.fail_at(deadline):
                    await trio.lowlevel.wait_readable(self.socket)
                continue
            if not piece:
                raise EOFError
            data += piece
            for _level, _kind, raw in ancillary:
                fds += array("i", raw)
        return data

    def request(self, command: int, payload: bytes = b"", flags: int = 0) -> bytes:
        """The bytes of a request with the next id."""
        self.last_id += 1
        return raw_message(command, payload, message_id=self.last_id, flags=flags)

    async def call(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> RawMessage:
        """Ask and get the answer, which must be to this question."""
        await self.send(self.request(command, payload), fds)
        reply = await self.receive()
        assert (reply.id, reply.command) == (self.last_id, command)
        return reply

    async def version(self, text: str | None = QEMU_CAPABILITIES, minor: int = 0) -> RawMessage:
        """Negotiate; ``text`` is the JSON, None for a request without."""
        data = b"" if text is None else text.encode() + b"\0"
        return await self.call(Command.VERSION, struct.pack("<HH", 0, minor) + data)

    async def capabilities(self, **keys: object) -> RawMessage:
        """Negotiate with these capabilities."""
        return await self.version(json.dumps({"capabilities": keys}))

    async def no_more(self) -> None:
        """The server has closed the connection."""
        with trio.fail_after(self.timeout):
            await trio.lowlevel.wait_readable(self.socket)
            try:
                assert self.socket.recv(1) == b""
            except ConnectionResetError:
                pass

    async def silence(self, seconds: float = 0.05) -> None:
        """Nothing comes."""
        with trio.move_on_after(seconds):
            await trio.lowlevel.wait_readable(self.socket)
            raise AssertionError(f"unexpected {self.socket.recv(4096)!r}")

    def close(self) -> None:
        self.socket.close()
