"""Does the barrier keep a store before a load? Asked of the processor, with two processes on two CPUs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

LITMUS = Path(__file__).with_name("support") / "litmus.py"

pytestmark = [
    pytest.mark.once,
    pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="nothing is reordered on a single CPU"),
]


def reordered(fence: str) -> int:
    """In how many rounds both sides' loads came before their stores."""
    run = subprocess.run([sys.executable, LITMUS, fence], capture_output=True, text=True, check=True, timeout=120)
    return int(run.stdout)


@pytest.mark.parametrize("fence", ["full_barrier", "lock_barrier"])
def test_a_store_is_seen_before_a_later_load(fence: str) -> None:
    assert reordered(fence) == 0


def test_without_a_barrier_it_is_not() -> None:
    """Else the test above would prove nothing."""
    if not any(reordered("nothing") for _ in range(5)):
        pytest.skip("this processor was not seen to reorder anything")
