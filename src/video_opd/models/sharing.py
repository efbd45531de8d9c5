"""Prompts that show the same video: what they have in common is read once.

A tree: a video, the queries about it, the answers to each query. The *trunk* of some prompts is what they
begin with, the video at least; a *branch* is the rest of one prompt, its query. A branch goes on top of its
trunk's keys and values as an answer goes on top of its prompt's.

    columns of the cache:   padding | trunk (video) | padding | branch (query) || answer
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from video_opd.models.prompt_batch import PromptBatch
from video_opd.types import EncodedPrompt


@dataclass(frozen=True, kw_only=True)
class Trunks:
    """Which prompts begin alike.

    Example: ``Trunks(of_prompt=(0, 1, 0), lengths=(240, 195))``: the first and the third prompt have their
    first 240 tokens in common, the second is alone with its first 195. Every prompt is longer than its trunk,
    and no branch holds a part of a video.
    """

    of_prompt: tuple[int, ...]
    lengths: tuple[int, ...]  # tokens

    def split(
        self, batch: PromptBatch, prompts: Sequence[EncodedPrompt], pad_id: int
    ) -> tuple[PromptBatch, PromptBatch]:
        """The trunks, one row each with its videos, and the branches, one row a prompt of text alone."""
        width = batch.input_ids_BP.shape[1]
        examples = [self.of_prompt.index(trunk) for trunk in range(len(self.lengths))]
        stops = [
            width - prompts[row].length + length for row, length in zip(examples, self.lengths, strict=True)
        ]
        rest = [
            prompt.length - self.lengths[trunk] for prompt, trunk in zip(prompts, self.of_prompt, strict=True)
        ]
        every = range(len(prompts))
        return (
            batch.cut(examples, stops, self.lengths, pad_id=pad_id, videos=True),
            batch.cut(every, [width] * len(prompts), rest, pad_id=pad_id, videos=False),
        )


def find_trunks(prompts: Sequence[EncodedPrompt], video_token_id: int) -> Trunks | None:
    """Prompts with one clip and equal tokens to its end share as many tokens as are equal; the others none.

    None where no two prompts share a trunk.
    """
    members: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        ids_P = prompt.input_ids[0].cpu()
        shown = (ids_P == video_token_id).nonzero()
        if len(shown) and int(shown[-1]) == len(ids_P) - 1:
            return None  # nothing after the video: no branch
        key = (prompt.clip_digest, ids_P[: int(shown[-1]) + 1].numpy().tobytes()) if len(shown) else row
        members.setdefault(key, []).append(row)
    if len(members) == len(prompts):
        return None
    of_prompt = {row: trunk for trunk, rows in enumerate(members.values()) for row in rows}
    return Trunks(
        of_prompt=tuple(of_prompt[row] for row in range(len(prompts))),
        lengths=tuple(
            _common_length([prompts[row].input_ids[0].cpu() for row in rows]) for rows in members.values()
        ),
    )


def _common_length(prompts: Sequence[torch.Tensor]) -> int:
    """Leading tokens that are equal in all, at most all but one of the shortest."""
    limit = min(map(len, prompts)) - 1
    equal_P = torch.stack([ids_P[:limit] == prompts[0][:limit] for ids_P in prompts]).all(0)
    return int(equal_P.long().cumprod(0).sum())
