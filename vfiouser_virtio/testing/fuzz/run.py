"""Fuzzing loop: make cases from a seed, run them, minimize those with a finding, and write them down."""

import gc
import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, get_args

from vfiouser_virtio.testing.fuzz import messages, pci_cases, registers, requests, rings
from vfiouser_virtio.testing.fuzz.bench import run_case
from vfiouser_virtio.testing.fuzz.case import Case, Kind, Memory, Step
from vfiouser_virtio.testing.fuzz.coverage import LineCoverage
from vfiouser_virtio.testing.fuzz.guided import FuzzCorpus
from vfiouser_virtio.testing.fuzz.jobs import Share
from vfiouser_virtio.testing.fuzz.joined import groups, run_joined
from vfiouser_virtio.testing.fuzz.minimizing import MINIMIZE_SECONDS, minimize_now
from vfiouser_virtio.testing.fuzz.oracle import Finding
from vfiouser_virtio.testing.fuzz.pci_target import PCI_TARGETS, PciTarget
from vfiouser_virtio.testing.fuzz.report import ONCE, Discovery
from vfiouser_virtio.testing.fuzz.save import save
from vfiouser_virtio.testing.fuzz.targets import TARGETS, FuzzTarget

KINDS: tuple[Kind, ...] = get_args(Kind)

# What devices offer in the cases; by default first.
# Polling ("adaptive" by default) is a wait for a driver that works at the same time, which ours here does not.
_OFFERS: tuple[dict[str, Any], ...] = (
    {},
    {"poll": "off"},
    {"in_order": True, "suspend": True, "poll": "off"},
    {"packed": True, "poll": "off"},
    {"packed": True, "suspend": True, "notification_data": True, "poll": "off"},
    {"packed": True, "in_order": True, "notif_config_data": True, "poll": "off"},
)
_NOT_DIRECT = 8
"""One of so many cases, but for those of messages, has its registers behind the socket."""
_AUDITED = 5
"""One of so many cases of virtio devices has an audit of the driver, which takes a few hundredths more time."""
_WINDOW = 128
"""Cases of each kind that are made before they are run, to be joined where they are for the same device."""
_GROWS = 4
"""So often twice as many: there are some sixty devices and offers, and groups of `joined.MOST` take the least time."""

_GENERATORS: dict[Kind, Callable[[random.Random, Case], list[Step]]] = {
    "messages": messages.generate,
    "registers": registers.generate,
    "rings": rings.generate,
    "requests": requests.generate,
}
_PCI_GENERATORS: dict[Kind, Callable[[random.Random, Case], list[Step]]] = {
    "registers": pci_cases.registers,
    "requests": pci_cases.requests,
}
ALL_TARGETS = (*TARGETS, *PCI_TARGETS)


def kinds_for(targets: Sequence[str], wanted: Sequence[Kind] = KINDS) -> list[Kind]:
    """Those kinds of cases that there are for any of these targets: a device that is not virtio has no rings."""
    virtio = any(target not in PCI_TARGETS for target in targets)
    return [kind for kind in wanted if virtio or kind in _PCI_GENERATORS]


def generate(kind: Kind, seed: int, index: int, targets: Sequence[str] = ALL_TARGETS) -> Case:
    """The case that these numbers stand for; the same one each time."""
    chance = random.Random(f"{kind}:{seed}:{index}")
    memory: Memory = chance.choice(get_args(Memory))
    if kind not in _PCI_GENERATORS:
        targets = [name for name in targets if name not in PCI_TARGETS]
    case = Case(kind, chance.choice(targets), memory, twin=chance.random() < 0.2, origin=f"{kind}:{seed}:{index}")
    if case.target in PCI_TARGETS:
        case.steps = _PCI_GENERATORS[kind](chance, case)
    else:
        case.offer = chance.choice(_OFFERS)
        case.steps = _GENERATORS[kind](chance, case)
        case.audited = index % _AUDITED == _AUDITED - 1
    case.direct = kind != "messages" and index % _NOT_DIRECT > 0
    return case


TOLD_AFTER_S = 3.0
"""Seconds of minimisation after which it is said what takes so long: each try of a stall takes as long as that."""


