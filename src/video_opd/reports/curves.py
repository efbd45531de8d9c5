"""The charts of a run: learning curves, times, and mIoU from round to round."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from video_opd.reports.charts import Chart, ErrorBar, Series, line_chart, stack_chart
from video_opd.reports.runs import Run, round_number

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
TIMES = {
    "time/decode_wait_s": "wait for decoding",
    "time/prefill_s": "prefill",
    "time/sample_s": "sample",
    "time/teacher_s": "teacher",
    "time/reference_s": "initial student",
    "time/update_s": "update",
    "time/checkpoint_s": "checkpoint",
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
        bars = [
            ErrorBar(x=float(x), low=e.ci95["mIoU"][0], high=e.ci95["mIoU"][1], colour="student")
            for x, e in own
            if "mIoU" in e.ci95
        ]
        help = "Mean overlap with the true moments, in percent, with its 95% interval; 0 is the base."
        charts.append(line_chart(f"mIoU on {testset}", help, series, x_label="round", error_bars=bars))
    return [chart for chart in charts if chart is not None]
