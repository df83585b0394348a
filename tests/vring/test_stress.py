"""Driver and device in two processes on one memfd: a short game of each kind; `--long`: tens of millions of buffers."""

import re
import subprocess
import sys

import pytest

from vfiouser_virtio.testing.stress import SABOTAGE

pytestmark = pytest.mark.once

# What is found soon on any machine; the others are for scripts/stress, on one that is not busy.
RELIABLE = [name for name in SABOTAGE if name not in ("device-early-look", "no-barriers")]


def stress(*options: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
    """``scripts/stress`` with these options; it forks, so it is a program of its own."""
    command = [sys.executable, "-m", "vfiouser_virtio.testing.stress", *options]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize("options", [[], ["--through-queue"]], ids=["ring", "queue"])
@pytest.mark.parametrize("kind", ["split", "packed"])
def test_nothing_is_lost(kind: str, options: list[str], long_run: bool) -> None:
    amount = ["--operations", "10000000"] if long_run else ["--seconds", "1"]
    run = stress("--ring", kind, *amount, *options, timeout=7200 if long_run else 120)
    assert run.returncode == 0, run.stderr
    buffers, driver, device = (
        int(number.replace(",", "")) for number in re.findall(r"([\d,]+) (?:buffers|times)", run.stdout)
    )
    assert min(buffers, driver, device) > 0, run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["split", "packed"])
@pytest.mark.parametrize("name", RELIABLE)
@pytest.mark.diagonal("name", "kind")
def test_what_is_broken_is_found(name: str, kind: str) -> None:
    run = stress("--ring", kind, "--sabotage", name, "--operations", "300000", "--size", "8")
    assert run.returncode == 1, run.stdout
    assert "LOST" in run.stderr
