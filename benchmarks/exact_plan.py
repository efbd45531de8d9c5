"""The plan of a step on prompts of known lengths: ``video-opd plan`` assumes the longest that may come."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from video_opd.config import Recipe
from video_opd.planning.memory import Memory
from video_opd.planning.plan import RecipeSizes, decide
from video_opd.planning.setup import Setup, Work
from video_opd.types import EncodedPrompt


def exact_plan(
    recipe: Recipe, sizes: RecipeSizes, work: Mapping[str, Any], *, processes: int = 1, cuda: bool = True
) -> Memory:
    """``work`` are fields of :class:`Work` that are known: :func:`lengths_of`, ``prompts_a_step``."""
    assumed = Work.of(recipe, (), processes)
    setup = Setup.of(recipe, processes)
    _, memory, _ = decide(setup, dataclasses.replace(assumed, **work), sizes, None, cuda=cuda)
    return memory


def lengths_of(prompts: Sequence[EncodedPrompt]) -> dict[str, int]:
    """The fields of :class:`Work` that prompts of one length give."""
    first = prompts[0]
    return {
        "prompt_tokens": first.length,
        "video_tokens": first.video_tokens,
        "frame_pairs": len(first.pair_times_s),
    }
