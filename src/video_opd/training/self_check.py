"""Checks before the first step: sampling, scoring and both engines must agree on this model and prompts."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from video_opd.config import Recipe
from video_opd.progress import log
from video_opd.seeds import derive_seed
from video_opd.training.batches import Row
from video_opd.training.components import Components
from video_opd.types import Rollout

PROMPTS = 2


class CheckError(AssertionError):
    """A check before the first step failed: two ways to compute the same log-probs disagree."""


def check_first_prompts(recipe: Recipe, components: Components, rows: Sequence[Row]) -> dict[str, float]:
    """Samples a response to each of the first prompts and scores it again, in two ways.

    The self-distillation gate scores it by the student's own engine: a student that is its own teacher must
    get |r_t| ≈ 0 for every token. Parity scores it by the plain engine, in one ordinary forward of prompt and
    response. Returns the largest deviations; raises :class:`CheckError` for one above the tolerance. (Every
    step checks that sampling and the forward with gradients agree: see ``policy/ratio_off_max``.)
    """
    prompts = [row.prompt for row in rows[:PROMPTS]]
    if not prompts:
        return {}
    seeds = [[derive_seed(recipe.run.seed, "check", row.sample.id)] for row in rows[:PROMPTS]]
    groups = components.policy.sample(
        prompts, n=1, max_new_tokens=recipe.sampling.max_new_tokens, temperature=1.0, seeds=seeds
    )
    responses = [[rollout.token_ids for rollout in group] for group in groups]
    rollouts = [rollout for group in groups for rollout in group]
    own = components.policy.logprobs(prompts, responses)
    plain = components.plain.logprobs(prompts, responses)
    measured = {
        "self-distillation |r_t|": _largest_gap(own.logprobs_BT, rollouts),
        "parity with the plain engine": _largest_gap(plain.logprobs_BT, rollouts),
    }
    for name, gap in measured.items():
        if not gap <= recipe.ratio_tolerance:
            raise CheckError(
                f"check before the first step: {name} is {gap:.3g} nats, above "
                f"{recipe.ratio_tolerance:g}; try model.engine plain, or (low precision) a larger "
                "loss.ratio_tolerance"
            )
        log(f"check: {name} at most {gap:.1e} nats on {len(rollouts)} responses")
    return measured


def _largest_gap(logprobs_BT: torch.Tensor, rollouts: Sequence[Rollout]) -> float:
    gaps = [
        (logprobs_BT[row, : len(rollout.recorded)].cpu() - torch.tensor(rollout.recorded)).abs().max().item()
        for row, rollout in enumerate(rollouts)
    ]
    return max(gaps)
