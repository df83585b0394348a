"""The double's socket: what libvfio-user accepts, agrees on, receives and sends."""

import errno
import json
import os
import socket
from typing import Any

from support.vfu_double_device import require

from vfiouser_virtio.protocols.vfio_user import HEADER, VERSION, Command, MessageFlags

_SERVER = {"max_msg_fds": 8, "max_data_xfer_size": 1 << 20}
_SUN_PATH = 108


class GoneError(Exception):
    """The client is not there any more."""


class Wire:
    """A listening socket, and a client at a time."""

    def __init__(self, path: str, non_blocking: bool) -> None:
        require(len(os.fsencode(path)) < _SUN_PATH, errno.ENAMETOOLONG)
        self.path = path
        self.client: socket.socket | None = None
        self._twin: socket.socket | None = None
        self.max_transfer = 1 << 20
        self._last_id = 0
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._listener.bind(path)
            self._listener.listen(0)
        except OSError:
            self._listener.close()
            raise
        self._listener.setblocking(not non_blocking)

    def fileno(self) -> int:
        return (self.client or self._listener).fileno()

    def close(self) -> None:
        os.unlink(self.path)
        self._listener.close()

    def disconnect(self) -> None:
        for sock in (self.client, self._twin):
            if sock is not None:
                sock.close()
        self.client = self._twin = None

    def attach(self) -> None:
        require(self.client is None)
        self.client = self._listener.accept()[0]
        self.client.setblocking(True)
        try:
            self._negotiate()
        except OSError:
            self.client.close()
            self.client = None
            raise

    def _negotiate(self) -> None:
        try:
            header, payload, _ = self.receive()
        except GoneError as gone:
            raise OSError(errno.ENOMSG, "no version") from gone
        try:
            require(header.command == Command.VERSION and len(payload) >= 4)
            version = VERSION.parse(payload)
            require(version.major == 0)
        except OSError as error:
            self.send(header, b"", [], error.errno or 0)
            raise
        capabilities = json.loads(version.data.rstrip(b"\0") or "{}").get("capabilities", {})
        self.max_transfer = capabilities.get("max_data_xfer_size", 1 << 20)
        answer: dict[str, Any] = dict(_SERVER)
        fds = []
        if capabilities.get("twin_socket", {}).get("supported") and capabilities.get("max_msg_fds", 1) > 0:
            answer["twin_socket"] = {"supported": True, "fd_index": 0}
            theirs, self._twin = socket.socketpair()
            fds = [theirs.detach()]
        data = json.dumps({"capabilities": answer}).encode() + b"\0"
        reply = VERSION.build({"major": 0, "minor": min(version.minor, 2), "data": data})
        self.send(header, reply, fds, 0)
        for fd in fds:
            os.close(fd)

    def ask(self, command: Command, payload: bytes) -> bytes:
        """A request of ours; the reply's payload."""
        sock = self._twin or self.client
        assert sock is not None
        self._last_id += 1
        size = HEADER.sizeof() + len(payload)
        header = {"id": self._last_id, "command": command, "size": size, "flags": 0, "error": 0}
        try:
            sock.sendall(HEADER.build(header) + payload)
            reply, payload, _ = self.receive(sock)
        except (GoneError, BrokenPipeError) as error:
            raise GoneError from error
        require(reply.id == self._last_id, errno.EPROTO)
        require(bool(reply.flags & MessageFlags.REPLY))
        require(not reply.flags & MessageFlags.ERROR, reply.error)
        return payload

    def receive(self, sock: socket.socket | None = None) -> tuple[Any, bytes, list[int]]:
        sock = sock or self.client
        assert sock is not None
        try:
            data, fds, _, _ = socket.recv_fds(sock, HEADER.sizeof(), 16)
        except ConnectionResetError as error:
            raise GoneError from error
        if len(data) < HEADER.sizeof():
            raise GoneError
        header = HEADER.parse(data)
        payload = sock.recv(header.size - HEADER.sizeof(), socket.MSG_WAITALL) if header.size > len(data) else b""
        return header, payload, list(fds)

    def send(self, header: Any, payload: bytes, fds: list[int], number: int) -> None:
        assert self.client is not None
        flags = MessageFlags.REPLY | (MessageFlags.ERROR if number else 0)
        size = HEADER.sizeof() + len(payload)
        reply = {"id": header.id, "command": header.command, "size": size, "flags": flags, "error": number}
        socket.send_fds(self.client, [HEADER.build(reply) + payload], fds)
