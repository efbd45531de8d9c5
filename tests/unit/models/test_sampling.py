"""Filters equal those of transformers, and draws follow the distribution that they should."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from video_opd.models.sampling import SamplingSettings, draw, rollout_uniforms, sampled_logprobs


def test_a_uniform_depends_on_its_seed_and_its_place_alone() -> None:
    together = rollout_uniforms([3, 2**80, 7], 12)
    assert together.shape == (3, 12) and together.min() >= 0 and together.max() < 1
    np.testing.assert_array_equal(rollout_uniforms([2**80], 5)[0], together[1, :5])
    np.testing.assert_array_equal(rollout_uniforms([7, 3], 20)[:, :12], together[[2, 0]])
    assert len(np.unique(together)) == together.size


def test_uniforms_never_change_between_releases() -> None:
    # Philox and numpy's seeding are specified, so a run that resumes under another version draws the same.
    np.testing.assert_allclose(
        rollout_uniforms([0], 2)[0], [0.014067035665647709, 0.2577672456246177], atol=1e-15
    )


@settings(max_examples=60)
@given(
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.3, 1.0, 1.7]),
    top_k=st.integers(0, 12),
    top_p=st.sampled_from([0.05, 0.5, 0.9, 1.0]),
)
def test_filters_are_those_of_transformers(seed: int, temperature: float, top_k: int, top_p: float) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(4, 10, generator=torch.Generator().manual_seed(seed)) * 3
    expected = (
        TemperatureLogitsWarper(temperature)(None, logits.clone()) if temperature != 1 else logits.clone()
    )
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    got = sampled_logprobs(logits, SamplingSettings(temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(got, expected.log_softmax(-1))


def test_greedy_keeps_the_models_own_logprobs() -> None:
    logits = torch.tensor([[1.0, 2.0, 0.5]])
    greedy = SamplingSettings(temperature=0, top_k=1, top_p=0.1)
    torch.testing.assert_close(sampled_logprobs(logits, greedy), logits.log_softmax(-1))


def test_draws_follow_the_distribution() -> None:
    probs = torch.tensor([0.0, 0.4, 0.05, 0.0, 0.3, 0.2, 0.05, 0.0])
    n = 20_000
    uniforms = torch.from_numpy(rollout_uniforms(range(n), 1)[:, 0])
    counts = torch.bincount(draw(probs.log().expand(n, -1), uniforms), minlength=8)
    assert counts[probs == 0].sum() == 0
    expected = n * probs[probs > 0]
    chi2 = ((counts[probs > 0] - expected) ** 2 / expected).sum().item()
    assert chi2 < 18.47  # 4 degrees of freedom, 99.9%


@pytest.mark.parametrize("uniform", [0.0, 0.25, 0.5, 1 - 2**-53])
def test_the_edges_of_the_unit_interval_draw_no_impossible_token(uniform: float) -> None:
    logprobs = torch.tensor([[0.0, 0.25, 0.0, 0.25, 0.5, 0.0]]).log()
    token = draw(logprobs, torch.tensor([uniform], dtype=torch.float64)).item()
    assert token == {0.0: 1, 0.25: 3, 0.5: 4, 1 - 2**-53: 4}[uniform]


@pytest.mark.parametrize(
    "bad", [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.5}, {"top_k": -1}]
)
def test_settings_out_of_range_are_refused(bad: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        SamplingSettings(**bad)
