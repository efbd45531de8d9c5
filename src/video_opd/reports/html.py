"""One self-contained HTML file about one or several runs: tables, curves, timelines, tokens.

No script, no font and no picture is fetched: the file can be mailed, archived and opened offline. A content
security policy allows the page its own script and pictures, and nothing else. Text that comes from data
(queries, responses, paths) is escaped by the template engine.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.errors import UserError
from video_opd.files import write_text
from video_opd.progress import log
from video_opd.reports import story, tables
from video_opd.reports.charts import Chart, Interval, Series, histogram, line_chart, number, stack_chart
from video_opd.reports.runs import Run, read_run, round_number
from video_opd.temporal import best_iou
from video_opd.terminal import visible

if TYPE_CHECKING:
    from jinja2 import Environment

MOST_TIMELINES = 12
MOST_ROLLOUTS = 8  # shown of the first steps, and as many of the last
R_FULL = 2.0  # |r_t| in nats at which a token has its full colour
RUN_COLOURS = ("run-a", "run-b", "run-c", "run-d", "run-e", "run-f")

# Title, how to read it, whether 0 belongs to the axis, metric → label. docs/metrics.md defines the metrics.
CURVES: tuple[tuple[str, str, bool, Mapping[str, str]], ...] = (
    (
        "Reverse KL to the teacher",
        "How far the student's responses are from what the teacher would say. It should fall towards 0.",
        True,
        {"reverse_kl/sampled": "sampled", "reverse_kl/analytic": "analytic"},
    ),
    (
        "Overlap of the responses that were trained on",
        "Mean IoU with the annotation. GRPO is rewarded for it, Video-OPD never sees it, annotations have 1.",
        True,
        {"response/iou_mean": "IoU of the responses"},
    ),
    (
        "Reward",
        "With a teacher: mean over tokens of log π_teacher − log π_student. GRPO: reward of a response.",
        True,
        {"reward/mean": "mean reward"},
    ),
    (
        "Surprise at the responses that are trained on",
        "Mean of −log π_student over their tokens, in nats. Supervised training lowers it.",
        True,
        {"response/nll": "nats a token"},
    ),
    (
        "Gradient norm",
        "Before clipping. Spikes mean single responses that the teacher finds very unlikely.",
        True,
        {"update/grad_norm": "gradient norm"},
    ),
    (
        "Faulty responses",
        "Share of the sampled responses that cannot be read as a time span, or hit the length limit.",
        True,
        {"response/unparsed_share": "not a time span", "response/truncated_share": "cut off"},
    ),
)
# How to read the colours of the tokens, by method.
TOKEN_HELP = {
    "video-opd": (
        "responses that the student wrote in training. Orange tokens are those that the teacher finds "
        "less likely than the student did (r_t < 0) and are pushed down; blue ones are pushed up. Colour "
        "fades as the two agree."
    ),
    "grpo": (
        "responses that the student wrote in training. All tokens of a response share its advantage: "
        "orange responses overlap less with the truth than the others of their group and are pushed down; "
        "blue ones are pushed up."
    ),
    "sft": "annotations in the answer format. Every token is pushed up; there is no other signal.",
    "op-rkd": (
        "annotations in the answer format. Orange tokens are those that the teacher finds less likely "
        "than the student did (r_t < 0) and are pushed down; blue ones are pushed up."
    ),
    "op-fkd": (
        "annotations in the answer format. Orange tokens are those that the teacher finds less likely "
        "than the student did; the loss compares whole distributions at each of them."
    ),
}
TIMES = {
    "time/decode_wait_s": "wait for decoding",
    "time/prefill_s": "prefill",
    "time/sample_s": "sample",
    "time/teacher_s": "teacher",
    "time/reference_s": "initial student",
    "time/update_s": "update",
    "time/checkpoint_s": "checkpoint",
}


@dataclass(frozen=True, kw_only=True)
class Lane:
    """One bar of a timeline; ``spans`` are (left, width) in percent of the duration."""

    label: str
    colour: str
    spans: Sequence[tuple[float, float]]
    text: str


@dataclass(frozen=True, kw_only=True)
class Timeline:
    id: str
    query: str
    duration: str
    frames: Sequence[tuple[str, float, str]]  # data URI, width in percent, time
    lanes: Sequence[Lane]


@dataclass(frozen=True, kw_only=True)
class TokenView:
    text: str
    sign: str  # "up", "down"
    strength: float  # 0–1
    tooltip: str


@dataclass(frozen=True, kw_only=True)
class RolloutView:
    step: int
    query: str
    note: str
    tokens: Sequence[TokenView]


@dataclass(frozen=True, kw_only=True)
class Reload:
    """A page that is watched loads itself every ``every_s`` seconds.

    It stops if it is loaded after ``until_s`` (seconds since 1970): nobody writes it any more then.
    """

    every_s: float
    until_s: float


def write_report(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Reads the run folders and writes one HTML file, whole or not at all.

    The page and stderr name what a run's files held and could not be used. Raises UserError for a folder
    that is not a run's, and when the file cannot be written.
    """
    written = write_text(out, render(read_runs(run_dirs)))
    log(f"wrote {written}")
    return written


