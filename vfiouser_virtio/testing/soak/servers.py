"""Servers that live as long as the soak: devices of all types, visited without a pause, never to grow nor to end."""

import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import trio

from vfiouser_virtio.faults.profiles import PROFILES
from vfiouser_virtio.testing.soak.children import Child, Children
from vfiouser_virtio.testing.soak.growth import Growth, HeldSample, held_by
from vfiouser_virtio.testing.soak.visits import VisitStatus

_SAMPLE_S = 1.0
_VISITS = 60
"""Of one process of visitors; then the next one comes, with the next seed."""

_ALL = (
    ("blk", "path={folder}/visited.img,num-queues=2"),
    ("blk", "size=1M,packed=on,num-queues=2"),
    ("console", "chardev=null,chardev=null,name=,name=second"),
    ("rng", "packed=on,in-order=on"),
    ("input", ""),
    ("balloon", "free-page-reporting=on,free-page-hint=on"),
    ("net", "hub=soak,queues=2"),
    ("net", "hub=soak,packed=on"),
)
_LIARS = tuple(
    (kind, f"{options},fault=profile:{name}")
    for name, profile in PROFILES.items()
    for kind, options in (("blk", "size=1M"), ("rng", ""), ("console", "chardev=null"), ("net", "hub=lies"))
    if profile.devices in ("any", kind)
)


@dataclass(frozen=True)
class ServerPlan:
    """Choice of devices, and the way to serve them."""

    name: str
    devices: tuple[tuple[str, str], ...]
    """Type and options of each."""
    arguments: tuple[str, ...] = ()
    """More arguments of ``serve``."""
    lies: bool = False
    """The devices lie on purpose."""


SERVERS = (
    ServerPlan("one process", _ALL),
    ServerPlan("process each", _ALL, ("--processes",)),
    ServerPlan("faults", _LIARS, lies=True),
)


@dataclass
class ServerResult:
    """Record of what a server went through."""

    name: str
    visits: int = 0
    killed: int = 0
    """Processes of visitors that were killed."""
    growth: Growth | None = None
    samples: list[HeldSample] = field(default_factory=list)
    log_lines: Counter[str] = field(default_factory=Counter)
    """By level."""
    complaints: list[str] = field(default_factory=list)


class VisitedServer:
    """Server of a plan, in ``folder``."""

    def __init__(self, processes: Children, folder: Path, plan: ServerPlan, seed: int) -> None:
        self.plan, self.result = plan, ServerResult(plan.name)
        self._processes, self._folder = processes, folder
        self._chance = random.Random(f"{seed}:{plan.name}")
        self._log = folder / "server.log"
        self._sockets = [(kind, str(folder / f"{index}.sock")) for index, (kind, _) in enumerate(plan.devices)]

    async def run(self, is_over: Callable[[], bool]) -> None:
        """Visit after visit until the end, or until something is wrong; one at least."""
        server = await self._start()
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch, server)
                while True:
                    await self._visitors()
                    if is_over() or self.result.complaints:
                        break
                nursery.cancel_scope.cancel()
            if server.status is not None:
                self._complain(f"ended by itself with status {server.status}")
        finally:
            with trio.CancelScope(shield=True):
                await server.kill_family()
            self._judge()

    async def _start(self) -> Child:
        (self._folder / "visited.img").write_bytes(bytes(1 << 20))
        arguments = ["serve", *self.plan.arguments]
        for (kind, options), (_, path) in zip(self.plan.devices, self._sockets, strict=True):
            words = [kind, *options.format(folder=self._folder).split(","), f"socket={path}"]
            arguments += ["--device", ",".join(filter(None, words))]
        return await self._processes.start("vfiouser_virtio.cli:main", arguments, log=self._log)

    async def _watch(self, server: Child) -> None:
        while server.status is None:
            if sample := held_by(server.pid):
                self.result.samples.append(sample)
            await trio.sleep(_SAMPLE_S)

    async def _visitors(self) -> None:
        """One process of them; every fourth is killed in the middle of something."""
        count, log = self._chance.randrange(1, _VISITS), self._folder / "visitors.log"
        log.unlink(missing_ok=True)
        visitors = await self._processes.start(
            "vfiouser_virtio.testing.soak.visits:visit",
            self._sockets,
            self._chance.randrange(1 << 32),
            count,
            self.plan.lies,
            log=log,
        )
        if self._chance.random() < 0.25:
            with trio.move_on_after(self._chance.random() * 5):
                await visitors.wait()
            if visitors.status is None:
                await visitors.kill()
                self.result.killed += 1
                return
        status = await visitors.wait()
        self.result.visits += count
        if status != VisitStatus.DONE:
            self._complain(f"visitors ended with status {status}:\n{log.read_text()[-4000:]}")

    def _judge(self) -> None:
        # There is none of a server that was ended before it began.
        with (self._log if self._log.exists() else Path(os.devnull)).open(errors="replace") as lines:
            for line in lines:
                for level in ("WARNING", "ERROR"):
                    self.result.log_lines[level] += level in line
                if "Traceback" in line:
                    self._complain(f"a traceback in its log: {self._log}")
                    break
        self.result.growth = Growth.of(self.result.samples)
        if self.result.growth is not None:
            for each in self.result.growth.complaints():
                self._complain(each)

    def _complain(self, what: str) -> None:
        self.result.complaints.append(f"server of {self.plan.name}: {what}")
