"""Picture of the ratios in SVG: a dot per comparison, a line for its middle half, a tick for its target."""

import math
from collections.abc import Iterable, Sequence
from html import escape

from benchmarks.measure import Comparison, summary
from benchmarks.report import Report, ratio_text

_LINE, _LEFT, _WIDTH, _RIGHT = 18, 400, 420, 130
# Ratios are drawn on a logarithmic scale, as half as much is as far from the same as twice as much.
_SCALE = (0.25, 0.5, 1.0, 2.0, 4.0)
_COLOURS = {True: "#2a7f3f", False: "#c0392b", None: "#5a6b7b"}
_MEANING = {True: "reached", False: "missed", None: "there is none"}

_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#333}"
    ".title{font-weight:600}.faint{fill:#888}.end{text-anchor:end}.mid{text-anchor:middle}"
)
_LEGEND = (
    '<text x="12" y="20">Ours / theirs, or ours / limit: medians and middle halves. The tick is the target: '
    + ", ".join(f'<tspan fill="{_COLOURS[met]}">{text}</tspan>' for met, text in _MEANING.items())
    + "</text>"
)


def draw(reports: Sequence[Report]) -> str:
    """An SVG document: ratios that have a target or are of a size to be shown, figures as parts of their limits."""
    marks: list[str] = []
    y = 44
    for report in reports:
        shown = [(one, *_position(one)) for one in report.comparisons]
        drawable = [(one, values, target) for one, values, target in shown if values is not None]
        if not drawable:
            continue
        y += _LINE
        marks.append(f'<text class="title" x="12" y="{y}">{escape(report.benchmark.name)}</text>')
        for one, values, target in drawable:
            y += _LINE
            marks += _mark(one, values, target, y)
        y += _LINE // 2
    height = y + 24
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{_LEFT + _WIDTH + _RIGHT}" height="{height}">',
            f"<style>{_STYLE}</style>",
            f'<rect width="100%" height="{height}" fill="white"/>',
            _LEGEND,
            *_axis(height),
            *marks,
            "</svg>\n",
        ]
    )


def _position(one: Comparison) -> tuple[tuple[float, float, float] | None, float | None]:
    """Median, low and high end, and the target, all as ratios."""
    if one.ratio is not None and (one.target or _SCALE[0] < one.ratio.median < _SCALE[-1]):
        return one.ratio, one.target.limit if one.target else None
    if one.theirs is None and one.target is not None and one.target.limit:
        median, low, high = (figure / one.target.limit for figure in summary(one.row.ours))
        return (median, low, high), 1.0
    return None, None


def _x(ratio: float) -> float:
    low, high = math.log(_SCALE[0]), math.log(_SCALE[-1])
    at = math.log(min(max(ratio, _SCALE[0]), _SCALE[-1]))
    return round(_LEFT + _WIDTH * (at - low) / (high - low), 1)


def _axis(height: int) -> Iterable[str]:
    for value in _SCALE:
        x = _x(value)
        colour = "#999" if value == 1 else "#e4e4e4"
        yield f'<line x1="{x}" y1="48" x2="{x}" y2="{height - 16}" stroke="{colour}"/>'
        yield f'<text class="mid faint" x="{x}" y="42">{value:g}x</text>'


def _mark(one: Comparison, values: tuple[float, float, float], target: float | None, y: int) -> Iterable[str]:
    median, low, high = values
    colour, middle = _COLOURS[one.met], y - 4
    against = f' <tspan class="faint">/ {escape(one.against)}</tspan>' if one.against else ""
    yield f'<text class="end" x="{_LEFT - 12}" y="{y}">{escape(one.row.metric)}{against}</text>'
    yield f'<line x1="{_x(low)}" y1="{middle}" x2="{_x(high)}" y2="{middle}" stroke="{colour}" stroke-width="2"/>'
    if target is not None:
        x = _x(target)
        yield f'<line x1="{x}" y1="{middle - 6}" x2="{x}" y2="{middle + 6}" stroke="#333" stroke-width="1.5"/>'
    yield f'<circle cx="{_x(median)}" cy="{middle}" r="4" fill="{colour}"/>'
    yield f'<text class="faint" x="{_LEFT + _WIDTH + 12}" y="{y}">{ratio_text(median)} {one.target_text}</text>'
