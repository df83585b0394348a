"""The oracle of the process fuzzer sees what it is there to see, also in servers that are bad on purpose."""

import json
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from support.amounts import Amounts

from vfiouser_virtio.cli import main
from vfiouser_virtio.testing.fuzz.process import (
    ANY,
    FAMILIES,
    ProcessCase,
    ProcessFinding,
    ServerBudgets,
    bench,
    fuzz_processes,
    generate_process_case,
    neighbour,
    oracle,
    run_process_case,
    visits,
)
from vfiouser_virtio.testing.fuzz.process import run as process_run
from vfiouser_virtio.testing.fuzz.process.attacks import STEPS
from vfiouser_virtio.testing.fuzz.process.case import HostileStep
from vfiouser_virtio.testing.fuzz.process.neighbour import RoundTrips
from vfiouser_virtio.testing.fuzz.process.scenery import FILES, HOST
from vfiouser_virtio.testing.fuzz.process.server import Holdings

BAD = Path(__file__).parents[1] / "support/bad_neighbour.py"
HELD = Holdings(fds=20, mappings=300, memfds=(), anonymous=30 << 20)
IDLE = RoundTrips([0.0002] * 100)


# ---- measurements ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seen", "stalls"),
    [
        ([0.0003] * 50, False),
        ([0.0003] * 50 + [0.15] * 20, False),
        ([0.0003] * 50 + [0.9], False),  # once may be the machine
        ([0.0003] * 50 + [0.21, 0.3], True),
        ([0.0003] * 50 + [1.1], True),
    ],
)
def test_stalls(seen: list[float], stalls: bool) -> None:
    assert (oracle.of_round_trips(IDLE, RoundTrips(seen)) is not None) == stalls


def test_what_is_too_long_depends_on_the_machine() -> None:
    slow = RoundTrips([10 * each for each in IDLE.served])
    assert oracle.of_round_trips(slow, RoundTrips([0.3, 0.5])) is None
    assert oracle.of_round_trips(slow, RoundTrips([0.9, 0.9])) is not None


@pytest.mark.parametrize(
    ("after", "kind"),
    [
        (HELD, None),
        (replace(HELD, fds=30, mappings=400, anonymous=60 << 20), None),
        (replace(HELD, fds=60), "growth"),
        (replace(HELD, mappings=1000), "growth"),
        (replace(HELD, anonymous=100 << 20), "growth"),
        (replace(HELD, memfds=("fuzz-0-0",)), "mapping"),
    ],
)
def test_holdings(after: Holdings, kind: str | None) -> None:
    found = oracle.of_holdings(HELD, after)
    assert (found and found.kind) == kind


def test_peak() -> None:
    assert oracle.of_peak(30 << 20, 100 << 20) is None
    assert oracle.of_peak(30 << 20, 600 << 20) is not None


@pytest.mark.parametrize(
    ("said", "kinds"),
    [
        (b"12:00:00 INFO rng0: connected\n", []),
        ("12:00:00 WARNING rng0: '\\x1b[2J' and ümlauts\n".encode(), []),
        (b"a client says: \x1b[2J\n", ["text"]),
        (b"it says \xc2\x9b31m\n", ["text"]),
        (b"it says\rforged\n", ["text"]),
        (b"it says: \nforged-line\n", ["text"]),
        (b"12:00:00 WARNING 'forged-line'\n", []),
        (b"ERROR rng0\nTraceback (most recent call last):\n", ["bug"]),
        (b"words\n" * 100_000, ["log"]),
        (b"words\n" * 10_000, []),
    ],
)
def test_stderr(said: bytes, kinds: list[str]) -> None:
    assert [found.kind for found in oracle.of_stderr(said, seconds=3.0)] == kinds


@pytest.mark.parametrize(
    ("status", "said", "good"),
    [
        (2, b"vfiouser-virtio: x.toml: too deeply nested\n", True),
        (None, b"", False),
        (0, b"", False),
        (2, b"", False),
        (1, b"Traceback (most recent call last):\n", False),
        (-11, b"vfiouser-virtio: oops\n", False),
        (2, b"line\n" * 10, False),
    ],
)
def test_refusals(status: int | None, said: bytes, good: bool) -> None:
    assert (oracle.of_refusal(status, said) is None) == good


