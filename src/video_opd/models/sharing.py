"""Finds prompts that begin with the same video, so that the tokens they share are prefilled once.

The prompts of a batch form a tree: a video, the queries about it, the responses to each query. The *trunk* of
some prompts is the sequence of tokens that they all begin with, the video at least. A *branch* is the rest of
one prompt, its query. A branch goes on top of the keys and values of its trunk, as a response goes on top of
those of its prompt.

    columns of the cache:   trunk (video) | padding | branch (query) || response

For flash attention the padding is in front of the trunk.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

from video_opd.models.prompt_batch import PromptBatch
from video_opd.types import EncodedPrompt


@dataclass(frozen=True, kw_only=True)
class Trunks:
    """The trunk of each prompt, and the length of each trunk.

    Example: with ``Trunks(of_prompt=(0, 1, 0), lengths=(240, 195))``, the first and the third prompt share
    their first 240 tokens; the second shares its trunk of 195 tokens with no other. Every prompt is longer
    than its trunk, and no branch holds a token of a video.
    """

    of_prompt: tuple[int, ...]
    lengths: tuple[int, ...]  # tokens

    def split(
        self, batch: PromptBatch, prompts: Sequence[EncodedPrompt], pad_id: int
    ) -> tuple[PromptBatch, PromptBatch]:
        """(a batch with a row for each trunk and its videos, a batch with a row of text for each branch)."""
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
    """The trunks of ``prompts``, or None if no two prompts share one.

    Prompts share a trunk if they have the same clip and the same tokens up to its end. The trunk holds all
    leading tokens that are equal.
    """
    members: dict[Hashable, list[int]] = {}
    for row, prompt in enumerate(prompts):
        ids_P = prompt.input_ids[0].cpu()
        shown = (ids_P == video_token_id).nonzero()
        if len(shown) and int(shown[-1]) == len(ids_P) - 1:
            return None  # nothing follows the video, so there is no branch
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
    """The number of leading tokens that are equal in all prompts; at least one token of each is left."""
    limit = min(map(len, prompts)) - 1
    equal_P = torch.stack([ids_P[:limit] == prompts[0][:limit] for ids_P in prompts]).all(0)
    return int(equal_P.long().cumprod(0).sum())
