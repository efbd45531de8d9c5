"""Run folders with everything that a report shows, made of drawn numbers: no model, no video."""

from __future__ import annotations

import base64
import io
import json
import random
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from video_opd.curriculum.tvdf import histogram, histogram_edges
from video_opd.data.annotations import read_samples
from video_opd.evaluation.comparison import evaluate_file

TEST_SETS = ("short", "long")
VIDEOS, QUERIES = 12, 3
QUERY = "the <b>cat</b> jumps over the fence"
LOOSE = {"base": 3.0, "student": 1.2, "teacher": 0.4}  # seconds by which the boundaries are off, about


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def whole_run(folder: Path, seed: int = 0, method: str = "video-opd") -> Path:
    """A run of 30 steps, evaluated on two test sets, with a selection."""
    draws = random.Random(seed)
    folder.mkdir(parents=True)
    write_training(folder, draws, method)
    for testset in TEST_SETS:
        write_evaluation(folder / "eval", testset, LOOSE, draws)
    write_failures(folder / "eval", draws)
    write_selection(folder, draws, range(60), 0.0)
    return folder


def rounds_run(folder: Path, rounds: int = 3) -> Path:
    """A folder of rounds: base and teacher once, a student a round, whose δ shrinks."""
    draws = random.Random(1)
    folder.mkdir(parents=True)
    (folder / "recipe.yaml").write_text("method: video-opd\noptim:\n  lr: 0.0001\n")
    records, used = [], 0
    for testset in TEST_SETS:
        write_evaluation(folder / "eval", testset, {k: LOOSE[k] for k in ("base", "teacher")}, draws)
    for number in range(1, rounds + 1):
        own = folder / f"round-{number}"
        own.mkdir()
        write_training(own, draws, "video-opd")
        for testset in TEST_SETS:
            write_evaluation(own / "eval", testset, {"student": 2.0 / number}, draws)
        write_failures(own / "eval", draws)
        deltas = write_selection(own, draws, range(used, 90), 0.1 * number)
        used += 20
        delta = {"scored": {"mean": sum(deltas) / len(deltas)}, "selected": {"mean": max(deltas)}}
        records.append({"round": number, "delta": delta})
    (folder / "rounds.json").write_text(json.dumps({"rounds": records, "finished": True}))
    return folder


def write_training(folder: Path, draws: random.Random, method: str) -> None:
    (folder / "recipe.yaml").write_text(f"method: {method}\noptim:\n  lr: {draws.choice((1e-4, 2e-4))}\n")
    (folder / "environment.json").write_text(json.dumps({"python": "3.11", "packages": {"torch": "2.15"}}))
    write_rows(
        folder / "metrics.jsonl",
        [
            {
                "step": step,
                "reverse_kl/sampled": 0.5 / step + 0.01 * draws.random(),
                "reverse_kl/analytic": 0.5 / step,
                "reward/mean": -0.5 / step,
                "response/iou_mean": 0.5,
                "response/unparsed_share": 0.0,
                "response/truncated_share": 0.0,
                "update/grad_norm": 1.0 + draws.random(),
                "time/decode_wait_s": 0.1,
                "time/sample_s": 1.0,
                "time/checkpoint_s": 0.5,
                "time/step_s": 3.0,
            }
            for step in range(1, 31)
        ],
    )
    rows = [
        {"step": step, "id": "a", "query": QUERY, **response(draws), "iou": 0.25, "truncated": step == 3}
        for step in range(1, 31)
    ]
    write_rows(folder / "rollouts.jsonl", rows)


def response(draws: random.Random) -> dict[str, Any]:
    """A response token by token, with what two models thought of each."""
    tokens = [*f"{draws.uniform(0, 30):.2f}", " to", " ", *f"{draws.uniform(30, 60):.2f}", "<|im_end|>"]
    student = [-draws.expovariate(1.0) for _ in tokens]
    teacher = [-draws.expovariate(1.0) for _ in tokens]

    def top(own: Sequence[float]) -> list[Any]:
        return [
            [[text, value], ["7", value - 1.0], ["\n", value - 9.5]]
            for text, value in zip(tokens, own, strict=True)
        ]

    return {
        "tokens": tokens,
        "student_logprobs": student,
        "teacher_logprobs": teacher,
        "r": [b - a for a, b in zip(student, teacher, strict=True)],
        "student_top": top(student),
        "teacher_top": top(teacher),
    }


