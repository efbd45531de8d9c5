"""Steps of Qwen3-VL-8B's shape, random weights, on a prompt of 8,192 video tokens: seconds and memory.

The student is held in bfloat16 and trained through adapters, which is what fits on 80 GB beside a teacher of
its size; then some of its decoder layers are trained in full, in float32 with autocast, which is what fits of
that. Each way is warmed up by one step; the second is timed as a whole, and the third stage by stage, with
a wait between stages. Shares are of the rate at which this card multiplies large matrices, measured first.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from exact_plan import exact_plan, lengths_of
from paper_size import config_of, costs_of, make, matrix_rate
from section import Report, run
from stages import StageWatch, watched

from video_opd.bench.timing import settle
from video_opd.bench.work import Engine, Steps, prompts_of, step_recipe
from video_opd.config import LoraConfig, ModelConfig
from video_opd.models.lora import add_adapters
from video_opd.models.parts import cast_weights
from video_opd.planning.cost_model import Costs, StepWork, Trained
from video_opd.planning.plan import RecipeSizes
from video_opd.planning.sizes import sizes_of
from video_opd.training.components import freeze
from video_opd.training.step import StepResult
from video_opd.types import EncodedPrompt
from video_opd.world.tiny import build_processor

GIB = 2**30
DTYPE = "bfloat16"
HELD = ("weights", "masters", "moments", "teacher", "reference", "runtime")  # parts of a plan
STAGES = ("prefill", "sample", "teacher", "update", "backward", "optimiser")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Sizes of the whole section. Frames of 512 px make 256 tokens a pair, 32 pairs 8,192."""

    size: str
    side_px: int
    long: int  # prompt tokens, at least
    short: int
    response: int  # tokens of a response, about those of "12.54 to 17.83"
    rollouts: int
    rank: int
    layers: int  # decoder layers that are trained in full
    matrix: int


REAL = Plan(
    size="8b", side_px=512, long=8400, short=2100, response=12, rollouts=8, rank=64, layers=8, matrix=8192
)
TINY = Plan(size="test", side_px=64, long=120, short=60, response=4, rollouts=2, rank=4, layers=1, matrix=256)


@dataclass(frozen=True, kw_only=True)
class Way:
    """One measurement: a step of ``method`` on ``prompts`` prompts of one micro-batch."""

    method: str
    engine: Engine = "prefix"
    rollouts: int = 1
    prompts: int = 1
    long: bool = True
    recompute: bool = True
    trained: Trained = "adapters"

    def __str__(self) -> str:
        return (
            f"{self.method}, {self.rollouts} rollout{'s' * (self.rollouts > 1)}, "
            f"{self.prompts} prompt{'s' * (self.prompts > 1)}{'' if self.long else ' (short)'}, "
            f"{self.engine}, {'recompute' if self.recompute else 'keep'}, {self.trained}"
        )


def ways_with_teacher() -> list[Way]:
    """The most telling first; ``keep`` does not fit at the full length."""
    return [
        Way(method="video-opd"),
        Way(method="video-opd", engine="plain"),
        Way(method="video-opd", prompts=2),
        Way(method="video-opd", long=False),
        Way(method="video-opd", long=False, recompute=False),
    ]


def ways_without_teacher(rollouts: int) -> list[Way]:
    """The last one may not fit."""
    return [
        Way(method="grpo"),
        Way(method="grpo", rollouts=rollouts),
        Way(method="grpo", rollouts=rollouts, long=False),
        Way(method="grpo", rollouts=rollouts, long=False, engine="plain"),
    ]


def ways_in_full() -> list[Way]:
    return [
        Way(method="video-opd", trained="full", recompute=False),
        Way(method="video-opd", trained="full"),
        Way(method="video-opd", trained="full", prompts=2),
    ]


def last_ways(rollouts: int) -> list[Way]:
    """Eight prompts of full length at once, with their gradients."""
    return [Way(method="grpo", rollouts=rollouts, engine="plain")]