# ---- cases -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [*FAMILIES, ANY])
def test_a_case_is_the_same_each_time_and_survives_json(family: str, tmp_path: Path) -> None:
    cases = [generate_process_case(family, 1, index) for index in range(40)]
    assert cases == [generate_process_case(family, 1, index) for index in range(40)]
    assert any(case != replace(cases[0], origin=case.origin) for case in cases)
    for case in cases:
        path = tmp_path / "case.json"
        path.write_text(case.dumps())
        assert ProcessCase.load(path).dumps() == case.dumps()
        assert {step["do"] for lane in case.lanes for step in lane} <= STEPS.keys()
        assert {step["do"] for step in case.files} <= FILES.keys()
        assert {step["do"] for step in case.host} <= HOST.keys()


# ---- servers ---------------------------------------------------------------------------------------------------------


def bad_case(how: str, **more: object) -> ProcessCase:
    """A client of a device that is bad, and its requests."""
    steps: list[HostileStep] = [
        {"do": "connect", "client": 0, "device": 0},
        {"do": "start", "client": 0, "size": 64},
        {"do": "request", "client": 0, "count": 4},
        {"do": "pause", "seconds": 0.2},
    ]
    case = ProcessCase("bad", [f"{BAD}:BadNeighbour,how={how}", "rng", "rng"], lanes=[steps])
    return replace(case, **more)  # type: ignore[arg-type] # the tests' own


def has_little_patience(monkeypatch: pytest.MonkeyPatch, *what: tuple[ModuleType, str]) -> None:
    """What never comes is not waited for long."""
    for module, name in what:
        monkeypatch.setattr(module, name, 1.0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "kinds", "waits"),
    [
        ("dies", {"died"}, []),
        ("stops", {"stopped"}, [(neighbour, "NO_ANSWER"), (bench, "END")]),
        ("takes_no_clients", {"refused"}, [(visits, "NO_ANSWER")]),
        ("stalls+overwrites_a_neighbour", {"stall", "neighbour"}, []),
        (
            "keeps_memory+keeps_descriptors+keeps_bytes+floods_the_log+commands_a_terminal+writes_to_a_file",
            {"mapping", "growth", "log", "text", "file"},
            [(bench, "LETTING_GO")],
        ),
        ("forges_a_line+shows_a_traceback+ignores_the_end", {"text", "bug", "end"}, [(bench, "END")]),
    ],
)
def test_a_bad_server_is_found_out(
    how: str, kinds: set[str], waits: list[tuple[ModuleType, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    has_little_patience(monkeypatch, *waits)
    monkeypatch.setattr(oracle, "USUAL", 3600.0)  # a busy machine is not to make a stall longer before it counts
    files: list[HostileStep] = [{"do": "guarded", "name": "victim", "text": "not yours"}]
    found = run_process_case(bad_case(how, files=files), budgets=ServerBudgets(stall=0.05))
    assert kinds <= {each.kind for each in found}, found


@pytest.mark.slow
def test_silence_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    has_little_patience(monkeypatch, (bench, "NO_ANSWER"))
    found = run_process_case(bad_case("nothing", speaks=True, options=["--log-level=error"]))
    assert "silent" in {each.kind for each in found}, found


@pytest.mark.slow
def test_what_is_not_served_is_found_out() -> None:
    assert [each.kind for each in run_process_case(ProcessCase("bad", ["none", "rng", "rng"]))] == ["start"]


@pytest.mark.slow
def test_a_configuration_that_has_no_end_is_found_out_and_a_pipe_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "PATIENCE", 4.0)
    endless = ProcessCase("bad", [f"{BAD}:BadNeighbour,how=spins_at_the_start", "rng", "rng"], serves=False)
    assert [each.kind for each in run_process_case(endless)] == ["start"]
    monkeypatch.undo()
    has_little_patience(monkeypatch, (bench, "WAITS"))
    files: list[HostileStep] = [{"do": "fifo", "name": "fifo.toml"}]
    pipe = ProcessCase("bad", [], ["--config", "{folder}/fifo.toml"], files=files, serves=False)
    assert run_process_case(pipe) == []


@pytest.mark.slow
def test_nothing_is_found(amounts: Amounts) -> None:
    """A few attacks of all kinds on our own server. How long a neighbour waits is judged by `fuzz server`."""
    said: list[str] = []
    run = fuzz_processes(2007, cases=amounts.process_cases, stop=1000, tell=said.append, minimize_seconds=0)
    assert [one for _, findings in run.found for one in findings if one.kind != "stall"] == [], said


def test_what_a_busy_machine_could_feign_counts_when_it_comes_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """What came once is told, and no finding; what nothing can feign is one, and says that it came once."""
    refused, died = ProcessFinding("refused", "no answer"), ProcessFinding("died", "of a signal")
    stall, stopped = ProcessFinding("stall", "8 s"), ProcessFinding("stopped", "20 s")
    died_once = replace(died, once=True)
    assert str(died_once) == "died (not reproduced): of a signal"
    for outcomes, counted, once in (
        ([[refused, died], []], [died_once], 1),
        ([[refused], [refused]], [refused], 0),
        ([[died], [died]], [died], 0),
        ([[died], [refused]], [died_once], 0),
        ([[stall], [stopped]], [stall], 0),
    ):
        left = list(outcomes)
        monkeypatch.setattr(process_run, "run_process_case", lambda *_, left=left, **__: left.pop(0))
        run = fuzz_processes(7, cases=1, families=["floods"], minimize_seconds=0)
        assert [findings for _, findings in run.found] == [counted]
        assert (run.cases, len(run.once), left) == (1, once, [])


def test_budgets_can_be_set() -> None:
    budgets = ServerBudgets.parse(["fds=1", "stall=2.5"])
    assert (budgets.fds, budgets.stall, budgets.mappings) == (1, 2.5, ServerBudgets().mappings)
    assert oracle.of_holdings(HELD, replace(HELD, fds=HELD.fds + 2)) is None
    found = oracle.of_holdings(HELD, replace(HELD, fds=HELD.fds + 2), budgets)
    assert found is not None
    assert found.what == "after all clients have left: 2 file descriptors more"
    assert oracle.of_round_trips(IDLE, RoundTrips([0.3, 0.5])) is not None
    assert oracle.of_round_trips(IDLE, RoundTrips([0.3, 0.5]), budgets) is None


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--only", "x"], "no family 'x'; there are mappings, "),
        (["--tree", "/proc"], "no package vfiouser_virtio in /proc"),
        (["--replay", "/proc/version"], "/proc/version: no case for this target"),
        (["--budget", "patience=3"], "there is no budget 'patience'; there are stall, fds, "),
        (["--budget", "fds=many"], "fds=many: 'many' is no integer"),
        (["--budget", "stall=-1"], "stall=-1: a budget is 0 or more"),
    ],
)
def test_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], said: str) -> None:
    assert main(["fuzz", "server", *arguments]) == 2
    assert said in capsys.readouterr().err


