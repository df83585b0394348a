"""Execution of one case against a server process: attackers, the neighbour, the host, and the oracle."""

import os
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path

from vfiouser_virtio.testing.fuzz.deadline import Deadline, waited_for_cpu
from vfiouser_virtio.testing.fuzz.process import oracle
from vfiouser_virtio.testing.fuzz.process.attackers import AttackerProcess
from vfiouser_virtio.testing.fuzz.process.case import ProcessCase
from vfiouser_virtio.testing.fuzz.process.neighbour import NO_ANSWER, Neighbour, NeighbourError, RoundTrips
from vfiouser_virtio.testing.fuzz.process.oracle import DEFAULT_BUDGETS, ProcessFinding, ServerBudgets
from vfiouser_virtio.testing.fuzz.process.scenery import HOST, Scenery
from vfiouser_virtio.testing.fuzz.process.server import PATIENCE, TREE, Holdings, ServerUnderAttack, can_supervise
from vfiouser_virtio.testing.fuzz.process.visits import visit

_BEGIN = 600.0
"""Seconds in which an attacker's process begins: several start at a time, niced, on a machine that may be busy."""
_IDLE = 0.4
_AFTER = 0.3
LETTING_GO = 30.0
"""Seconds for a server to let go of clients that left; 30000 mappings take some of them."""
_COMES_BACK = 20.0
"""Seconds for which a client is refused at most: until the one before has gone, or a process has been started again."""
END = 20.0
WAITS = 5.0
"""Seconds without any CPU time after which a command that is not ready waits for something."""
_QUIET = 0.5
_MOST_OF_A_CPU = 0.8
_ENDLESS = 512 << 20
"""Bytes of memory after which a configuration is taken for one that is read for ever."""


class FuzzerError(Exception):
    """Mistake of the fuzzer's own, or of a case."""


@dataclass
class _Run:
    """Run of one case, with its findings so far."""

    case: ProcessCase
    server: ServerUnderAttack
    scene: Scenery
    waits: bool = False
    """A configuration that waits for something (the writer of a pipe) does what it is told, if SIGTERM ends it."""
    budgets: ServerBudgets = DEFAULT_BUDGETS
    tell: Callable[[str], object] = lambda _: None
    findings: list[ProcessFinding] = field(default_factory=list)

    def found(self, finding: ProcessFinding | None) -> None:
        if finding is not None and finding not in self.findings:
            self.findings.append(finding)

    def say(self, kind: str, what: str | None) -> None:
        if what is not None:
            self.found(ProcessFinding(kind, what))


def run_process_case(
    case: ProcessCase,
    *,
    tree: Path = TREE,
    budgets: ServerBudgets = DEFAULT_BUDGETS,
    tell: Callable[[str], object] = lambda _: None,
) -> list[ProcessFinding]:
    """What is wrong with how the server of a tree takes ``case``; the first is the most important.

    ``tell`` is told of steps that were refused, or cut short by their time: of how far the attack has come.
    Raises `FuzzerError` for a mistake of the fuzzer's.
    """
    with tempfile.TemporaryDirectory(prefix="vu-", ignore_cleanup_errors=True) as name, ExitStack() as stack:
        folder = Path(name)
        folder.chmod(0o711)
        scene = Scenery(folder, stack)
        scene.prepare(case.files)
        devices = [device.format(folder=folder) for device in case.devices]
        options = [option.format(folder=folder) for option in case.options]
        if case.kills and can_supervise(tree):
            options = ["--supervise" if option == "--processes" else option for option in options]
        with ServerUnderAttack(folder, devices, options, stderr=case.stderr, tree=tree) as server:
            run = _Run(case, server, scene, budgets=budgets, tell=tell)
            if not _is_ready(run):
                _not_ready(run)
            elif case.lanes:
                _serve(run, stack)
            else:
                _end(run)
        run.say("file", scene.complaint())
    return run.findings


def _is_ready(run: _Run) -> bool:
    """Whether the command serves; a configuration that is read for ever is found by the memory that it takes."""
    server = run.server
    end = time.monotonic() + (PATIENCE if run.case.serves else PATIENCE / 2)
    used, quiet_from = 0.0, time.monotonic()
    while not server.wait_ready(0.1):
        if server.status is not None or time.monotonic() > end:
            return False
        if (now := server.cpu_seconds()) != used or not server.is_asleep():
            used, quiet_from = now, time.monotonic()
        elif not run.case.serves and time.monotonic() - quiet_from > WAITS:
            run.waits = True
            return False
        if (memory := server.anonymous()) > _ENDLESS:
            run.say("start", f"{memory >> 20} MiB of memory, and it is not ready")
            return False
    return True


def _not_ready(run: _Run) -> None:
    """A configuration that is a mistake is one clear line; any other one is to be served."""
    server = run.server
    if run.findings:
        return
    if run.case.serves:
        said = server.said()[-300:].decode(errors="replace")
        run.say("start", f"it is not ready; status {server.status}: {said}")
    elif run.waits:
        _end(run)
    else:
        run.found(oracle.of_refusal(server.status, server.said()))


