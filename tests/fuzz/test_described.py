"""``fuzz device``: a device of one's own, from its file, and shipped ones with options."""

import json
import sys
from pathlib import Path

import pytest

from vfiouser_virtio.cli import main
from vfiouser_virtio.errors import ConfigError
from vfiouser_virtio.testing.fuzz.described import add_described

DEVICE = """
from vfiouser_virtio import Device, queue

class Own(Device):
    device_id = 61
    first = queue(max_size=16)
    second = queue(max_size=16)

    def __init__(self, bad: bool = False) -> None:
        super().__init__()
        self.bad = bad

    async def run(self) -> None:
        async for chain in self.second:
            data = chain.readable.read(min(chain.readable.length, 600))
            if self.bad and len(data) > 500:
                raise RuntimeError("who sends so much?")
            chain.complete()
"""


@pytest.fixture
def own(tmp_path: Path) -> str:
    file = tmp_path / "own_device.py"
    file.write_text(DEVICE)
    return f"{file}:Own"


def fuzz(*words: str) -> int:
    return main(["fuzz", "device", *words])


@pytest.mark.slow
def test_a_bug_of_ones_own_device_is_found_made_small_and_replayed(own: str, tmp_path: Path) -> None:
    out, report = tmp_path / "out", tmp_path / "report.json"
    status = fuzz(f"{own},bad", "--seed", "3", "--cases", "200", "--out", str(out), "--report", str(report))
    assert status == 1
    [found] = json.loads(report.read_text())["findings"]
    assert found["kind"] == "bug"
    assert "who sends so much?" in found["what"]
    assert found["steps"] <= 3
    assert fuzz(f"{own},bad", "--replay", found["file"]) == 1
    assert fuzz(own, "--replay", found["file"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("device", ["own", "rng", "blk,size=1M"])
def test_nothing_is_found_in_a_good_one(device: str, own: str) -> None:
    assert fuzz(own if device == "own" else device, "--seed", "3", "--cases", "5") == 0


def test_what_is_no_device_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match='no device "nonsense"'):
        add_described("nonsense")
    with pytest.raises(ConfigError, match="only options of rng itself"):
        add_described("rng,packed")


@pytest.mark.slow
def test_cases_that_run_new_lines_are_kept(own: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corpus, report = tmp_path / "corpus", tmp_path / "report.json"
    words = (own, "--seed", "3", "--cases", "6", "--corpus", str(corpus), "--report", str(report))
    status = fuzz(*words)
    if sys.version_info < (3, 12):
        assert status == 2
        assert "needs Python 3.12" in capsys.readouterr().err
        return
    assert status == 0
    first = json.loads(report.read_text())
    kept = set(corpus.glob("*.json"))
    assert first["lines"] > 100
    assert len(kept) == first["corpus"] > 0
    assert fuzz(*words) == 0
    again = json.loads(report.read_text())
    assert again["cases"] > first["cases"]
    assert kept <= set(corpus.glob("*.json"))
