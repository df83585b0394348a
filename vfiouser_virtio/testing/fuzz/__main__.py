"""``python -m vfiouser_virtio.testing.fuzz``: what scripts/fuzz runs."""

import argparse
import gc
import sys
import time
from pathlib import Path

from vfiouser_virtio.testing.fuzz.bench import run_case
from vfiouser_virtio.testing.fuzz.case import Case
from vfiouser_virtio.testing.fuzz.run import KINDS, fuzz, minimize, save
from vfiouser_virtio.testing.fuzz.targets import TARGETS

EXAMPLES = """\
  scripts/fuzz                                    a minute of everything, seed by the clock
  scripts/fuzz --seed 7 --cases 500 --only rings  always the same 500 cases
  scripts/fuzz --replay tests/fuzz/corpus/x.json  one case again, with all that the oracle says
"""


def main(arguments: list[str] | None = None) -> int:
    """0: nothing found; 1: something was, and is in a file; 2: wrong usage."""
    parser = argparse.ArgumentParser(
        "scripts/fuzz",
        description="Throw hostile messages, register accesses, rings and requests at the whole stack.",
        epilog="examples:\n" + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, help="which cases; default: by the clock")
    parser.add_argument("--cases", type=int, help="how many of each kind")
    parser.add_argument("--seconds", type=float, help="how long; default 60 without --cases")
    parser.add_argument("--only", choices=KINDS, action="append", help="this kind only (may be repeated)")
    parser.add_argument("--target", choices=list(TARGETS), action="append", help="this device only (may be repeated)")
    parser.add_argument("--stop", type=int, default=1, help="end after this many different findings; default 1")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE", help="run these corpus files instead")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="where new corpus files go")
    options = parser.parse_args(arguments)
    gc.collect()
    gc.freeze()  # what is imported stays: the oracle's collections need not look at it
    if options.replay:
        return _replay(options.replay)
    seed = int(time.time()) if options.seed is None else options.seed
    seconds = 60.0 if options.seconds is None and options.cases is None else options.seconds
    print(f"seed {seed}", flush=True)
    findings = fuzz(
        seed,
        cases=options.cases,
        seconds=seconds,
        kinds=options.only or KINDS,
        targets=options.target or tuple(TARGETS),
        stop=options.stop,
    )
    for case, finding in findings:
        print(f"\n{case.origin} on {case.target}, {case.memory} memory\n{finding}\nminimizing …", flush=True)
        print(f"-> {save(minimize(case, finding), finding, options.out)}", flush=True)
    print(f"{len(findings)} findings")
    return 1 if findings else 0


def _replay(paths: list[Path]) -> int:
    failed = 0
    for path in paths:
        finding = run_case(Case.load(path))
        print(f"{path}: {finding or 'nothing found'}")
        failed += finding is not None
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