def _serve(run: _Run, stack: ExitStack) -> None:
    case, server = run.case, run.server
    for path in server.sockets:
        os.chmod(path, 0o666)  # noqa: S103 - attackers of other users must reach them
    attackers = [
        stack.enter_context(AttackerProcess(case, number, server, run.scene.folder))
        for number in range(len(case.lanes))
    ]
    for each in attackers:
        if not each.wait_said("ready", _BEGIN):
            raise FuzzerError(f"an attacker's process has not begun in {_BEGIN:.0f} s, or has ended: {each.mistake}")
    try:
        with Neighbour(server, server.sockets[-1]) as neighbour:
            _attack(run, neighbour, attackers)
    except TimeoutError:
        run.say("stopped", f"the neighbour's register is not answered within {NO_ANSWER:.0f} s")
    except NeighbourError as error:
        run.say("neighbour", str(error))
    except OSError as error:
        if not _has_died(server, 2):
            run.say("neighbour", f"the neighbour's connection is gone: {error}")
    for number, each in enumerate(attackers):
        if each.mistake:
            raise FuzzerError(each.mistake)
        for refusal in each.refusals:
            run.tell(f"lane {number}: {refusal}")
    if _has_died(server):
        said = server.said()[-300:].decode(errors="replace")
        run.say("died", f"the process has ended, status {server.status}: {said}")
    else:
        _end(run)
    for finding in oracle.of_stderr(server.said(), time.monotonic() - server.began, run.budgets):
        run.found(finding)


def _attack(run: _Run, neighbour: Neighbour, attackers: list[AttackerProcess]) -> None:
    case, server = run.case, run.server
    idle = neighbour.watch(_IDLE)
    before = server.holdings()
    peak = before.anonymous
    attacked = RoundTrips()
    for each in attackers:
        each.tell("begin")
    begun = time.monotonic()

    def waited() -> float:
        return sum(map(waited_for_cpu, (*(each.pid for each in attackers), *server.pids())))

    limit = Deadline(case.seconds + NO_ANSWER, waited, at_once=True)
    host = sorted(case.host, key=lambda step: float(step.get("after", 0)))
    try:
        while not all(each.has_said("done") for each in attackers) or host:
            passed = time.monotonic() - begun
            if limit.over():
                break
            while host and passed >= host[0].get("after", 0):
                parameters = {key: value for key, value in host.pop(0).items() if key != "after"}
                HOST[parameters.pop("do")](run.scene, server, **parameters)
            for _ in range(20):
                neighbour.look(attacked)
            peak = max(peak, server.anonymous())
        if case.speaks:
            _listen(run, neighbour, attacked)
        refusal = visit(server.sockets[-2], case.devices[-2], patience=5)
        run.say("refused", _prefixed("a device that was not attacked", refusal))
        attacked.served += neighbour.watch(_AFTER).served
        _let_go(run, neighbour, attackers, attacked, before)
    finally:
        run.found(oracle.of_round_trips(idle, attacked, run.budgets))
        run.found(oracle.of_peak(before.anonymous, peak, run.budgets))


def _listen(run: _Run, neighbour: Neighbour, attacked: RoundTrips) -> None:
    """Something is to be said of what was done."""
    limit = Deadline(NO_ANSWER, run.server.waited_seconds, at_once=True)
    while not run.server.said():
        neighbour.look(attacked)
        if limit.over():
            run.say("silent", "nothing is said of a device that waits for what does not come")
            return


def _prefixed(words: str, said: str | None) -> str | None:
    return None if said is None else f"{words}: {said}"


def _let_go(
    run: _Run, neighbour: Neighbour, attackers: list[AttackerProcess], attacked: RoundTrips, before: Holdings
) -> None:
    """The attackers leave, others come, and nothing is left of the attack."""
    server = run.server
    for each in attackers:
        each.tell("leave")
    end = time.monotonic() + LETTING_GO
    stuck = run.case.may_be_stuck
    while not all(each.has_said("left") for each in attackers) or (server.holdings().memfds and not stuck):
        if time.monotonic() > end:
            break
        for _ in range(50):
            neighbour.look(attacked)
    for each in attackers:
        each.tell("snapshot")
        each.wait_said("seen")
    for number, device in enumerate(run.case.devices[:-1]):
        if stuck and number < run.case.attacked:
            continue
        run.say("refused", _prefixed(device, visit(server.sockets[number], device, patience=_COMES_BACK)))
    changed: list[str] = []
    for each in attackers:
        each.tell("compare")
        changed += each.wait_said("changed") or []
    if changed:
        run.say("mapping", f"memory of clients that left was written by what others did: {', '.join(changed)}")
    neighbour.finish()
    held = server.holdings()
    run.found(oracle.of_holdings(before, replace(held, memfds=()) if stuck else held, run.budgets))
    used = server.cpu_seconds()
    time.sleep(_QUIET)
    used = server.cpu_seconds() - used
    if used > _MOST_OF_A_CPU * _QUIET:
        run.say("growth", f"{used:.2f} s of CPU time within {_QUIET} s, though nothing is asked of it")


def _has_died(server: ServerUnderAttack, patience: float = 0) -> bool:
    """Whether it has ended; what its end does to a connection is seen a moment before."""
    end = time.monotonic() + patience
    while server.status is None and time.monotonic() < end:
        time.sleep(0.02)
    return server.status is not None


def _end(run: _Run) -> None:
    if not run.server.terminate(END):
        run.say("end", f"SIGTERM has not ended it within {END:.0f} s")
    elif (status := run.server.status) is not None and status < 0 and status != -15:
        run.say("end", f"after SIGTERM it ended with status {status}")
