"""Loop of the process fuzzer: cases by seed and number, run again where the finding depends on time."""

import itertools
import time
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from random import Random

from vfiouser_virtio.testing.fuzz.process.bench import FuzzerError, run_process_case
from vfiouser_virtio.testing.fuzz.process.case import HostileStep, ProcessCase
from vfiouser_virtio.testing.fuzz.process.families import FAMILIES
from vfiouser_virtio.testing.fuzz.process.minimizing import MINIMIZE_SECONDS, minimize_process_case
from vfiouser_virtio.testing.fuzz.process.oracle import DEFAULT_BUDGETS, ProcessFinding, ServerBudgets
from vfiouser_virtio.testing.fuzz.process.server import TREE, can_supervise
from vfiouser_virtio.testing.hanging_files import can_be_mounted

ANY = "any"
"""Origin of cases that are drawn from all families, two of them at a time now and then."""
_TIMED = frozenset({"stall", "growth", "start", "refused", "mapping"})
"""Kinds of findings that a busy machine could feign: they count when they are found twice."""
REPLAYS = 3
"""So often a case is run, at most, until it shows what it was kept for: a race is won by chance."""

Keep = Callable[[ProcessCase, list[ProcessFinding]], None]
"""What becomes of a case with findings; called again when it has become smaller."""


@dataclass
class ProcessRun:
    """Outcome of a run of cases: what it has done and found."""

    cases: int = 0
    found: list[tuple[ProcessCase, list[ProcessFinding]]] = field(default_factory=list)
    once: list[str] = field(default_factory=list)
    """Findings that did not come again, each with its case: there was something, or the machine was busy."""
    left_out: int = 0


def generate_process_case(family: str, seed: int, index: int) -> ProcessCase:
    """The case that these stand for, the same one each time; ``family`` is one of `FAMILIES`, or `ANY`."""
    random = Random(f"{family}:{seed}:{index}")
    case = _combined(random) if family == ANY else FAMILIES[family](random)
    case.origin = f"{family}:{seed}:{index}"
    return case


def _combined(random: Random) -> ProcessCase:
    """A case of one family, or of two at once; and stderr in any state."""
    case = FAMILIES[random.choice(tuple(FAMILIES))](random)
    if case.serves and random.random() < 0.3:
        other = FAMILIES[random.choice(tuple(FAMILIES))](random)
        if other.serves and case.foreign == other.foreign and not (case.files and other.files):
            case = _both(case, other)
    if case.serves and case.stderr == "read" and not case.speaks and random.random() < 0.2:
        case.stderr = random.choice(("unread", "closed"))
    return case


def _both(one: ProcessCase, other: ProcessCase) -> ProcessCase:
    """Two attacks at once, each on devices of its own, by processes of its own."""

    def moved(steps: Sequence[HostileStep], key: str) -> list[HostileStep]:
        return [step | {key: step[key] + one.attacked} if key in step else step for step in steps]

    return replace(
        one,
        family=f"{one.family}+{other.family}",
        devices=one.devices[: one.attacked] + other.devices,
        options=sorted({*one.options, *other.options}),
        stderr=other.stderr if one.stderr == "read" else one.stderr,
        files=one.files + other.files,
        lanes=one.lanes + [moved(lane, "device") for lane in other.lanes],
        host=one.host + moved(other.host, "index"),
        speaks=one.speaks or other.speaks,
        seconds=max(one.seconds, other.seconds),
    )


def lacking(case: ProcessCase, tree: Path = TREE) -> str:
    """What there is not, and the case needs."""
    if case.needs_root and not can_be_mounted():
        return "root and /dev/fuse"
    return "serve --supervise" if case.kills and not can_supervise(tree) else ""


