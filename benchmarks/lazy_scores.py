"""How many rows must the teacher answer so that the first k by δ are known?

    python benchmarks/lazy_scores.py --out runs/lazy-scores

The student answers a generated pool, and ``score --for-topk K`` lets the teacher answer what the selection of
K rows needs, for several K, each of which extends the file of the one before. At last K is the whole pool:
then all rows have their scores, and each selection from fewer answers must be the one from all of them. With
``--rounds``, ``video-opd rounds`` makes three rounds, whose selections must be those from the teacher's
answers to the whole pool beside the answers of the round's student. Every command is killed on the way
(SIGKILL) and repeated. The script itself may be stopped and repeated, too.
"""

from __future__ import annotations

import argparse
import json
import random
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import BASE, ROOT, TEACHER, machine, parser, video_opd, write_result

from video_opd.config import SelectionConfig
from video_opd.curriculum.tvdf import select_file
from video_opd.data.annotations import read_samples
from video_opd.jsonl import read_jsonl, write_jsonl
from video_opd.processes import by_video
from video_opd.world.make import make_world
from video_opd.world.shipped import shipped

SEED = 950
SHARES = (0.026, 0.05, 0.1)  # k ÷ rows of the pool; the first is the paper's, 2,500 of 96,586
BATCH_SIZE = 32
ROUNDS = 3


def main() -> None:
    arguments = parse()
    out = Path(arguments.out)
    data = out / "world" / "train.jsonl"  # written when all videos are there
    if not data.exists():
        make_world(out / "world", videos={"train": arguments.videos}, seed=SEED, workers=1)
    samples = read_samples(data)
    sizes = [round(share * len(samples)) for share in SHARES]
    files = [out / f"scores-{k}.jsonl" for k in (*sizes, len(samples))]
    counts, kills = [], []
    for k, path, before in zip((*sizes, len(samples)), files, (None, *files), strict=False):
        if before is not None and not path.exists():
            for end in ("", ".meta.json"):
                shutil.copyfile(f"{before}{end}", f"{path}{end}")
        printed, killed = kill_and_repeat(score(data, path, arguments, k), path, arguments)
        kills.append(killed)
        counts.append({key: json.loads(printed)[key] for key in ("answered", "needed")})
        print(f"k = {k}: {counts[-1]}", flush=True)
    full = files[-1]
    assert counts[-1]["answered"] == len(samples), "the last file has every answer"
    lazy = [
        {"k": k, **of_k, "killed": killed, **compare(data, full, path, k)}
        for k, of_k, killed, path in zip(sizes, counts, kills, files, strict=False)
    ]
    record = {
        "command": sys.argv,
        "machine": machine(),
        "rows": len(samples),
        "videos": len(by_video(samples)),
        "lazy": lazy,
        "rounds": three_rounds(data, out, full, sizes[0], arguments) if arguments.rounds else [],
    }
    write_result("lazy_scores", record)
    print(table(record))


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--out", required=True, help="folder for videos, scores and rounds")
    options.add_argument("--videos", type=int, default=500, help="of the pool, some four queries each")
    options.add_argument("--rounds", action="store_true", help="also make three rounds")
    options.add_argument("--teacher-k", type=int, default=4, help="the teacher's responses to a row")
    options.add_argument("--student-k", type=int, default=2, help="the student's")
    options.add_argument("--kills", type=int, default=1, help="of each command")
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
        "tvdf.batch_size": BATCH_SIZE,
    }
    words = (word for key, value in changes.items() for word in (f"--{key}", value))
    return [ROOT / "recipes" / "tiny" / "rounds.yaml", *words]


def score(data: Path, scores: Path, arguments: argparse.Namespace, k: int) -> list[str]:
    words = ["--k", arguments.teacher_k, "--student-k", arguments.student_k, "--max-new-tokens", 16]
    words += ["--batch-size", BATCH_SIZE, "--out", scores, "--for-topk", k, "--json"]
    return video_opd("score", *settings(data, Path(arguments.out)), *words)


def compare(data: Path, full: Path, lazy: Path, k: int, exclude: Sequence[str] = ()) -> dict[str, Any]:
    """The selections from both files, which must be equal; and on how many videos the answered rows are."""
    chosen, found = (
        select_file(data, scores, SelectionConfig(k=k), exclude=exclude)[0] for scores in (full, lazy)
    )
    assert found == chosen, f"{lazy}: another selection"
    answered = {row["id"] for _, row in read_jsonl(lazy) if "teacher_iou" in row}
    videos = by_video(sample for sample in read_samples(data) if sample.id in answered)
    return {"selected": len(found), "equal": True, "answered_videos": len(videos)}


def kill_and_repeat(command: Sequence[str], name: Path, arguments: argparse.Namespace) -> tuple[str, int]:
    """Runs a command to its end; on the way it is killed. Returns its output, and how often it was killed.

    A file beside ``name`` counts the kills, because this script may be stopped and repeated, too.
    """
    note = name.with_name(f"{name.name}.kills")
    kills = int(note.read_text()) if note.exists() else 0
    draws = random.Random(kills)
    while True:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        wait_s = draws.uniform(0.5, 1.5) * arguments.every if kills < arguments.kills else None
        try:
            printed, _ = process.communicate(timeout=wait_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            kills += 1
            note.write_text(str(kills))
            continue
        assert process.returncode == 0, f"{command} ended with {process.returncode}"
        return printed, kills


def three_rounds(
    data: Path, out: Path, full: Path, k: int, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    folder = out / "rounds"
    words = ["--run.dir", folder, "--run.trackers", "[]", "--rounds.count", ROUNDS, "--tvdf.k", k]
    words += ["--tvdf.teacher_k", arguments.teacher_k, "--tvdf.student_k", arguments.student_k]
    words += ["--optim.max_steps", 2]
    _, kills = kill_and_repeat(video_opd("rounds", *settings(data, out), *words), folder, arguments)
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
