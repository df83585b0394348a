"""Disk whose guest and server are killed again and again: is every flushed write there, and nothing torn?"""

import random
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import trio

from vfiouser_virtio.testing.soak.children import Child, Children
from vfiouser_virtio.testing.soak.ledger import BLOCK, Ledger
from vfiouser_virtio.testing.soak.writer import WriterStatus

Victim = Literal["guest", "server", "both", "device"]
"""The device is the child of a supervising server that has it: its guest has to go on, and is killed later."""
VICTIMS: tuple[Victim, ...] = get_args(Victim)[:3]

BLOCKS = 64
"""Of the disk: so few that the next guest soon writes where the last one has left something under way."""
PATIENCE = 300.0
"""Seconds after which what is waited for counts as never coming."""
_LOOK = 0.001  # seconds between two looks at the ledger


@dataclass(frozen=True)
class DiskPlan:
    """Way in which a disk is served and used."""

    name: str
    options: str = ""
    """Of the device, behind its path: ``aio=threads,cache=none``."""
    serve: tuple[str, ...] = ()
    """More arguments of the command ``serve``; ``{folder}`` is where the sockets are."""
    shared: bool = True
    """Whether the guest's memory comes with a file descriptor."""
    depth: int = 4
    """Writes that are under way at a time."""


PLANS = (
    DiskPlan("threads", "aio=threads"),
    DiskPlan("io_uring", "aio=io_uring"),
    DiskPlan("direct", "aio=io_uring,cache=none", depth=8),
    DiskPlan("inline", "aio=inline,packed=on"),
    DiskPlan("private", "aio=io_uring", shared=False),
    DiskPlan("process", "aio=threads,cache=none", serve=("--device", "rng,socket={folder}/rng.sock", "--processes")),
)


@dataclass
class KillResult:
    """Record of what was done and found."""

    flushed: int = 0
    started: int = 0
    kills: Counter[str] = field(default_factory=Counter)
    complaints: list[str] = field(default_factory=list)


class KilledDisk:
    """Disk in a file in ``folder``, its server, and one guest after the other."""

    def __init__(self, processes: Children, folder: Path, plan: DiskPlan, seed: int, *, flushes: int) -> None:
        """``flushes``: how many flushed writes there are to be; what is under way at a kill is not among them."""
        self.plan, self.result = plan, KillResult()
        self.server: Child | None = None
        self._processes, self._folder = processes, folder
        self._chance = random.Random(f"{seed}:{plan.name}")
        self._goal, self._room = flushes, 4 * flushes + 1000
        self._image = folder / f"{plan.name}.img"
        self._socket = folder / f"{plan.name}.sock"
        self._book = folder / f"{plan.name}.ledger"
        self._count = 0
        with self._image.open("xb") as file:
            file.truncate(BLOCKS * BLOCK)

    async def run(
        self, victims: tuple[Victim, ...] = VICTIMS, is_over: Callable[[], bool] = lambda: False
    ) -> KillResult:
        """Until enough was flushed, or it is over, or something is wrong; the server goes in the end.

        ``is_over`` is asked when something was flushed.
        """
        result = self.result
        try:
            with Ledger(self._book, blocks=BLOCKS, room=self._room) as ledger:
                while result.flushed < self._goal and not (ledger.full or result.complaints):
                    if result.flushed and is_over():
                        break
                    await self._round(ledger, self._chance.choice(victims))
                    result.started, result.flushed = ledger.started, ledger.flushed
        finally:
            with trio.CancelScope(shield=True):
                if self.server is not None:
                    await self.server.kill_family()
        return self.result

    async def _round(self, ledger: Ledger, victim: Victim) -> None:
        """One guest, and a kill at a moment that its number of writes so far decides."""
        if self.server is None:
            self.server = await self._start_server()
        writer = await self._start_writer()
        server_log = self.server.log
        try:
            # A server that goes before its guest has come would leave that waiting: then it has written something.
            await self._wait_writes(ledger, self._chance.randrange(victim in ("server", "device"), 120), writer)
            if writer.status is None:
                await self._kill(victim, writer, ledger)
            with trio.fail_after(PATIENCE):
                status = await writer.wait()
        except trio.TooSlowError:
            for each in (writer, self.server):
                if each is not None:
                    await each.tell_where()
            self._complain(f"nothing goes on for {PATIENCE} s", writer.log, server_log)
            return
        finally:
            await writer.kill()
        expected: set[int] = {WriterStatus.DONE, WriterStatus.SERVER_GONE if victim == "server" else -signal.SIGKILL}
        if status not in expected:
            if self.server is not None:
                await self.server.tell_where()
            self._complain(f"the guest ended with status {status}, {expected} expected", writer.log, server_log)
        if self.server is not None and self.server.status is not None:
            self._complain(f"the server ended by itself with status {self.server.status}", server_log)
        for complaint in ledger.complaints(self._image.read_bytes()):
            self._complain(f"after the death of {victim}: {complaint}")

    async def _kill(self, victim: Victim, writer: Child, ledger: Ledger) -> None:
        self.result.kills[victim] += 1
        if victim in ("guest", "both"):
            await writer.kill()
        if victim == "device":
            assert self.server is not None
            await self.server.kill_children()
            await self._wait_writes(ledger, 30, writer)  # the guest goes on
            await writer.kill()
        if victim in ("server", "both"):
            assert self.server is not None
            server, self.server = self.server, None
            await server.kill_family()

    async def _wait_writes(self, ledger: Ledger, number: int, writer: Child) -> None:
        """Raises TooSlowError where none comes for `PATIENCE` seconds: however slow a machine is, some do."""
        started = ledger.started
        wanted = started + number
        with trio.fail_after(PATIENCE) as scope:
            while started < wanted and writer.status is None:
                await trio.sleep(_LOOK)  # nothing tells of an entry: the guest is not to be held up by it
                if ledger.started != started:
                    started, scope.deadline = ledger.started, trio.current_time() + PATIENCE

    async def _start_server(self) -> Child:
        device = f"blk,path={self._image},socket={self._socket}"
        options = f",{self.plan.options}" if self.plan.options else ""
        arguments = [
            "serve",
            "--device",
            device + options,
            *(each.format(folder=self._folder) for each in self.plan.serve),
        ]
        return await self._processes.start("vfiouser_virtio.cli:main", arguments, log=self._log("server"))

    async def _start_writer(self) -> Child:
        return await self._processes.start(
            "vfiouser_virtio.testing.soak.writer:write_blocks",
            str(self._socket),
            str(self._book),
            BLOCKS,
            self._room,
            self._chance.randrange(1 << 32),
            self.plan.shared,
            self.plan.depth,
            PATIENCE / 3,
            log=self._log("guest"),
        )

    def _log(self, who: str) -> Path:
        self._count += 1
        return self._folder / f"{self.plan.name}-{who}-{self._count}.log"

    def _complain(self, what: str, *logs: Path) -> None:
        said = "".join(f"\n--- {log.name}\n{log.read_text()[-2000:] if log.exists() else ''}" for log in logs)
        self.result.complaints.append(f"{self.plan.name}: {what}{said}")
