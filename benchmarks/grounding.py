"""How much is the agreement of samples worth, and how well do windows find an event in a long video?

The first: on videos of the world as they are, answers that are greedy, sampled, and the consensus of K
samples, by thirds of the agreement. The second: videos put one after another, each question about one of
them, answered from the whole and from windows that are ranked in several ways.

    python benchmarks/grounding.py --out runs/grounding
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import groupby
from pathlib import Path
from typing import Any

import av
import numpy as np
from common import BASE, TEACHER, machine, parser, write_result

from video_opd.api import ground, load
from video_opd.data.annotations import read_samples
from video_opd.evaluation.bootstrap import interval95
from video_opd.grounding.ground import GroundedAnswer, WindowAnswer
from video_opd.progress import track
from video_opd.temporal import Interval, iou
from video_opd.types import Sample
from video_opd.world.make import make_world
from video_opd.world.shipped import shipped

SIZE_PX = (144, 192)  # (height, width) of the joined videos
CLOCK_HZ = 1000
DRAWN = {"samples": 8, "max_new_tokens": 24, "batch_size": 32}


def main() -> None:
    arguments = parse()
    out = Path(arguments.out)
    files = make_world(out, videos={"short": 48, "subtle": 24}, seed=arguments.seed, track=track)
    record: dict[str, Any] = {"command": sys.argv, "machine": machine(), "agreement": {}, "windows": {}}
    for name in (TEACHER, BASE):
        model = load(shipped(name), device="cpu")
        for split, path in files.items():
            record["agreement"][f"{name}, {split}"] = agreement_figures(answers(model, read_samples(path)))
    print(agreement_table(record["agreement"]))
    questions = join(read_samples(files["short"]), out / "long", arguments.joined)
    record["windows"] = window_figures(load(shipped(TEACHER), device="cpu"), questions, arguments.window)
    print(window_table(record["windows"]))
    write_result("grounding", record)


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--out", required=True, help="folder for videos")
    options.add_argument("--seed", type=int, default=11, help="of the world")
    options.add_argument("--joined", type=int, default=4, help="videos that make a long one")
    options.add_argument("--window", type=float, default=12.0, help="seconds; they overlap by half")
    return options.parse_args()


Answered = tuple[Sample, GroundedAnswer, GroundedAnswer]
"""A question, its greedy answer, and the consensus of samples."""


def answers(model: Any, samples: Sequence[Sample], **options: Any) -> list[Answered]:
    found: list[Answered] = []
    for video, group in groupby(samples, key=lambda sample: sample.video):
        rows = list(group)
        queries = [row.query for row in rows]
        greedy = ground(model, video, queries, max_new_tokens=24, batch_size=32, **options)
        drawn = ground(model, video, queries, **DRAWN, **options)
        found += zip(rows, greedy, drawn, strict=True)
    return found


def summary(values: Sequence[float] | np.ndarray, videos: Sequence[Path]) -> dict[str, Any]:
    """Mean in percent, and its 95% interval over videos."""
    column_N1 = 100 * np.asarray(values, dtype=np.float64)[:, None]
    return {"n": len(column_N1), "mean": float(column_N1.mean()), "ci95": interval95(column_N1, videos)[0]}


# --- agreement


def agreement_figures(pairs: Sequence[Answered]) -> dict[str, Any]:
    videos = [sample.video for sample, _, _ in pairs]
    truths = [sample.spans[0] for sample, _, _ in pairs]
    greedy = [iou(answer.span, truth) for (_, answer, _), truth in zip(pairs, truths, strict=True)]
    consensus = np.array([iou(drawn.span, t) for (_, _, drawn), t in zip(pairs, truths, strict=True)])
    single = [
        float(np.mean([iou(response.span, t) for response in drawn.samples]))
        for (_, _, drawn), t in zip(pairs, truths, strict=True)
    ]
    agreements = np.array([drawn.agreement or 0.0 for _, _, drawn in pairs])
    thirds = np.array_split(np.argsort(agreements, kind="stable"), 3)
    return {
        "greedy": summary(greedy, videos),
        "consensus": summary(consensus, videos),
        "one sample": summary(single, videos),
        "thirds of agreement": [summary(consensus[rows], [videos[i] for i in rows]) for rows in thirds],
        "agreement at the borders": [float(agreements[rows[0]]) for rows in thirds[1:]],
        "spearman": spearman(agreements, consensus),
        "samples without a span": sum(r.span is None for _, _, drawn in pairs for r in drawn.samples),
    }


def spearman(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(mean_ranks(a), mean_ranks(b))[0, 1])


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """Equal values share the mean of their ranks."""
    _, group, count = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    return (ends - (count - 1) / 2)[group]


def agreement_table(figures: dict[str, Any]) -> str:
    lines = [
        "| model, split | n | greedy | consensus | one sample | least agreement | middle | most | Spearman |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for name, row in figures.items():
        cells = [row["greedy"], row["consensus"], row["one sample"], *row["thirds of agreement"]]
        shown = " | ".join(cell(c) for c in cells)
        lines.append(f"| {name} | {row['greedy']['n']} | {shown} | {row['spearman']:.2f} |")
    return "\n".join(lines)


def cell(figure: dict[str, Any]) -> str:
    return f"{figure['mean']:.1f} [{figure['ci95'][0]:.1f}, {figure['ci95'][1]:.1f}]"


# --- windows


def join(samples: Sequence[Sample], folder: Path, count: int) -> list[Sample]:
    """``count`` videos one after another in each file, and their questions but for those asked twice."""
    folder.mkdir(parents=True, exist_ok=True)
    groups = [list(rows) for _, rows in groupby(samples, key=lambda sample: sample.video)]
    questions: list[Sample] = []
    for start in range(0, len(groups) - count + 1, count):
        path = folder / f"{start:03d}.mp4"
        offset_s, rows = 0.0, []
        with av.open(str(path), "w") as container:
            stream = container.add_stream(
                "libx264", options={"preset": "superfast", "crf": "20", "threads": "1"}
            )
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width = SIZE_PX
            stream.pix_fmt = "yuv420p"
            stream.codec_context.time_base = Fraction(1, CLOCK_HZ)
            for group in groups[start : start + count]:
                with av.open(str(group[0].video)) as source:
                    for frame in source.decode(video=0):
                        shown = frame.reformat(SIZE_PX[1], SIZE_PX[0], "yuv420p")
                        shown.pts = round((offset_s + (frame.time or 0.0)) * CLOCK_HZ)
                        shown.time_base = Fraction(1, CLOCK_HZ)
                        container.mux(stream.encode(shown))
                rows += [(sample, offset_s) for sample in group]
                offset_s += group[0].duration_s or 0.0
            container.mux(stream.encode(None))
        asked = [sample.query for sample, _ in rows]
        questions += [
            Sample(
                id=sample.id,
                video=path,
                query=sample.query,
                spans=((sample.spans[0][0] + begins_s, sample.spans[0][1] + begins_s),),
            )
            for sample, begins_s in rows
            if asked.count(sample.query) == 1
        ]
    return questions


Rank = Callable[[WindowAnswer], Sequence[float]]


def best(answer: GroundedAnswer, rank: Rank) -> Interval | None:
    return max(answer.windows, key=lambda w: (w.response.span is not None, *rank(w))).response.span


def window_figures(model: Any, questions: Sequence[Sample], window_s: float) -> dict[str, Any]:
    whole = answers(model, questions)
    searched = answers(model, questions, window_s=window_s)
    truths = [sample.spans[0] for sample in questions]
    spans: dict[str, list[Interval | None]] = {
        "the whole video": [greedy.span for _, greedy, _ in whole],
        "windows, by log-probability": [greedy.span for _, greedy, _ in searched],
        "windows, by agreement of 8 samples": [drawn.span for _, _, drawn in searched],
        "windows, by log-probability of the consensus of 8": [
            best(drawn, lambda w: (w.response.logprob,)) for _, _, drawn in searched
        ],
        "windows, by mean log-probability of 8 samples": [
            best(drawn, lambda w: (float(np.mean([s.logprob for s in w.samples])),))
            for _, _, drawn in searched
        ],
        "the right window, if it were known": [
            max((w.response.span for w in greedy.windows), key=lambda span: iou(span, truth))
            for (_, greedy, _), truth in zip(searched, truths, strict=True)
        ],
    }
    videos = [sample.video for sample in questions]
    figures = {}
    for name, found in spans.items():
        ious = np.array([iou(span, truth) for span, truth in zip(found, truths, strict=True)])
        figures[name] = {
            "mIoU": summary(ious, videos),
            "R@0.5": summary(ious >= 0.5, videos),
            "overlaps": summary(ious > 0, videos),
        }
    return figures


def window_table(figures: dict[str, Any]) -> str:
    lines = ["| answered from | mIoU | R@0.5 | overlaps with the event at all |", "|---|---|---|---|"]
    lines += [
        f"| {name} | " + " | ".join(cell(c) for c in row.values()) + " |" for name, row in figures.items()
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
