"""The time saved by prefilling a video once for all queries about it.

    python benchmarks/scoring.py --out runs/scoring

Generated videos with five queries each, shown to the tiny base in frames of 64 tokens: prompts of some 1,500
tokens. Two jobs: eight sampled responses to each of a video's queries (what the scores of TVDF need), and one
greedy response to each (what predictions need). Each is done in three ways, all by the ``prefix`` engine:

- ``shared``: the queries of a video in one batch, whose prompts share the video's prefill;
- ``batched``: the same batch without that: the vision tower once a video, the language model once a prompt;
- ``separate``: one prompt and one response at a time, so the video is prefilled for every response.

The ways take turns within a repeat, in another order every time, so what else the machine does falls on all
of them; ratios are taken within a repeat. The responses must be equal, and their log-probabilities to 1e-4.

With ``--predict`` the command itself is measured, decoding and writing included: five queries a video, as
``video-opd predict`` batches them and one by one (``--batch-size 1``). The responses must be equal. The
figure is processor time in user mode, which other work on the machine changes little.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from common import BASE, parser, write_result

from video_opd.bench.timing import machine
from video_opd.data.annotations import read_samples
from video_opd.evaluation.predict import GenerationSettings, predict
from video_opd.jsonl import read_jsonl
from video_opd.models.inference import InferenceModel, load_inference_model, read_inference_config
from video_opd.models.policy import HFPolicy
from video_opd.processes import by_video
from video_opd.seeds import derive_seed
from video_opd.types import EncodedPrompt, Rollout, Sample
from video_opd.world.make import make_world
from video_opd.world.shipped import shipped

QUERIES, ANSWERS, MAX_NEW_TOKENS, FRAME_TOKENS = 5, 8, 32, 64
BATCH_SIZE = 8  # the default of predict and evaluate
TOLERANCE = 1e-4  # nats
Job = Callable[[], list[Rollout]]


def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    model = load_inference_model(
        read_inference_config(
            str(shipped(BASE)),
            [f"--video.{end}_frame_tokens={FRAME_TOKENS}" for end in ("min", "max")],
        ),
        arguments.device,
    )
    record: dict[str, Any] = {
        "command": sys.argv,
        "machine": machine(torch.device(model.policy.device)),
    }
    if arguments.predict:
        samples = samples_by_video(Path(arguments.out), arguments.videos)
        record |= measure_predict(model, samples, Path(arguments.out), arguments.repeats)
        write_result("predict", record)
        print(predict_table(record))
        return
    videos = prompts_by_video(model, Path(arguments.out), arguments.videos)
    record |= {
        "prompts": {
            "videos": len(videos),
            "queries_a_video": QUERIES,
            "tokens": [prompt.length for video in videos for prompt in video],
            "video_tokens": [video[0].video_tokens for video in videos],
        },
        "repeats": arguments.repeats,
        "jobs": {},
    }
    for name, n, temperature in (("sampled", ANSWERS, 1.0), ("greedy", 1, 0.0)):
        ways = {
            "shared": partial(together, model.policy, videos, n, temperature),
            "batched": partial(unshared, model.policy, videos, n, temperature),
            "separate": partial(one_at_a_time, model.policy, videos, n, temperature),
        }
        record["jobs"][name] = {"answers_a_query": n, "temperature": temperature} | measure(
            ways, arguments.repeats
        )
    print(table(record))
    write_result("scoring", record)


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--out", required=True, help="folder for the generated videos")
    options.add_argument("--videos", type=int, default=2)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--device", help="cuda where there is one, else cpu")
    options.add_argument("--predict", action="store_true", help="measure predict, five queries a video")
    return options.parse_args()


def samples_by_video(out: Path, count: int) -> list[list[Sample]]:
    """The first five queries of the first ``count`` videos that have so many."""
    data = make_world(out, videos={"long": 2 * count}, seed=900, workers=1)["long"]
    chosen = [rows[:QUERIES] for rows in by_video(read_samples(data)) if len(rows) >= QUERIES][:count]
    assert len(chosen) == count, "too few videos with five queries"
    return chosen


def prompts_by_video(model: Any, out: Path, count: int) -> list[list[EncodedPrompt]]:
    chosen = samples_by_video(out, count)
    prompts = {sample.id: prompt for sample, prompt in model.prompts([s for rows in chosen for s in rows])}
    return [[prompts[sample.id] for sample in rows] for rows in chosen]


def seeds_of(prompts: Sequence[EncodedPrompt], n: int) -> list[list[int]]:
    return [[derive_seed(0, "benchmark", prompt.sample_id, j) for j in range(n)] for prompt in prompts]


def together(
    policy: HFPolicy, videos: Sequence[Sequence[EncodedPrompt]], n: int, temperature: float
) -> list[Rollout]:
    return [
        rollout
        for prompts in videos
        for group in policy.sample(
            prompts,
            n=n,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=temperature,
            seeds=seeds_of(prompts, n) if temperature else None,
        )
        for rollout in group
    ]


def unshared(
    policy: HFPolicy, videos: Sequence[Sequence[EncodedPrompt]], n: int, temperature: float
) -> list[Rollout]:
    with patch("video_opd.models.forward_passes.find_trunks", lambda *_: None):
        return together(policy, videos, n, temperature)


def one_at_a_time(
    policy: HFPolicy, videos: Sequence[Sequence[EncodedPrompt]], n: int, temperature: float
) -> list[Rollout]:
    rollouts = []
    for prompt in (prompt for prompts in videos for prompt in prompts):
        for seed in seeds_of([prompt], n)[0]:
            ((rollout,),) = policy.sample(
                [prompt],
                max_new_tokens=MAX_NEW_TOKENS,
                temperature=temperature,
                seeds=[[seed]] if temperature else None,
            )
            rollouts.append(rollout)
    return rollouts


def measure(ways: Mapping[str, Job], repeats: int) -> dict[str, Any]:
    """Seconds of each way, and how many times the seconds of ``shared`` they are."""
    expected = {name: job() for name, job in ways.items()}  # also warms up
    difference = max(compare(expected["shared"], rollouts) for rollouts in expected.values())
    wall: dict[str, list[float]] = {name: [] for name in ways}
    cpu: dict[str, list[float]] = {name: [] for name in ways}
    names = list(ways)
    for repeat in range(repeats):
        shift = repeat % len(names)
        for name in names[shift:] + names[:shift]:
            wall_s, cpu_s = time.perf_counter(), time.process_time()
            rollouts = ways[name]()
            cpu[name].append(time.process_time() - cpu_s)
            wall[name].append(time.perf_counter() - wall_s)
            difference = max(difference, compare(expected["shared"], rollouts))
    assert difference < TOLERANCE, f"log-probs differ by {difference}"
    return {
        "answers": len(expected["shared"]),
        "tokens": sum(len(rollout.token_ids) for rollout in expected["shared"]),
        "largest_logprob_difference": difference,
        "wall_s": {name: spread(values) for name, values in wall.items()},
        "cpu_s": {name: spread(values) for name, values in cpu.items()},
        "times_shared_wall": {name: spread(ratios(wall[name], wall["shared"])) for name in names[1:]},
        "times_shared_cpu": {name: spread(ratios(cpu[name], cpu["shared"])) for name in names[1:]},
    }


def compare(expected: Sequence[Rollout], got: Sequence[Rollout]) -> float:
    """Returns the largest difference of log-probs between responses that must be equal."""
    assert [r.token_ids for r in got] == [r.token_ids for r in expected], "the responses differ"
    return max(
        abs(a - b)
        for x, y in zip(expected, got, strict=True)
        for a, b in zip(x.recorded, y.recorded, strict=True)
    )


def measure_predict(
    model: InferenceModel, videos: Sequence[Sequence[Sample]], out: Path, repeats: int
) -> dict[str, Any]:
    """User-mode seconds of ``predict`` as it batches, and one by one."""
    samples = [sample for rows in videos for sample in rows]
    batch_sizes = {"together": BATCH_SIZE, "one by one": 1}

    def run(way: str) -> tuple[float, float, dict[str, Any]]:
        path = out / "predictions.jsonl"
        user_s, wall_s = resource.getrusage(resource.RUSAGE_SELF).ru_utime, time.perf_counter()
        predict(
            model.policy,
            samples,
            model.prompts,
            path,
            provenance={"benchmark": way},
            settings=GenerationSettings(max_new_tokens=MAX_NEW_TOKENS),
            batch_size=batch_sizes[way],
            overwrite=True,
        )
        user_s = resource.getrusage(resource.RUSAGE_SELF).ru_utime - user_s
        rows = {row["id"]: row["responses"] for _, row in read_jsonl(path)}
        return user_s, time.perf_counter() - wall_s, rows

    _, _, expected = run("together")  # also warms up
    assert len(expected) == len(samples)
    user: dict[str, list[float]] = {way: [] for way in batch_sizes}
    wall: dict[str, list[float]] = {way: [] for way in batch_sizes}
    for repeat in range(repeats):
        for way in list(batch_sizes)[:: 1 if repeat % 2 else -1]:
            user_s, wall_s, rows = run(way)
            assert rows == expected, f"{way}: the responses differ"
            user[way].append(user_s)
            wall[way].append(wall_s)
    return {
        "videos": len(videos),
        "queries_a_video": QUERIES,
        "answers": len(samples),
        "repeats": repeats,
        "user_s": {way: spread(values) for way, values in user.items()},
        "wall_s": {way: spread(values) for way, values in wall.items()},
        "times_faster_user": spread(ratios(user["one by one"], user["together"])),
        "times_faster_wall": spread(ratios(wall["one by one"], wall["together"])),
    }


def predict_table(record: dict[str, Any]) -> str:
    user, times = record["user_s"], record["times_faster_user"]
    return (
        f"{record['answers']} answers, {record['queries_a_video']} queries a video: together "
        f"{user['together']['median']:.2f} s, one by one {user['one by one']['median']:.2f} s of user time; "
        f"{times['median']:.2f} [{times['min']:.2f}, {times['max']:.2f}] times faster"
    )


def ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    return [a / b for a, b in zip(slow, fast, strict=True)]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def table(record: dict[str, Any]) -> str:
    lines = ["| job | way | CPU s | wall s | times shared, CPU: median [min, max] |", "|---|---|---|---|---|"]
    for name, job in record["jobs"].items():
        for way in job["cpu_s"]:
            times = job["times_shared_cpu"].get(way, {"median": 1.0, "min": 1.0, "max": 1.0})
            lines.append(
                f"| {name} | {way} | {job['cpu_s'][way]['median']:.2f} | {job['wall_s'][way]['median']:.2f} "
                f"| {times['median']:.2f} [{times['min']:.2f}, {times['max']:.2f}] |"
            )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
