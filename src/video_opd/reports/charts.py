"""Charts as numbers: scales, ticks and paths are computed here, the template only draws them.

Coordinates are SVG user units with the origin at the top left. Colours are names of CSS classes, so that one
drawing serves light and dark pages.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

WIDTH, HEIGHT = 520.0, 220.0
LEFT, RIGHT, TOP, BOTTOM = 52.0, 12.0, 12.0, 34.0
MOST_POINTS = 400  # more are averaged into so many bins: a path of 10,000 steps draws the same picture
ERROR_BAR_WIDTH = 2.0
MOST_COLUMNS = 60  # columns of a stacked chart, at most
SMOOTH_FROM = 24  # points from which a smoothed line is drawn over the raw one


@dataclass(frozen=True, kw_only=True)
class Series:
    label: str
    colour: str  # CSS class
    xs: Sequence[float]
    ys: Sequence[float]
    dashed: bool = False


@dataclass(frozen=True, kw_only=True)
class ErrorBar:
    """An upright bar from ``low`` to ``high`` at ``x``."""

    x: float
    low: float
    high: float
    colour: str
    what: str = "95%"


@dataclass(frozen=True, kw_only=True)
class Tick:
    at: float  # user units along the axis
    label: str


@dataclass(frozen=True, kw_only=True)
class Line:
    colour: str
    raw: str  # SVG path data
    smooth: str  # the same, smoothed; empty for a short series
    dashed: bool
    end: tuple[float, float]  # the last point, for a dot
    tooltip: str


@dataclass(frozen=True, kw_only=True)
class Box:
    """A filled rectangle: a bar of a histogram or a layer of a stack."""

    x: float
    y: float
    width: float
    height: float
    colour: str
    tooltip: str


@dataclass(frozen=True, kw_only=True)
class Chart:
    title: str
    help: str  # how to read it
    x_label: str
    x_ticks: Sequence[Tick]
    y_ticks: Sequence[Tick]
    legend: Sequence[tuple[str, str]]  # (colour, label)
    summary: str = ""  # what the picture shows, in words: its text alternative
    lines: Sequence[Line] = ()
    boxes: Sequence[Box] = ()
    zero: float | None = None  # where y = 0 lies, when it is inside the picture
    width: float = WIDTH
    height: float = HEIGHT
    left: float = LEFT
    right: float = WIDTH - RIGHT
    top: float = TOP
    bottom: float = HEIGHT - BOTTOM


@dataclass(frozen=True, kw_only=True)
class Scale:
    """A linear map from values to user units."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        span = self.high - self.low
        share = (value - self.low) / span if span else 0.5
        return round(self.start + share * (self.end - self.start), 2)


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About ``count`` round values that cover [low, high]; the ends may lie outside of it."""
    if not high - low > 1e-12 * max(abs(low), abs(high), 1e-280):  # a point, but for rounding
        half = max(0.5, 1e-6 * abs(low))  # so much is not rounded away
        low, high = (low - half, high + half) if high >= low else (0.0, 1.0)
    rough = (high - low) / count
    exponent = math.floor(math.log10(rough))
    power = 10.0**exponent
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 2 - exponent) for i in range(first, last + 1)]


def number(value: float) -> str:
    """Short and plain: ``0.031``, ``12.4``, ``1,250``, ``2e-07``."""
    size = abs(value)
    if value == 0:
        return "0"
    if size >= 1000:
        return f"{value:,.0f}"
    if size < 1e-3:
        return f"{value:.1g}"
    return f"{value:.3g}"


def line_chart(
    title: str,
    help: str,
    series: Sequence[Series],
    *,
    zero: bool = False,
    x_label: str = "optimiser step",
    error_bars: Sequence[ErrorBar] = (),
) -> Chart | None:
    """Curves over steps; ``zero`` makes the axis include 0. None when there is nothing to draw."""
    drawn = [s for s in series if s.xs]
    if not drawn:
        return None
    binned = [(s, *bins(s.xs, s.ys)) for s in drawn]
    values = sorted(
        [y for _, _, ys in binned for y in ys] + [y for bar in error_bars for y in (bar.low, bar.high)]
    )
    low, high = (min(values[0], 0.0), max(values[-1], 0.0)) if zero else (values[0], values[-1])
    y_values = ticks(low, high, 4)
    x_scale, x_ticks = _step_axis(min(xs[0] for _, xs, _ in binned), max(xs[-1] for _, xs, _ in binned))
    y_scale = Scale(low=y_values[0], high=y_values[-1], start=HEIGHT - BOTTOM, end=TOP)
    lines = []
    for s, xs, ys in binned:
        smoothed = smooth(ys) if len(ys) >= SMOOTH_FROM else []
        lines.append(
            Line(
                colour=s.colour,
                raw=path(xs, ys, x_scale, y_scale),
                smooth=path(xs, smoothed, x_scale, y_scale) if smoothed else "",
                dashed=s.dashed,
                end=(x_scale(xs[-1]), y_scale((smoothed or ys)[-1])),
                tooltip=f"{s.label}: {number(s.ys[0])} at {x_label.split()[-1]} {s.xs[0]:.0f}, "
                f"{number(s.ys[-1])} at {x_label.split()[-1]} {s.xs[-1]:.0f}",
            )
        )
    boxes = [
        _box(
            x_scale(bar.x) - ERROR_BAR_WIDTH / 2,
            ERROR_BAR_WIDTH,
            y_scale(bar.low),
            y_scale(bar.high),
            bar.colour,
            f"{bar.what}: {number(bar.low)} to {number(bar.high)}",
        )
        for bar in error_bars
    ]
    return Chart(
        title=title,
        help=help,
        x_label=x_label,
        x_ticks=x_ticks,
        y_ticks=[Tick(at=y_scale(v), label=number(v)) for v in y_values],
        legend=[(s.colour, s.label) for s in drawn] if len(drawn) > 1 else [],
        summary="; ".join(line.tooltip for line in lines),
        lines=lines,
        boxes=boxes,
        zero=y_scale(0.0) if y_values[0] < 0 < y_values[-1] else None,
    )


def stack_chart(title: str, help: str, series: Sequence[Series]) -> Chart | None:
    """Parts of a whole a step, one above the other; steps are averaged into at most so many columns."""
    drawn = [s for s in series if s.xs and any(s.ys)]
    if not drawn:
        return None
    steps = sorted({x for s in drawn for x in s.xs})
    by_step = [dict(zip(s.xs, s.ys, strict=True)) for s in drawn]
    n = min(MOST_COLUMNS, len(steps))
    columns = [steps[i * len(steps) // n : (i + 1) * len(steps) // n] for i in range(n)]
    heights = [[fmean(part.get(x, 0.0) for x in column) for part in by_step] for column in columns]
    y_values = ticks(0.0, max(sum(column) for column in heights), 4)
    y_scale = Scale(low=0.0, high=y_values[-1], start=HEIGHT - BOTTOM, end=TOP)
    slot = (WIDTH - RIGHT - LEFT) / len(columns)
    boxes = []
    for i, (column, parts) in enumerate(zip(columns, heights, strict=True)):
        below = 0.0
        for s, value in zip(drawn, parts, strict=True):
            tooltip = f"step {_range(column)}, {s.label}: {number(value)}"
            boxes.append(
                _box(LEFT + i * slot, slot * 0.86, y_scale(below), y_scale(below + value), s.colour, tooltip)
            )
            below += value
    labelled = range(0, len(columns), max(1, len(columns) // 6))
    return Chart(
        title=title,
        help=help,
        x_label="optimiser step",
        x_ticks=[Tick(at=round(LEFT + (i + 0.43) * slot, 2), label=f"{columns[i][0]:.0f}") for i in labelled],
        y_ticks=[Tick(at=y_scale(v), label=number(v)) for v in y_values],
        legend=[(s.colour, s.label) for s in drawn],
        summary="; ".join(f"{s.label}: {number(fmean(s.ys))} on average" for s in drawn),
        boxes=boxes,
    )


def histogram(
    title: str,
    help: str,
    x_label: str,
    edges: Sequence[float],
    groups: Sequence[tuple[str, str, Sequence[int]]],
) -> Chart | None:
    """Groups ``(label, colour, counts)`` side by side in the same bins, each as a share of its group."""
    groups = [group for group in groups if sum(group[2])]
    if not groups:
        return None
    shares = [[100 * count / sum(counts) for count in counts] for _, _, counts in groups]
    y_values = ticks(0.0, max(max(share) for share in shares), 4)
    y_scale = Scale(low=0.0, high=y_values[-1], start=HEIGHT - BOTTOM, end=TOP)
    x_scale = Scale(low=edges[0], high=edges[-1], start=LEFT, end=WIDTH - RIGHT)
    slot = (WIDTH - RIGHT - LEFT) / (len(edges) - 1) * 0.9 / len(groups)
    boxes = []
    for g, ((label, colour, counts), share) in enumerate(zip(groups, shares, strict=True)):
        for (low, high), count, percent in zip(pairwise(edges), counts, share, strict=True):
            tooltip = f"{label}: {count} ({percent:.0f}%) between {number(low)} and {number(high)}"
            left = x_scale(low) + g * slot
            boxes.append(_box(left, slot, y_scale(0.0), y_scale(percent), colour, tooltip))
    return Chart(
        title=title,
        help=help,
        x_label=x_label,
        x_ticks=[
            Tick(at=x_scale(v), label=number(v))
            for v in ticks(edges[0], edges[-1], 4)
            if edges[0] <= v <= edges[-1]
        ],
        y_ticks=[Tick(at=y_scale(v), label=f"{number(v)}%") for v in y_values],
        legend=[(colour, f"{label} ({sum(counts):,})") for label, colour, counts in groups],
        summary="; ".join(f"{label}: {_middle(edges, counts)}" for label, _, counts in groups),
        boxes=boxes,
    )


def _middle(edges: Sequence[float], counts: Sequence[int]) -> str:
    """``40, half of them below 0.35``: the upper edge of the bin in which the middle one lies."""
    total, below = sum(counts), 0
    for edge, count in zip(edges[1:], counts, strict=True):
        below += count
        if 2 * below >= total:
            return f"{total:,}, half of them below {number(edge)}"
    raise AssertionError("a group of a histogram has members")


def bins(xs: Sequence[float], ys: Sequence[float]) -> tuple[list[float], list[float]]:
    """At most MOST_POINTS points, each the mean of its neighbours."""
    n = min(len(xs), MOST_POINTS)
    cuts = [i * len(xs) // n for i in range(n + 1)]
    pairs = list(pairwise(cuts))
    return [fmean(xs[a:b]) for a, b in pairs], [fmean(ys[a:b]) for a, b in pairs]


def smooth(ys: Sequence[float]) -> list[float]:
    """A centred moving average over a tenth of the series: it does not lag behind as a running mean does."""
    half = max(1, len(ys) // 20)
    windows = [ys[max(0, i - half) : i + half + 1] for i in range(len(ys))]
    return [fmean(window) for window in windows]


def path(xs: Sequence[float], ys: Sequence[float], x_scale: Scale, y_scale: Scale) -> str:
    points = [f"{x_scale(x):g},{y_scale(y):g}" for x, y in zip(xs, ys, strict=True)]
    return "M" + "L".join(points)


def _step_axis(low: float, high: float) -> tuple[Scale, list[Tick]]:
    scale = Scale(low=low, high=high, start=LEFT, end=WIDTH - RIGHT)
    inside = [v for v in ticks(low, high, 6) if low <= v <= high and v == int(v)] or [low]
    return scale, [Tick(at=scale(v), label=number(v)) for v in inside]


def _box(x: float, width: float, bottom: float, top: float, colour: str, tooltip: str) -> Box:
    return Box(
        x=round(x, 2),
        y=top,
        width=round(width, 2),
        height=round(bottom - top, 2),
        colour=colour,
        tooltip=tooltip,
    )


def _range(column: Sequence[float]) -> str:
    return f"{column[0]:.0f}" if len(column) == 1 else f"{column[0]:.0f}–{column[-1]:.0f}"
