"""What users write, when faults are due, and that a log does the same once more."""

import json
from pathlib import Path

import pytest

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults import FAULTS, FaultPlan, parse_fault, replay
from vfiouser_virtio.faults.log import FaultLog
from vfiouser_virtio.faults.profiles import PROFILES


def hits(plan: FaultPlan, name: str, count: int, queue: int | None = 0) -> list[int]:
    found = []
    for n in range(1, count + 1):
        if hit := plan.hit(name, queue):
            hit.did("")
            found.append(n)
    return found


@pytest.mark.parametrize(
    ("schedule", "due"),
    [
        ("", list(range(1, 13))),
        (":at=3", [3]),
        (":at=3+7", [3, 7]),
        (":every=5", [5, 10]),
        (":after=9", [10, 11, 12]),
        (":after=2:every=5", [7, 12]),
        (":count=2", [1, 2]),
        (":every=4:count=2", [4, 8]),
        (":p=0", []),
        (":p=1", list(range(1, 13))),
    ],
)
def test_schedules(schedule: str, due: list[int]) -> None:
    assert hits(FaultPlan([f"used-never{schedule}"]), "used-never", 12) == due


def test_probability_is_decided_by_the_seed_and_by_nothing_else() -> None:
    one = hits(FaultPlan(["used-never:p=0.2"], seed=1), "used-never", 1000)
    assert one == hits(FaultPlan(["used-never:p=0.2"], seed=1), "used-never", 1000)
    assert one != hits(FaultPlan(["used-never:p=0.2"], seed=2), "used-never", 1000)
    assert 120 < len(one) < 280
    # Other faults, and other queues in between, make no difference.
    plan = FaultPlan(["used-never:p=0.2", "used-twice:p=0.5"], seed=1)
    found = []
    for n in range(1, 1001):
        plan.hit("used-twice", 0)
        plan.hit("used-never", 1)
        if plan.hit("used-never", 0):
            found.append(n)
    assert found == one


def test_each_queue_has_its_own_count() -> None:
    plan = FaultPlan(["used-never:at=2", "used-twice:at=1:queue=3"])
    assert [bool(plan.hit("used-never", queue)) for queue in (0, 1, 0, 1, 2)] == [False, False, True, True, False]
    assert [bool(plan.hit("used-twice", queue)) for queue in (0, 3, 3)] == [False, True, False]


def test_two_of_a_name_are_each_counted() -> None:
    plan = FaultPlan(["used-len-long:at=2:len=1", "used-len-long:every=2:len=2"])
    found = [plan.hit("used-len-long", 0) for _ in range(4)]
    assert [hit and hit["len"] for hit in found] == [None, 1, None, 2]


def test_stop_and_start() -> None:
    """What could have happened meanwhile is counted, so that a replay has the same numbers."""
    plan = FaultPlan(["used-never:at=2+4"])
    plan.stop()
    plan.stop()
    assert hits(plan, "used-never", 3) == []
    plan.start()
    assert hits(plan, "used-never", 1) == [1]
    assert [entry.get("event", entry.get("n")) for entry in plan.log.entries] == ["stopped", "started", 4]


def test_a_log_does_the_same_once_more(tmp_path: Path) -> None:
    lines: list[str] = []
    plan = FaultPlan(["used-never:p=0.1", "used-id-out-of-range:p=0.1"], device="blk0", write=lines.append)
    plan.stop()
    hits(plan, "used-never", 50)
    plan.start()
    expected = [hits(plan, name, 200) for name in ("used-never", "used-id-out-of-range")]
    drawn = FaultPlan(["used-never", "used-id-out-of-range"], seed=plan.seed).hit("used-id-out-of-range", 0)
    log = tmp_path / "faults.jsonl"
    log.write_text("".join(lines))
    assert json.loads(lines[0])["seed"] == plan.seed

    again = replay(str(log))
    assert again.seed == plan.seed
    hits(again, "used-never", 50)
    assert [hits(again, name, 200) for name in ("used-never", "used-id-out-of-range")] == expected
    assert list(again.log.entries) == [entry for entry in plan.log.entries if "fault" in entry]
    other = replay(str(log))
    first = next(hit for _ in range(200) if (hit := other.hit("used-id-out-of-range", 0)))
    assert drawn is not None
    if first.n == drawn.n:
        assert first.draw(1000) == drawn.draw(1000)


