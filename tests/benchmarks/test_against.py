"""`scripts/bench --against`: two trees in turn, each measured by what it has."""

import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import against, steps
from benchmarks.measure import Benchmark, Options

from vfiouser_virtio.errors import ConfigError

pytestmark = pytest.mark.once

# In place of the benchmarks of a tree, whose `package.py` stands for what is measured.
_MAIN = """
import json, package
from benchmarks import catalogue
def main(arguments):
    name, *rest = arguments
    assert rest == ["--json", "--rounds", "1", "--quick"], rest
    print(json.dumps({"benchmarks": [{"rows": catalogue.BENCHMARKS[name].rows(), "notes": package.NOTES}]}))
"""
_CATALOGUE = """
import importlib.util
BENCHMARKS = {}
if importlib.util.find_spec("benchmarks.some_steps"):
    from benchmarks import some_steps
    BENCHMARKS["some-steps"] = some_steps.BENCHMARK
"""
_STEPS = """
import package
class BENCHMARK:
    name = "some-steps"
    def rows():
        return [
            {"metric": "time", "unit": "us", "ours": {"rounds": [package.TIME]}},
            {"metric": package.MORE, "unit": "k/s", "ours": {"rounds": [package.TIME * 2]}},
        ]
"""
STEPS = Benchmark(name="some-steps", summary="", run=lambda _: [])


def git(repository: Path, *words: str) -> None:
    command = ["git", "-c", "user.name=x", "-c", "user.email=x@example.com", "-C", str(repository), *words]
    subprocess.run(command, check=True, capture_output=True)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, and a working tree that has another package and a benchmark more."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    top = tmp_path / "top"
    benchmarks = top / "scripts" / "benchmarks"
    benchmarks.mkdir(parents=True)
    git(top, "init", "-q")
    (benchmarks / "__main__.py").write_text(_MAIN)
    (benchmarks / "catalogue.py").write_text(_CATALOGUE)
    (top / "package.py").write_text("TIME, MORE, NOTES = 4.0, 'speed', ['of both', 'of this one']")
    git(top, "add", ".")
    git(top, "commit", "-qm", "before")
    (benchmarks / "some_steps.py").write_text(_STEPS)
    (top / "package.py").write_text("TIME, MORE, NOTES = 5.0, 'speed', ['of both']")
    monkeypatch.setattr(against, "TOP", top)
    return top


def test_ratios_are_those_of_the_two_trees(tree: Path) -> None:
    rows = against.run(STEPS, "HEAD", ["--quick"], Options(rounds=2))
    time, speed = rows
    assert (time.ours, time.theirs) == ([5.0, 5.0], {"HEAD": [4.0, 4.0]})
    assert [comparison.met for comparison in time.comparisons] == [False]  # 25 % slower
    assert speed.unit == "k/s"
    assert [comparison.met for comparison in speed.comparisons] == [True]


def test_a_revision_that_has_the_benchmark_is_measured_by_its_own(tree: Path) -> None:
    steps = tree / "scripts" / "benchmarks" / "some_steps.py"
    steps.write_text(_STEPS.replace("[package.TIME]", "[7]"))
    git(tree, "add", str(steps))
    git(tree, "commit", "-qm", "with a benchmark of its own")
    steps.write_text(_STEPS)
    time, _ = against.run(STEPS, "HEAD", ["--quick"], Options(rounds=1))
    assert (time.ours, time.theirs) == ([5.0], {"HEAD": [7]})


def test_what_does_not_work_there_is_said(tree: Path) -> None:
    (tree / "scripts" / "benchmarks" / "some_steps.py").write_text("import moved_since")
    with pytest.raises(ConfigError, match="moved_since"):
        against.run(STEPS, "HEAD", ["--quick"], Options(rounds=1))


def test_what_only_one_measures_is_said(tree: Path) -> None:
    (tree / "package.py").write_text("TIME, MORE, NOTES = 5.0, 'renamed', ['of both']")
    notes: list[str] = []
    rows = against.run(STEPS, "HEAD", ["--quick"], Options(rounds=1, note=notes.append))
    assert [row.metric for row in rows] == ["time"]
    assert notes == ["HEAD: of this one", "only one of the two measures: renamed, speed"]


def test_no_such_revision(tree: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere: git knows no such revision"):
        against.run(STEPS, "nowhere", [], Options(rounds=1))


def test_steps_of_a_revision_without_the_raw_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.step_requests", None)
    notes: list[str] = []
    rows = steps.BENCHMARK.run(Options(rounds=1, quick=True, note=notes.append))
    assert [row.metric for row in rows] == ["interrupt by eventfd", "DMA map and unmap"]
    [note] = notes
    assert note.startswith("without requests: ")