def test_cases_are_replayed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A command line that is a mistake is refused in one line; of a case that is to be served that is a finding."""
    case = ProcessCase("bad", ["nothing-of-that-name"], serves=False)
    paths = [tmp_path / "good.json", tmp_path / "bad.json"]
    paths[0].write_text(case.dumps())
    paths[1].write_text(replace(case, serves=True).dumps())
    assert main(["fuzz", "server", "--replay", *map(str, paths)]) == 1
    said = capsys.readouterr().out
    assert f"{paths[0]}: nothing found\n{paths[1]}: start: it is not ready; status 2: " in said


def test_a_finding_is_written_and_can_be_replayed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def bad(_: object) -> ProcessCase:
        return ProcessCase("bad", ["nothing-of-that-name"])

    monkeypatch.setitem(FAMILIES, "floods", bad)
    command, report = ["fuzz", "server", "--out", str(tmp_path)], tmp_path / "report.json"
    options = ["--seed", "7", "--cases", "1", "--only", "floods", "--report", str(report)]
    assert main([*command, *options]) == 1
    said = json.loads(report.read_text())
    assert (said["target"], said["seed"], said["cases"]) == ("server", 7, 1)
    [found] = said["findings"]
    assert (found["kind"], found["file"]) == ("start", str(tmp_path / "server-floods-7-0.json"))
    assert main([*command, "--replay", str(tmp_path / "server-floods-7-0.json")]) == 1
