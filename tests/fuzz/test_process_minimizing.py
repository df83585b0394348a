"""A case of attacks on a server process is made as small as what it shows allows, and can be replayed."""

import shlex
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from pathlib import Path

import pytest

from vfiouser_virtio.cli import main
from vfiouser_virtio.testing.fuzz.process import (
    ANY,
    FAMILIES,
    ProcessCase,
    ProcessFinding,
    generate_process_case,
    replay_process_case,
)
from vfiouser_virtio.testing.fuzz.process import run as process_run
from vfiouser_virtio.testing.fuzz.process.case import HostileStep
from vfiouser_virtio.testing.fuzz.process.minimizing import minimize_process_case

DIED = ProcessFinding("died", "of a signal")


def drawn(family: str) -> ProcessCase:
    """The first case of two families at once that the seed gives."""
    cases = (generate_process_case(ANY, 1, index) for index in count())
    return next(case for case in cases if case.family == family)


def has(case: ProcessCase, *steps: str) -> bool:
    """Whether clients that have come do each of these."""
    done = set[str]()
    for lane in case.lanes:
        here = dict[int, str]()
        for step in lane:
            if step["do"] == "connect":
                here[step["client"]] = case.devices[: case.attacked][step["device"]]
            elif step.get("client") in here:
                done.add(step["do"])
    return done.issuperset(steps)


def names(case: ProcessCase) -> list[list[str]]:
    return [[step["do"] for step in lane] for lane in case.lanes]


@pytest.mark.parametrize("family", ["chains+flags", "flags+chains"])
def test_of_two_attacks_at_once_the_one_that_counts_is_left(family: str) -> None:
    case = drawn(family)
    assert len(case.lanes) == 2
    assert has(case, "long_chains")
    small = minimize_process_case(case, "stall", lambda one: has(one, "long_chains"))
    assert names(small) == [["connect", "long_chains"]]
    [[connect, chains]] = small.lanes
    assert connect["device"] == 0
    assert small.attacked == 1
    assert not small.devices[0].startswith("rng,") or "queue-size" in case.devices[0] + case.devices[1]
    assert chains["seconds"] < 1
    assert {key: chains[key] for key in ("packed", "base")} == {
        key: step[key] for lane in case.lanes for step in lane if "packed" in step for key in ("packed", "base")
    }


def test_what_needs_both_of_them_keeps_both() -> None:
    case = drawn("chains+flags")
    race = next(step["do"] for lane in case.lanes for step in lane if step["do"].endswith("_race"))
    small = minimize_process_case(case, "stopped", lambda one: has(one, "long_chains", race))
    assert sorted(names(small)) == sorted([["connect", "long_chains"], ["connect", race]])
    assert small.attacked == 2


def test_what_the_host_does_and_the_surroundings_are_left_out_too() -> None:
    deaths = generate_process_case("deaths", 1, 0)
    case = replace(deaths, options=["--processes", "--log-level=info"], stderr="unread")
    steps: list[HostileStep] = [{"do": "pause", "seconds": 4}]
    small = minimize_process_case(replace(case, lanes=[*case.lanes, steps]), "died", lambda one: bool(one.host))
    assert [step["do"] for step in small.host] == ["kill_process"]
    assert (small.lanes, small.options, small.stderr) == ([[]], [], "read")


@pytest.mark.parametrize("kind", ["start", "silent"])
def test_what_a_case_without_steps_would_show_as_well_stays_as_it_is(kind: str) -> None:
    case = generate_process_case("lost_rings", 1, 0)
    assert minimize_process_case(case, kind, lambda _: True) == case


def test_there_is_an_end_to_it() -> None:
    asked: list[ProcessCase] = []

    def shows(case: ProcessCase) -> bool:
        asked.append(case)
        return True

    case = drawn("chains+flags")
    assert minimize_process_case(case, "died", shows, 0) == case
    assert asked == []


# ---- the command -----------------------------------------------------------------------------------------------------


def attacked(monkeypatch: pytest.MonkeyPatch, result: Callable[[ProcessCase], list[ProcessFinding]]) -> None:
    """In place of a server, what comes of a case."""
    both = drawn("chains+flags")
    monkeypatch.setattr(process_run, "run_process_case", lambda case, **_: result(case))
    monkeypatch.setitem(FAMILIES, "floods", lambda _: replace(both))


def command(folder: Path) -> list[str]:
    return ["fuzz", "server", "--seed=7", "--cases=1", "--only=floods", "--budget=fds=30", f"--out={folder}"]


def test_a_finding_is_made_small_and_the_printed_command_replays_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    attacked(monkeypatch, lambda case: [DIED] if has(case, "long_chains") else [])
    assert main(command(tmp_path)) == 1
    said = capsys.readouterr().out
    path = tmp_path / "server-floods-7-0.json"
    small = ProcessCase.load(path)
    assert names(small) == [["connect", "long_chains"]]
    assert small.shows == "died: of a signal"
    [again] = [line.removeprefix("-> ") for line in said.splitlines() if line.startswith("-> ")]
    words = shlex.split(again)
    assert words == ["vfiouser-virtio", "fuzz", "server", "--budget", "fds=30", "--replay", str(path)]
    assert main(words[1:]) == 1
    assert capsys.readouterr().out == f"{path}: died: of a signal\n"


def test_a_race_is_given_several_tries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is seen at each third run: when it is replayed, and while it is made smaller."""
    runs = count(0)
    attacked(monkeypatch, lambda case: [DIED] if next(runs) % 3 == 0 and has(case, "long_chains") else [])
    assert main(command(tmp_path)) == 1
    small = ProcessCase.load(tmp_path / "server-floods-7-0.json")
    assert replay_process_case(small) == [DIED]
    assert sum(map(len, small.lanes)) < sum(map(len, drawn("chains+flags").lanes))


def test_what_smaller_ones_do_not_show_twice_is_kept_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    whole = drawn("chains+flags")
    seen: list[ProcessCase] = []

    def result(case: ProcessCase) -> list[ProcessFinding]:
        again = case.lanes == whole.lanes or case not in seen
        seen.append(case)
        return [DIED] if again else []

    attacked(monkeypatch, result)
    assert main(command(tmp_path)) == 1
    assert ProcessCase.load(tmp_path / "server-floods-7-0.json").lanes == whole.lanes
