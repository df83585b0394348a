"""Twelve faults that were once found by hand, found again by ``fuzz server`` in the version before their mends.

For each, cases of its family are run on that version until one finds it; the same cases then run on this tree. The
outcome is a table in Markdown. With ``--rows FILE`` each row is kept as soon as it is there, and a run that was ended
goes on behind it.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType

from vfiouser_virtio.testing.fuzz.process import ProcessCase, ProcessFinding, generate_process_case
from vfiouser_virtio.testing.fuzz.process.bench import FuzzerError
from vfiouser_virtio.testing.fuzz.process.run import confirmed, lacking

TOP = Path(__file__).parents[1]
BEFORE = "de25aaf"
_NOTHING = "nothing found"


@dataclass(frozen=True, slots=True)
class KnownFault:
    """KnownFault of the older version: ``kinds`` are the findings that it is seen by."""

    what: str
    family: str
    kinds: frozenset[str]


def _fault(what: str, family: str, *kinds: str) -> KnownFault:
    return KnownFault(what, family, frozenset(kinds))


FAULTS = (
    _fault("memory of a client that left stays", "mappings", "mapping", "refused"),
    _fault("O_NONBLOCK of a shared eventfd stops the loop", "flags", "stopped"),
    _fault("one kick takes seconds", "chains", "stall", "stopped", "growth"),
    _fault("the log is flooded, or blocks", "logging", "log", "stopped", "end"),
    _fault("SIGBUS by a truncated file", "truncation", "died"),
    _fault("a disk that hangs stops the loop", "hung_disks", "stopped"),
    _fault("a client's text commands the terminal", "words", "text"),
    _fault("a closed stderr", "streams", "start"),
    _fault("nested and endless configuration", "configurations", "start"),
    _fault("a lost ring is waited for in silence", "lost_rings", "silent"),
    _fault("a console's log file follows links", "log_files", "file"),
    _fault("a device's dead process stays dead", "deaths", "refused"),
)


@dataclass(frozen=True, slots=True)
class FoundAgain:
    """Row of the table: what was run, and what came of it."""

    fault: str
    ran: str
    """Options of `fuzz server` that stand for the cases."""
    found_as: str
    """Kinds of the findings in the older version; empty: it was not found."""
    seconds: int
    """How long that took."""
    today: str
    revision: str
    when: str
    load: float
    """Load average of the machine, five minutes'."""

    @property
    def is_good(self) -> bool:
        """Whether the older version shows the fault, and today's does not."""
        return bool(self.found_as) and self.today == _NOTHING

    def __str__(self) -> str:
        found = self.found_as or "**not found**"
        return f"| {self.fault} | {self.ran} | {found} | {self.seconds} | {self.today} |"


