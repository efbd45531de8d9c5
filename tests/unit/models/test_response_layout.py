"""Responses side by side in one row equal responses on a copy of their prompt each."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from model_cases import mixed_prompts, model, processor

from video_opd.models.forward_passes import ForwardPasses
from video_opd.models.policy import HFPolicy
from video_opd.models.response_layout import ResponseLayout, response_attention_mask

RESPONSES: Any = [[(9, 145, 296), (46, 25, 9, 354, 122)], [(57,)], [(20, 21), (22, 23, 24, 25), (26, 27, 28)]]


@pytest.mark.parametrize(("first", "steps"), [(0, 3), (2, 1)])
def test_the_mask_equals_a_loop(first: int, steps: int) -> None:
    prompt_mask_BP = torch.tensor([[0, 1, 1], [1, 1, 1]])
    width = 2
    mask = response_attention_mask(prompt_mask_BP, width, first, steps)
    assert mask.shape == (2, 1, steps * width, 3 + (first + steps) * width) and mask.dtype == torch.bool
    for row in range(2):
        for query in range(steps * width):
            token, response = divmod(first * width + query, width)
            for key in range(mask.shape[-1]):
                if key < 3:
                    expected = bool(prompt_mask_BP[row, key])
                else:
                    its_token, its_response = divmod(key - 3, width)
                    expected = its_response == response and its_token <= token
                assert bool(mask[row, 0, query, key]) == expected


def test_separate_inverts_interleave() -> None:
    layout = ResponseLayout.of([2, 1, 3], torch.device("cpu"))
    ids_NR = torch.arange(24).reshape(6, 4) + 1
    ids_BQ = layout.interleave(ids_NR, pad_id=0)
    assert ids_BQ.shape == (3, 12)
    assert ids_BQ[0].tolist() == [1, 5, 0, 2, 6, 0, 3, 7, 0, 4, 8, 0]
    assert torch.equal(layout.separate(ids_BQ[..., None])[..., 0], ids_NR)


def policy(attn: str) -> HFPolicy:
    made = model(sharpness=20)
    made.set_attn_implementation({"text_config": attn})
    return HFPolicy(made, processor(), "prefix")


def found(of: HFPolicy) -> tuple[Any, ...]:
    """Rollouts, scores and gradients."""
    of.model.zero_grad()
    seeds = [[7 * i + j for j in range(3)] for i in range(3)]
    rollouts = of.sample(mixed_prompts(), n=3, max_new_tokens=6, seeds=seeds)
    scores = of.logprobs(mixed_prompts(), RESPONSES, grad=True, full=True)
    weights = torch.linspace(-1, 1, scores.logprobs_BT.numel()).view_as(scores.logprobs_BT)
    (scores.logprobs_BT * weights).sum().backward()
    gradients = {name: p.grad for name, p in of.model.named_parameters() if p.grad is not None}
    return [[r.token_ids for r in group] for group in rollouts], rollouts, scores, gradients


@pytest.mark.parametrize("attn", ["sdpa", "eager"])
def test_side_by_side_is_as_on_copies(attn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """An attention that takes no such mask gets copies of the prompt."""
    tokens, rollouts, scores, gradients = found(policy(attn))
    monkeypatch.setattr(ForwardPasses, "side_by_side", False)
    on_copies = found(policy(attn))
    assert tokens == on_copies[0]
    for group, others in zip(rollouts, on_copies[1], strict=True):
        for a, b in zip(group, others, strict=True):
            assert a.recorded == pytest.approx(b.recorded, abs=1e-5)
    torch.testing.assert_close(scores.logprobs_BT, on_copies[2].logprobs_BT, atol=1e-5, rtol=0)
    torch.testing.assert_close(scores.mask_BT, on_copies[2].mask_BT)
    torch.testing.assert_close(scores.full_BTV, on_copies[2].full_BTV, atol=1e-4, rtol=0)
    assert gradients.keys() == on_copies[3].keys()
    for name, gradient in gradients.items():
        assert gradient.norm() > 0, name
        assert (gradient - on_copies[3][name]).norm() <= 1e-5 * gradient.norm(), name
