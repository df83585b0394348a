"""A corpus is merged with others: what is left runs the same lines, and is the smallest of it."""

import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import pytest

from vfiouser_virtio.cli import main
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.testing.fuzz.case import Case
from vfiouser_virtio.testing.fuzz.coverage import LineCoverage
from vfiouser_virtio.testing.fuzz.guided import FuzzCorpus


class LinesOfData:
    """Lines that were run: here each letter of a case's data is one."""

    def __init__(self) -> None:
        self.seen: set[str] = set()

    @property
    def lines(self) -> int:
        return len(self.seen)

    def run(self, case: Case) -> None:
        for step in case.steps:
            self.seen.update(step["data"])


def _write(folder: Path, name: str, datas: Iterable[str], target: str = "rng") -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    steps = [{"do": "raw", "data": data} for data in datas]
    path.write_text(Case("messages", target, steps=steps).dumps())
    return path


def _merge(folder: Path, *others: Path, over: bool = False) -> bool:
    coverage = LinesOfData()
    corpus = FuzzCorpus(folder, cast("LineCoverage", coverage))
    return corpus.merge(others, ["rng"], coverage.run, lambda: over)


def test_cases_that_are_run_together_are_kept_one_by_one(tmp_path: Path) -> None:
    coverage = LinesOfData()
    corpus = FuzzCorpus(tmp_path, cast("LineCoverage", coverage))
    cases = [
        Case("messages", "rng", steps=[{"do": "raw", "data": data}]) for data in ("ab", "ba", "bc", "c", "d", "a", "e")
    ]

    def run(began: Callable[[int], None]) -> None:
        for number, case in enumerate(cases):
            if number:
                began(number)
            coverage.run(case)

    kept = corpus.run_group(cases, run)
    assert [case.steps[0]["data"] for case in kept] == ["ab", "bc", "d", "e"]
    assert corpus.cases == kept
    assert corpus.run_group(cases, run) == []


def test_what_runs_no_new_line_goes(tmp_path: Path) -> None:
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    small = _write(mine, "small", ["ab"])
    covered = _write(mine, "covered", ["ab", "ba"])
    elsewhere = _write(mine, "elsewhere", ["a", "b", "a"], "blk")
    _write(theirs, "known", ["ba"])
    _write(theirs, "new", ["abc", "c"])
    before = {path.name for path in theirs.iterdir()}
    assert _merge(mine, theirs)
    kept = set(mine.glob("*.json"))
    assert small in kept
    assert elsewhere in kept
    assert covered not in kept
    [added] = kept - {small, elsewhere}
    assert [step["data"] for step in Case.load(added).steps] == ["abc", "c"]
    assert {path.name for path in theirs.iterdir()} == before
    assert _merge(mine)
    assert set(mine.glob("*.json")) == kept


def test_a_case_that_both_have_stays(tmp_path: Path) -> None:
    """Also where the other's copy comes first, and is written with the name that ours has."""
    theirs, mine = tmp_path / "theirs", tmp_path / "mine"
    mine.mkdir()
    _write(theirs, "a", ["abc"])
    assert _merge(mine, theirs)
    [ours] = mine.iterdir()
    assert ours.name > "a.json"
    assert _merge(mine, theirs)
    assert list(mine.iterdir()) == [ours]


def test_nothing_goes_where_it_was_over_before(tmp_path: Path) -> None:
    paths = {_write(tmp_path, name, ["ab"]) for name in ("one", "two")}
    assert not _merge(tmp_path, over=True)
    assert set(tmp_path.glob("*.json")) == paths


def test_a_file_that_is_no_case_is_named(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"x\.json: no fuzz case"):
        _merge(tmp_path)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["--merge"], "into which folder"), (["--corpus", "{tmp}", "--merge", "{tmp}/none"], "/none is no folder")],
)
def test_mistakes(tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["fuzz", "self", *(each.format(tmp=tmp_path) for each in arguments)]) == 2
    assert said in capsys.readouterr().err


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of cases alike most go; how many depends on lines that other threads or time run."""
    steps, alike = [{"do": "bring_up"}], 20
    for number in range(alike):
        (tmp_path / f"{number}.json").write_text(Case("rings", "rng", origin=str(number), steps=steps).dumps())
    status = main(["fuzz", "self", "--corpus", str(tmp_path), "--merge", "--seed", "1"])
    if sys.version_info < (3, 12):
        assert status == 2
        assert "needs Python 3.12" in capsys.readouterr().err
        return
    assert status == 0
    said = re.search(r"(\d+) kept", capsys.readouterr().out)
    assert said
    assert 1 <= int(said[1]) < alike
    assert len(list(tmp_path.iterdir())) == int(said[1])
