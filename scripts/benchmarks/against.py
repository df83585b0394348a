"""Comparison of this working tree with another revision of it: the same benchmarks in turn.

Each round is a process of its own for either side: where its objects come to lie in memory, and how it hashes, changes
figures by some percent, and falls on both sides alike over many rounds. The other revision is measured by its own
``scripts/benchmarks``, as names of modules change; a benchmark that it does not have yet is added to them.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Benchmark, Options, Row, at_least, at_most, turn
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.vm.debian import cache_dir

TOP = Path(__file__).parents[2]
"""The working tree that is measured."""
_OURS = "ours"
# What is slower by more than this is a loss that a change must be worth.
_TOLERANCE = 0.03

# What runs there: file of a benchmark of ours that is missing ("" for none), then the arguments of scripts/bench.
_PROGRAM = """
import sys, importlib.util
from benchmarks import catalogue, __main__ as bench
if sys.argv[1]:
    spec = importlib.util.spec_from_file_location("benchmarks.added", sys.argv[1])
    added = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(added)
    catalogue.BENCHMARKS[added.BENCHMARK.name] = added.BENCHMARK
sys.exit(bench.main(sys.argv[2:]))
"""


def run(benchmark: Benchmark, revision: str, arguments: Sequence[str], options: Options) -> list[Row]:
    """Rows whose ratios are ours / those of ``revision``, a round each.

    Raises ConfigError for what Git does not know, and for what cannot be measured there.
    """
    trees = {_OURS: TOP, revision: _checked_out(revision)}
    units: dict[str, str] = {}
    figures: dict[str, dict[str, list[float]]] = {side: defaultdict(list) for side in trees}
    said: dict[str, dict[str, None]] = {side: {} for side in trees}
    for number in range(options.rounds):
        for side in turn(list(trees), number):
            options.progress(f"{side}, round {number + 1}")
            rows, notes = _measured(benchmark, trees[side], arguments)
            said[side] |= dict.fromkeys(notes)
            for row in rows:
                units[row["metric"]] = row["unit"]
                figures[side][row["metric"]] += row["ours"]["rounds"]
    for note in said[revision].keys() - said[_OURS].keys():
        options.note(f"{revision}: {note}")
    ours, theirs = figures[_OURS], figures[revision]
    if alone := ours.keys() ^ theirs.keys():
        options.note(f"only one of the two measures: {', '.join(sorted(alone))}")
    both = [metric for metric in ours if metric in theirs]
    return [_row(metric, units[metric], ours[metric], revision, theirs[metric]) for metric in both]


def _row(metric: str, unit: str, ours: list[float], revision: str, theirs: list[float]) -> Row:
    # Not "/s", of wake-ups, nor "ms/s", of a CPU.
    speed = unit in {"M/s", "k/s", "MB/s"}
    target = at_least(1 - _TOLERANCE) if speed else at_most(1 + _TOLERANCE)
    return Row(metric=metric, unit=unit, ours=ours, theirs={revision: theirs}, targets={revision: target})


def _checked_out(revision: str) -> Path:
    """A folder with the files of a revision, kept in the cache, so that its modules are compiled once."""
    command = ["git", "-C", str(TOP), "rev-parse", "--verify", "--quiet", f"{revision}^{{commit}}"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    if not commit:
        raise ConfigError(f"--against {revision}: git knows no such revision")
    tree = cache_dir() / "against" / commit
    if not tree.exists():
        tree.parent.mkdir(exist_ok=True)
        folder = tempfile.mkdtemp(dir=tree.parent)
        archive = subprocess.run(["git", "-C", str(TOP), "archive", commit], stdout=subprocess.PIPE, check=True)
        subprocess.run(["tar", "-x", "-C", folder], input=archive.stdout, check=True)
        os.rename(folder, tree)  # whole, or not there
    return tree


def _measured(benchmark: Benchmark, tree: Path, arguments: Sequence[str]) -> tuple[list[dict[str, Any]], list[str]]:
    """Rows and notes."""
    module = Path("scripts", "benchmarks", f"{benchmark.name.replace('-', '_')}.py")
    added = "" if (tree / module).exists() else str(TOP / module)
    command = [sys.executable, "-c", _PROGRAM, added, benchmark.name, "--json", "--rounds", "1", *arguments]
    environment = os.environ | {"PYTHONPATH": f"{tree}:{tree / 'scripts'}"}
    # In its folder, which comes before PYTHONPATH.
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ConfigError(f"in {tree}: {done.stderr.strip()}")
    [found] = json.loads(done.stdout)["benchmarks"]
    return found["rows"], found["notes"]
