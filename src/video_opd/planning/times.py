"""The seconds of a step, a run and of scoring: operations by the cost model, at a stated rate.

The rate is what the card attains over a whole step, a third of what it attains on large matrix products:
between them lie norms, copies, the optimiser and the launching of operations. Waiting for videos and the
exchange between GPUs are not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from video_opd.config import Recipe
from video_opd.planning.cost_model import Costs, StepWork, Trained
from video_opd.planning.setup import Setup, Work
from video_opd.planning.sizes import ModelSizes

TFLOP = 1e12


@dataclass(frozen=True, kw_only=True)
class Times:
    """Seconds. ``candidate_s`` is for one GPU; ``scoring_s`` for all rows of the data file on all of them."""

    stages_s: Mapping[str, float]  # of a step with fresh rollouts
    step_s: float
    run_s: float
    candidate_s: float | None  # scored by student and teacher; None: the recipe names no teacher
    scoring_s: float | None


def times_of(
    recipe: Recipe,
    student: ModelSizes,
    teachers: tuple[ModelSizes, ...],
    setup: Setup,
    work: Work,
    *,
    rate_tflops: float,
) -> Times:
    """All for the longest video that the budget and the rows allow, so an upper bound for shorter ones."""
    costs = Costs.of(student)
    largest = max(map(Costs.of, teachers), key=lambda each: each.weights, default=None)
    parts: dict[str, Trained | None] = {
        part: "full" if role == "full" else "adapters" if role else None
        for part in ("vision", "language")
        for role in [setup.role(part)]
    }
    step = StepWork(
        prompt=work.prompt_tokens,
        video_tokens=work.video_tokens,
        frame_pairs=work.frame_pairs,
        rollouts=work.rollouts,
        response=work.response_tokens,
        shared=setup.prefix,
        recompute=bool(setup.recompute),
        trained=parts["language"] or "adapters",
        vision=parts["vision"],
        sampled=work.sampled,
        reference=setup.reference,
    )
    asked = step.operations(costs, largest if setup.has_teacher else None)
    seconds = TFLOP * rate_tflops / work.prompts_a_step
    stages = {stage: count / seconds for stage, count in asked.items()}
    if work.sampled_ahead is not None:
        stages["update"] += stages["prefill"]  # the update cannot go on from a prefill without a graph
    if setup.vllm:  # whose time nobody has measured here
        stages["prefill"] = stages["sample"] = 0.0
    fresh = sum(stages.values())
    again = stages["prefill"] + stages["update"] + stages["backward"]
    step_s = (fresh + (work.updates_a_batch - 1) * again) / work.updates_a_batch
    candidate_s = None
    if recipe.teacher.path and largest is not None:
        candidate_s = (
            _answers(costs, work, recipe.tvdf.responses_of_student)
            + _answers(largest, work, recipe.tvdf.teacher_k)
        ) / (TFLOP * rate_tflops)
    return Times(
        stages_s=stages,
        step_s=step_s,
        run_s=work.steps * step_s,
        candidate_s=candidate_s,
        scoring_s=None if candidate_s is None else candidate_s * -(-work.rows // setup.processes),
    )


def _answers(costs: Costs, work: Work, responses: int) -> float:
    """The operations of ``responses`` to a prompt that is prefilled once."""
    step = StepWork(
        prompt=work.prompt_tokens,
        video_tokens=work.video_tokens,
        frame_pairs=work.frame_pairs,
        rollouts=responses,
        response=work.response_tokens,
        shared=True,
        recompute=False,
    ).operations(costs, None)
    return step["prefill"] + step["sample"]
