"""The client's end of a vfio-user socket, byte by byte: what QEMU would send, or what nobody should."""

import json
import socket
import struct
from array import array
from collections.abc import Sequence

import trio

from vfiouser_virtio.protocols.vfio_user import HEADER_CODEC, Command

# facts: the JSON of QEMU 11.1's VERSION, key for key; 214 bytes in all with header, version and NUL.
QEMU_CAPABILITIES = (
    '{"capabilities": {"pgsizes": 4096, "max_msg_fds": 16, "max_dma_maps": 65535, "max_data_xfer_size": 1048576, '
    '"migration": {"max_bitmap_size": 268435456, "pgsize": 4096}, "write_multiple": true}}'
)


class Reply:
    """One message from the server."""

    def __init__(self, raw: bytes, fds: list[int]) -> None:
        self.raw = raw
        self.id, self.command, self.size, self.flags, self.error = HEADER_CODEC.unpack_from(raw)
        self.body = raw[16:]
        self.fds = fds


class RawClient:
    """Sends and receives; `call` does both. Every wait ends after five seconds, as QEMU's does."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.last_id = 0

    async def send(self, data: bytes, fds: Sequence[int] = ()) -> None:
        """All of ``data``; the fds ride on its first byte."""
        with trio.fail_after(60):
            while data:
                ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", fds))] if fds else []
                try:
                    sent = self.socket.sendmsg([data], ancillary)
                except BlockingIOError:
                    await trio.lowlevel.wait_writable(self.socket)
                    continue
                data, fds = data[sent:], ()

    async def receive(self) -> Reply:
        """The next message. Raises EOFError at the end of the stream."""
        with trio.fail_after(60):
            header, fds = await self._exactly(16)
            body, more = await self._exactly(HEADER_CODEC.unpack(header)[2] - 16)
            return Reply(header + body, fds + more)

    async def _exactly(self, count: int) -> tuple[bytes, list[int]]:
        data = b""
        fds: list[int] = []
        while len(data) < count:
            try:
                piece, ancillary, _flags, _ = self.socket.recvmsg(
                    count - len(data), socket.CMSG_SPACE(64), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                await trio.lowlevel.wait_readable(self.socket)
                continue
            if not piece:
                raise EOFError
            data += piece
            for _level, _kind, raw in ancillary:
                fds += list(array("i", raw))
        return data, fds

    def request(self, command: int, payload: bytes = b"", flags: int = 0) -> bytes:
        """The bytes of a request with the next id."""
        self.last_id += 1
        return HEADER_CODEC.pack(self.last_id, command, 16 + len(payload), flags, 0) + payload

    async def call(self, command: int, payload: bytes = b"", fds: Sequence[int] = ()) -> Reply:
        """Ask and get the answer, which must be to this question."""
        await self.send(self.request(command, payload), fds)
        reply = await self.receive()
        assert (reply.id, reply.command) == (self.last_id, command)
        return reply

    async def version(self, text: str | None = QEMU_CAPABILITIES, minor: int = 0) -> Reply:
        """Negotiate; ``text`` is the JSON, None for a request without."""
        data = b"" if text is None else text.encode() + b"\0"
        return await self.call(Command.VERSION, struct.pack("<HH", 0, minor) + data)

    async def capabilities(self, **keys: object) -> Reply:
        """Negotiate with these capabilities."""
        return await self.version(json.dumps({"capabilities": keys}))

    async def no_more(self) -> None:
        """The server has closed the connection."""
        with trio.fail_after(60):
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
