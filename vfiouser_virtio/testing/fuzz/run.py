"""Fuzzing loop: make cases from a seed, run them, minimize those with a finding, and write them down."""

import gc
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_args

from vfiouser_virtio.testing.fuzz import messages, registers, requests, rings
from vfiouser_virtio.testing.fuzz.bench import run_case
from vfiouser_virtio.testing.fuzz.case import Case, Kind, Memory, Step
from vfiouser_virtio.testing.fuzz.coverage import LineCoverage
from vfiouser_virtio.testing.fuzz.guided import FuzzCorpus
from vfiouser_virtio.testing.fuzz.jobs import Share
from vfiouser_virtio.testing.fuzz.minimizing import MINIMIZE_SECONDS, minimize_now
from vfiouser_virtio.testing.fuzz.oracle import Finding
from vfiouser_virtio.testing.fuzz.report import Discovery
from vfiouser_virtio.testing.fuzz.save import save
from vfiouser_virtio.testing.fuzz.targets import TARGETS, FuzzTarget

KINDS: tuple[Kind, ...] = get_args(Kind)

# What devices offer in the cases; by default first.
_OFFERS: tuple[dict[str, Any], ...] = (
    {},
    {},
    {"in_order": True, "suspend": True},
    {"packed": True},
    {"packed": True, "suspend": True, "notification_data": True},
    {"packed": True, "in_order": True, "notif_config_data": True},
)

_GENERATORS: dict[Kind, Callable[[random.Random, Case], list[Step]]] = {
    "messages": messages.generate,
    "registers": registers.generate,
    "rings": rings.generate,
    "requests": requests.generate,
}


def generate(kind: Kind, seed: int, index: int, targets: Sequence[str] = tuple(TARGETS)) -> Case:
    """The case that these numbers stand for; the same one each time."""
    chance = random.Random(f"{kind}:{seed}:{index}")
    memory: Memory = chance.choice(get_args(Memory))
    case = Case(kind, chance.choice(targets), memory, twin=chance.random() < 0.2, origin=f"{kind}:{seed}:{index}")
    case.offer = chance.choice(_OFFERS)
    case.steps = _GENERATORS[kind](chance, case)
    return case


def minimize(case: Case, finding: Finding, target: FuzzTarget | None = None, seconds: float = MINIMIZE_SECONDS) -> Case:
    """The same case with as little in it as possible while it finds the same thing."""

    def still(steps: list[Step]) -> bool:
        found = run_case(replace(case, steps=steps), target)
        return found is not None and (found.kind, found.where) == (finding.kind, finding.where)

    return replace(case, steps=minimize_now(case.steps, still, seconds))


def fuzz(
    seed: int,
    *,
    cases: int | None = None,
    seconds: float | None = None,
    kinds: Sequence[Kind] = KINDS,
    targets: Sequence[str] = tuple(TARGETS),
    target: FuzzTarget | None = None,
    stop: int = 1,
) -> list[tuple[Case, Finding]]:
    """Run ``cases`` of each kind, or for ``seconds``; ends early after ``stop`` different findings, which it returns.

    ``target`` takes the place of the named ones: a device of your own.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    found: dict[tuple[str, str], tuple[Case, Finding]] = {}
    for index in itertools.count() if cases is None else range(cases):
        for kind in kinds:
            if deadline is not None and time.monotonic() > deadline:
                return list(found.values())
            case = generate(kind, seed, index, targets)
            finding = run_case(case, target)
            if finding is not None and (finding.kind, finding.where) not in found:
                found[finding.kind, finding.where] = (case, finding)
                if len(found) >= stop:
                    return list(found.values())
    return list(found.values())


@dataclass(frozen=True, slots=True)
class StackRun:
    """Options of a run against our own stack, for every job of it."""

    seed: int
    kinds: Sequence[Kind] = KINDS
    targets: Sequence[str] = tuple(TARGETS)
    out: Path = Path("fuzz-findings")
    corpus: Path | None = None
    """Coverage guides, and cases that run new lines are kept here."""
    source: str = ""
    """File of a user's device, whose lines count too."""


def fuzz_stack(run: StackRun, share: Share) -> None:
    """What one job does: its share of the cases of each kind. Raises ConfigError."""
    gc.collect()
    gc.freeze()  # what is imported stays: the oracle's collections need not look at it
    if run.corpus is None:
        _fuzz_stack(run, share, None)
        return
    coverage = LineCoverage(run.source)
    try:
        _fuzz_stack(run, share, FuzzCorpus(run.corpus, coverage))
    finally:
        coverage.close()


def _fuzz_stack(run: StackRun, share: Share, corpus: FuzzCorpus | None) -> None:
    known: set[tuple[str, str]] = set()

    def one(case: Case) -> None:
        finding = run_case(case)
        if finding is not None and (finding.kind, finding.where) not in known:
            known.add((finding.kind, finding.where))
            small = minimize(case, finding)
            share.tell("found", Discovery(small, finding, str(save(small, finding, run.out))))
        share.did()

    if corpus is not None:
        for case in corpus.waiting(run.targets):
            if share.over():
                break
            corpus.run(case, one)
    for index in share.indexes():
        for kind in run.kinds:
            case = generate(kind, run.seed, index, run.targets)
            if corpus is None:
                one(case)
            else:
                case = corpus.offspring(random.Random(f"guided:{case.origin}"), case)
                if corpus.run(case, one):
                    corpus.save(case)
                share.tell("lines", (corpus.coverage.lines, len(corpus.cases)))
            if share.over():
                break
