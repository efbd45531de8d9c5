"""How many rows must the teacher answer so that the first k by δ are known?

    python benchmarks/lazy_scores.py --out runs/lazy-scores

A generated pool is scored whole, and with ``--for-topk`` for several k, each of which extends the file of the
one before. Then ``video-opd rounds`` makes three rounds, whose scores are lazy. Both are killed on the way
(SIGKILL) and repeated. Every selection must be the one from full scores; those of the rounds are the
teacher's answers to the whole pool beside the answers of the round's student.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import BASE, ROOT, TEACHER, machine, parser, run_all, video_opd, write_result

from video_opd.config import SelectionConfig
from video_opd.curriculum.tvdf import select_file
from video_opd.data.annotations import read_samples
from video_opd.jsonl import read_jsonl, write_jsonl
from video_opd.processes import by_video
from video_opd.world.demo import shipped
from video_opd.world.make import make_world

SEED = 950
SHARES = (0.026, 0.05, 0.1)  # k ÷ rows of the pool; the first is the paper's, 2,500 of 96,586
TEACHER_K, STUDENT_K, BATCH_SIZE = 4, 2, 32
ROUNDS = 3


def main() -> None:
    arguments = parse()
    out = Path(arguments.out)
    data = make_world(out / "world", videos={"train": arguments.videos}, seed=SEED, workers=1)["train"]
    samples = read_samples(data)
    full = out / "full.jsonl"
    run_all([score(data, out, full)], 1)
    lazy: list[dict[str, Any]] = []
    for share in SHARES:
        k = round(share * len(samples))
        path = out / f"lazy-{k}.jsonl"
        if not path.exists() and lazy:
            for end in ("", ".meta.json"):  # the file of the last k is extended
                Path(f"{path}{end}").write_bytes(Path(f"{lazy[-1]['file']}{end}").read_bytes())
        command = score(data, out, path, "--for-topk", k, "--json")
        printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        counts = {key: json.loads(printed)[key] for key in ("answered", "needed")}
        lazy.append({"k": k, "file": str(path), **counts, **compare(data, full, path, k)})
        print(f"k = {k}: {counts}", flush=True)
    killed = kill_and_repeat(score(data, out, out / "killed.jsonl", "--for-topk", lazy[0]["k"]), arguments)
    same = (out / "killed.jsonl").read_bytes() == Path(lazy[0]["file"]).read_bytes()
    assert same, "the killed file differs"
    rounds = three_rounds(data, out, full, lazy[0]["k"], arguments)
    record = {
        "command": sys.argv,
        "machine": machine(),
        "rows": len(samples),
        "videos": len(by_video(samples)),
        "lazy": [{key: value for key, value in row.items() if key != "file"} for row in lazy],
        "killed": {"times": killed, "same_bytes": same},
        "rounds": rounds,
    }
    write_result("lazy_scores", record)
    print(table(record))


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--out", required=True, help="folder for videos, scores and rounds")
    options.add_argument("--videos", type=int, default=500, help="of the pool, some four queries each")
    options.add_argument("--kills", type=int, default=3, help="of each command that is killed")
    options.add_argument("--every", type=float, default=30.0, metavar="S", help="mean seconds between kills")
    return options.parse_args()


def settings(data: Path, out: Path) -> list[Any]:
    """The recipe of ``recipes/tiny/rounds.yaml`` on the generated pool."""
    changes: dict[str, Any] = {
        "model.path": shipped(BASE),
        "teacher.path": shipped(TEACHER),
        "data.train": data,
        "data.limit": "null",
        "data.cache_dir": out / "clips",
        "evaluate.data": "[]",
    }
    words = (word for key, value in changes.items() for word in (f"--{key}", value))
    return [ROOT / "recipes" / "tiny" / "rounds.yaml", *words]


def score(data: Path, out: Path, scores: Path, *more: Any) -> list[str]:
    words = ["--k", TEACHER_K, "--student-k", STUDENT_K, "--max-new-tokens", 16, "--batch-size", BATCH_SIZE]
    return video_opd("score", *settings(data, out), *words, "--out", scores, *more)


def compare(data: Path, full: Path, lazy: Path, k: int, exclude: Sequence[str] = ()) -> dict[str, Any]:
    """The selections from both files, which must be equal; and on how many videos the answered rows are."""
    chosen, found = (
        select_file(data, scores, SelectionConfig(k=k), exclude=exclude)[0] for scores in (full, lazy)
    )
    assert found == chosen, f"{lazy}: another selection"
    answered = {row["id"] for _, row in read_jsonl(lazy) if "teacher_iou" in row}
    videos = by_video(sample for sample in read_samples(data) if sample.id in answered)
    return {"selected": len(found), "equal": True, "answered_videos": len(videos)}


def kill_and_repeat(command: Sequence[str], arguments: argparse.Namespace) -> int:
    """Runs a command to its end; on the way it is killed. Returns how often it was."""
    draws, kills = random.Random(0), 0
    while True:
        process = subprocess.Popen(command)
        try:
            code = process.wait(
                draws.uniform(0.5, 1.5) * arguments.every if kills < arguments.kills else None
            )
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            kills += 1
            time.sleep(0.1)
            continue
        assert code == 0, f"{command} ended with {code}"
        return kills


def three_rounds(
    data: Path, out: Path, full: Path, k: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    folder = out / "rounds"
    words = ["--run.dir", folder, "--run.trackers", "[]", "--rounds.count", ROUNDS, "--tvdf.k", k]
    words += ["--tvdf.teacher_k", TEACHER_K, "--tvdf.student_k", STUDENT_K, "--optim.max_steps", 2]
    kills = kill_and_repeat(video_opd("rounds", *settings(data, out), *words), arguments)
    teacher = {row["id"]: row for _, row in read_jsonl(full)}
    used: list[str] = []
    known: set[str] = set()
    records = []
    for number in range(1, ROUNDS + 1):
        path = folder / f"round-{number}"
        rows = [row for _, row in read_jsonl(path / "scores.jsonl")]
        whole = [
            {**teacher[row["id"]], **{key: row[key] for key in row if key != "for_topk"}} for row in rows
        ]
        write_jsonl(out / f"full-{number}.jsonl", whole)
        answered = {row["id"] for row in rows if "teacher_iou" in row}
        found = compare(data, out / f"full-{number}.jsonl", path / "scores.jsonl", k, used)
        records.append(
            {
                "round": number,
                "rows": len(rows),
                "answered": len(answered),
                "asked_now": len(answered - known),
                "killed": kills,
                **found,
            }
        )
        known |= answered
        chosen = [row["id"] for _, row in read_jsonl(path / "selected.jsonl")]
        again, _ = select_file(data, out / f"full-{number}.jsonl", SelectionConfig(k=k), exclude=used)
        assert [row["id"] for row in again] == chosen, f"{path}: another selection"
        used += chosen
    return records


def table(record: dict[str, Any]) -> str:
    rows, videos = record["rows"], record["videos"]
    lines = [
        f"| k of {rows:,} rows | had to be answered | answered | on videos, of {videos:,} | equal |",
        "|---|---|---|---|---|",
    ]
    for row in record["lazy"]:
        share = f"{row['k']:,} ({row['k'] / rows:.1%})"
        counts = (f"{row[key]:,} ({row[key] / rows:.1%})" for key in ("needed", "answered"))
        on = f"{row['answered_videos']:,} ({row['answered_videos'] / videos:.1%})"
        lines.append(f"| {share} | {' | '.join(counts)} | {on} | yes |")
    for row in record["rounds"]:
        lines.append(
            f"round {row['round']}: {row['rows']:,} rows, {row['answered']:,} with the teacher's answer, "
            f"{row['asked_now']:,} of them asked in this round; selection equal"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
