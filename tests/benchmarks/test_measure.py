"""How figures become ratios and verdicts."""

from collections.abc import Callable

import pytest
from benchmarks.measure import Row, Target, at_least, at_most, in_turn, summary


def row(ours: list[float], theirs: list[float], **targets: Target) -> Row:
    return Row(metric="speed", unit="MB/s", ours=ours, theirs={"them": theirs}, targets=targets)


def test_the_median_of_the_rounds_ratios_counts() -> None:
    # The machine was ten times slower in the second round: for both.
    (found,) = row([90.0, 9.0, 60.0], [100.0, 10.0, 100.0]).comparisons
    assert found.ratio is not None
    assert found.ratio.median == pytest.approx(0.9)
    assert found.ratio.low == pytest.approx(0.75)
    assert found.ratio.high == pytest.approx(0.9)


@pytest.mark.parametrize(
    ("target", "met", "text"),
    [(at_least(0.9), True, "≥ 0.9x"), (at_least(0.91), False, "≥ 0.91x"), (at_most(0.9), True, "≤ 0.9x")],
)
def test_a_target_for_a_ratio(target: Target, met: bool, text: str) -> None:
    (found,) = row([9.0], [10.0], them=target).comparisons
    assert (found.met, found.target_text) == (met, text)


def test_a_target_for_a_figure_of_ours() -> None:
    some = Row(metric="start", unit="ms", ours=[140.0, 160.0, 150.0], targets={"": at_most(150)})
    (found,) = some.comparisons
    assert (found.met, found.target_text, found.ratio) == (True, "≤ 150 ms", None)


def test_without_a_target_there_is_no_verdict() -> None:
    (found,) = row([9.0], [10.0]).comparisons
    assert (found.met, found.target_text) == (None, "")
    (alone,) = Row(metric="speed", unit="MB/s", ours=[1.0]).comparisons
    assert (alone.met, alone.against) == (None, "")


def test_a_contender_that_did_nothing_is_no_success() -> None:
    (found,) = row([9.0, 9.0], [10.0, 0.0], them=at_least(0.5)).comparisons
    assert (found.ratio, found.met) == (None, False)


@pytest.mark.parametrize(("ours", "met"), [([0.0, 0.0], True), ([0.0, 0.1], False)])
def test_nothing_beside_nothing_is_as_good(ours: list[float], met: bool) -> None:
    """Such as the CPU time of idle devices."""
    (found,) = row(ours, [0.0, 0.0], them=at_most(1.03)).comparisons
    assert (found.ratio, found.met) == (None, met)


def test_rounds_of_a_second_run_are_added() -> None:
    both = row([9.0], [10.0], them=at_least(1)).and_again(row([11.0, 12.0], [10.0, 10.0]))
    (found,) = both.comparisons
    assert found.ratio is not None
    assert found.ratio.median == pytest.approx(1.1)
    assert found.met is True


def test_contenders_alternate() -> None:
    order: list[str] = []

    def contender(name: str, figure: float) -> Callable[[], float]:
        def measure() -> float:
            order.append(name)
            return figure

        return measure

    assert in_turn({"a": contender("a", 1.0), "b": contender("b", 2.0)}, 3) == {"a": [1.0] * 3, "b": [2.0] * 3}
    assert "".join(order) == "abbaab"


def test_the_middle_half() -> None:
    assert summary([1.0, 2.0, 3.0, 4.0, 100.0]) == (3.0, 2.0, 4.0)
    assert summary([7.0]) == (7.0, 7.0, 7.0)