def test_draws_are_decided_by_seed_and_place() -> None:
    def draws(seed: int) -> list[int]:
        plan = FaultPlan(["used-id-out-of-range"], seed=seed)
        found = []
        for _ in range(5):
            hit = plan.hit("used-id-out-of-range", 0)
            assert hit is not None
            found += [hit.draw(1000), hit.draw(1000)]
        return found

    assert draws(1) == draws(1)
    assert draws(1) != draws(2)
    assert len(set(draws(1))) > 5


def test_the_log_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfiouser_virtio.faults.log.MAX_BYTES", 1000)
    lines: list[str] = []
    log = FaultLog(lines.append)
    for n in range(20_000):
        log.add(fault="used-never", n=n)
    assert len(log.entries) == 10_000
    assert sum(map(len, lines)) < 1200
    assert json.loads(lines[-1])["event"] == "truncated"


@pytest.mark.parametrize(
    ("fault", "complaint"),
    [
        ("used-nevre", 'no fault "used-nevre"; did you mean "used-never"?'),
        ("used-never:at", "expected KEY=VALUE after each colon"),
        ("used-never:at=1:at=2", "each once"),
        ("used-never:at=0", "at=0: expected a number from 1"),
        ("used-never:p=2", "expected a probability from 0 to 1"),
        ("used-never:speed=2", 'used-never has no "speed" (it has p, at, every, after, count, queue)'),
        ("config-changes:queue=0", 'config-changes has no "queue"'),
        ("used-late:time=soon", "expected as in time=TIME: how much later"),
        ("config-value:value=0", "needs field=NAME"),
        ("features-extra:bit=-1", "bit=-1: expected as in bit=N: its number, 0 to 127"),
        ("features-missing:bit=128", "bit=128: expected as in bit=N: its number, 0 to 127"),
        ("profile", "which profile?"),
        ("profile:nice", "the profiles are malicious"),
        ("replay:/nonexistent", "No such file"),
        ({"name": "used-never"}, "there is no name"),
        ({"fault": "used-never", "at": [1, 0]}, "expected a number from 1, or several"),
    ],
)
def test_mistakes(fault: object, complaint: str) -> None:
    with pytest.raises(ConfigError) as raised:
        FaultPlan([fault])
    assert complaint in str(raised.value)


def test_a_replay_is_alone(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="says all"):
        FaultPlan(["used-never", f"replay:{tmp_path}/log"])


@pytest.mark.parametrize("text", ["", "[]", "{}", "nothing", '{"seed": 1, "faults": []}\n{"fault": 1}'])
def test_what_is_no_log(tmp_path: Path, text: str) -> None:
    (tmp_path / "log").write_text(text)
    with pytest.raises(ConfigError, match="this is no log of faults"):
        replay(str(tmp_path / "log"))


def test_mappings_say_the_same() -> None:
    spec = parse_fault({"fault": "used-late", "p": 0.5, "at": [3, 7], "queue": 0, "time": "50ms"})
    assert spec == parse_fault("used-late:p=0.5:at=3+7:queue=0:time=50ms")
    assert parse_fault(spec.text) == spec
    assert spec.arguments == {"time": 0.05}
    assert parse_fault({"fault": "profile", "which": "malicious"}).which == "malicious"
    with pytest.raises(TypeError):
        parse_fault(3)


def test_declarations_are_whole() -> None:
    for name, fault in FAULTS.items():
        assert name == fault.name == name.lower()
        for text in (fault.does, fault.breaks, fault.section, fault.per):
            assert text, name
            assert not text.endswith("."), name
        for argument in fault.arguments:
            assert argument.default is None or argument.convert(argument.default) == argument.default


@pytest.mark.parametrize("name", PROFILES)
def test_profiles_consist_of_faults(name: str) -> None:
    assert len(FaultPlan([f"profile:{name}"]).specs) == len(PROFILES[name].faults)