class Bench:
    """The models of one kind of training, and what is measured on them."""

    def __init__(self, report: Report, plan: Plan, device: torch.device, rate: float) -> None:
        self.report, self.plan, self.device, self.rate = report, plan, device, rate
        self.processor = build_processor()
        self.prompts = {
            length: prompts_of(self.processor, length, videos=2, side_px=plan.side_px)
            for length in (plan.long, plan.short)
        }
        self.student: Any = None
        self.teacher: Any = None
        self.costs: dict[str, Costs] = {}

    def load(self, trained: Trained) -> None:
        """Makes both models anew, on the device."""
        self.student = self.teacher = None
        free()
        layers = self.plan.layers if trained == "full" else None
        self.student = make(self.plan.size, "float32" if layers else DTYPE, self.device, 0, layers)
        self.teacher = make(self.plan.size, DTYPE, self.device, 1, layers)
        self.costs = {"student": costs_of(self.student), "teacher": costs_of(self.teacher)}
        if trained == "full":
            self.student.requires_grad_(True)
            freeze(self.student, ModelConfig(freeze=("vision", "merger", "lm_head")))
            cast_weights(self.student, getattr(torch, DTYPE), frozen_only=True)
        else:
            rank = self.plan.rank
            add_adapters(self.student, LoraConfig(parts=("language",), rank=rank, alpha=2 * rank), 0)
            self.student.to(self.device)
        self.report.note(
            **{f"costs_{trained}": {name: asdict(cost) for name, cost in self.costs.items()}},
            **{f"trained_{trained}": self.trained_weights},
            **{f"models_bytes_{trained}": allocated(self.device)},
        )

    @property
    def trained_weights(self) -> int:
        return sum(p.numel() for p in self.student.parameters() if p.requires_grad)

    def measure_all(self, ways: Sequence[Way]) -> None:
        for way in ways:
            self.report.attempt(str(way), lambda: self.measure(way))  # noqa: B023
            free()

    def measure(self, way: Way) -> None:
        """A row for the second and third of three steps. Where the memory is too small, the row says so."""
        try:
            watch, result, before, whole_s = self.three_steps(way)
        except torch.cuda.OutOfMemoryError as error:
            self.report.add(str(way), "out of memory", message=str(error)[:300])
            return
        self.add(way, watch, result, before, whole_s)

    def three_steps(self, way: Way) -> tuple[StageWatch, StepResult, int, float]:
        """(watch on the third step, its result, bytes that were allocated before it, seconds of the second
        step, in which nobody waits between stages)."""
        steps = Steps(
            self.student,
            self.processor,
            self.teacher,
            self.prompts_of(way),
            method=way.method,
            engine=way.engine,
            rollouts=way.rollouts,
            dtype=DTYPE,
            tokens=self.plan.response,
            recompute=way.recompute,
            cached=True,
        )
        any_ratio(steps)
        steps()
        settle(self.device)
        began_s = time.perf_counter()
        steps()
        settle(self.device)
        whole_s = time.perf_counter() - began_s
        before = allocated(self.device)
        watch = watched(steps, self.device)
        return watch, steps(), before, whole_s

    def prompts_of(self, way: Way) -> list[EncodedPrompt]:
        return self.prompts[self.plan.long if way.long else self.plan.short][: way.prompts]

    def add(self, way: Way, watch: StageWatch, result: StepResult, before: int, whole_s: float) -> None:
        prompt = self.prompts_of(way)[0]
        longest = max(map(len, result.responses))
        work = StepWork(
            prompt=prompt.length,
            video_tokens=prompt.video_tokens,
            frame_pairs=len(prompt.pair_times_s),
            rollouts=way.rollouts,
            response=longest,
            shared=way.engine == "prefix",
            recompute=way.recompute,
            trained=way.trained,
        )
        teacher = self.costs["teacher"] if way.method == "video-opd" else None
        operations = {
            stage: way.prompts * count
            for stage, count in work.operations(self.costs["student"], teacher).items()
        }
        seconds = watch.seconds
        share = {
            stage: count / seconds[stage] / self.rate
            for stage, count in operations.items()
            if stage in seconds
        }
        peaks = {stage: peak - before for stage, peak in watch.peaks.items()}
        planned = self.planned_bytes(way)
        whole = sum(operations.values()) / whole_s / self.rate
        figure = f"{whole_s:.2f} s, {whole:.0%} of the matrix rate: " + ", ".join(
            f"{stage} {seconds[stage]:.2f}" + (f" ({share[stage]:.0%})" if share.get(stage) else "")
            for stage in STAGES
            if stage in seconds
        )
        if peaks:
            figure += f"; {max(peaks.values()) / GIB:.1f} GiB above what is held"
            figure += f" (plan {planned / GIB:.1f})"
        self.report.add(
            str(way),
            figure,
            True,
            way=asdict(way),
            prompt_tokens=prompt.length,
            video_tokens=prompt.video_tokens,
            answer_tokens=longest,
            seconds=seconds,
            seconds_whole=whole_s,
            seconds_a_prompt=whole_s / way.prompts,
            seconds_a_sampled_token=seconds["sample"] / max(1, longest - 1) if work.shared else None,
            operations=operations,
            share_of_matrix_rate=share,
            share_of_matrix_rate_whole=whole,
            held_bytes=before,
            peak_bytes=peaks,
            planned_bytes=planned,
        )
        self.report.note(summary=f"{len(self.report.record['rows']) - 1} ways; the last: {figure}")

    def planned_bytes(self, way: Way) -> int:
        """What a step takes by its plan, above what is held between steps."""
        recipe = step_recipe(
            way.method, way.engine, way.rollouts, dtype=DTYPE, prompts=way.prompts, tokens=self.plan.response
        )
        teacher = {"teacher.dtype": DTYPE} if way.method == "video-opd" else {}
        held: dict[str, Any] = {"model.freeze": ["vision", "merger", "lm_head"]}
        if way.trained == "adapters":
            rank = self.plan.rank
            held |= {"lora.parts": ["language"], "lora.rank": rank, "lora.alpha": 2 * rank}
        recipe = recipe.changed(**teacher, **held, **{"model.gradient_checkpointing": way.recompute})
        layers = self.plan.layers if way.trained == "full" else None
        sizes = sizes_of(config_of(self.plan.size, layers).to_dict(), self.plan.size)
        teachers = (sizes,) if way.method == "video-opd" else ()
        together = ("prompts_a_step", "micro_batch", "teacher_micro_batch")
        work = {**lengths_of(self.prompts_of(way)), **dict.fromkeys(together, way.prompts)}
        work["rollouts"] = way.rollouts
        memory = exact_plan(recipe, RecipeSizes(student=sizes, teachers=teachers), work)
        return memory.peak - sum(memory.parts.get(part, 0) for part in HELD)


