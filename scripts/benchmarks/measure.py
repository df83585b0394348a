"""Interface of a benchmark, and how its figures become ratios and verdicts.

On two noisy cores an absolute figure moves by a factor of two between runs. So contenders are measured in turn, each
round gives one ratio, and it is the median of the ratios that counts; their middle half says how much they vary.
"""

import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

ROUNDS = 5


class Summary(NamedTuple):
    """Median of some figures, and the ends of their middle half."""

    median: float
    low: float
    high: float


def summary(figures: Sequence[float]) -> Summary:
    """Of at least one figure."""
    if len(figures) == 1:
        return Summary(figures[0], figures[0], figures[0])
    low, median, high = statistics.quantiles(figures, n=4, method="inclusive")
    return Summary(median, low, high)


@dataclass(frozen=True, slots=True)
class Target:
    """Threshold that a median has to reach."""

    relation: Literal["≤", "≥"]
    limit: float

    def met_by(self, figure: float) -> bool:
        """Whether this figure is good enough."""
        return figure <= self.limit if self.relation == "≤" else figure >= self.limit


def at_least(limit: float) -> Target:
    """More is better: speed."""
    return Target("≥", limit)


def at_most(limit: float) -> Target:
    """Less is better: time, memory."""
    return Target("≤", limit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Metric: our figures, a round each, and those of the others in the same rounds."""

    metric: str
    unit: str
    ours: Sequence[float]
    theirs: Mapping[str, Sequence[float]] = field(default_factory=dict)
    targets: Mapping[str, Target] = field(default_factory=dict)
    """By contender, for the ratio ours / theirs; under the empty name, for our own figure."""

    @property
    def comparisons(self) -> "list[Comparison]":
        """Each contender beside us; our figure alone if there is a target for it, or no contender."""
        alone = [Comparison(self, "", None, self.targets.get(""))] if "" in self.targets or not self.theirs else []
        return alone + [
            Comparison(self, name, figures, self.targets.get(name)) for name, figures in self.theirs.items()
        ]

    def and_again(self, later: "Row") -> "Row":
        """This row with the rounds of a second measurement added."""
        theirs = {name: [*figures, *later.theirs[name]] for name, figures in self.theirs.items()}
        return Row(
            metric=self.metric, unit=self.unit, ours=[*self.ours, *later.ours], theirs=theirs, targets=self.targets
        )


@dataclass(frozen=True, slots=True)
class Comparison:
    """Comparison of our figures with those of one contender, or, with an empty name, our figures alone."""

    row: Row
    against: str
    theirs: Sequence[float] | None
    target: Target | None

    @property
    def ratio(self) -> Summary | None:
        """Ours / theirs, round by round. None without a contender, or where it measured nothing at all."""
        if self.theirs is None or not all(self.theirs):
            return None
        return summary([ours / theirs for ours, theirs in zip(self.row.ours, self.theirs, strict=True)])

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        judged = summary(self.row.ours) if self.theirs is None else self.ratio
        if judged is None:  # it measured nothing: no CPU time of what is idle is as good as ours if we have none either
            return self.target.relation == "≤" and not any(self.row.ours)
        return self.target.met_by(judged.median)

    @property
    def target_text(self) -> str:
        """`≥ 0.95x`, `≤ 150 ms`, or nothing."""
        if self.target is None:
            return ""
        return f"{self.target.relation} {self.target.limit:g}{f' {self.row.unit}' if self.theirs is None else 'x'}"


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the user, and how a benchmark tells of its work."""

    rounds: int = ROUNDS
    quick: bool = False
    """A tiny run that shows that all works; its figures mean little."""
    only: str = ""
    """Only metrics whose names match this, in benchmarks that can measure them one by one."""
    libvfio_user: Path | None = None
    peers: Sequence[str] = ()
    variants: Sequence[str] = ()
    progress: Callable[[str], None] = lambda _text: None
    """Says what is being measured."""
    note: Callable[[str], None] = lambda _text: None
    """Keeps a sentence to be shown with the figures."""

    def wants(self, metric: str) -> bool:
        """Whether a metric of this name is to be measured."""
        return re.search(self.only, metric) is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """Benchmark that `scripts/bench NAME` runs."""

    name: str
    summary: str
    run: Callable[[Options], list[Row]]


def in_turn(contenders: Mapping[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Each contender's figures, one a round; every other round goes backwards, so that a drift falls on all alike."""
    figures: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds):
        for name in turn(list(contenders), number):
            figures[name].append(contenders[name]())
    return figures


def turn(names: Sequence[str], number: int) -> Sequence[str]:
    """The order of a round."""
    return names[::-1] if number % 2 else names
