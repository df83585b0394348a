"""Judgement of one case against a server: play it, then see whether the server still serves, and what it said.

===============  ======================================================================================================
finding          seen how
===============  ======================================================================================================
``crash``        the server died of a signal; one that is not ours to start refuses connections
``exit``         it ended by itself, in another way than after a good client
``sanitizer``    it goes on, and its sanitizer or run-time has complained
``hang``         no reply to a message that is due one, or the socket is not read
``broken``       a good client is not served afterwards
``reply``        a reply that nothing asked for, of the wrong size, id, command, or with file descriptors
``leak``         more file descriptors after each time that the case is played
===============  ======================================================================================================
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import dataclass, field
from itertools import pairwise

import trio

from vfiouser_virtio.background import background
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.testing.fuzz.case import Step
from vfiouser_virtio.testing.fuzz.message_step import command_name
from vfiouser_virtio.testing.fuzz.oracle import Finding, Found
from vfiouser_virtio.testing.fuzz.ram import FuzzRam
from vfiouser_virtio.testing.fuzz.servers.connection import ServerConnection
from vfiouser_virtio.testing.fuzz.servers.output import last_line, telltale
from vfiouser_virtio.testing.fuzz.servers.player import Player
from vfiouser_virtio.testing.fuzz.servers.server import (
    START_TIMEOUT,
    Ending,
    FuzzedServer,
    ServerGoneError,
    open_fds,
    peer_pid,
)
from vfiouser_virtio.testing.fuzz.servers.shown import ShownDevice, greet, look

_AGAIN = 0.005  # seconds between two tries of a good client
_SHOWN_OUTPUT = 4000
_LEAK_PLAYS = 3
"""How often a case is played again before it is said to leak."""


@dataclass(slots=True)
class ServerTally:
    """Observations beside findings."""

    closed: int = 0
    """How often the server has hung up."""
    slowest: float = 0.0
    """Seconds of its slowest reply."""
    unconfirmed: list[str] = field(default_factory=list)
    """Findings that did not come again, by the origin of their cases."""


class Judge:
    """Judge of cases; ``wait`` is what a reply may take, in seconds, ``exit_ok``: a server may end by itself."""

    def __init__(self, server: FuzzedServer, *, wait: float, exit_ok: bool = False) -> None:
        self.server = server
        self.tally = ServerTally()
        self.wait = wait
        self._exit_ok = exit_ok
        self._one_shot: int | None = None
        """The status with which it ends after each client, if it does."""
        self._fds: int | None = None
        """Its file descriptors while a good client is connected, at first."""
        self._fds_now: int | None = None
        """The same after the last case."""

    async def get_to_know(self) -> ShownDevice:
        """A good client's view, and whether the server outlives it. Raises ConfigError where it serves none."""
        self.server.start()
        try:
            async with _connected(self.server, START_TIMEOUT, self.wait) as connection:
                shown = await look(connection)
        except Found as found:
            raise ConfigError(f"{self.server.path}: a good client is not served: {found}") from None
        if shown is None:
            if (ending := await self.server.wait_ended(_AGAIN)) is not None and (said := last_line(ending.output)):
                raise ConfigError(f"{self.server.path}: the server {ending}: {said}")
            raise ConfigError(f"{self.server.path}: no vfio-user server: VERSION is not answered as it should be")
        if (ending := await self._ends_after_a_client()) is not None:
            if ending.status < 0:
                raise ConfigError(f"{self.server.path}: the server {ending} after a good client")
            self._one_shot = ending.status
        return shown

    async def _ends_after_a_client(self) -> Ending | None:
        """Its end, once the first client has left; None when it has served another."""
        with trio.move_on_after(self.wait * 4):
            while True:
                if (ending := self.server.ended()) is not None:
                    return ending
                try:
                    async with _connected(self.server, self.wait, self.wait) as connection:
                        if await greet(connection):
                            self._fds = open_fds(peer_pid(connection.socket))
                            return None
                except ServerGoneError:
                    if self.server.command is None:
                        what = "the server ends with its first client: --restart COMMAND starts it again"
                        raise ConfigError(f"{self.server.path}: {what}") from None
                except Found:
                    pass
                await trio.sleep(_AGAIN)
        raise ConfigError(f"{self.server.path}: the server neither ends after a good client nor serves another")

    # ---- one case ------------------------------------------------------------------------------------------------

    async def judge(self, steps: Sequence[Step], *, patience: float = 1.0) -> Finding | None:
        """What is wrong, if anything; a hang is one after ``patience`` times the usual wait."""
        wait = self.wait * patience
        self.server.start()
        player = Player(self.server, wait=wait)
        seen: Finding | None = None
        try:
            await player.play(steps)
        except Found as found:
            seen = found.finding
        except ServerGoneError as error:
            # In the middle of a case a one-shot server has ended as it should; any other is judged below.
            seen = None if self.server.command is not None else Finding("crash", str(error), "gone")
        self.tally.closed += player.closed
        self.tally.slowest = max(self.tally.slowest, player.slowest)
        after = await self._afterwards(wait, f"after {command_name(player.last_command)}")
        finding = after if after is not None and (seen is None or after.kind in ("crash", "exit")) else seen
        if finding is None and (said := self.server.complaint()):
            finding = Finding("sanitizer", said, said)
        if finding is not None:
            self.server.stop()
        return finding

    async def leaks(self, steps: Sequence[Step]) -> Finding | None:
        """Whether each time that a case is played leaves file descriptors behind in a server that goes on."""
        if self._one_shot is not None or self._fds is None or self._fds_now is None or self._fds_now <= self._fds:
            return None
        counts = [self._fds_now]
        for _ in range(_LEAK_PLAYS):
            if await self.judge(steps) is not None or self._fds_now is None:
                return None
            counts.append(self._fds_now)
        if not all(more > less for less, more in pairwise(counts)):
            self._fds = max(counts)
            return None
        if self.server.command is None:
            self._fds = max(counts)
        self.server.stop()
        return Finding("leak", f"file descriptors of the server, after each time: {counts}", "fds")

    async def _afterwards(self, wait: float, where: str) -> Finding | None:
        """The server is as good as before, or has ended as it does after each client."""
        end = trio.current_time() + wait
        while True:
            if (ending := self.server.ended()) is not None:
                return self._judge_ending(ending, where)
            try:
                async with _connected(self.server, wait, wait) as connection:
                    if await greet(connection):
                        self._fds_now = open_fds(peer_pid(connection.socket))
                        return None
            except ServerGoneError as error:
                if self.server.command is None:
                    return Finding("crash", f"the server is gone: {error}", where)
                if (ending := await self.server.wait_ended(_AGAIN)) is not None:
                    return self._judge_ending(ending, where)
            except Found as found:
                what = f"a good client, {where}: {found.finding.what}"
                return Finding("broken", what, f"{found.finding.kind} {found.finding.where}")
            if trio.current_time() > end:
                return Finding("broken", f"the server hangs up on a good client, {where}", "closed")
            await trio.sleep(_AGAIN)

    def _judge_ending(self, ending: Ending, where: str) -> Finding | None:
        said = telltale(ending.output.encode())
        words = said or last_line(ending.output)
        what = f"the server {ending} {where}{words and f': {words}'}"
        if ending.output:
            what += f"\nits output:\n{ending.output[-_SHOWN_OUTPUT:]}"
        if ending.status < 0:
            return Finding("crash", what, said or f"{str(ending).rpartition(' ')[2]} {where}")
        if said:
            return Finding("crash", what, said)
        if ending.status == self._one_shot or self._exit_ok:
            return None
        return Finding("exit", what, words or f"status {ending.status} {where}")


@asynccontextmanager
async def _connected(server: FuzzedServer, seconds: float, wait: float) -> AsyncIterator[ServerConnection]:
    """A good client for the length of a block; ``seconds`` to connect. Raises ServerGoneError."""
    sock = await server.connect(seconds)
    with closing(FuzzRam()) as ram:
        connection = ServerConnection(sock, ram, wait=wait)
        async with background() as tasks:
            try:
                tasks.start_soon(connection.run)
                yield connection
            finally:
                connection.close()
