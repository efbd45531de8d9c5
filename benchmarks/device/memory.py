"""The memory of a step on this card beside what ``video-opd plan`` says, for the ways to hold large models.

Random weights of Qwen3-VL-8B's and 32B's shapes, a prompt of 8,192 video tokens. A step is made to fill the
moments, and the next one is measured: the largest sum of allocated bytes, against the plan without what a
GPU's libraries take. A way that the card does not hold with all decoder layers has as many of them as the
plan says it holds.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from exact_plan import exact_plan, lengths_of
from paper_size import config_of, make
from real_shape import GIB, allocated, any_ratio, free
from section import Report, add_torchao, run

from video_opd.bench.timing import settle
from video_opd.bench.work import Steps, prompts_of, step_recipe
from video_opd.config import Recipe
from video_opd.errors import UserError
from video_opd.models.quantisation import quantise_frozen_layers
from video_opd.models.torchao import check_torchao
from video_opd.planning.memory import Memory
from video_opd.planning.plan import FITS, RecipeSizes
from video_opd.planning.sizes import ModelSizes, sizes_of
from video_opd.training.components import adapt, freeze
from video_opd.world.tiny import build_processor

DTYPE = "bfloat16"
TOLERANCE = 0.1  # of the plan
LR = 1e-6  # the paper's
ABOVE = 1e-3  # weights so large that a step of LR is far below half of bfloat16's spacing there

INT8_TEACHER = {"teacher.dtype": DTYPE, "teacher.quantization": "int8"}
ADAPTERS = {
    "model.freeze": ["lm_head"],
    "lora.parts": ["vision", "merger", "language"],
    "lora.rank": 16,
    "lora.alpha": 32,
}
IN_8_BITS = {"model.weights": DTYPE, "optim.moments": "int8"}
TOWER_FROZEN = {"model.freeze": ["vision", "merger"]}


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """Sizes of the whole section."""

    student: str
    teacher: str
    side_px: int
    tokens: int  # of the prompt, at least
    response: int
    layers: tuple[int, ...]  # decoder layers of a student that does not fit whole, the most first


REAL = Shapes(student="8b", teacher="32b", side_px=512, tokens=8400, response=12, layers=(36, 28, 20, 12, 8))
TINY = Shapes(student="test", teacher="test", side_px=64, tokens=120, response=4, layers=(2, 1))


@dataclass(frozen=True, kw_only=True)
class Holding:
    """A way to hold student and teacher: settings of the recipe. Without a teacher the method is GRPO."""

    name: str
    changes: Mapping[str, Any]
    teacher: bool = True
    recompute: bool = True

    @property
    def needs_torchao(self) -> bool:
        return "int8" in self.changes.values()


HOLDINGS = (
    Holding(name="adapters, 32B teacher in int8", changes={**ADAPTERS, **INT8_TEACHER}),
    Holding(
        name="adapters on an int8 base, 32B teacher in int8",
        changes={**ADAPTERS, **INT8_TEACHER, "lora.base_quantization": "int8"},
    ),
    Holding(
        name="in full, bfloat16 weights, int8 moments, 32B teacher in int8",
        changes={**IN_8_BITS, **INT8_TEACHER},
    ),
    Holding(name="in full, bfloat16 weights, int8 moments, no teacher", changes=IN_8_BITS, teacher=False),
    Holding(name="in full, float32 weights, no teacher", changes={}, teacher=False),
    Holding(name="in full, tower frozen, no teacher", changes=TOWER_FROZEN, teacher=False),
    Holding(
        name="in full, tower frozen, activations kept, no teacher",
        changes=TOWER_FROZEN,
        teacher=False,
        recompute=False,
    ),
)


class Bench:
    """One prompt, the teacher of all ways that have one, and what is measured."""

    def __init__(self, report: Report, shapes: Shapes, device: torch.device) -> None:
        self.report, self.shapes, self.device = report, shapes, device
        self.processor = build_processor()
        self.prompts = prompts_of(self.processor, shapes.tokens, side_px=shapes.side_px)
        self.limit = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
        self.teacher: Any = None

    def measure_all(self, holdings: Sequence[Holding]) -> None:
        for holding in holdings:
            self.report.attempt(holding.name, lambda: self.measure(holding))  # noqa: B023
            free()

    def measure(self, holding: Holding) -> None:
        if holding.needs_torchao:
            try:
                check_torchao("this row")
            except UserError as error:
                self.report.add(holding.name, f"left out: {error}")
                return
        self._have_teacher(holding.teacher)
        layers, memory, recipe = self.fitting(holding)
        student = self._student(recipe, layers)
        try:
            steps = self._steps(student, holding)
            steps()
            settle(self.device)
            free()
            if self.limit is not None:
                torch.cuda.reset_peak_memory_stats(self.device)
            steps()
            settle(self.device)
        except torch.cuda.OutOfMemoryError as error:
            planned = f"the plan says {memory.peak / GIB:.1f} GiB"
            self.report.add(holding.name, f"out of memory; {planned}", False, message=str(error)[:300])
            return
        self._add(holding, layers, memory)
        if recipe.model.weights == DTYPE:
            self._round(holding, steps)

    def fitting(self, holding: Holding) -> tuple[int, Memory, Recipe]:
        """(decoder layers of the student, its plan, the recipe): as many as this card holds."""
        planned = [self._planned(holding, layers) for layers in self.shapes.layers]
        fits = [self.limit is None or memory.peak <= FITS * self.limit for memory, _ in planned]
        chosen = fits.index(True) if any(fits) else -1
        return self.shapes.layers[chosen], *planned[chosen]

    def _planned(self, holding: Holding, layers: int) -> tuple[Memory, Recipe]:
        recipe = step_recipe(
            self._method(holding), "prefix", 1, dtype=DTYPE, prompts=1, tokens=self.shapes.response
        ).changed(**holding.changes, **{"model.gradient_checkpointing": holding.recompute})
        teachers = (shape(self.shapes.teacher, None),) if holding.teacher else ()
        sizes = RecipeSizes(student=shape(self.shapes.student, layers), teachers=teachers)
        work = {**lengths_of(self.prompts), "prompts_a_step": 1, "rollouts": 1}
        return exact_plan(recipe, sizes, work), recipe

    @staticmethod
    def _method(holding: Holding) -> str:
        return "video-opd" if holding.teacher else "grpo"

    def _have_teacher(self, wanted: bool) -> None:
        """Makes the teacher before any student: until it is quantised, it needs nearly all of the card."""
        if wanted and self.teacher is None:
            self.teacher = make(self.shapes.teacher, DTYPE, self.device, 1)
            quantise_frozen_layers(self.teacher, "int8", self.device)
            free()
        if not wanted:
            self.teacher = None
            free()

    def _student(self, recipe: Recipe, layers: int) -> Any:
        held = DTYPE if recipe.lora.parts else recipe.model.weights
        student = make(self.shapes.student, held, self.device, 0, layers)
        if recipe.lora.parts:
            adapt(student, recipe, recipe.model.path, self.device)
            return student.to(self.device)
        student.requires_grad_(True)
        freeze(student, recipe.model)
        return student

    def _steps(self, student: Any, holding: Holding) -> Steps:
        steps = Steps(
            student,
            self.processor,
            self.teacher,
            self.prompts,
            method=self._method(holding),
            engine="prefix",
            dtype=DTYPE,
            tokens=self.shapes.response,
            recompute=holding.recompute,
            changes=holding.changes,
        )
        any_ratio(steps)
        return steps

    def _add(self, holding: Holding, layers: int, memory: Memory) -> None:
        planned = memory.peak - memory.parts.get("runtime", 0)
        what = f"{holding.name}, {layers} layers"
        numbers: dict[str, Any] = {
            "layers": layers,
            "planned_bytes": planned,
            "parts": dict(memory.parts),
            "phase": memory.fullest,
            "held_bytes": allocated(self.device),
        }
        if self.limit is None:
            self.report.add(what, f"planned {planned / GIB:.3f} GiB, not measured on a CPU", True, **numbers)
            return
        measured = torch.cuda.max_memory_allocated(self.device)
        free_bytes, whole_bytes = torch.cuda.mem_get_info(self.device)
        ratio = measured / planned
        self.report.add(
            what,
            f"{measured / GIB:.2f} of {planned / GIB:.2f} GiB planned: {ratio:.3f}",
            abs(ratio - 1) <= TOLERANCE,
            measured_bytes=measured,
            reserved_bytes=torch.cuda.max_memory_reserved(self.device),
            used_bytes=whole_bytes - free_bytes,
            **numbers,
        )
        self.report.note(summary=f"the last: {what}: {ratio:.3f} of the plan")

    def _round(self, holding: Holding, steps: Steps) -> None:
        """A step of the paper's learning rate moves some of the bfloat16 weights, each to a neighbour.

        Rounded to the nearest, none of these would move.
        """
        optimizer: Any = steps.stepper.components.optimizer
        for group in optimizer.param_groups:
            group["lr"] = LR
        model: Any = steps.stepper.components.model
        layer = model.model.language_model.layers[0].mlp.down_proj.weight
        before = layer.detach().clone()
        steps()
        large = before.abs() > ABOVE
        moved = ((layer != before) & large).sum().item() / max(1, large.sum().item())
        spacing = 2.0**-7 * torch.exp2(before.abs().float().log2().floor())
        off = (layer.float() - before.float()).abs()
        farthest = (off / spacing)[large].max().item()
        self.report.add(
            f"{holding.name}: a step of lr {LR:g}",
            f"moves {moved:.2%} of a layer's weights, by {farthest:.1f} spacings at most",
            0 < moved < 0.5 and farthest <= 1.0,
            moved=moved,
            farthest=farthest,
        )


@functools.cache
def shape(size: str, layers: int | None) -> ModelSizes:
    return sizes_of(config_of(size, layers).to_dict(), size)


def measure(report: Report, tiny: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report.note(summary="no row yet")
    add_torchao()
    Bench(report, TINY if tiny else REAL, device).measure_all(HOLDINGS)
    rows: Iterator[Mapping[str, Any]] = (row for row in report.record["rows"] if "measured_bytes" in row)
    ratios = [row["measured_bytes"] / row["planned_bytes"] for row in rows]
    summary = f"{len(ratios)} ways measured"
    if ratios:
        summary += f", {min(ratios):.3f} to {max(ratios):.3f} of their plans"
    report.note(summary=summary)


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