def main(arguments: list[str] | None = None) -> int:
    """0: each was found in the older version, and nothing in this one."""
    parser = argparse.ArgumentParser("scripts/fuzz-found-again", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="which cases; default 1")
    parser.add_argument("--most", type=int, default=30, help="give up on a fault after this many cases; default 30")
    parser.add_argument("--only", choices=[fault.family for fault in FAULTS], action="append", help="this family only")
    parser.add_argument("--before", default=BEFORE, help=f"revision that has the faults; default {BEFORE}")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="keep rows here, and do not run those that are there again"
    )
    parser.add_argument("--print", action="store_true", help="run nothing: print the rows that are kept, of any seed")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, _ended)  # what was mounted and started goes with it
    kept = _kept(options.rows)
    rows: list[FoundAgain] = []
    if options.print:
        print(_head(options.before))
        for fault in FAULTS:
            known = [row for key, row in kept.items() if key.split(" ")[:2] == [options.before, fault.family]]
            print("\n".join(map(str, known)) or f"| {fault.what} | not run | | | |")
            rows += known[:1]
        print(f"\n{_summary(rows)}")
        return 0 if len(rows) == len(FAULTS) and all(row.is_good for row in rows) else 1
    with tempfile.TemporaryDirectory(prefix="vu-") as folder:
        Path(folder).chmod(0o711)
        archive = subprocess.run(["git", "-C", str(TOP), "archive", options.before], stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        print(_head(options.before))
        for fault in FAULTS:
            if options.only and fault.family not in options.only:
                continue
            key = f"{options.before} {fault.family} {options.seed}"
            if key not in kept:
                kept[key] = _row(fault, options.seed, options.most, Path(folder))
                if options.rows:
                    _keep(options.rows, kept)
            rows.append(kept[key])
            print(rows[-1], flush=True)
    print(f"\n{_summary(rows)}")
    return 0 if all(row.is_good for row in rows) else 1


def _head(before: str) -> str:
    return f"| fault | cases | found in {before} as | seconds | the same cases today |\n|---|---|---|---|---|"


def _ended(_signal: int, _frame: FrameType | None) -> None:
    sys.exit("ended by SIGTERM")


def _kept(path: Path | None) -> dict[str, FoundAgain]:
    """Rows of a run that was ended, by revision, family and seed."""
    if path is None or not path.exists():
        return {}
    return {key: FoundAgain(**row) for key, row in json.loads(path.read_text()).items()}


def _keep(path: Path, rows: Mapping[str, FoundAgain]) -> None:
    path.write_text(json.dumps({key: asdict(row) for key, row in rows.items()}, indent=1) + "\n")


def _summary(rows: Sequence[FoundAgain]) -> str:
    """Where and when the rows were made."""
    if not rows:
        return f"0 of {len(FAULTS)} were run."
    found = sum(bool(row.found_as) for row in rows)
    loads = [row.load for row in rows]
    days = sorted({row.when for row in rows})
    return (
        f"{found} of {len(rows)} found again ({len(FAULTS)} are known); {', '.join(days)}, "
        f"{os.cpu_count()} processors, load {min(loads):.1f} to {max(loads):.1f}."
    )


def _row(fault: KnownFault, seed: int, most: int, before: Path) -> FoundAgain:
    """The row of one."""
    begun = time.monotonic()
    kinds: list[str] = []
    cases: list[ProcessCase] = []
    missing = ""
    while not kinds and len(cases) < most:
        cases.append(generate_process_case(fault.family, seed, len(cases)))
        if cases[-1].needs_root and (missing := lacking(cases[-1])):
            break
        found = _run(cases[-1], before, fault.kinds) or ()
        kinds = list(dict.fromkeys(each.kind for each in found))
    seconds = time.monotonic() - begun
    today = "not run"
    if kinds:
        again = [_run(each, TOP) for each in cases]
        today = "**not run**" if None in again else _words([each for findings in again for each in findings or ()])
    described = ["git", "-C", str(TOP), "describe", "--always", "--dirty", "--exclude", "*"]
    return FoundAgain(
        fault=fault.what,
        ran=f"needs {missing}" if missing else f"`--only {fault.family} --seed {seed} --cases {len(cases)}`",
        found_as=", ".join(kinds),
        seconds=round(seconds),
        today=today,
        revision=subprocess.run(described, stdout=subprocess.PIPE, text=True, check=True).stdout.strip(),
        when=time.strftime("%Y-%m-%d"),
        load=os.getloadavg()[1],
    )


def _run(case: ProcessCase, tree: Path, kinds: frozenset[str] | None = None) -> Sequence[ProcessFinding] | None:
    """What a case finds, of these kinds; None where it cannot be run, which is told."""

    def tell(said: str) -> None:
        print(f"{case.origin}: {said}", file=sys.stderr, flush=True)

    begun = time.monotonic()
    try:
        findings, once = confirmed(case, tree=tree, kinds=kinds, tell=tell)
    except FuzzerError as error:
        tell(f"not run: {error}")
        return None
    seen = [str(each) for each in findings] + [f"seen once, and not again: {each}" for each in once]
    tell(
        f"{'today' if tree == TOP else 'before'}, {time.monotonic() - begun:.0f} s: {'; '.join(seen) or _NOTHING}"[:500]
    )
    return findings


def _words(findings: Sequence[ProcessFinding]) -> str:
    return f"**{', '.join(dict.fromkeys(each.kind for each in findings))}**" if findings else _NOTHING


if __name__ == "__main__":
    os.chdir(TOP)
    sys.exit(main())
