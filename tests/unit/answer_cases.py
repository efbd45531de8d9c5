"""A policy without a model: an answer is a function of sample and seed, as the border says."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from video_opd.types import EncodedPrompt, Rollout, Sample, TokenLogprobs


def make_samples(count: int) -> list[Sample]:
    return [
        Sample(
            id=f"s{i}", video=Path(f"{i // 2}.mp4"), query=f"query {i}", duration_s=20.0, spans=((5.0, 10.0),)
        )
        for i in range(count)
    ]


def make_prompt(sample: Sample, length: int = 10) -> EncodedPrompt:
    return EncodedPrompt(
        sample_id=sample.id,
        input_ids=torch.zeros(1, length, dtype=torch.long),
        tensors={},
        text=sample.query,
        pair_times_s=(0.0,),
        video_tokens=length,
        clip_digest=str(sample.video),
        duration_s=20.0,
    )


class FakeLoader:
    """Yields prompts of the samples it is opened on, but for those that fail; may be killed on the way."""

    def __init__(self, failing: Iterable[str] = (), kill_after: int | None = None) -> None:
        self.failing, self.kill_after = set(failing), kill_after
        self.opened: list[list[str]] = []

    def __call__(self, samples: Sequence[Sample]) -> Iterable[tuple[Sample, EncodedPrompt]]:
        self.opened.append([sample.id for sample in samples])
        for count, sample in enumerate(samples):
            if count == self.kill_after:
                raise KeyboardInterrupt
            if sample.id not in self.failing:
                yield sample, make_prompt(sample, 10 + int(sample.id[1:]) * 7 % 5)


class FakePrefix(list[EncodedPrompt]):
    """The prefix that a fake policy makes: the prompts themselves."""

    def select(self, rows: Sequence[int]) -> FakePrefix:
        return FakePrefix(self[row] for row in rows)


class FakePolicy:
    """Answers with ``text(sample_id, seed)``; every token's log-probability is ``logprob`` nats."""

    def __init__(self, text: Callable[[str, int | None], str], logprob: float = -0.5) -> None:
        self.text, self.logprob = text, logprob
        self.calls: list[dict[str, Any]] = []
        self.read: list[list[str]] = []  # ids that were read, a list each time

    def prefill(self, prompts: Sequence[EncodedPrompt], *, grad: bool = False) -> FakePrefix:
        self.read.append([p.sample_id for p in prompts])
        return FakePrefix(prompts)

    def prefill_chunks(self, prompts: Sequence[EncodedPrompt], size: int) -> Iterator[FakePrefix]:
        self.read.append([p.sample_id for p in prompts])
        for start in range(0, len(prompts), size):
            yield FakePrefix(prompts[start : start + size])

    def sample(
        self,
        prompts: Sequence[EncodedPrompt],
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seeds: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Rollout]]:
        assert (seeds is None) == (temperature == 0)
        if not isinstance(prompts, FakePrefix):
            self.prefill(prompts)
        assert seeds is None or [len(row) for row in seeds] == [n] * len(prompts)
        self.calls.append({"ids": [p.sample_id for p in prompts], "n": n, "temperature": temperature})
        groups = []
        for i, prompt in enumerate(prompts):
            texts = [self.text(prompt.sample_id, None if seeds is None else seeds[i][j]) for j in range(n)]
            groups.append([self._rollout(text, max_new_tokens) for text in texts])
        return groups

    def _rollout(self, text: str, max_new_tokens: int) -> Rollout:
        ids = tuple(text.encode()[:max_new_tokens]) or (0,)
        return Rollout(
            token_ids=ids,
            logprobs=(self.logprob,) * len(ids),
            text=text[:max_new_tokens],
            truncated=len(text) > max_new_tokens,
        )

    def logprobs(
        self,
        prompts: Sequence[EncodedPrompt],
        responses: Sequence[Sequence[Sequence[int]]],
        *,
        grad: bool = False,
        full: bool = False,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        if not isinstance(prompts, FakePrefix):
            self.prefill(prompts)
        assert len(prompts) == len(responses)
        flat = [tokens for group in responses for tokens in group]
        mask_BT = torch.zeros(len(flat), max(map(len, flat)), dtype=torch.bool)
        for row, tokens in enumerate(flat):
            mask_BT[row, : len(tokens)] = True
        return TokenLogprobs(logprobs_BT=mask_BT * self.logprob, mask_BT=mask_BT)
