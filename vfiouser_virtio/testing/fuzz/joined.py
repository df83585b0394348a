"""Many cases run as one: device, server and the looks at the process, which take longer than a case, are shared.

A step ``client`` is where one client leaves and the next one comes; it has the keys of `Case` that are the client's.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

from vfiouser_virtio.testing.fuzz.bench import run_case
from vfiouser_virtio.testing.fuzz.case import Case
from vfiouser_virtio.testing.fuzz.client import NO_ANSWER
from vfiouser_virtio.testing.fuzz.oracle import Finding
from vfiouser_virtio.testing.fuzz.pci_target import PciTarget
from vfiouser_virtio.testing.fuzz.targets import FuzzTarget

MOST = 64
"""Cases that are joined: what is found in them has to be looked for in each."""

RUNS_AGAIN = 2
"""So often a case is run again until what it has shown comes again."""

_OF_A_CLIENT = ("memory", "twin", "direct", "hello")
# Kinds whose clients break the protocol: none can be followed by another case.
_RUDE = ("messages", "registers")
# Steps behind which the memory is not what the next case begins with.
_REMAPPING = ("unmap", "map")


def groups(cases: Iterable[Case]) -> Iterator[list[Case]]:
    """The cases in groups of one device each, for `joined`; in a group those with the same memory follow each other."""
    alike: dict[str, list[Case]] = {}
    for case in cases:
        alike.setdefault(json.dumps([case.target, case.offer, case.audited]), []).append(case)
    for group in alike.values():
        group.sort(key=lambda case: (case.kind, case.memory, case.twin, case.direct))
        for start in range(0, len(group), MOST):
            yield group[start : start + MOST]


def joined(cases: Sequence[Case], *, marked: bool = False) -> Case:
    """One case that does what all these do, on one device; ``marked``: with a step ``case`` where each begins."""
    whole = replace(cases[0], steps=list(cases[0].steps))
    for number, (before, case) in enumerate(pairwise(cases), 1):
        if not _goes_on(before, case):
            whole.steps.append({"do": "client"} | {name: getattr(case, name) for name in _OF_A_CLIENT})
        elif any(step["do"] in _REMAPPING for step in before.steps):
            whole.steps += [{"do": "unmap"}, {"do": "map", "memory": case.memory}]
        if marked:
            whole.steps.append({"do": "case", "number": number})
        whole.steps += case.steps
    if len(cases) > 1:
        whole.origin = f"{cases[0].origin} and {len(cases) - 1} more"
    return whole


def _goes_on(before: Case, case: Case) -> bool:
    """Whether a case can be done by the client of the one before."""
    same = all(getattr(before, name) == getattr(case, name) for name in _OF_A_CLIENT)
    begins = bool(case.steps) and case.steps[0]["do"] == "bring_up"
    silent = any(how in NO_ANSWER for step in before.steps if step["do"] == "answers" for how in step["how"])
    return same and begins and before.kind not in _RUDE and case.kind not in _RUDE and not silent


def run_joined(
    cases: Sequence[Case], target: FuzzTarget | PciTarget | None = None, began: Callable[[int], None] | None = None
) -> tuple[Case, Finding] | None:
    """What is wrong, and with which case: one of these if it shows something alone, else all of them as one.

    It has been seen twice, or is `Finding.once`. ``began`` is called with the number of each case but the first when it
    begins, the first time that it is run.
    """
    whole = joined(cases)
    finding = run_case(joined(cases, marked=True) if began else whole, target, began)
    if finding is None:
        return None
    for case in cases if len(cases) > 1 else ():
        alone = run_case(case, target)
        if alone is not None:
            return case, alone if alone.key == finding.key else _confirmed(case, alone, target)
    return whole, _confirmed(whole, finding, target)


def _confirmed(case: Case, finding: Finding, target: FuzzTarget | PciTarget | None) -> Finding:
    """The finding, when the case shows it again."""
    for _ in range(RUNS_AGAIN):
        again = run_case(case, target)
        if again is not None and again.key == finding.key:
            return finding
    return replace(finding, once=True)
