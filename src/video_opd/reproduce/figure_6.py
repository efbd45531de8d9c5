"""Figure 6: how fast Video-OPD and GRPO learn, by step, by second and by operation.

Both are trained from the base on the same rows at a constant rate, and checkpoints on the way are measured on
the test set ``short``, as the paper measures on one benchmark. Seconds are those of the prefix engine on this
machine. Operations are counted, in one step of each method at a length of prompt, on the plain engine, which
puts a prompt through the model once for each rollout as other trainers do, and on the prefix engine.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from video_opd.jsonl import read_jsonl
from video_opd.reproduce.claims import OPERATIONS, Claim, Difference
from video_opd.reproduce.measurements import Measured, differences, find, measure, samples_of, spread
from video_opd.reproduce.places import BASE, Place, make_videos, predict_task, predictions_of, train_task
from video_opd.reproduce.rates import BATCH, VIDEOS, chosen_rate, prepare_tuning, seen, tuned, tuning_stage
from video_opd.reproduce.table_1 import ARMS as NAMES
from video_opd.reproduce.tasks import Stage, Task
from video_opd.world.shipped import shipped

NAME = "figure-6"
TITLE = "Figure 6: learning by step, by second and by operation"
SUITE = "figures"
NOISE = 1.0
ARMS = ("grpo", "video-opd", "video-opd-full")
STEPS, EVERY = 60, 10
TEST = "short"
PROMPT_TOKENS = (300, 1000, 4000)
ENGINES = {"plain": "plain update", "prefix": "prefix"}  # and their names in ``video-opd bench engine``
JOBS = {"grpo": "grpo, 8 rollouts", "video-opd": "video-opd"}


def prepare(place: Place, seeds: Sequence[int]) -> None:
    prepare_tuning(place)
    make_videos(place, seeds, VIDEOS, [0.0, NOISE])


def stages(place: Place, seeds: Sequence[int]) -> list[Stage]:
    test = place.tests[TEST]
    first = [
        predict_task(place.runs("shipped") / BASE, shipped(BASE), test),
        count_task(place),
        *tuning_stage(place, ARMS),
    ]
    runs = {
        (seed, arm): train_task(
            place,
            run_of(place, arm, seed),
            arm,
            data=place.pool(seed, seen(arm, NOISE)),
            evaluate={},
            seed=seed,
            steps=STEPS,
            changes=tuned(place, arm)
            | {
                "optim.schedule": "constant",
                "run.save_every": EVERY,
                "run.keep_checkpoints": STEPS // EVERY,
            },
        )
        for seed in seeds
        for arm in ARMS
    }
    measured = [
        predict_task(
            answers_of(place, arm, seed, step), checkpoint_of(place, arm, seed, step), test
        ).waiting_for(made)
        for (seed, arm), made in runs.items()
        for step in steps()
    ]
    return [first, [*runs.values()], measured]


def count_task(place: Place) -> Task:
    """Counts the operations of a step of each method; nothing is timed."""
    out = counts_of(place)
    words = ["bench", "engine", "--lengths", *PROMPT_TOKENS, "--operations-only", "--device", "cpu"]
    return Task(
        name=f"{NAME}-operations",
        words=lambda: [*words, "--plain-up-to", max(PROMPT_TOKENS), "--json", out],
        done=out.exists,
        seconds=60,
    )


def steps() -> range:
    return range(EVERY, STEPS + 1, EVERY)


def counts_of(place: Place) -> Path:
    return place.runs(NAME) / "operations.json"


def run_of(place: Place, arm: str, seed: int) -> Path:
    return place.runs(NAME) / f"{arm}-seed-{seed}"


def checkpoint_of(place: Place, arm: str, seed: int, step: int) -> Path:
    """The student after a number of steps."""
    return run_of(place, arm, seed) / "checkpoints" / f"step-{step}" / "model"


def answers_of(place: Place, arm: str, seed: int, step: int) -> Path:
    """The folder of its predictions; a checkpoint with added files would count as damaged."""
    return place.runs(NAME) / f"{arm}-seed-{seed}-step-{step}"


def arm_of(arm: str, step: int) -> str:
    return f"{arm}, step {step}"


def result(place: Place, seeds: Sequence[int]) -> dict[str, Any]:
    tests = {TEST: place.tests[TEST]}

    def measured(folders: Sequence[Path]) -> Measured:
        files = [{TEST: predictions_of(folder, tests[TEST])} for folder in folders]
        return measure(samples_of(tests), files)

    arms = {
        arm_of(arm, step): measured([answers_of(place, arm, seed, step) for seed in seeds])
        for arm in ARMS
        for step in steps()
    }
    pairs = [(arm_of(ours, step), arm_of("grpo", step)) for ours in ARMS[1:] for step in steps()]
    return {
        "settings": {"videos": VIDEOS, "noise": NOISE, "test": TEST, **BATCH},
        "rates": {arm: chosen_rate(place, arm) for arm in ARMS},
        "base": measured([place.runs("shipped") / BASE]).means(),
        "mIoU": {arm: found.means() for arm, found in arms.items()},
        "step_s": {arm: _step_seconds([run_of(place, arm, seed) for seed in seeds]) for arm in ARMS},
        "operations": _operations(json.loads(counts_of(place).read_text(encoding="utf-8"))),
        "differences": differences(arms, pairs),
    }


def _step_seconds(runs: Sequence[Path]) -> float:
    """The median time of a step, without the first."""
    rows = [row for run in runs for _, row in read_jsonl(run / "metrics.jsonl")]
    return statistics.median(row["time/step_s"] for row in rows if row["step"] > 1)


def _operations(counted: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The operations of a step of each method, by length of prompt and engine."""
    jobs = {job: method for method, job in JOBS.items()}
    found: dict[int, dict[str, dict[str, int]]] = {}
    for record in counted["operations"]:
        if record["job"] in jobs:
            by_engine = found.setdefault(record["prompt_tokens"], {engine: {} for engine in ENGINES})
            for engine, way in ENGINES.items():
                by_engine[engine][jobs[record["job"]]] = record["ways"][way]["counted"]
    return [{"prompt_tokens": tokens, **by_engine} for tokens, by_engine in found.items()]