def read_runs(run_dirs: Sequence[str | Path], *, tell: bool = True) -> list[Run]:
    """Reads the run folders; ``tell`` names on stderr what could not be used."""
    if not run_dirs:
        raise UserError("a report needs at least one run folder")
    runs = [read_run(folder) for folder in run_dirs]
    for run in runs if tell else ():
        for line in run.left_out:
            log(f"{run.folder}: left out: {line}")
    return runs


def render(runs: Sequence[Run], *, reload: Reload | None = None) -> str:
    """Returns the page as text; ``reload`` makes it load itself again and again."""
    from markupsafe import Markup

    template = environment().get_template("report.html.j2")
    script = environment().get_template("report.js").render()
    single = len(runs) == 1
    return template.render(
        title=runs[0].name if single else f"{len(runs)} runs",
        policy=policy(script),
        script=Markup(script),
        reload=reload,
        comparison=None if single else tables.compare(runs),
        overlay=[] if single else curves(runs),
        sections=[_section(run, curves([run]) if single else []) for run in runs],
        legend=[(f"{r:+g}" if r else "0", _strength(r)) for r in (-2, -1, -0.5, 0, 0.5, 1, 2)],
    )


def policy(script: str) -> str:
    """Returns the content security policy of a page with this script."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


@functools.cache
def environment() -> Environment:
    """Returns the template engine, which compiles each template once.

    It escapes everything from data, and a missing value is an error.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    engine = Environment(
        loader=PackageLoader("video_opd.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters["visible"] = visible
    return engine


def _section(run: Run, charts: Sequence[Chart]) -> dict[str, Any]:
    early, late = rollouts(run)
    return {
        "run": run,
        "method": story.METHODS.get(run.method, run.method),
        "headline": story.headline(run),
        "tiles": story.tiles(run),
        "outcome": story.outcome(run),
        "outcome_header": story.OUTCOME_HEADER,
        "blocks": tables.blocks(run),
        "facts": tables.selection_facts(run.selection or {}),
        "histogram": selection_chart(run.selection or {}),
        "rounds": tables.rounds_table(run),
        "round_header": tables.ROUND_HEADER,
        "round_charts": [*round_curves(run), *round_selections(run)],
        "charts": charts,
        "timelines": [timeline(row) for row in run.timelines[:MOST_TIMELINES]],
        "timelines_left_out": max(0, len(run.timelines) - MOST_TIMELINES),
        "token_help": TOKEN_HELP.get(run.method, TOKEN_HELP["video-opd"]),
        "early": early,
        "late": late,
        "environment": tables.table(run.environment),
    }


def curves(runs: Sequence[Run]) -> list[Chart]:
    """Draws the learning curves of one run, or those of several laid over each other."""
    charts = []
    for title, help, zero, keys in CURVES:
        series = []
        for r, run in enumerate(runs):
            for k, (key, label) in enumerate(keys.items()):
                xs, ys = run.series(key)
                if len(runs) == 1:
                    name, colour = label, ("student", "other")[k]
                elif k == 0:  # one curve a run, or the picture is a tangle
                    name, colour = run.name, RUN_COLOURS[r % len(RUN_COLOURS)]
                else:
                    continue
                series.append(Series(label=name, colour=colour, xs=xs, ys=ys, dashed=k > 0))
        charts.append(line_chart(title, help, series, zero=zero))
    if len(runs) == 1:
        stages = [
            Series(label=label, colour=f"part-{i}", xs=xs, ys=ys)
            for i, (key, label) in enumerate(TIMES.items())
            for xs, ys in [runs[0].series(key)]
        ]
        charts.append(stack_chart("Where the time goes", "Seconds a step, by stage.", stages))
    return [chart for chart in charts if chart is not None]


def round_curves(run: Run) -> list[Chart]:
    """Draws mIoU over the rounds, base at 0, with its 95% intervals: a chart a test set (figure 5)."""
    charts = []
    for testset in run.testsets if run.rounds else ():
        found = [e for e in run.evaluations if e.testset == testset]
        teacher = run.evaluation("teacher", testset)
        own = [(round_number(e.model), e) for e in found if e.model == "base" or round_number(e.model)]
        own.sort(key=lambda pair: pair[0])
        xs = [float(x) for x, _ in own]
        series = [Series(label="student", colour="student", xs=xs, ys=[e.scores["mIoU"] for _, e in own])]
        if teacher is not None and xs:
            level = teacher.scores["mIoU"]
            ends = [min(xs), max(xs)]
            series.append(Series(label="teacher", colour="teacher", xs=ends, ys=[level, level], dashed=True))
        marks = [
            Interval(x=float(x), low=e.ci95["mIoU"][0], high=e.ci95["mIoU"][1], colour="student")
            for x, e in own
            if "mIoU" in e.ci95
        ]
        help = "Mean overlap with the true moments, in percent, with its 95% interval; 0 is the base."
        charts.append(line_chart(f"mIoU on {testset}", help, series, x_label="round", intervals=marks))
    return [chart for chart in charts if chart is not None]


def round_selections(run: Run) -> list[Chart]:
    charts = [
        selection_chart(each.selection or {}, f"round {each.number}: δ before and after the selection")
        for each in run.rounds
    ]
    return [chart for chart in charts if chart is not None]


def selection_chart(
    selection: Mapping[str, Any], title: str = "δ before and after the selection"
) -> Chart | None:
    return histogram(
        title,
        "Right of 0 the teacher answers better than the student: there is something to learn.",
        "δ = teacher IoU − student IoU",
        selection.get("delta_edges") or [],
        [
            ("all scored", "base", selection.get("delta_before") or []),
            ("selected", "student", selection.get("delta_after") or []),
        ],
    )


def timeline(row: Mapping[str, Any]) -> Timeline:
    """Turns one row of eval/timelines.jsonl into bars in percent of the duration."""
    duration_s = float(row["duration"])
    truth = [(float(s), float(e)) for s, e in row["truth"]]

    def lane(label: str, colour: str, spans: Sequence[tuple[float, float]], note: str = "") -> Lane:
        inside = [(s, min(e, duration_s)) for s, e in spans if s < duration_s]
        shown = [(100 * s / duration_s, 100 * (e - s) / duration_s) for s, e in inside]
        text = ", ".join(f"{s:.1f}–{e:.1f} s" for s, e in spans) or "no answer"
        return Lane(label=label, colour=colour, spans=shown, text=text + note)

    lanes = [lane("truth", "truth", truth)]
    for model, span in row["answers"].items():
        spans = [(float(span[0]), float(span[1]))] if span else []
        note = f" · IoU {best_iou(spans[0], truth):.2f}" if spans else ""
        lanes.append(lane(model, model if model in ("base", "student", "teacher") else "other", spans, note))
    return Timeline(
        id=str(row["id"]),
        query=str(row["query"]),
        duration=f"{duration_s:.1f} s",
        frames=_film(row.get("frames") or [], row.get("frame_times_s") or [], duration_s),
        lanes=lanes,
    )


def _film(frames: Sequence[str], times_s: Sequence[float], duration_s: float) -> list[tuple[str, float, str]]:
    """Lays each frame over the stretch of time that it is nearest to, so that film and bars align."""
    if not frames:
        return []
    edges = [0.0, *((a + b) / 2 for a, b in pairwise(times_s)), duration_s]
    widths = [100 * (b - a) / duration_s for a, b in pairwise(edges)]
    pictures = [uri if str(uri).startswith("data:") else f"data:image/jpeg;base64,{uri}" for uri in frames]
    return [(p, w, f"{t:.1f}") for p, w, t in zip(pictures, widths, times_s, strict=True)]


def rollouts(run: Run) -> tuple[list[RolloutView], list[RolloutView]]:
    """Returns responses of the first and of the last steps; the second list is empty when there are few."""
    rows = [row for row in run.rollouts if row.get("tokens")]
    late = rows[-MOST_ROLLOUTS:] if len(rows) >= 2 * MOST_ROLLOUTS else []
    return [_rollout(row) for row in rows[:MOST_ROLLOUTS]], [_rollout(row) for row in late]


def _rollout(row: Mapping[str, Any]) -> RolloutView:
    note = f"IoU {row['iou']:.2f}" if row.get("iou") is not None else ""
    if row.get("truncated"):
        note += " · cut off at the length limit"
    credit = credits_of(row)
    tokens = [_token(text, r) for text, r in zip(row["tokens"], credit, strict=True)]
    query = str(row.get("query") or row.get("id"))
    return RolloutView(step=int(row["step"]), query=query, note=note, tokens=tokens)


def credits_of(row: Mapping[str, Any]) -> Sequence[float | None]:
    """Returns the signal of each token of a row: r_t, or the advantage if there is no teacher."""
    credit: Sequence[float | None] = row["r"]
    return row.get("advantage") or credit if all(r is None for r in credit) else credit


def _token(text: str, r: float | None) -> TokenView:
    shown = text.replace("\n", "⏎") or "∅"
    if r is None:
        return TokenView(text=shown, sign="up", strength=0.0, tooltip="without a finite signal")
    sign = "down" if r < 0 else "up"
    return TokenView(text=shown, sign=sign, strength=_strength(r), tooltip=f"signal {number(r)}")


def _strength(r: float) -> float:
    return round(min(1.0, abs(r) / R_FULL), 3)
