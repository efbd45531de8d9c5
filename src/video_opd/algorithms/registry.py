"""The five methods by name."""

from __future__ import annotations

from typing import Any

from video_opd.algorithms.grpo import GRPO
from video_opd.algorithms.method import Method
from video_opd.algorithms.op_fkd import OPFKD
from video_opd.algorithms.op_rkd import OPRKD
from video_opd.algorithms.rewards import IoUReward, Reward, load_reward
from video_opd.algorithms.sft import SFT
from video_opd.algorithms.trajectories import AnnotatedTrajectories
from video_opd.algorithms.video_opd import VideoOPD
from video_opd.config import GRPORecipe, OPFKDRecipe, OPRKDRecipe, Recipe, SFTRecipe, VideoOPDRecipe


def make_method(recipe: Recipe, tokenizer: Any, *, opened: bool = False) -> Method:
    """The method of a recipe. Off-policy methods encode annotations with ``tokenizer``.

    ``opened`` says that the prompt ends inside ``<think>``.
    """
    match recipe:
        case VideoOPDRecipe():
            return VideoOPD(recipe.sampling, recipe.loss, recipe.teacher.reward_scale)
        case GRPORecipe():
            return GRPO(
                recipe.sampling,
                make_reward(recipe, opened=opened),
                recipe.loss,
                normalise_std=recipe.reward.normalise_std,
                annotated=recipe.reward.function is None,
            )
        case SFTRecipe():
            return SFT(_annotated(recipe, tokenizer))
        case OPRKDRecipe():
            return OPRKD(_annotated(recipe, tokenizer), recipe.loss, recipe.teacher.reward_scale)
        case OPFKDRecipe():
            return OPFKD(_annotated(recipe, tokenizer))
    raise AssertionError(f"no method {recipe.method}")


def make_reward(recipe: GRPORecipe, *, opened: bool = False) -> Reward:
    """The reward that ``recipe.reward`` describes.

    Raises :class:`~video_opd.errors.UserError` if it is a user's function that cannot be imported.
    """
    settings = recipe.reward
    if settings.function is not None:
        return load_reward(settings.function)
    return IoUReward(
        kind=settings.iou,
        iou_weight=settings.iou_weight,
        format_weight=settings.format_weight,
        thinking=recipe.prompt.thinking,
        opened=opened,
    )


def _annotated(recipe: Recipe, tokenizer: Any) -> AnnotatedTrajectories:
    return AnnotatedTrajectories(tokenizer, recipe.prompt.style)
