"""``fault-log=FILE`` and ``fault=replay:FILE``: a mistake costs no log, and one that does not say all is refused."""

import json
from pathlib import Path

import pytest

from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.faults import FaultPlan, replay
from vfiouser_virtio.serving.device_setup import setups
from vfiouser_virtio.serving.device_specs import parse_device


@pytest.fixture
def log(tmp_path: Path) -> Path:
    """The log of another run."""
    path, lines = tmp_path / "faults.jsonl", list[str]()
    hit = FaultPlan(["used-never:at=1"], seed=7, write=lines.append).hit("used-never", 0)
    assert hit is not None
    hit.did("it was not")
    path.write_text("".join(lines))
    return path


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("fault=replay:{log},fault-log={log}", "is the log of replay:"),
        ("fault=replay:{log},fault-log={folder}/../{name}/faults.jsonl", "write to another file"),
        ("fault=replay:{log},fault-seed=3,fault-log={folder}/other", "fault-seed=3: .* has its own"),
        ("fault=profile:nice,fault-log={log}", "the profiles are"),
        ("fault=used-never:queue=7,fault-log={log}", "has 1 queues"),
        ("fault=config-value:field=capacity,fault-log={log}", "no field capacity"),
    ],
)
def test_mistakes_leave_the_file_as_it_is(log: Path, options: str, complaint: str) -> None:
    before = log.read_bytes()
    options = options.format(log=log, folder=log.parent, name=log.parent.name)
    [setup] = setups([parse_device(f"rng,{options}")])
    with pytest.raises(ConfigError, match=complaint):
        setup.create()
    assert log.read_bytes() == before


def test_two_devices_have_two_logs(log: Path) -> None:
    devices = [
        parse_device(f"rng,fault=used-never,fault-log={log}"),
        parse_device(f"rng,fault=used-late,fault-log={log}"),
    ]
    with pytest.raises(ConfigError, match="2 devices have fault-log="):
        setups(devices)
    nowhere = "rng,fault=used-never,fault-log=/dev/null"
    assert len(setups([parse_device(nowhere), parse_device(nowhere)])) == 2


def test_what_has_happened_before_the_file_is_there(tmp_path: Path) -> None:
    """`capability-loop` happens while the device is made."""
    lines: list[str] = []
    plan = FaultPlan(["used-never"], seed=7)
    for number in range(3):
        hit = plan.hit("used-never", 0)
        assert hit is not None
        hit.did(f"{number}")
        if number == 1:
            plan.log.write_to(lines.append)
    found = [json.loads(line) for line in lines]
    assert [entry.get("n") for entry in found] == [None, 1, 2, 3]
    assert found[0]["seed"] == 7
    (tmp_path / "log").write_text("".join(lines))
    assert replay(str(tmp_path / "log")).seed == 7


@pytest.mark.parametrize(
    ("added", "complaint"),
    [
        ('{"event": "truncated", "bytes": 1}\n', "cannot be replayed: it has ended after 64 MiB"),
        ('{"event": "lost", "lines": 3}\n', "cannot be replayed: lines are missing"),
        ('{"fault": "used-nev', "ends in the middle of a line"),
    ],
)
def test_a_log_that_does_not_say_all(log: Path, added: str, complaint: str) -> None:
    with log.open("a") as file:
        file.write(added)
    with pytest.raises(ConfigError, match=complaint) as raised:
        replay(str(log))
    assert "\n" not in str(raised.value)


def test_a_log_that_is_too_long(log: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vfiouser_virtio.faults.log.MAX_READ", 100)
    with pytest.raises(ConfigError, match="this is no log of faults: those end after"):
        replay(str(log))
