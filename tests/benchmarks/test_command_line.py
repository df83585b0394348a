"""`scripts/bench` itself: what it prints, and its exit status."""

import json
from pathlib import Path
from xml.etree import ElementTree

import pytest
from benchmarks import __main__ as bench
from benchmarks import catalogue
from benchmarks.measure import Benchmark, Options, Row, at_least, at_most

from vfiouser_virtio.errors import ConfigError


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[Options]:
    """Two benchmarks in place of all: ``good``, and ``bad``, which misses one of two targets; and what they got."""
    got: list[Options] = []

    def good(options: Options) -> list[Row]:
        got.append(options)
        options.note("on a fine day")
        return [Row(metric="time", unit="ms", ours=[1.0] * options.rounds, targets={"": at_most(2)})]

    def bad(options: Options) -> list[Row]:
        got.append(options)
        print("chatter")
        targets = {"a & b": at_least(1), "c": at_least(0.2)}
        theirs = {"a & b": [2.0] * options.rounds, "c": [2.0] * options.rounds}
        return [Row(metric="speed <big>", unit="MB/s", ours=[1.0] * options.rounds, theirs=theirs, targets=targets)]

    made = (Benchmark(name="good", summary="all is well", run=good), Benchmark(name="bad", summary="not so", run=bad))
    monkeypatch.setattr(catalogue, "BENCHMARKS", {each.name: each for each in made})
    return got


def test_text_has_a_line_for_each_comparison(runs: list[Options], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main([]) == 0
    out = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert out.startswith("good: all is well\n")
    assert "time 1 ms (1–1) ≤ 2 ms ok" in lines
    assert "speed <big> 1 MB/s a & b 2 MB/s 0.50x (0.5–0.5) ≥ 1x MISSED" in lines
    assert "c 2 MB/s 0.50x (0.5–0.5) ≥ 0.2x ok" in lines
    assert "  (on a fine day)\n" in out


def test_json(runs: list[Options], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--json", "--rounds", "2", "bad"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["machine"]["cpus"] >= 1
    (benchmark,) = printed["benchmarks"]
    assert benchmark["name"] == "bad"
    (row,) = benchmark["rows"]
    assert row["metric"] == "speed <big>"
    assert row["ours"] == {"median": 1.0, "low": 1.0, "high": 1.0, "rounds": [1.0, 1.0]}
    first, second = row["comparisons"]
    assert (first["against"], first["target"], first["met"]) == ("a & b", "≥ 1x", False)
    assert first["ratio"]["median"] == 0.5
    assert second["met"] is True


def test_check_measures_again_and_lists_what_was_missed(
    runs: list[Options], capsys: pytest.CaptureFixture[str]
) -> None:
    assert bench.main(["--check", "good"]) == 0
    assert len(runs) == 1
    assert "missed" not in capsys.readouterr().err
    assert bench.main(["--check", "--rounds", "1"]) == 1
    assert len(runs) == 1 + 1 + 2
    captured = capsys.readouterr()
    assert "1 targets missed:\n  bad: speed <big>: 0.50x of a & b, target ≥ 1x\n" in captured.err
    assert "chatter" not in captured.out


def test_picture(runs: list[Options], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--svg", str(tmp_path / "picture.svg")]) == 0
    root = ElementTree.fromstring((tmp_path / "picture.svg").read_text())
    texts = ["".join(element.itertext()) for element in root.findall(".//{*}text")]
    assert "speed <big> / a & b" in texts
    assert "0.50x ≥ 1x" in texts
    colours = [dot.get("fill") for dot in root.findall(".//{*}circle")]
    assert len(colours) == 3
    assert len(set(colours)) == 2


def test_options_reach_the_benchmark(runs: list[Options], capsys: pytest.CaptureFixture[str]) -> None:
    words = ["good", "--quick", "--rounds=7", "--only=x", "--peer=p", "--peer=q", "--variant=packed=on"]
    words.append("--libvfio-user=/d")
    assert bench.main(words) == 0
    (options,) = runs
    assert (options.quick, options.rounds, options.only) == (True, 7, "x")
    assert (options.peers, options.variants, options.libvfio_user) == (["p", "q"], ["packed=on"], Path("/d"))


def test_list_measures_nothing(runs: list[Options], capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == ["good", "bad"]
    assert runs == []


def test_what_cannot_be_measured_is_an_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(options: Options) -> list[Row]:
        raise ConfigError("there is no compiler")

    monkeypatch.setattr(catalogue, "BENCHMARKS", {"x": Benchmark(name="x", summary="", run=run)})
    assert bench.main(["x"]) == 2
    assert capsys.readouterr().err.endswith("scripts/bench: x: there is no compiler\n")


def test_unknown_names_are_refused(runs: list[Options], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        bench.main(["worse"])
    assert ended.value.code == 2
    assert "'worse'" in capsys.readouterr().err
