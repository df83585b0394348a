"""QMP client (QEMU, docs/interop/qmp-spec)."""

import json
import socket
from collections import deque
from typing import Any

import trio

# QEMU sends no line longer than a big answer; more is not QMP.
_MAX_LINE = 16 << 20


class QmpError(Exception):
    """Command that QEMU refused: `kind` is its error class, the text its description."""

    def __init__(self, kind: str, description: str) -> None:
        super().__init__(description)
        self.kind = kind


class QmpClosedError(Exception):
    """Monitor that QEMU closed: it has ended, or is about to."""


class QmpClient:
    """Monitor on a connected socket. `run` must be running, as a task of its own, while the others are used."""

    def __init__(self, sock: socket.socket) -> None:
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._replies: dict[int, dict[str, Any]] = {}
        self._last_id = 0
        self._changed = trio.Condition()
        self._closed = False
        # The newest are kept: a guest that reboots in a loop does not fill our memory.
        self.events: deque[dict[str, Any]] = deque(maxlen=1000)

    async def run(self) -> None:
        """Receive until QEMU closes the monitor."""
        buffer = bytearray()
        try:
            while len(buffer) < _MAX_LINE and (received := await self._stream.receive_some()):
                buffer += received
                *lines, rest = buffer.split(b"\n")
                buffer = bytearray(rest)
                await self._take(lines)
        except trio.BrokenResourceError:
            pass
        finally:
            with trio.CancelScope(shield=True):
                async with self._changed:
                    self._closed = True
                    self._changed.notify_all()

    async def negotiate(self) -> None:
        """Leave negotiation mode: the first thing to do. Raises QmpClosedError when QEMU ends instead."""
        await self.execute("qmp_capabilities")

    async def execute(self, command: str, **arguments: object) -> Any:
        """Run a command and give what it returns; `_` in names of arguments stands for `-`.

        Raises QmpError when QEMU refuses, QmpClosedError when it ends before it answers.
        """
        self._last_id += 1
        number = self._last_id
        request = {"execute": command, "id": number}
        if arguments:
            request["arguments"] = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            await self._stream.send_all(json.dumps(request).encode() + b"\n")
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            raise QmpClosedError(f"QEMU ended before {command}") from None
        async with self._changed:
            while number not in self._replies:
                if self._closed:
                    raise QmpClosedError(f"QEMU ended during {command}")
                await self._changed.wait()
            reply = self._replies.pop(number)
        if "error" in reply:
            raise QmpError(reply["error"]["class"], reply["error"]["desc"])
        return reply["return"]

    async def wait_event(self, name: str) -> dict[str, Any]:
        """The oldest kept event of that name, taken out of `events`, waiting for it if there is none.

        Raises QmpClosedError when QEMU ends first.
        """
        async with self._changed:
            while True:
                for event in self.events:
                    if event["event"] == name:
                        self.events.remove(event)
                        return event
                if self._closed:
                    raise QmpClosedError(f"QEMU ended without {name}")
                await self._changed.wait()

    def close(self) -> None:
        """Close the socket, which must not be in use."""
        self._stream.socket.close()

    async def _take(self, lines: list[bytearray]) -> None:
        async with self._changed:
            for line in lines:
                message = json.loads(line) if line.strip() else {}
                if "event" in message:
                    self.events.append(message)
                elif "id" in message:
                    self._replies[message["id"]] = message
            self._changed.notify_all()
