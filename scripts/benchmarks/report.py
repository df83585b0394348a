"""Report of results as a text table and as JSON, and progress on a terminal."""

import os
import platform
import sys
from collections.abc import Iterable
from dataclasses import dataclass

from benchmarks.measure import Benchmark, Comparison, Row, Summary, summary

_HEAD = ("", "ours", "", "theirs", "ratio (middle half)", "target", "")
_VERDICTS = {True: "ok", False: "MISSED", None: ""}


@dataclass(frozen=True, slots=True)
class Report:
    """Report of one benchmark."""

    benchmark: Benchmark
    rows: list[Row]
    notes: list[str]

    @property
    def comparisons(self) -> list[Comparison]:
        """All of them, row by row."""
        return [comparison for row in self.rows for comparison in row.comparisons]

    @property
    def missed(self) -> list[str]:
        """A line for each target that was missed."""
        return [
            f"{self.benchmark.name}: {one.row.metric}: {_judged(one)}, target {one.target_text}"
            for one in self.comparisons
            if one.met is False
        ]

    def and_again(self, rows: list[Row]) -> "Report":
        """With the rounds of a second run."""
        return Report(
            self.benchmark, [row.and_again(later) for row, later in zip(self.rows, rows, strict=True)], self.notes
        )


def as_text(report: Report) -> str:
    """A line per comparison, columns aligned."""
    lines = [_HEAD, *_lines(report.rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    # Words to the left, figures to the right.
    shown = [
        "  ".join(
            cell.ljust(width) if column in (0, 2, 6) else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]
    title = f"{report.benchmark.name}: {report.benchmark.summary}"
    return "\n".join([title, *(f"  {line}" for line in shown), *(f"  ({note})" for note in report.notes), ""])


def _lines(rows: Iterable[Row]) -> Iterable[tuple[str, ...]]:
    for row in rows:
        ours = f"{_figure(summary(row.ours).median)} {row.unit}"
        name = row.metric
        for one in row.comparisons:
            if one.theirs is None:
                yield name, ours, "", "", _spread(summary(row.ours)), one.target_text, _VERDICTS[one.met]
            else:
                theirs = f"{_figure(summary(one.theirs).median)} {row.unit}"
                ratio = "" if one.ratio is None else f"{ratio_text(one.ratio.median)} {_spread(one.ratio)}"
                yield name, ours, one.against, theirs, ratio, one.target_text, _VERDICTS[one.met]
            name = ours = ""


def _judged(one: Comparison) -> str:
    if one.theirs is None:
        return f"{_figure(summary(one.row.ours).median)} {one.row.unit}"
    return (
        f"{ratio_text(one.ratio.median)} of {one.against}" if one.ratio else f"nothing to compare with at {one.against}"
    )


def ratio_text(ratio: float) -> str:
    """`0.95x`; `0.0046x`."""
    return f"{ratio:.2f}x" if ratio >= 0.1 else f"{ratio:.2g}x"


def _figure(value: float) -> str:
    """Three digits that count, and no exponents."""
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _spread(of: Summary) -> str:
    return f"({_figure(of.low)}–{_figure(of.high)})"


def as_json(reports: Iterable[Report]) -> dict[str, object]:
    """Everything, to be kept and compared."""
    return {
        "machine": {
            "cpus": len(os.sched_getaffinity(0)),
            "linux": platform.release(),
            "python": platform.python_version(),
            "load": os.getloadavg()[0],
        },
        "benchmarks": [
            {
                "name": report.benchmark.name,
                "summary": report.benchmark.summary,
                "notes": report.notes,
                "rows": [_row_json(row) for row in report.rows],
            }
            for report in reports
        ],
    }


def _row_json(row: Row) -> dict[str, object]:
    return {
        "metric": row.metric,
        "unit": row.unit,
        "ours": summary(row.ours)._asdict() | {"rounds": list(row.ours)},
        "comparisons": [_comparison_json(one) for one in row.comparisons],
    }


def _comparison_json(one: Comparison) -> dict[str, object]:
    shown: dict[str, object] = {"against": one.against or None, "target": one.target_text or None, "met": one.met}
    if one.theirs is not None:
        shown["theirs"] = summary(one.theirs)._asdict() | {"rounds": list(one.theirs)}
        shown["ratio"] = one.ratio and one.ratio._asdict()
    return shown


class Progress:
    """Line on stderr that says what is being done, if that is a terminal."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._shown = sys.stderr.isatty()

    def __call__(self, text: str) -> None:
        if self._shown:
            print(f"\r\033[K{f'{self._name}: {text}' if text else ''}", end="", file=sys.stderr, flush=True)
