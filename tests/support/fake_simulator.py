"""A simulator's end of a bridge, message by message: what a good one sends, and all else."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import trio

from vfiouser_virtio.pci import Identity, Register, bar, interrupts
from vfiouser_virtio.pci.bridge import Bridge
from vfiouser_virtio.protocols.rtl_bridge import (
    ACCESS_CODEC,
    DMA_CODEC,
    HEADER_CODEC,
    HELLO_CODEC,
    INTERRUPT_CODEC,
    MAGIC,
    REPLY,
    VERSION,
    RtlMessage,
    pack_message,
)


class Card(Bridge):
    """All of BAR 0 in the simulator, but one register; two interrupts."""

    identity = Identity(vendor=0x1234, device=0x5AC1, class_code=0x120000, subsystem=7)
    irq = interrupts(2, msix_bar=1)
    regs = bar(0, size=0x1000)
    here = Register(0x10, reset=0x600D)


class Said(NamedTuple):
    """What the bridge has said."""

    kind: int
    status: int
    number: int
    body: bytes

    @property
    def access(self) -> tuple[int, int, int, bytes]:
        """BAR, offset, count and data of a READ or WRITE."""
        index, count, offset = ACCESS_CODEC.unpack_from(self.body)
        return index, offset, count, self.body[ACCESS_CODEC.size :]


class FakeSimulator:
    """Connection to a bridge."""

    def __init__(self, stream: trio.SocketStream) -> None:
        self.stream = stream
        self._received = bytearray()
        self._number = 0

    async def hello(self, magic: bytes = MAGIC, version: int = VERSION) -> Said:
        """HELLO, and what is answered."""
        await self.send(RtlMessage.HELLO, 0, HELLO_CODEC.pack(magic, version))
        return await self.receive()

    async def send(self, kind: int, number: int, body: bytes = b"", status: int = 0) -> None:
        """A message."""
        await self.stream.send_all(pack_message(kind, number, body, status))

    async def receive(self) -> Said:
        """The next message. EOFError when there is none any more."""
        while True:
            if len(self._received) >= HEADER_CODEC.size:
                size, kind, status, number = HEADER_CODEC.unpack_from(self._received)
                if len(self._received) >= size:
                    body = bytes(self._received[HEADER_CODEC.size : size])
                    del self._received[:size]
                    return Said(kind, status, number, body)
            data = await self.stream.receive_some()
            if not data:
                raise EOFError
            self._received += data

    async def expect(self, kind: RtlMessage) -> Said:
        """The next message, which is of this kind."""
        said = await self.receive()
        assert said.kind == kind, said
        return said

    async def answer(self, asked: Said, data: bytes = b"", status: int = 0) -> None:
        """A reply."""
        await self.send(asked.kind | REPLY, asked.number, data, status)

    async def ask(self, kind: RtlMessage, address: int, count: int, data: bytes = b"") -> int:
        """Ask for memory, without waiting; the number of the request."""
        self._number += 1
        await self.send(kind, self._number, DMA_CODEC.pack(address, count) + data)
        return self._number

    async def dma(self, kind: RtlMessage, address: int, count: int, data: bytes = b"") -> tuple[int, bytes]:
        """Ask for memory: status and data of the reply, which comes next."""
        number = await self.ask(kind, address, count, data)
        said = await self.receive()
        assert (said.kind, said.number) == (kind | REPLY, number)
        return said.status, said.body

    async def interrupt(self, vector: int, action: int) -> None:
        """INTERRUPT."""
        await self.send(RtlMessage.INTERRUPT, 0, INTERRUPT_CODEC.pack(vector, action))


@asynccontextmanager
async def fake_simulator(path: Path, *, greet: bool = True) -> AsyncIterator[FakeSimulator]:
    """A simulator that has connected."""
    async with await trio.open_unix_socket(path) as stream:
        simulator = FakeSimulator(stream)
        if greet:
            await simulator.hello()
        yield simulator