def saved(operations: Mapping[str, int]) -> float:
    """How much less a step of Video-OPD is than one of GRPO, in percent of that one."""
    return 100 * (1 - operations["video-opd"] / operations["grpo"])


def claims(record: Mapping[str, Any]) -> list[Claim]:
    learnt = [
        Claim(
            says=f"{NAMES[ours]} is better than GRPO after {step} steps",
            source="figure 6",
            where=f"annotation noise {record['settings']['noise']:g}",
            difference=find(record, arm_of(ours, step), arm_of("grpo", step)),
        )
        for ours in ARMS[1:]
        for step in (EVERY, STEPS)
    ]
    return learnt + [
        Claim(
            says="A step of Video-OPD costs less than one of GRPO",
            source="figure 6",
            where=f"{engine} engine, prompts of {counted['prompt_tokens']:,} tokens",
            difference=Difference.exact(saved(counted[engine])),
            score=OPERATIONS,
        )
        for counted in record["operations"]
        for engine in ENGINES
    ]


def tables(record: Mapping[str, Any]) -> Iterator[str]:
    """Markdown: mean IoU by step with the seconds until then, and the operations of a step."""
    settings, step_s = record["settings"], record["step_s"]
    rates = ", ".join(f"{NAMES[arm]} {record['rates'][arm]:g}" for arm in ARMS)
    yield (
        f"{settings['videos']} videos a seed with annotation noise {settings['noise']:g}, "
        f"{settings['optim.batch_size']} prompts a step, constant rates ({rates}). Mean IoU on the test set "
        f"{settings['test']}, ± the standard deviation over seeds; the base has {spread(record['base'])}:\n"
    )
    yield "| steps | " + " | ".join(NAMES[arm] for arm in ARMS) + " | Video-OPD − GRPO [95%] | full − GRPO |"
    yield "|---|" + "---|" * (len(ARMS) + 2)
    for step in steps():
        cells = [spread(record["mIoU"][arm_of(arm, step)]) for arm in ARMS]
        cells += [str(find(record, arm_of(a, step), arm_of("grpo", step))) for a in ARMS[1:]]
        yield f"| {step} | " + " | ".join(cells) + " |"
    seconds = ", ".join(f"{NAMES[arm]} {step_s[arm]:.2f}" for arm in ARMS)
    yield f"\nSeconds of a step on the prefix engine, as two runs shared this machine: {seconds}.\n"
    yield "Operations of a step, in billions, and what Video-OPD saves of GRPO's:\n"
    yield "| prompt tokens | engine | GRPO, 8 rollouts | Video-OPD | saved |"
    yield "|---|---|---|---|---|"
    for counted in record["operations"]:
        for engine in ENGINES:
            found = counted[engine]
            cells = [f"{found[method] / 1e9:.1f}" for method in JOBS]
            yield (f"| {counted['prompt_tokens']:,} | {engine} | {' | '.join(cells)} | {saved(found):.0f}% |")
    yield ""
