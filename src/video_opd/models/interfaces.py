"""What the training loop, the curriculum and the evaluation may ask of a model, whoever runs it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol, runtime_checkable

from video_opd.types import EncodedPrompt, Rollout, TokenLogprobs

Responses = Sequence[Sequence[Sequence[int]]]
"""For each prompt its responses, for each response its token ids. Results are flattened prompt-major:
``[[a, b], [c]]`` gives the rows a, b, c."""


@runtime_checkable
class Policy(Protocol):
    """A model that writes answers, and knows how likely each of its tokens was."""

    def prefill(self, prompts: Sequence[EncodedPrompt], *, grad: bool = False) -> Any:
        """Read the prompts once, for :meth:`sample` and :meth:`logprobs` to be given in their place.

        The result can be used any number of times while the weights stay; ``.select(rows)`` is the part of it
        for some of the prompts. ``grad``: one :meth:`logprobs` with ``grad`` may follow.
        """
        ...

    def sample(
        self,
        prompts: Sequence[EncodedPrompt] | Any,
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seeds: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Rollout]]:
        """``n`` rollouts a prompt. ``seeds[i][j]`` decides rollout j of prompt i, and nothing else does."""
        ...

    def logprobs(
        self,
        prompts: Sequence[EncodedPrompt] | Any,
        responses: Responses,
        *,
        grad: bool = False,
        full: bool = False,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """Log-probabilities of given responses; ``grad`` takes prompts, or a prefix read with ``grad``."""
        ...


@runtime_checkable
class ChunkedPolicy(Policy, Protocol):
    """A policy that can be asked more about one video than memory holds at a time."""

    def prefill_chunks(self, prompts: Sequence[EncodedPrompt], size: int) -> Iterator[Any]:
        """:meth:`prefill` of ``size`` prompts at a time; a video that they share is read once for all."""
        ...


@runtime_checkable
class Teacher(Protocol):
    """A frozen model that scores answers that somebody else wrote."""

    def logprobs(
        self,
        prompts: Sequence[EncodedPrompt],
        responses: Responses,
        *,
        full: bool = False,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """Log-probabilities of given responses, finite wherever ``mask_BT`` is True."""
        ...