def write_evaluation(folder: Path, testset: str, loose: Mapping[str, float], draws: random.Random) -> None:
    annotations = folder / f"annotations-{testset}.jsonl"
    drawn = random.Random(testset)
    rows = [
        {
            "id": f"{testset}-{v}-{q}",
            "video": f"{testset}-{v}.mp4",
            "query": f"{QUERY}, {q}",
            "duration": 40.0,
            "spans": [[q * 12.0 + drawn.randint(0, 3), q * 12.0 + drawn.randint(6, 10)]],
            "source": f"source {q}",
        }
        for v in range(VIDEOS)
        for q in range(QUERIES)
    ]
    write_rows(annotations, rows)
    for model, off_s in loose.items():
        predictions = folder / f"{model}-{testset}.jsonl"
        write_rows(predictions, [_prediction(row, rows, off_s, draws) for row in rows])
        record = {**evaluate_file(read_samples(annotations), predictions), "model": model, "testset": testset}
        (folder / f"{model}-{testset}.json").write_text(json.dumps(record))


def _prediction(
    row: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], off_s: float, draws: random.Random
) -> dict[str, Any]:
    kind = draws.random()
    start, end = row["spans"][0]
    if kind < 0.08:
        return {"id": row["id"], "query": row["query"], "responses": ["I do not <i>know</i>"]}
    if kind < 0.2:
        start, end = draws.choice([r["spans"][0] for r in rows if r["video"] == row["video"]])
    start = max(0.0, start - abs(draws.gauss(0, off_s)))
    end = min(40.0, end + abs(draws.gauss(0, off_s)))
    return {"id": row["id"], "query": row["query"], "responses": [f"{start:.2f} to {end:.2f}"]}


def write_failures(folder: Path, draws: random.Random) -> None:
    """Frames and tokens of every row; a run keeps those of a few."""
    for testset in TEST_SETS:
        rows = []
        for line in (folder / f"annotations-{testset}.jsonl").read_text().splitlines():
            times_s = [i * 39.5 / 7 for i in range(8)]
            frames = [jpeg(i) for i in range(8)]
            rows.append(
                {"id": json.loads(line)["id"], "frames": frames, "frame_times_s": times_s, **response(draws)}
            )
        write_rows(folder / f"failures-{testset}.jsonl", rows)


@cache
def jpeg(i: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (192, 96), (30 * i, 90, 255 - 30 * i)).save(buffer, "JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()


def write_selection(folder: Path, draws: random.Random, ids: range, learned: float) -> list[float]:
    """Scores of the rows ``ids``, of which the 20 with the largest δ are selected; returns every δ."""
    scores: list[dict[str, Any]] = [
        {
            "id": f"r{i}",
            "teacher_iou": draws.random(),
            "student_iou": min(1.0, learned + 0.5 * draws.random()),
        }
        for i in ids
    ]
    deltas = {row["id"]: row["teacher_iou"] - row["student_iou"] for row in scores}
    passed = [row["id"] for row in scores if row["teacher_iou"] >= 0.5]
    chosen = sorted(passed, key=lambda name: -deltas[name])[:20]
    write_rows(folder / "scores.jsonl", scores)
    write_rows(folder / "selected.jsonl", [{"id": name, "video": "v.mp4", "query": QUERY} for name in chosen])
    summary = {
        "strategy": "topk",
        "rank_by": "iou_gap",
        "rows": len(scores),
        "failed_gate": len(scores) - len(passed),
        "candidates": len(passed),
        "selected": len(chosen),
        "min_teacher_iou": 0.5,
        "delta_edges": histogram_edges(),
        "delta_before": histogram(deltas.values()),
        "delta_after": histogram(deltas[name] for name in chosen),
        "by_source": {
            f"source {q}": {
                "rows": 0,
                "candidates": sum(int(name[1:]) % 3 == q for name in passed),
                "selected": sum(int(name[1:]) % 3 == q for name in chosen),
            }
            for q in range(3)
        },
    }
    (folder / "select.json").write_text(json.dumps(summary))
    return list(deltas.values())
