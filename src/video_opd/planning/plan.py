"""The plan of a recipe on some GPUs: memory by part, what is decided by it, and time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from video_opd.config import Recipe
from video_opd.errors import need
from video_opd.models.checkpoint_files import base_of
from video_opd.planning.host import HostMemory, host_memory_of
from video_opd.planning.memory import GIB, PARTS, Memory, memory_of
from video_opd.planning.rate import DEFAULT_RATE
from video_opd.planning.setup import ResolvedPlacement, Setup, Work
from video_opd.planning.sizes import ModelSizes, read_sizes
from video_opd.planning.times import Times, times_of
from video_opd.types import Sample

# A plan fits where its sum is at most this share of a GPU's memory: the allocator loses some to fragments.
FITS = 0.95
# A plan surely does not fit where even this share of its sum is more than the memory.
SURE = 0.9


@dataclass(frozen=True, kw_only=True)
class RecipeSizes:
    """The models of a recipe."""

    student: ModelSizes
    teachers: tuple[ModelSizes, ...] = ()

    @classmethod
    def of(cls, recipe: Recipe, read: Callable[[str], ModelSizes] = read_sizes) -> RecipeSizes:
        """``read`` gives the sizes of a model by its path. Raises :class:`UserError` for a model whose sizes
        nobody knows. A teacher that is an adapter has the sizes of its base."""
        student = read(recipe.model.path)
        bases = [str(base_of(path)) for path in recipe.teacher.local_paths]
        teachers = [student if base == recipe.model.path else read(base) for base in bases]
        return cls(student=student, teachers=tuple(teachers))


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a recipe needs on ``setup.processes`` GPUs of ``limit`` bytes (None: not known).

    ``setup`` is what was decided for what the recipe leaves open; ``reasons`` say why.
    """

    sizes: RecipeSizes
    setup: Setup
    work: Work
    memory: Memory
    host: HostMemory | None  # None: the plan is for a CPU, whose memory is the host's
    times: Times
    limit: int | None
    rate_tflops: float
    reasons: tuple[str, ...]

    @property
    def fits(self) -> bool:
        return self.limit is None or self.memory.peak <= FITS * self.limit

    @property
    def teacher_placement(self) -> ResolvedPlacement:
        place = self.setup.teacher_placement
        assert place != "auto", "a plan has decided"
        return place

    @property
    def recompute(self) -> bool:
        return bool(self.setup.recompute)

    def to_json(self) -> dict[str, Any]:
        """Bytes, tokens and seconds as plain numbers."""
        work, times, limit = self.work, self.times, self.limit
        return {
            "gpus": self.setup.processes,
            "gpu_memory_bytes": limit,
            "fits": self.fits,
            "peak_bytes": self.memory.peak,
            "spare_bytes": None if limit is None else limit - self.memory.peak,
            "phase": self.memory.fullest,
            "parts": dict(self.memory.parts),
            "phases": {phase: dict(parts) for phase, parts in self.memory.phases.items()},
            "host": None
            if self.host is None
            else {
                "each_process_bytes": self.host.each,
                "parts": dict(self.host.parts),
                "saving_bytes": self.host.saving,
                "pages_bytes": self.host.pages,
            },
            "student": {"model": self.sizes.student.name, "weights": self.sizes.student.weights},
            "teachers": [{"model": t.name, "weights": t.weights} for t in self.sizes.teachers],
            "decided": {
                "model.gradient_checkpointing": self.recompute,
                "teacher.placement": self.setup.teacher_placement,
            },
            "reasons": list(self.reasons),
            "prompt_tokens": work.prompt_tokens,
            "video_tokens": work.video_tokens,
            "prompts_a_step": work.prompts_a_step,
            "rows": work.rows,
            "rows_assumed": work.rows_assumed,
            "steps": work.steps,
            "rate_tflops": self.rate_tflops,
            "matrix_rate_tflops": self.rate_tflops,  # the former name, which scripts may read
            "stages_s": dict(times.stages_s),
            "step_s": times.step_s,
            "run_s": times.run_s,
            "scoring_candidate_s": times.candidate_s,
            "scoring_s": times.scoring_s,
        }


