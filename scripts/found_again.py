"""Twelve faults that were once found by hand, found again by ``fuzz server`` in the version before their mends.

For each, cases of its family are run on that version until one finds it; the same cases then run on this tree. The
outcome is a table in Markdown. With ``--rows FILE`` each row is kept as soon as it is there, and a run that was ended
goes on behind it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

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


def main(arguments: list[str] | None = None) -> int:
    """0: each was found in the older version, and nothing in this one."""
    parser = argparse.ArgumentParser("scripts/fuzz-found-again", description=__doc__)
    parser.add_argument("--seed", type=int, default=1, help="which cases; default 1")
    parser.add_argument("--most", type=int, default=30, help="give up on a fault after this many cases; default 30")
    parser.add_argument("--only", choices=[fault.family for fault in FAULTS], action="append", help="this family only")
    parser.add_argument(
        "--slower", type=float, default=1, metavar="N", help="attackers have N times as long, on a machine that is busy"
    )
    parser.add_argument("--before", default=BEFORE, help=f"revision that has the faults; default {BEFORE}")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE", help="keep rows here, and do not run those that are there again"
    )
    options = parser.parse_args(arguments)
    rows = _kept(options.rows)
    good = True
    with tempfile.TemporaryDirectory(prefix="vu-") as folder:
        Path(folder).chmod(0o711)
        archive = subprocess.run(["git", "-C", str(TOP), "archive", options.before], stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        print(f"| fault | found in {options.before} by | as | seconds | the same cases today |\n|---|---|---|---|---|")
        for fault in FAULTS:
            if options.only and fault.family not in options.only:
                continue
            key = f"{options.before} {fault.family} {options.seed}"
            if key not in rows:
                rows[key] = _row(fault, options.seed, options.most, Path(folder), options.slower)
                if options.rows:
                    options.rows.write_text(json.dumps(rows, indent=1) + "\n")
            text, as_it_should_be = rows[key]
            print(text, flush=True)
            good &= as_it_should_be
    return 0 if good else 1


def _kept(path: Path | None) -> dict[str, tuple[str, bool]]:
    """Rows of a run that was ended, by revision, family and seed."""
    if path is None or not path.exists():
        return {}
    return {key: (str(text), bool(good)) for key, (text, good) in json.loads(path.read_text()).items()}


def _row(fault: KnownFault, seed: int, most: int, before: Path, slower: float) -> tuple[str, bool]:
    """The row of one, and whether it is as it should be."""
    begun = time.monotonic()
    for index in range(most):
        case = generate_process_case(fault.family, seed, index)
        if case.needs_root and (missing := lacking(case)):
            return f"| {fault.what} | needs {missing} | | | |", False
        seen = [each for each in _run(case, before, slower) or () if each.kind in fault.kinds]
        if seen:
            break
    else:
        return f"| {fault.what} | **not found** in {most} cases | | {time.monotonic() - begun:.0f} | |", False
    seconds = time.monotonic() - begun
    cases = [generate_process_case(fault.family, seed, number) for number in range(index + 1)]
    found = [_run(each, TOP, slower) for each in cases]
    today = [finding for findings in found for finding in findings or ()]
    kinds = ", ".join(dict.fromkeys(each.kind for each in seen))
    command = f"`--only {fault.family} --seed {seed} --cases {index + 1}`"
    words = "**not run**" if None in found else _words(today)
    return f"| {fault.what} | {command} | {kinds} | {seconds:.0f} | {words} |", words == _NOTHING


def _run(case: ProcessCase, tree: Path, slower: float) -> Sequence[ProcessFinding] | None:
    """What a case finds; None where it cannot be run, which is told."""
    try:
        return confirmed(case, tree=tree, seconds=slower * case.seconds)[0]
    except FuzzerError as error:
        print(f"{case.family}: not run: {error}", file=sys.stderr, flush=True)
        return None


def _words(findings: Sequence[ProcessFinding]) -> str:
    if not findings:
        return _NOTHING
    print("\n".join(map(str, findings)), file=sys.stderr)
    return "**" + ", ".join(dict.fromkeys(each.kind for each in findings)) + "**"


if __name__ == "__main__":
    os.chdir(TOP)
    sys.exit(main())
