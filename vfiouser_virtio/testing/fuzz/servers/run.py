"""Fuzzing of a server behind a socket: cases by a seed, judged; findings are confirmed, minimised and saved."""

from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path

import trio

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.testing.fuzz.case import Case, Step
from vfiouser_virtio.testing.fuzz.jobs import Share
from vfiouser_virtio.testing.fuzz.minimizing import MINIMIZE_SECONDS, minimize_steps
from vfiouser_virtio.testing.fuzz.oracle import Finding
from vfiouser_virtio.testing.fuzz.report import ONCE, Discovery
from vfiouser_virtio.testing.fuzz.save import save
from vfiouser_virtio.testing.fuzz.servers.judge import Judge
from vfiouser_virtio.testing.fuzz.servers.mutations import generate
from vfiouser_virtio.testing.fuzz.servers.server import FuzzedServer

WAIT = 5.0
"""Seconds that a reply may take: QEMU gives up after as many."""
_RECENT = 64
"""Cases before the one with a finding that may have to do with it."""
_SURE, _QUICK = 2.0, 0.4  # times the usual wait: to confirm a hang, and to minimise it


@dataclass(frozen=True, slots=True)
class ServerRun:
    """Options of a run, for every job of it."""

    path: Path
    seed: int
    restart: str | None = None
    """The command that starts a server; ``{socket}`` in it is the socket's path."""
    out: Path = Path("fuzz-findings")
    wait: float = WAIT
    exit_ok: bool = False
    minimize_seconds: float = MINIMIZE_SECONDS

    def server(self, job: int = 0, jobs: int = 1) -> FuzzedServer:
        """The server of one job. Raises ConfigError."""
        if self.restart is None:
            return FuzzedServer(self.path)
        path = self.path if jobs == 1 else self.path.with_name(f"{self.path.name}.{job}")
        return FuzzedServer(path, FuzzedServer.command_of(self.restart, path))


def check_jobs(run: ServerRun, jobs: int) -> None:
    """Raise ConfigError where several jobs would have one server."""
    if jobs > 1 and (run.restart is None or "{socket}" not in run.restart):
        raise ConfigError("--jobs: each job needs a server of its own: --restart 'COMMAND … {socket}'")


def fuzz_server(run: ServerRun, share: Share) -> None:
    """What one job does. Raises ConfigError."""
    server = run.server(share.job, share.jobs)
    try:
        trio.run(_Fuzzer(run, share, server).run)
    finally:
        server.stop()
        if server.command is not None:
            with suppress(OSError):
                server.path.unlink(missing_ok=True)


def replay_on_server(run: ServerRun, case: Case) -> Finding | None:
    """What a server does with one case. Raises ConfigError."""
    server = run.server()

    async def once() -> Finding | None:
        judge = Judge(server, wait=run.wait, exit_ok=run.exit_ok)
        await judge.get_to_know()
        server.stop()
        return await judge.judge(case.steps, patience=_SURE) or await judge.leaks(case.steps)

    try:
        return trio.run(once)
    finally:
        server.stop()


class _Fuzzer:
    def __init__(self, run: ServerRun, share: Share, server: FuzzedServer) -> None:
        self._run = run
        self._share = share
        self._server = server
        self._judge = Judge(server, wait=run.wait, exit_ok=run.exit_ok)
        self._recent: deque[Case] = deque(maxlen=_RECENT)
        self._known: set[tuple[str, str]] = set()

    async def run(self) -> None:
        shown = await self._judge.get_to_know()
        if self._share.job == 0:
            self._share.tell("note", ("the server shows", str(shown)))
        try:
            for index in self._share.indexes():
                if not await self._one(generate(self._run.seed, index, shown)):
                    break
                self._share.did()
        finally:
            tally = self._judge.tally
            self._share.tell("note", ("connections that it closed", tally.closed))
            self._share.tell("note", ("slowest reply, seconds", round(tally.slowest, 3)))
            if self._server.command is not None:
                self._share.tell("note", ("starts of the server", self._server.starts))
            if tally.unconfirmed:
                self._share.tell("note", (ONCE, tally.unconfirmed))

    async def _one(self, case: Case) -> bool:
        """One case; False when there is no server any more."""
        finding = await self._judge.judge(case.steps) or await self._judge.leaks(case.steps)
        if finding is None:
            self._recent.append(case)
            return True
        if (finding.kind, finding.where) not in self._known:
            self._known.add((finding.kind, finding.where))
            await self._found(case, finding)
        self._recent.clear()
        return self._server.command is not None or finding.kind != "crash"

    async def _found(self, case: Case, finding: Finding) -> None:
        if self._server.command is not None or finding.kind != "crash":
            steps = await self._confirmed(case, finding)
            if steps is None:
                # So that what comes seldom may still be found with another case.
                self._known.discard((finding.kind, finding.where))
                self._judge.tally.unconfirmed.append(f"{case.origin}: {str(finding).splitlines()[0][:120]}")
                return
            case = replace(case, steps=await self._minimized(steps, finding))
        path = save(case, finding, self._run.out)
        self._share.tell("found", Discovery(case.origin, len(case.steps), finding, str(path)))

    async def _confirmed(self, case: Case, finding: Finding) -> list[Step] | None:
        """Steps that show it on a new server: those of the case, or with those of the cases before it."""
        for before in sorted({0, 1, 2, 4, 8, 16, 32, len(self._recent)}):
            if before > len(self._recent):
                break
            steps: list[Step] = []
            for earlier in list(self._recent)[len(self._recent) - before :]:
                steps += [*earlier.steps, {"do": "hang_up"}]
            steps += case.steps
            if await self._shows(steps, finding, _SURE):
                return steps
            if self._server.command is None:
                break
        return None

    async def _minimized(self, steps: Sequence[Step], finding: Finding) -> list[Step]:
        """The smallest steps that show it twice."""
        shown = [list(steps)]

        async def still(fewer: list[Step]) -> bool:
            if shows := await self._shows(fewer, finding, _QUICK if finding.kind == "hang" else 1.0):
                shown.append(fewer)
            return shows

        await minimize_steps(steps, still, self._run.minimize_seconds)
        back = 1  # twice as far each time: what is left of a race may show it now and then
        while len(shown) > 1 and not await self._shows(shown[-1], finding, _SURE):
            del shown[max(len(shown) - back, 1) :]
            back *= 2
        return shown[-1]

    async def _shows(self, steps: Sequence[Step], finding: Finding, patience: float) -> bool:
        self._server.stop()
        try:
            again = await self._judge.judge(steps, patience=patience)
            if again is None and finding.kind == "leak":
                again = await self._judge.leaks(steps)
        except ConfigError:
            return False
        return again is not None and (again.kind, again.where) == (finding.kind, finding.where)
