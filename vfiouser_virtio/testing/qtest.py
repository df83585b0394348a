"""Client of QEMU's qtest protocol (QEMU, docs/devel/testing/qtest.rst and system/qtest.c).

Lines of text on a socket: each command has one answer, in order, and between them come the interrupt lines that were
asked for::

    readl 0xb0008000            OK 0x0000000010441af4
    writeb 0xe0020014 0x1       OK
    irq_intercept_in ioapic     OK
                                IRQ raise 21

It works on a machine that never runs (``-S``), so that no firmware, no clock and no other CPU takes part.
"""

import socket
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import trio

from vfiouser_virtio.background import background

# Names of the commands for accesses of 1, 2, 4 and 8 bytes.
_WIDTHS = {1: "b", 2: "w", 4: "l", 8: "q"}
_RECEIVE_SIZE = 4096


class QtestClosed(Exception):
    """End of QEMU: it has closed the socket."""


@dataclass(slots=True)
class _Command:
    """A command on its way."""

    text: str
    posted: bool = False
    answered: trio.Event = field(default_factory=trio.Event)
    answer: str = ""

    def result(self) -> str:
        outcome, _, rest = self.answer.partition(" ")
        if outcome != "OK":
            raise RuntimeError(f"QEMU's qtest answers {self.text!r} with {self.answer!r}")
        return rest


class Qtest:
    """Client on a connected socket. `run` must be running, as a task of its own, while the others are used.

    ``on_irq(line, level)`` is called when an intercepted interrupt line changes.
    """

    def __init__(self, sock: socket.socket, on_irq: Callable[[int, bool], None]) -> None:
        self._socket = trio.socket.from_stdlib_socket(sock)
        self._on_irq = on_irq
        self._outgoing = bytearray()
        self._has_outgoing = trio.Event()
        self._waiting: deque[_Command] = deque()  # for their answers, oldest first
        self._closed = False

    async def run(self) -> None:
        """Talk to QEMU until it closes the socket. Raises RuntimeError when it refuses what was posted."""
        try:
            async with background() as nursery:
                nursery.start_soon(self._send)
                await self._receive()
        finally:
            self._closed = True
            for command in self._waiting:
                command.answered.set()

    def close(self) -> None:
        """Close the socket, which must not be in use."""
        self._socket.close()

    def post(self, text: str) -> None:
        """Send a command without waiting for its answer. If QEMU refuses it, `run` raises RuntimeError."""
        self._put(_Command(text, posted=True))

    async def execute(self, text: str) -> str:
        """Send a command and give what follows OK in its answer.

        Raises RuntimeError when QEMU refuses it, QtestClosed when QEMU has ended.
        """
        command = _Command(text)
        self._put(command)
        await command.answered.wait()
        if not command.answer:
            raise QtestClosed(f"QEMU ended during {text!r}")
        return command.result()

    async def read(self, address: int, size: int) -> int:
        """A load of 1, 2, 4 or 8 bytes from guest-physical memory or a BAR. Errors as `execute`."""
        return int(await self.execute(f"read{_WIDTHS[size]} {address:#x}"), 16)

    async def write(self, address: int, size: int, value: int) -> None:
        """A store of 1, 2, 4 or 8 bytes; to a device, QEMU may still be on the way there. Errors as `execute`."""
        await self.execute(f"write{_WIDTHS[size]} {address:#x} {value:#x}")

    def post_write(self, address: int, size: int, value: int) -> None:
        """`write`, without waiting for QEMU's answer."""
        self.post(f"write{_WIDTHS[size]} {address:#x} {value:#x}")

    def _put(self, command: "_Command") -> None:
        if self._closed:
            raise QtestClosed(f"QEMU has ended: cannot do {command.text!r}")
        self._outgoing += command.text.encode() + b"\n"
        self._waiting.append(command)
        self._has_outgoing.set()

    async def _send(self) -> None:
        try:
            while True:
                await self._has_outgoing.wait()
                while self._outgoing:
                    del self._outgoing[: await self._socket.send(self._outgoing[:_RECEIVE_SIZE])]
                self._has_outgoing = trio.Event()
        except OSError:
            pass  # `_receive` sees the end, too

    async def _receive(self) -> None:
        buffer = b""
        while received := await self._receive_some():
            *lines, buffer = (buffer + received).split(b"\n")
            for line in lines:
                self._take(line.decode().strip())

    async def _receive_some(self) -> bytes:
        try:
            return await self._socket.recv(_RECEIVE_SIZE)
        except OSError:
            return b""

    def _take(self, line: str) -> None:
        match line.split():
            case ["IRQ", change, number]:
                self._on_irq(int(number), change == "raise")
            case [_, *_]:
                command = self._waiting.popleft()
                command.answer = line
                command.answered.set()
                if command.posted:
                    command.result()