def measure(report: Report, tiny: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    plan = TINY if tiny else REAL
    rate = matrix_rate(device, getattr(torch, DTYPE), plan.matrix)
    report.note(plan=asdict(plan), matrix_rate=rate, summary="only the matrix rate")
    report.add("matrix rate", f"{rate / 1e12:.3g} TFLOP/s in {DTYPE}", True)
    bench = Bench(report, plan, device, rate)
    bench.load("adapters")
    bench.measure_all(ways_with_teacher())
    bench.teacher = None
    free()
    bench.teacher = bench.student  # GRPO asks no teacher
    bench.measure_all(ways_without_teacher(plan.rollouts))
    bench.measure_all(last_ways(plan.rollouts))
    bench.load("full")
    bench.measure_all(ways_in_full())
    summarise(report)


def summarise(report: Report) -> None:
    """The ratios that the ways were chosen for."""
    rows = {row["what"]: row for row in report.record["rows"] if "seconds" in row}

    def ratio(name: str, slow: Way, fast: Way) -> None:
        if str(slow) in rows and str(fast) in rows:
            value = rows[str(slow)]["seconds_a_prompt"] / rows[str(fast)]["seconds_a_prompt"]
            report.add(name, f"{value:.2f} times", ratio=value)

    with_teacher, without = ways_with_teacher(), ways_without_teacher(report.record["plan"]["rollouts"])
    ratio("video-opd: plain in times of prefix", with_teacher[1], with_teacher[0])
    ratio("video-opd: one prompt at a time in times of two, a prompt", with_teacher[0], with_teacher[2])
    ratio("video-opd: recompute in times of keep, short", with_teacher[3], with_teacher[4])
    ratio("grpo: all rollouts in times of one", without[1], without[0])
    ratio("grpo: plain in times of prefix, short", without[3], without[2])
    first = rows.get(str(with_teacher[0]))
    done = sum("seconds" in row for row in report.record["rows"])
    report.note(summary=f"{done} ways; {with_teacher[0]}: {first['figure'] if first else 'not measured'}")


def any_ratio(steps: Steps) -> None:
    """Rounding of bfloat16 in a large random model must not end a measurement; parity is another section."""
    steps.stepper.settings = replace(steps.stepper.settings, ratio_tolerance=1e6)


def allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
