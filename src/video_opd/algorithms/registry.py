"""The five methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from video_opd.algorithms.grpo import GRPO
from video_opd.algorithms.method import Method
from video_opd.algorithms.op_fkd import OPFKD
from video_opd.algorithms.op_rkd import OPRKD
from video_opd.algorithms.rewards import IoUReward, Reward, load_reward
from video_opd.algorithms.sft import SFT
from video_opd.algorithms.trajectories import AnnotatedTrajectories
from video_opd.algorithms.video_opd import VideoOPD
from video_opd.config import Recipe


def make_method(recipe: Recipe, tokenizer: Any) -> Method:
    """The method that ``recipe.method`` names. Off-policy methods encode annotations with ``tokenizer``."""
    return _METHODS[recipe.method](recipe, tokenizer)


def make_reward(recipe: Recipe) -> Reward:
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
    )


def _annotated(recipe: Recipe, tokenizer: Any) -> AnnotatedTrajectories:
    return AnnotatedTrajectories(tokenizer, recipe.prompt.style)


_METHODS: dict[str, Callable[[Recipe, Any], Method]] = {
    "video-opd": lambda recipe, _: VideoOPD(recipe.sampling, recipe.loss, recipe.teacher.reward_scale),
    "grpo": lambda recipe, _: GRPO(
        recipe.sampling,
        make_reward(recipe),
        recipe.loss,
        normalise_std=recipe.reward.normalise_std,
        annotated=recipe.reward.function is None,
    ),
    "sft": lambda recipe, tokenizer: SFT(_annotated(recipe, tokenizer)),
    "op-rkd": lambda recipe, tokenizer: OPRKD(
        _annotated(recipe, tokenizer), recipe.loss, recipe.teacher.reward_scale
    ),
    "op-fkd": lambda recipe, tokenizer: OPFKD(_annotated(recipe, tokenizer)),
}