def minimize(
    case: Case,
    finding: Finding,
    target: FuzzTarget | PciTarget | None = None,
    seconds: float = MINIMIZE_SECONDS,
    *,
    tell: Callable[[str], None] | None = None,
) -> Case:
    """The same case with as little in it as possible while it finds the same; ``tell`` is told if that takes long."""
    begun, told = time.monotonic(), tell is None

    def still(steps: list[Step]) -> bool:
        nonlocal told
        if tell is not None and not told and time.monotonic() - begun >= TOLD_AFTER_S:
            told = True
            tell(f"{case.origin}: {finding}; its case is made smaller, for {seconds:g} s or so")
        try:
            found = run_case(replace(case, steps=steps), target)
        except ValueError:  # a step without a parameter that it needs
            return False
        return found is not None and found.key == finding.key

    return replace(case, steps=minimize_now(case.steps, still, seconds))


def fuzz(
    seed: int,
    *,
    cases: int | None = None,
    seconds: float | None = None,
    kinds: Sequence[Kind] = KINDS,
    targets: Sequence[str] = ALL_TARGETS,
    target: FuzzTarget | PciTarget | None = None,
    stop: int = 1,
) -> list[tuple[Case, Finding]]:
    """Run ``cases`` of each kind, or for ``seconds``; ends early after ``stop`` different findings, which it returns.

    ``target`` takes the place of the named ones: a device of your own.
    """
    deadline = None if seconds is None else time.monotonic() + seconds
    found: dict[tuple[str, str], tuple[Case, Finding]] = {}
    indexes = iter(itertools.count() if cases is None else range(cases))
    while made := [generate(kind, seed, index, targets) for index in islice(indexes, _WINDOW) for kind in kinds]:
        for group in groups(made):
            if deadline is not None and time.monotonic() > deadline:
                return list(found.values())
            one = run_joined(group, target)
            if one is not None and one[1].counts and one[1].key not in found:
                found[one[1].key] = one
                if len(found) >= stop:
                    return list(found.values())
    return list(found.values())


@dataclass(frozen=True, slots=True)
class StackRun:
    """Options of a run against our own stack, for every job of it."""

    seed: int
    kinds: Sequence[Kind] = KINDS
    targets: Sequence[str] = ALL_TARGETS
    out: Path = Path("fuzz-findings")
    corpus: Path | None = None
    """Coverage guides, and cases that run new lines are kept here."""
    merge: Sequence[Path] | None = None
    """Folders whose cases are merged into the corpus, which is all that is done then."""
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

    def run_some(cases: Sequence[Case], began: Callable[[int], None] | None = None) -> None:
        found = run_joined(cases, began=began)
        if found is not None and not found[1].counts:
            share.tell("note", (ONCE, [f"{found[0].origin}: {str(found[1]).splitlines()[0]}"]))
        elif found is not None and found[1].key not in known:
            case, finding = found
            if not finding.once:
                known.add(finding.key)
            small = case if finding.once else minimize(case, finding, tell=partial(share.tell, "progress"))
            share.tell("found", Discovery(small.origin, len(small.steps), finding, str(save(small, finding, run.out))))
        share.did(len(cases))

    def one(case: Case) -> None:
        run_some([case])

    if corpus is not None and run.merge is not None:
        whole = corpus.merge(run.merge, run.targets, one, share.over)
        share.tell("lines", (corpus.coverage.lines, len(corpus.cases)))
        if not whole:
            share.tell("note", ("merge", "ended early: no case was removed"))
        return
    if corpus is not None:
        for group in groups(corpus.waiting(run.targets)):
            if share.over():
                break
            corpus.run_group(group, partial(run_some, group))
    indexes = share.indexes()
    windows = (_WINDOW << number for number in range(_GROWS))
    while made := [
        generate(kind, run.seed, index, run.targets)
        for index in islice(indexes, next(windows, _WINDOW << _GROWS))
        for kind in run.kinds
    ]:
        gc.freeze()  # nothing in them is to be collected
        if corpus is not None:
            made = [corpus.offspring(random.Random(f"guided:{case.origin}"), case) for case in made]
        for group in groups(made):
            if share.over():
                break
            if corpus is None:
                run_some(group)
                continue
            for case in corpus.run_group(group, partial(run_some, group)):
                corpus.save(case)
            share.tell("lines", (corpus.coverage.lines, len(corpus.cases)))
