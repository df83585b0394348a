"""Fuzzing loop: make cases from a seed, run them, minimize those with a finding, and write them down."""

import itertools
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from vfiouser_virtio.testing.fuzz import messages, registers, requests, rings
from vfiouser_virtio.testing.fuzz.bench import run_case
from vfiouser_virtio.testing.fuzz.case import Case, Kind, Memory, Step
from vfiouser_virtio.testing.fuzz.oracle import Finding
from vfiouser_virtio.testing.fuzz.targets import TARGETS, FuzzTarget

KINDS: tuple[Kind, ...] = get_args(Kind)
MINIMIZE_SECONDS = 60.0

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
    """The same case with as many steps left out as possible while it finds the same thing."""
    deadline = time.monotonic() + seconds

    def still(steps: list[Step]) -> bool:
        found = run_case(replace(case, steps=steps), target)
        return found is not None and (found.kind, found.where) == (finding.kind, finding.where)

    steps, size = case.steps, max(len(case.steps) // 2, 1)
    while size:
        start = 0
        while start < len(steps) and time.monotonic() < deadline:
            fewer = steps[:start] + steps[start + size :]
            if still(fewer):
                steps = fewer
            else:
                start += size
        size //= 2
    return replace(case, steps=steps)


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


def save(case: Case, finding: Finding, folder: Path) -> Path:
    """Write a corpus file; its name says what and where, for a human to improve."""
    words = f"{finding.kind}-{finding.where}-{case.origin}"
    name = "".join(letter if letter.isalnum() else "-" for letter in words).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(replace(case, shows=finding.what.strip().splitlines()[-1][:200]).dumps())
    return path
