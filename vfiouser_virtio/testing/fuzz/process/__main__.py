"""``python -m vfiouser_virtio.testing.fuzz.process``: what ``scripts/fuzz server`` runs."""

import argparse
import sys
import time
from functools import partial
from pathlib import Path

from vfiouser_virtio.testing.fuzz.process.bench import run_process_case
from vfiouser_virtio.testing.fuzz.process.case import ProcessCase
from vfiouser_virtio.testing.fuzz.process.families import FAMILIES
from vfiouser_virtio.testing.fuzz.process.run import ANY, fuzz_processes
from vfiouser_virtio.testing.fuzz.process.server import TREE

EXAMPLES = """\
  scripts/fuzz server                                  a minute of everything, seed by the clock
  scripts/fuzz server --seed 7 --cases 5 --only chains always the same 5 cases
  scripts/fuzz server --tree ../older                  the server is another tree's, the attackers are ours
  scripts/fuzz server --replay case.json               one case again
"""


def main(arguments: list[str] | None = None) -> int:
    """0: nothing found; 1: something was, and is in a file; 2: wrong usage."""
    parser = argparse.ArgumentParser(
        "scripts/fuzz server",
        description="Attack server processes over their sockets, and watch what it costs their neighbours.",
        epilog="examples:\n" + EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seed", type=int, help="which cases; default: by the clock")
    parser.add_argument("--cases", type=int, help="how many of each family")
    parser.add_argument("--seconds", type=float, help="how long; default 60 without --cases")
    parser.add_argument("--only", choices=tuple(FAMILIES), action="append", help="this family only (may be repeated)")
    parser.add_argument("--tree", type=Path, default=TREE, help="folder of the package whose server is attacked")
    parser.add_argument("--stop", type=int, default=1, help="end after this many cases with findings; default 1")
    parser.add_argument("--replay", type=Path, nargs="+", metavar="FILE", help="run these cases instead")
    parser.add_argument("--out", type=Path, default=Path("fuzz-findings"), help="where cases with findings go")
    options = parser.parse_args(arguments)
    tree = options.tree.resolve()
    if options.replay:
        return _replay(options.replay, tree)
    seed = int(time.time()) if options.seed is None else options.seed
    print(f"seed {seed}", flush=True)
    found = fuzz_processes(
        seed,
        families=options.only or (ANY,),
        cases=options.cases,
        seconds=60.0 if options.seconds is None and options.cases is None else options.seconds,
        tree=tree,
        stop=options.stop,
        tell=partial(print, flush=True),
    )
    for case, findings in found:
        options.out.mkdir(parents=True, exist_ok=True)
        case.shows = str(findings[0]).splitlines()[0][:200]
        path = options.out / f"server-{case.origin.replace(':', '-')}.json"
        path.write_text(case.dumps())
        print(f"{path}: " + "\n".join(map(str, findings)))
    print(f"{len(found)} cases with findings")
    return 1 if found else 0


def _replay(paths: list[Path], tree: Path) -> int:
    failed = 0
    for path in paths:
        findings = run_process_case(ProcessCase.load(path), tree=tree)
        print(f"{path}: " + ("\n".join(map(str, findings)) or "nothing found"))
        failed += bool(findings)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
