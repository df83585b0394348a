"""A vfio-user client without any waiting of its own: for a library that handles its messages when it is called."""

import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vfiouser_virtio.libvfio_user.bindings import Context
from vfiouser_virtio.protocols.vfio_user import (
    DMA_MAP,
    DMA_UNMAP,
    HEADER,
    IRQ_SET,
    REGION_ACCESS,
    VERSION,
    Command,
    DmaMapFlags,
    IrqSetFlags,
    MessageFlags,
)

PATIENCE = 60
RW = DmaMapFlags.READ | DmaMapFlags.WRITE


@dataclass
class Message:
    id: int
    command: int
    flags: int
    error: int
    payload: bytes
    fds: list[int] = field(default_factory=list)


class Peer:
    """Connects at once. ``seen`` hears of every message: ("sends" | "receives", message)."""

    def __init__(self, path: str | Path, seen: Callable[[str, Message], None] | None = None) -> None:
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.socket.settimeout(PATIENCE)
        self.socket.connect(str(path))
        self._seen = seen or (lambda direction, message: None)
        self._last_id = 0

    def send(self, command: int, payload: bytes = b"", fds: Sequence[int] = (), flags: int = 0, id: int = 0) -> None:  # noqa: A002
        self._last_id += 1
        message = Message(id or self._last_id, command, flags, 0, payload, list(fds))
        self._seen("sends", message)
        header = {"id": message.id, "command": command, "size": 16 + len(payload), "flags": flags, "error": 0}
        socket.send_fds(self.socket, [HEADER.build(header) + payload], fds)

    def receive(self, keep_fds: bool = False) -> Message:
        """The next message; the descriptors that came with it are closed, but counted, unless you keep them."""
        data, fds, _, _ = socket.recv_fds(self.socket, 16, 16)
        for fd in () if keep_fds else fds:
            os.close(fd)
        if not data:
            raise EOFError
        header = HEADER.parse(data)
        payload = b""
        while len(payload) < header.size - 16:
            payload += self.socket.recv(header.size - 16 - len(payload))
        message = Message(header.id, header.command, header.flags, header.error, payload, fds)
        self._seen("receives", message)
        return message

    def close(self) -> None:
        self.socket.close()

    # --- Requests ---------------------------------------------------------------------------------------------------

    def version(self, major: int = 0, minor: int = 1, **capabilities: Any) -> None:
        data = json.dumps({"capabilities": {"max_msg_fds": 8} | capabilities}).encode() + b"\0"
        self.send(Command.VERSION, VERSION.build({"major": major, "minor": minor, "data": data}))

    def region_read(self, region: int, offset: int, count: int) -> None:
        access = {"offset": offset, "region": region, "count": count}
        self.send(Command.REGION_READ, REGION_ACCESS.build(access))

    def region_write(self, region: int, offset: int, data: bytes, flags: int = 0) -> None:
        access = {"offset": offset, "region": region, "count": len(data)}
        self.send(Command.REGION_WRITE, REGION_ACCESS.build(access) + data, flags=flags)

    def dma_map(self, address: int, size: int, fd: int | None = None, offset: int = 0, flags: int = RW) -> None:
        request = {"argsz": DMA_MAP.sizeof(), "flags": flags, "offset": offset, "address": address, "size": size}
        self.send(Command.DMA_MAP, DMA_MAP.build(request), () if fd is None else (fd,))

    def dma_unmap(self, address: int, size: int, flags: int = 0) -> None:
        request = {"argsz": DMA_UNMAP.sizeof(), "flags": flags, "address": address, "size": size}
        self.send(Command.DMA_UNMAP, DMA_UNMAP.build(request))

    def set_irqs(
        self, index: int, flags: IrqSetFlags, start: int, count: int, data: bytes = b"", fds: Sequence[int] = ()
    ) -> None:
        size = IRQ_SET.sizeof() + len(data)
        request = {"argsz": size, "flags": flags, "index": index, "start": start, "count": count}
        self.send(Command.DEVICE_SET_IRQS, IRQ_SET.build(request) + data, fds)

    def answer_dma(self, memory: bytearray) -> None:
        """Answer one DMA_READ or DMA_WRITE out of ``memory``, which begins at address 0."""
        request = self.receive()
        address, count = (int.from_bytes(request.payload[at : at + 8], "little") for at in (0, 8))
        reply = request.payload[:16]
        if request.command == Command.DMA_READ:
            reply += memory[address : address + count]
        else:
            memory[address : address + count] = request.payload[16:]
        self.send(request.command, reply, flags=MessageFlags.REPLY, id=request.id)


@contextmanager
def attached(context: Context) -> Iterator[Peer]:
    """A client that has negotiated, of a context that runs, until the end of the block."""
    context.realize_ctx()
    peer = Peer(context.name)
    peer.version()
    assert context.attach_ctx()
    peer.receive()
    try:
        yield peer
    finally:
        peer.close()
