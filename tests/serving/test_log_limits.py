"""Token buckets of log lines, with a clock of our own."""

import logging

import pytest

from vfiouser_virtio.serving.log_limits import BURST, LogLimits
from vfiouser_virtio.serving.terminal import _Handler


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def flood(limits: LogLimits, device: str, count: int) -> int:
    """How many of so many lines get through."""
    written = 0
    for _ in range(count):
        if limits.admits(device):
            limits.charge(device, 1)
            written += 1
    return written


def test_a_burst_and_then_the_rate(clock: Clock) -> None:
    limits = LogLimits(10, clock)
    assert flood(limits, "blk0", 1000) == 10 * BURST
    assert limits.owed("blk0") is None
    clock.now += 0.5
    assert flood(limits, "blk0", 1000) == 0  # a second's worth is saved up
    assert limits.next_report() == pytest.approx(0.5)
    clock.now += 0.5
    assert limits.owed("blk0") == "blk0: 1900 more lines were dropped in the last 1.0 s (see --log-rate)"
    assert limits.next_report() is None
    assert flood(limits, "blk0", 1000) == 10


def test_each_device_has_its_own(clock: Clock) -> None:
    limits = LogLimits(10, clock)
    flood(limits, "blk0", 1000)
    assert flood(limits, "rng0", 5) == 5
    assert list(limits.all_owed()) == []
    clock.now += 60
    assert list(limits.all_owed()) == ["blk0: 900 more lines were dropped in the last 60.0 s (see --log-rate)"]
    assert list(limits.all_owed(final=True)) == []


def test_at_the_end_all_is_said(clock: Clock) -> None:
    limits = LogLimits(10, clock)
    flood(limits, "blk0", 101)
    assert list(limits.all_owed(final=True)) == ["blk0: 1 more lines were dropped in the last 0.0 s (see --log-rate)"]


def test_a_traceback_counts_as_its_lines(clock: Clock) -> None:
    limits = LogLimits(10, clock)
    assert limits.admits("blk0")
    limits.charge("blk0", 300)  # more than there is
    clock.now += 20
    assert not limits.admits("blk0")
    clock.now += 2
    assert limits.admits("blk0")


@pytest.mark.parametrize("rate", [0.01, 0.5, 1])
def test_a_low_rate_still_lets_something_through(clock: Clock, rate: float) -> None:
    limits = LogLimits(rate, clock)
    assert flood(limits, "blk0", 100) == max(1, rate * BURST)
    clock.now += 1 / rate
    assert limits.owed("blk0") is not None
    assert flood(limits, "blk0", 100) == 1


def test_without_a_limit(clock: Clock) -> None:
    limits = LogLimits(0, clock)
    assert flood(limits, "blk0", 10_000) == 10_000
    assert limits.next_report() is None


def test_a_traceback_is_charged_as_what_it_takes_on_stderr(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    handler = _Handler(LogLimits(1, clock))
    try:
        raise ValueError("as many lines as Python likes")
    except ValueError as error:
        trouble = (type(error), error, error.__traceback__)
    for exc_info in (trouble, *[None] * 100):
        record = logging.LogRecord("x", logging.ERROR, "", 0, "a line", None, exc_info)
        vars(record)["device"] = "blk0"
        handler.emit(record)
    assert capsys.readouterr().err.count("\n") == BURST
