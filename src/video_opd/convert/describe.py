"""Statistics of a data file: durations, spans and their positions, queries, sources, tokens. No torch."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from video_opd.config import Settings, VideoConfig, read_settings
from video_opd.config.tree import apply_overrides
from video_opd.convert.check import CheckedVideo
from video_opd.data.annotations import Annotations
from video_opd.data.budget import plan
from video_opd.temporal import annotation_iou
from video_opd.types import Sample

BINS = 12
_TAIL = 99.0  # percentile from which a histogram's last bin is open
_ASSUMED_FPS = 30.0  # for videos that were not opened; any rate above the budget's gives the same tokens
_STEPS = (1, 2, 2.5, 5, 10)


@dataclass(frozen=True, kw_only=True)
class Histogram:
    """``counts`` [n] between ``edges`` [n + 1]; with ``open_end`` the last bin holds all longer values."""

    edges: tuple[float, ...]
    counts: tuple[int, ...]
    open_end: bool


@dataclass(frozen=True, kw_only=True)
class Spread:
    """The distribution of some numbers. ``p5`` and ``p95`` are percentiles."""

    n: int
    min: float
    p5: float
    median: float
    mean: float
    p95: float
    max: float
    total: float
    histogram: Histogram


class _VideoSettings(Settings):
    video: VideoConfig = VideoConfig()


def read_budget(overrides: Sequence[str]) -> VideoConfig:
    """The paper's budget, changed by ``--video.key value``. Raises UserError for any other key."""
    return read_settings(_VideoSettings, apply_overrides({}, overrides)).video


def describe(
    annotations: Annotations,
    budget: VideoConfig,
    *,
    size_px: tuple[int, int] | None = None,
    checked: Mapping[Path, CheckedVideo] | None = None,
) -> dict[str, Any]:
    """The record that ``data stats --json`` prints.

    Tokens are counted under ``budget``. A video has ``size_px`` (width, height) and its stated duration, or
    the size and duration that it has in ``checked``; ``tokens`` is None if both are missing. Spreads are over
    seconds, shares of the duration, or counts; a spread over no numbers is None.
    """
    samples = annotations.samples
    by_video: dict[Path, list[Sample]] = {}
    for sample in samples:
        by_video.setdefault(sample.video, []).append(sample)
    lengths = {video: s for video, rows in by_video.items() if (s := _duration(rows, checked, video))}
    spans = [(span, sample.duration_s) for sample in samples for span in sample.spans]
    relative = [(start / s, end / s) for (start, end), s in spans if s]
    asked = Counter((sample.video, sample.query) for sample in samples)
    return {
        "rows": len(samples),
        "videos": len(by_video),
        "unannotated": annotations.unannotated,
        "clamped": len(annotations.clamped),
        "without_duration": sum(sample.duration_s is None for sample in samples),
        "asked_twice": sum(count - 1 for count in asked.values()),
        "sources": dict(Counter(sample.source or "–" for sample in samples).most_common()),
        "duration_s": spread(list(lengths.values())),
        "span_s": spread([end - start for (start, end), _ in spans]),
        "span_share": spread([end - start for start, end in relative], top=1.0),
        "start_share": spread([start for start, _ in relative], top=1.0),
        "end_share": spread([end for _, end in relative], top=1.0),
        "spans_a_row": spread([len(sample.spans) for sample in samples if sample.spans], whole=True),
        "annotation_iou": spread([x for sample in samples if (x := annotation_iou(sample.row)) is not None]),
        "queries_a_video": spread([len(rows) for rows in by_video.values()], whole=True),
        "words_a_query": spread([len(sample.query.split()) for sample in samples], whole=True),
        "tokens": _tokens(by_video, lengths, budget, size_px, checked),
    }


def _duration(
    rows: Sequence[Sample], checked: Mapping[Path, CheckedVideo] | None, video: Path
) -> float | None:
    """The video's own duration if it was opened, else the first one that a row states."""
    facts = checked.get(video) if checked else None
    if facts and facts.duration_s:
        return facts.duration_s
    return next((row.duration_s for row in rows if row.duration_s), None)


def _tokens(
    by_video: Mapping[Path, Sequence[Sample]],
    lengths: Mapping[Path, float],
    budget: VideoConfig,
    size_px: tuple[int, int] | None,
    checked: Mapping[Path, CheckedVideo] | None,
) -> dict[str, Any] | None:
    """The tokens of the videos: each video once, and each once for every row that asks about it."""
    tokens, frames, rows = [], [], []
    for video, asking in by_video.items():
        facts = checked.get(video) if checked else None
        if size_px is not None and video in lengths:
            width, height = size_px
            count = max(1, round(lengths[video] * _ASSUMED_FPS))
            chosen = plan(count, _ASSUMED_FPS, height, width, budget)
        elif size_px is None and facts and facts.size_px and facts.frames and facts.fps:
            chosen = plan(facts.frames, facts.fps, *facts.size_px, budget)
        else:
            continue
        tokens.append(chosen.video_tokens)
        frames.append(chosen.n_frames)
        rows.append(len(asking))
    if not tokens:
        return None
    return {
        "budget": budget.without_decoder(),
        "size": None if size_px is None else list(size_px),
        "videos": len(tokens),  # those that were counted
        "a_video": spread(tokens, whole=True),
        "frames_a_video": spread(frames, whole=True),
        "at_the_bound": sum(t >= 0.95 * budget.max_video_tokens for t in tokens),
        "all_rows": int(np.dot(tokens, rows)),
        "all_videos": sum(tokens),
    }


def spread(
    values: Sequence[float], *, top: float | None = None, whole: bool = False
) -> dict[str, Any] | None:
    """A :class:`Spread` as a record; ``top`` fixes the histogram's end, ``whole`` gives it whole edges."""
    if not values:
        return None
    array = np.asarray(values, dtype=np.float64)
    low, p5, median, p95, high = (float(x) for x in np.percentile(array, [0, 5, 50, 95, 100]))
    result = Spread(
        n=len(values),
        min=low,
        p5=p5,
        median=median,
        mean=float(array.mean()),
        p95=p95,
        max=high,
        total=math.fsum(values),
        histogram=histogram(array, top=top, whole=whole),
    )
    return asdict(result)


def histogram(values: np.ndarray, *, top: float | None = None, whole: bool = False) -> Histogram:
    """About twelve bins of a round width from 0 on. The last percent of a long tail shares the last bin.

    A value on an edge belongs to the bin above it, except on the last edge.
    """
    high = float(values.max())
    end = float(np.percentile(values, _TAIL)) if top is None else top
    end = (math.ceil(end) if whole else end) or high or 1.0
    step = _round_step(end / BINS, whole)
    count = max(1, math.ceil(end / step - 1e-9)) if top is not None else math.floor(end / step) + 1
    edges = [round(i * step, 12) for i in range(count + 1)]
    index = np.minimum((values / step + 1e-9).astype(np.int64), count - 1)
    counts = np.bincount(index, minlength=count)
    return Histogram(
        edges=tuple(edges), counts=tuple(int(n) for n in counts), open_end=bool(high > edges[-1] + 1e-9)
    )


def _round_step(rough: float, whole: bool) -> float:
    if whole and rough <= 1:
        return 1.0
    rough = max(rough, 1e-9)  # edges have 12 decimals
    power = 10.0 ** math.floor(math.log10(rough))
    steps = (1, 2, 5, 10) if whole else _STEPS
    return next(factor * power for factor in steps if factor * power >= rough * 0.999)