def make_plan(
    recipe: Recipe,
    processes: int = 1,
    memory_bytes: int | None = None,
    *,
    total_bytes: int | None = None,
    samples: Sequence[Sample] | None = None,
    sizes: RecipeSizes | None = None,
    cuda: bool = True,
    rate_tflops: float = DEFAULT_RATE,
) -> Plan:
    """The plan of ``recipe`` on ``processes`` GPUs (or, without ``cuda``, processes on a CPU) of
    ``memory_bytes`` each, or with so much free of their ``total_bytes``.

    ``samples`` are the rows of the data file, if it is here; their durations bound the prompts. Raises
    :class:`UserError` for settings that cannot work with so many processes, and for a model whose sizes
    nobody knows.
    """
    need(processes >= 1, f"{processes} processes: a run needs at least 1")
    need(
        memory_bytes is None or memory_bytes > 0, f"{memory_bytes} bytes of memory: a plan needs more than 0"
    )
    recipe.check_processes(processes)
    share = recipe.vllm_share
    taken = [f"vLLM takes {share:g} of each GPU (sampling.vllm_memory)"] if share else []
    if memory_bytes is not None and cuda:
        memory_bytes -= round(share * (total_bytes or memory_bytes))
    sizes = sizes or RecipeSizes.of(recipe)
    setup, work = Setup.of(recipe, processes), Work.of(recipe, samples, processes)
    setup, memory, reasons = decide(setup, work, sizes, memory_bytes, cuda=cuda)
    return Plan(
        sizes=sizes,
        setup=setup,
        work=work,
        memory=memory,
        host=host_memory_of(sizes.student, sizes.teachers, setup, work) if cuda else None,
        times=times_of(
            recipe,
            sizes.student,
            sizes.teachers,
            setup,
            work,
            rate_tflops=rate_tflops,
        ),
        limit=memory_bytes,
        rate_tflops=rate_tflops,
        reasons=(*reasons, *taken),
    )


def decide(
    setup: Setup, work: Work, sizes: RecipeSizes, memory_bytes: int | None, *, cuda: bool = True
) -> tuple[Setup, Memory, tuple[str, ...]]:
    """(``setup`` with nothing left open, its memory, why): the first choice that fits, in the order of what
    they cost.

    The teacher is tried whole, then in shards, then on the CPU outside its turn, and each of them first with
    activations kept, then with recomputed ones. Where nothing fits, the choice that needs least is taken.
    """
    places = _places(setup, cuda)
    again = [False, True] if setup.recompute is None and setup.prefix else [bool(setup.recompute)]
    found: list[tuple[Setup, Memory]] = []
    for place in places:
        for recompute in again:
            choice = replace(setup, teacher_placement=place, recompute=recompute)
            memory = memory_of(sizes.student, sizes.teachers, choice, work, cuda=cuda)
            found.append((choice, memory))
            if memory_bytes is None or memory.peak <= FITS * memory_bytes:
                return choice, memory, _reasons(setup, found, memory_bytes)
    choice, memory = min(found, key=lambda each: each[1].peak)
    return choice, memory, _reasons(setup, [*found, (choice, memory)], memory_bytes)


def _places(setup: Setup, cuda: bool) -> list[ResolvedPlacement]:
    if setup.teacher_placement != "auto":
        return [setup.teacher_placement]
    if not cuda or not (setup.has_teacher or setup.reference):
        return ["whole"]
    if setup.has_teacher and setup.teacher_quantization is not None:
        return ["whole"]  # quantised weights are neither sharded nor moved
    return ["whole", "sharded", "cpu"] if setup.processes > 1 else ["whole", "cpu"]


def _reasons(
    setup: Setup, found: Sequence[tuple[Setup, Memory]], memory_bytes: int | None
) -> tuple[str, ...]:
    """Why what ``setup`` leaves open was decided as in the last of ``found``."""
    choice, memory = found[-1]
    limit = "no limit is known" if memory_bytes is None else f"of {memory_bytes / GIB:.1f} GiB"
    needs = f"a step then takes {memory.peak / GIB:.1f} GiB, {limit}"
    reasons = []
    if setup.recompute is None and setup.prefix:
        kept = [
            m.peak for s, m in found if not s.recompute and s.teacher_placement == choice.teacher_placement
        ]
        rather = f", and {min(kept) / GIB:.1f} GiB if they are kept" if choice.recompute and kept else ""
        what = "recomputed" if choice.recompute else "kept"
        reasons.append(f"activations are {what} (model.gradient_checkpointing): {needs}{rather}")
    if setup.teacher_placement == "auto" and (setup.has_teacher or setup.reference):
        whole = min(m.peak for s, m in found if s.teacher_placement == "whole")
        rather = f", and {whole / GIB:.1f} GiB if it is whole" if choice.teacher_placement != "whole" else ""
        reasons.append(f"teacher.placement is {choice.teacher_placement}: {needs}{rather}")
    return tuple(reasons)


def table_of(plan: Plan) -> list[tuple[str, int, str]]:
    """(part, bytes, what it is) of each part that takes memory, in the order of ``PARTS``."""
    return [(part, plan.memory.parts[part], PARTS[part]) for part in PARTS if part in plan.memory.parts]
