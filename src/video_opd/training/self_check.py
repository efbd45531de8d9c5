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
ROLLOUTS = 4  # of each: rounding has a long tail, and a single response does not show it


class CheckError(AssertionError):
    """A check before the first step failed: two ways to compute the same log-probs disagree."""


def check_first_prompts(recipe: Recipe, components: Components, rows: Sequence[Row]) -> dict[str, float]:
    """Samples responses to each of the first prompts and scores them again, in two ways.

    The self-distillation gate scores them by the student's own engine: a student that is its own teacher must
    get |r_t| ≈ 0 for every token. Parity scores the first of each by the plain engine, in one ordinary
    forward of prompt and response. Returns the largest deviations; raises :class:`CheckError` for one above
    the tolerance. (Every step checks that sampling and the forward with gradients agree: see
    ``policy/ratio_off_max``.)
    """
    prompts = [row.prompt for row in rows[:PROMPTS]]
    if not prompts:
        return {}
    seeds = [
        [derive_seed(recipe.run.seed, "check", row.sample.id, i) for i in range(ROLLOUTS)]
        for row in rows[:PROMPTS]
    ]
    groups = components.policy.sample(
        prompts, n=ROLLOUTS, max_new_tokens=recipe.sampling.max_new_tokens, temperature=1.0, seeds=seeds
    )
    responses = [[rollout.token_ids for rollout in group] for group in groups]
    rollouts, first = [rollout for group in groups for rollout in group], [group[0] for group in groups]
    own = components.policy.logprobs(prompts, responses)
    # A row of the plain engine holds a whole prompt, so it scores one response to each.
    plain = components.plain.logprobs(prompts, [group[:1] for group in responses])
    compared = {
        "self-distillation |r_t|": (own.logprobs_BT, rollouts),
        "parity with the plain engine": (plain.logprobs_BT, first),
    }
    measured = {name: _largest_gap(*of) for name, of in compared.items()}
    for name, gap in measured.items():
        if not gap <= recipe.ratio_tolerance:
            raise CheckError(
                f"check before the first step: {name} is {gap:.3g} nats, above "
                f"{recipe.ratio_tolerance:g}; try model.engine plain, or (low precision) a larger "
                "loss.ratio_tolerance"
            )
        log(
            f"check: {name} at most {gap:.1e} nats on {len(compared[name][1])} responses "
            f"({recipe.ratio_tolerance:g} is allowed)"
        )
    return measured


def _largest_gap(logprobs_BT: torch.Tensor, rollouts: Sequence[Rollout]) -> float:
    gaps = [
        (logprobs_BT[row, : len(rollout.recorded)].cpu() - torch.tensor(rollout.recorded)).abs().max().item()
        for row, rollout in enumerate(rollouts)
    ]
    return max(gaps)