def confirmed(
    case: ProcessCase,
    *,
    tree: Path = TREE,
    budgets: ServerBudgets = DEFAULT_BUDGETS,
    kinds: Container[str] | None = None,
    tell: Callable[[str], object] = lambda _: None,
) -> tuple[list[ProcessFinding], list[ProcessFinding]]:
    """Findings of a case, and what was seen only once of those that a busy machine could feign.

    A case that finds something is run again; a finding that nothing could feign counts (a crash), and says if it did
    not come again (`ProcessFinding.once`): it may be a race.
    ``kinds``: no others are looked for. ``tell`` is told what the attackers could not do. Raises FuzzerError.
    """
    findings = run_process_case(case, tree=tree, budgets=budgets, tell=tell)
    findings = [each for each in findings if kinds is None or each.kind in kinds]
    if not findings:
        return [], []
    again = {each.kind for each in run_process_case(case, tree=tree, budgets=budgets)}
    if "stopped" in again:
        again.add("stall")  # the neighbour waited so long that it gave up
    once = [each for each in findings if each.kind in _TIMED and each.kind not in again]
    return [replace(each, once=each.kind not in again) for each in findings if each not in once], once


def replay_process_case(
    case: ProcessCase, *, tree: Path = TREE, budgets: ServerBudgets = DEFAULT_BUDGETS
) -> list[ProcessFinding]:
    """Findings of a case out of a file. Where there is none it is run again, `REPLAYS` times in all.

    Raises FuzzerError.
    """
    for _ in range(REPLAYS):
        if findings := run_process_case(case, tree=tree, budgets=budgets):
            return findings
    return []


def _minimized(
    case: ProcessCase, findings: Sequence[ProcessFinding], tree: Path, budgets: ServerBudgets, seconds: float
) -> ProcessCase:
    """The smallest case that shows the first of these findings, or ``case`` where a smaller one does not twice."""
    kind, tries = findings[0].kind, REPLAYS if findings[0].once else 1

    def shows(smaller: ProcessCase) -> bool:
        try:
            return any(
                kind in {each.kind for each in run_process_case(smaller, tree=tree, budgets=budgets)}
                for _ in range(tries)
            )
        except FuzzerError:  # a step without one that it needs
            return False

    small = minimize_process_case(case, kind, shows, seconds)
    return small if small == case or shows(small) else case


def fuzz_processes(
    seed: int,
    *,
    families: Sequence[str] = (ANY,),
    cases: int | None = None,
    seconds: float | None = None,
    tree: Path = TREE,
    stop: int = 1,
    tell: Callable[[str], object] = lambda _: None,
    keep: Keep = lambda _case, _findings: None,
    budgets: ServerBudgets = DEFAULT_BUDGETS,
    minimize_seconds: float = MINIMIZE_SECONDS,
) -> ProcessRun:
    """Run ``cases`` of each family, or for ``seconds``, until ``stop`` of them have found something."""
    deadline = None if seconds is None else time.monotonic() + seconds
    run = ProcessRun()
    for case in _cases(seed, families, cases):
        if deadline is not None and time.monotonic() > deadline:
            break
        if missing := lacking(case, tree):
            tell(f"{case.origin} ({case.family}): left out, as it needs {missing}")
            run.left_out += 1
            continue
        begun = time.monotonic()
        findings, once = confirmed(case, tree=tree, budgets=budgets)
        run.cases += 1
        seen = [str(each).splitlines()[0] for each in findings]
        seen += [f"seen once, and not again: {str(each).splitlines()[0]}" for each in once]
        run.once += [f"{case.origin}: {str(each).splitlines()[0]}" for each in once]
        tell(f"{case.origin} ({case.family}), {time.monotonic() - begun:.1f} s: {'; '.join(seen) or 'nothing found'}")
        if findings:
            keep(case, findings)
            tell(f"{case.origin}: its case is made smaller, for {minimize_seconds:g} s or so")
            small = _minimized(case, findings, tree, budgets, minimize_seconds)
            if small != case:
                keep(small, findings)
            run.found.append((small, findings))
            if len(run.found) >= stop:
                break
    return run


def _cases(seed: int, families: Sequence[str], cases: int | None) -> Iterator[ProcessCase]:
    for index in itertools.count() if cases is None else range(cases):
        for family in families:
            yield generate_process_case(family, seed, index)
