"""Checks before the first step: sampling, scoring, both engines and the update's forward must agree on this
model and these prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from video_opd.config import Recipe
from video_opd.progress import log
from video_opd.seeds import derive_seed
from video_opd.training.batches import Row
from video_opd.training.components import Components
from video_opd.training.loss_batch import distance
from video_opd.training.step import Stepper, token_ids
from video_opd.types import Rollout

PROMPTS = 2
ROLLOUTS = 4  # of each: rounding has a long tail, and a single response does not show it


class CheckError(AssertionError):
    """A check before the first step failed: two ways to compute the same log-probs disagree."""


def check_first_prompts(
    recipe: Recipe, components: Components, stepper: Stepper, planned: int, rows: Sequence[Row]
) -> dict[str, float]:
    """Samples responses to each of the first prompts and scores them again, in three ways.

    Self-distillation scores them by the student's own engine: a student that is its own teacher must get
    |r_t| ≈ 0 for every token. Parity scores the first of each by the plain engine, in one ordinary forward
    of prompt and response. The third way is the forward of the first update: with gradients, through
    the wrapper, recomputed if that is on, and padded with the other rows of a micro-batch. It costs at most
    that one forward, and draws no random number.

    ``rows`` are this process's rows of the first batch, of ``planned`` prompts. Returns the largest
    deviations, as :func:`~video_opd.training.loss_batch.distance` takes them; raises :class:`CheckError` for
    one above the tolerance.
    """
    groups = _sampled(recipe, components, rows[:PROMPTS])
    measured: dict[str, float] = {}
    if groups:
        prompts, responses = [row.prompt for row in rows[:PROMPTS]], token_ids(groups)
        own = components.policy.logprobs(prompts, responses, temperature=recipe.temperature)
        # A row of the plain engine holds a whole prompt, so it scores one response to each.
        first = [group[:1] for group in groups]
        plain = components.plain.logprobs(prompts, token_ids(first), temperature=recipe.temperature)
        remedy = "try model.engine plain"
        _compare(measured, "self-distillation |r_t|", own.logprobs_BT, groups, recipe, remedy)
        _compare(measured, "parity with the plain engine", plain.logprobs_BT, first, recipe, remedy)
    by_id = {row.sample.id: group for row, group in zip(rows, groups, strict=False)}
    of_update = {name: group[: recipe.rollouts] for name, group in by_id.items()}
    scores = stepper.scores_before_update(
        planned, rows, {name: [rollout.token_ids for rollout in group] for name, group in of_update.items()}
    )
    if scores:
        remedy = "try model.gradient_checkpointing false, or model.engine plain"
        name, compared = "the update's forward against sampling", [of_update[name] for name in scores]
        _compare(measured, name, torch.cat([*scores.values()]), compared, recipe, remedy)
    return measured


def _sampled(recipe: Recipe, components: Components, rows: Sequence[Row]) -> Sequence[Sequence[Rollout]]:
    if not rows:
        return []
    seeds = [
        [derive_seed(recipe.run.seed, "check", row.sample.id, i) for i in range(ROLLOUTS)] for row in rows
    ]
    return components.policy.sample(
        [row.prompt for row in rows],
        n=ROLLOUTS,
        max_new_tokens=recipe.sampling.max_new_tokens,
        temperature=recipe.temperature,
        seeds=seeds,
    )


def _compare(
    measured: dict[str, float],
    name: str,
    logprobs_BT: torch.Tensor,
    groups: Sequence[Sequence[Rollout]],
    recipe: Recipe,
    remedy: str,
) -> None:
    """Notes how far ``logprobs_BT`` are from what was recorded while sampling, and judges it."""
    scores, low_precision = iter(logprobs_BT.tolist()), recipe.low_precision
    gaps = [
        [abs(score - recorded) for score, recorded in zip(next(scores), rollout.recorded, strict=False)]
        for group in groups
        for rollout in group
    ]
    of_rollouts = [distance(of_rollout, low_precision=low_precision) for of_rollout in gaps]
    found = measured[name] = distance(of_rollouts, low_precision=False)
    unit = "nats of a response's tokens" if low_precision else "nats"
    if not found <= recipe.ratio_tolerance:
        raise CheckError(
            f"check before the first step: {name} is {found:.3g} {unit}, above "
            f"{recipe.ratio_tolerance:g}; {remedy}, or (low precision) a larger loss.ratio_tolerance"
        )
    log(
        f"check: {name} at most {found:.1e} {unit} on {len(gaps)} responses "
        f"({recipe.ratio_tolerance:g} is allowed)"
        + (f"; of a single token at most {max(map(max, gaps)):.1e}" if low_precision else "")
    )
