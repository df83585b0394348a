"""Fuzzing loop of parsers: batches of cases, with nothing between them but the bench."""

import gc
import itertools
import re
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.testing.fuzz.case import Case, Step
from vfiouser_virtio.testing.fuzz.jobs import Share
from vfiouser_virtio.testing.fuzz.minimizing import minimize_now
from vfiouser_virtio.testing.fuzz.oracle import Finding, Hung, of_exception
from vfiouser_virtio.testing.fuzz.parsers.bench import ParserBench
from vfiouser_virtio.testing.fuzz.parsers.blk import BlkRequests
from vfiouser_virtio.testing.fuzz.parsers.config import PciAccesses
from vfiouser_virtio.testing.fuzz.parsers.control import ControlCommands
from vfiouser_virtio.testing.fuzz.parsers.entropy import BATCH, batch_random, draws
from vfiouser_virtio.testing.fuzz.parsers.messages import Messages
from vfiouser_virtio.testing.fuzz.parsers.rings import Rings
from vfiouser_virtio.testing.fuzz.report import Discovery
from vfiouser_virtio.testing.fuzz.save import save

PARSERS: dict[str, Callable[[], ParserBench[Any]]] = {
    "split": partial(Rings, packed=False),
    "packed": partial(Rings, packed=True),
    "messages": Messages,
    "blk": BlkRequests,
    "config": PciAccesses,
    "control": ControlCommands,
}
"""By name, in the order in which they have their turns."""

_CHUNK = 64
"""Cases between two looks at the time."""
HANG_S = 20.0
"""CPU seconds that so many cases do not take: 0.02 is usual."""
MINIMIZE_S = 20.0
"""Seconds for which the case of a finding is made smaller."""
_ORIGIN = re.compile(r"(\w+):(-?\d+):(\d+)")


@dataclass(frozen=True, slots=True)
class ParserRun:
    """Options of a run, for every job of it."""

    seed: int
    parsers: Sequence[str] = tuple(PARSERS)
    out: Path = Path("fuzz-findings")


def fuzz_parsers(run: ParserRun, share: Share) -> None:
    """What one job does: a batch of each parser, then the next one. Raises ConfigError."""
    gc.collect()
    gc.freeze()  # what is imported stays: collections need not look at it
    benches = {name: PARSERS[name]() for name in run.parsers}
    known: set[tuple[str, str]] = set()
    try:
        for batch in itertools.count(share.job, share.jobs):
            count = BATCH if share.cases is None else min(BATCH, share.cases - batch * BATCH)
            if count <= 0:
                break
            for name, bench in benches.items():
                _run_batch(run, share, name, bench, batch, count, known)
            if share.over():
                break
    finally:
        for bench in benches.values():
            bench.close()


def _run_batch(
    run: ParserRun,
    share: Share,
    name: str,
    bench: ParserBench[Any],
    batch: int,
    count: int,
    known: set[tuple[str, str]],
) -> None:
    chance = batch_random(name, run.seed, batch)
    bench.begin(chance)
    source = draws(chance)
    for start in range(0, count, _CHUNK):
        if share.over():
            return
        stop = min(start + _CHUNK, count)
        found: list[tuple[int, Any, Finding]] = []
        with _limited():
            for number in range(start, stop):
                made = bench.make(next(source))
                try:
                    bench.run(made)
                except (Exception, Hung) as error:
                    found.append((batch * BATCH + number, made, of_exception(error)))
        for number, made, finding in found:
            if finding.key not in known and not share.enough.is_set():
                known.add(finding.key)
                _found(run, share, name, made, f"{name}:{run.seed}:{number}", finding, bench)
        share.tell("note", (name, stop - start))
        share.did(stop - start)


def _found(
    run: ParserRun, share: Share, name: str, made: Any, origin: str, finding: Finding, bench: ParserBench[Any]
) -> None:
    steps = bench.steps(made)
    again = run_steps(name, steps)
    if again is None or again.key != finding.key:  # it depends on what was run before, which is a fault of the fuzzer's
        finding = Finding(finding.kind, finding.what, finding.where, once=True)
    else:
        steps = minimize_now(steps, lambda fewer: _still(name, fewer, finding), MINIMIZE_S)
    case = Case("parser", name, origin=origin, steps=steps)
    share.tell("found", Discovery(origin, len(steps), finding, str(save(case, finding, run.out))))


def _still(name: str, steps: Sequence[Step], finding: Finding) -> bool:
    try:
        found = run_steps(name, steps)
    except (ValueError, TypeError, KeyError):  # a step without a parameter that it needs
        return False
    return found is not None and found.key == finding.key


def run_steps(name: str, steps: Sequence[Step]) -> Finding | None:
    """What is found in a case, on a bench of its own. Raises ValueError, TypeError or KeyError for what is no case."""
    bench = PARSERS[name]()
    try:
        made = bench.of_steps(steps)
        try:
            with _limited():
                bench.run(made)
        except (Exception, Hung) as error:
            return of_exception(error)
        return None
    finally:
        bench.close()


def run_parser_case(case: Case) -> Finding | None:
    """Likewise, of a case that was read from a file."""
    if case.kind != "parser" or case.target not in PARSERS:
        raise ValueError(f"kind {case.kind!r}, target {case.target!r}: expected a parser, one of {', '.join(PARSERS)}")
    return run_steps(case.target, case.steps)


def parser_case(origin: str) -> Case | None:
    """The case that PARSER:SEED:NUMBER stands for; None for what is none. Raises ConfigError for another parser."""
    found = _ORIGIN.fullmatch(origin)
    if found is None:
        return None
    name, seed, number = found[1], int(found[2]), int(found[3])
    if name not in PARSERS:
        raise ConfigError(f"{origin}: there is no parser {name!r}; there are {', '.join(PARSERS)}")
    batch, index = divmod(number, BATCH)
    chance = batch_random(name, seed, batch)
    bench = PARSERS[name]()
    try:
        bench.begin(chance)
        draw = next(itertools.islice(draws(chance), index, None))
        return Case("parser", name, origin=origin, steps=bench.steps(bench.make(draw)))
    finally:
        bench.close()


@contextmanager
def _limited() -> Iterator[None]:
    """A loop without an end is ended, by a signal that counts what the process computes."""

    def hung(*_: object) -> None:
        raise Hung

    before = signal.signal(signal.SIGVTALRM, hung)
    signal.setitimer(signal.ITIMER_VIRTUAL, HANG_S, HANG_S)  # and again: several cases may hang
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)
