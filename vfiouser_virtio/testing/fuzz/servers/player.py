"""Steps of a conversation, carried out: on one connection after another, or on two at a time.

=============  ==================================================================================================
step           what it does
=============  ==================================================================================================
``message``    one message (`message_step`); ``id``, ``flags``, ``error``, ``size``: of its header; ``fds``: by name
               (`fd_kinds`); ``cuts``: where it is cut into several writes; ``later``: it goes out in one write with
               the next one; ``wait`` off: its reply is not waited for before the next step
``raw``        bytes (hex) that need not be a message
``deaf``       replies are no longer read
``half_close`` nothing more will be sent
``hang_up``    the connection is closed; the next step makes another
``poke``       a store to the RAM that "ram" stands for
=============  ==================================================================================================

``client`` 1 of a step: on a second connection, which a server may leave waiting.
"""

from collections.abc import Mapping, Sequence
from contextlib import closing
from typing import Any

from vfiouser_virtio.background import background
from vfiouser_virtio.fds import close_all
from vfiouser_virtio.testing.fuzz import fd_kinds
from vfiouser_virtio.testing.fuzz.case import Step
from vfiouser_virtio.testing.fuzz.message_step import command_number, payload_of
from vfiouser_virtio.testing.fuzz.ram import FuzzRam
from vfiouser_virtio.testing.fuzz.servers.connection import Owed, ServerConnection
from vfiouser_virtio.testing.fuzz.servers.server import FuzzedServer, ServerGoneError
from vfiouser_virtio.testing.raw.client import raw_message

_SECOND_WAIT = 0.2  # seconds for a connection beside another one
_MOST_FDS = 253  # of one message (SCM_MAX_FD)


class Player:
    """Player of one case; ``wait`` is how long a reply may take, in seconds."""

    def __init__(self, server: FuzzedServer, *, wait: float) -> None:
        self.wait = wait
        self.closed = 0
        """How often the server has hung up."""
        self.slowest = 0.0
        """Seconds of the slowest reply."""
        self.last_command = 0
        """What was sent last."""
        self._server = server
        self._connections: dict[int, ServerConnection] = {}
        self._held: dict[int, tuple[bytes, list[int]]] = {}

    async def play(self, steps: Sequence[Step]) -> None:
        """Carry out the steps, then hang up. Raises Found, and ServerGoneError where no connection can be had."""
        with closing(FuzzRam()) as self._ram:
            async with background() as self._tasks:
                try:
                    for step in steps:
                        await self._step(step)
                    for client, connection in list(self._connections.items()):
                        await self._flush(client, connection)
                        await connection.drain()
                        connection.check()
                finally:
                    for _data, fds in self._held.values():
                        close_all(fds)
                    for connection in self._connections.values():
                        self._leave(connection)

    def _leave(self, connection: ServerConnection) -> None:
        self.closed += connection.closed.is_set() and not connection.ours
        self.slowest = max(self.slowest, connection.slowest)
        connection.close()

    async def _step(self, step: Step) -> None:
        client = step.get("client", 0)
        do = step["do"]
        if do == "hang_up" and client not in self._connections:
            return
        connection = await self._connection(client)
        if connection is None:
            return
        if do in ("message", "raw"):
            await self._send(client, connection, step)
        elif do == "deaf":
            connection.stop_reading()
        elif do == "half_close":
            await self._flush(client, connection)
            connection.half_close()
        elif do == "poke":
            self._ram.write(step["at"], bytes.fromhex(step["data"]))
        elif do == "hang_up":
            await self._flush(client, connection)
            self._leave(self._connections.pop(client))
        else:
            raise ValueError(f"there is no step {do!r}")
        connection.check()

    async def _connection(self, client: int) -> ServerConnection | None:
        if client not in self._connections:
            alone = not self._connections  # while another one is connected, a server may leave this one waiting
            try:
                sock = await self._server.connect(self.wait if alone else _SECOND_WAIT)
            except ServerGoneError:
                if alone:
                    raise
                return None
            connection = ServerConnection(sock, self._ram, wait=self.wait, trusted=client == 0 and alone)
            self._connections[client] = connection
            self._tasks.start_soon(connection.run)
        return self._connections[client]

    async def _send(self, client: int, connection: ServerConnection, step: Mapping[str, Any]) -> None:
        fds = [fd_kinds.make(kind, self._ram.fd) for kind in step.get("fds", ())][:_MOST_FDS]
        held, held_fds = self._held.pop(client, (b"", []))
        data, fds = held + _bytes_of(step), held_fds + fds
        if step.get("later"):
            self._held[client] = data, fds
            return
        owed = await self._write(connection, data, fds, [len(held) + cut for cut in step.get("cuts", ())])
        if step.get("wait", step["do"] == "message"):
            await connection.result(owed)

    async def _flush(self, client: int, connection: ServerConnection) -> None:
        data, fds = self._held.pop(client, (b"", []))
        if data:
            await self._write(connection, data, fds, ())

    async def _write(
        self, connection: ServerConnection, data: bytes, fds: Sequence[int], cuts: Sequence[int]
    ) -> list[Owed]:
        try:
            return await connection.send(data, fds[:_MOST_FDS], cuts)
        finally:
            self.last_command = connection.last_command
            close_all(fds)


def _bytes_of(step: Mapping[str, Any]) -> bytes:
    if step["do"] == "raw":
        return bytes.fromhex(step["data"])
    header = {name: step[name] for name in ("flags", "error", "size") if name in step}
    return raw_message(command_number(step["command"]), payload_of(step), message_id=step.get("id", 1), **header)
