"""Appendix A: gradients of tokens are those of autograd, and noise is decomposed as eq 10 says."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

import model_cases as cases
import numpy as np
import pytest
import torch

from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import LocalTeacher
from video_opd.reproduce import appendix_a, gradient_noise
from video_opd.reproduce.gradient_noise import decompose, main, measure_prompt, token_gradients
from video_opd.reproduce.places import Place
from video_opd.types import Rollout, Sample
from video_opd.world.tiny import build_model, build_processor


def test_the_parts_of_the_variance_add_up():
    """Three tokens, of which the second repeats the first: eq 10 by numpy's covariances."""
    g = torch.Generator().manual_seed(0)
    first = torch.randn(64, 1, 5, generator=g)
    g_BTS = torch.cat([first, first, torch.randn(64, 1, 5, generator=g)], 1) + 1.0
    found = decompose(g_BTS, grouped=False)
    tokens = [torch.cov(g_BTS[:, t].T.double()).trace() for t in range(3)]
    assert found["variance"] is not None
    assert found["variance_of_tokens"] == pytest.approx(float(sum(tokens)))
    assert found["variance"] == pytest.approx(float(torch.cov(g_BTS.sum(1).T.double()).trace()))
    assert found["covariance_share"] == pytest.approx(2 / 5, abs=0.15)  # (4 + 1) instead of 3
    assert found["noise_of_mean"] == pytest.approx(found["variance"] / 8)
    assert found["signal"] == pytest.approx(5 * 9, rel=0.3)


def test_gradients_of_tokens_are_sketches_of_autograds():
    """Inner products of sketches are those of the gradients; KLs are those of the whole vocabulary."""
    policy = HFPolicy(build_model("test").eval(), build_processor(), "prefix")
    other = HFPolicy(build_model("test", seed=5).eval(), build_processor(), "prefix")
    prompt = cases.mixed_prompts()[0]
    responses = [(5, 9, 3), (7, 2)]
    teacher = other.logprobs([prompt], [responses], full=True).full_BTV
    assert teacher is not None
    scores_BTS, kl_BTS = token_gradients(policy, prompt, list(responses), teacher, size=1 << 16)
    parameters = list(policy.model.parameters())
    scored = policy.logprobs([prompt], [responses], grad=True, full=True)
    assert scored.full_BTV is not None

    def gradient(value: torch.Tensor) -> torch.Tensor:
        found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        return torch.cat(
            [
                (torch.zeros_like(p) if x is None else x).flatten()
                for p, x in zip(parameters, found, strict=True)
            ]
        )

    kl = torch.nn.functional.kl_div(teacher[1, 0], scored.full_BTV[1, 0], log_target=True, reduction="sum")
    for sketched, value in ((scores_BTS[0, 2], scored.logprobs_BT[0, 2]), (kl_BTS[1, 0], kl)):
        whole = gradient(value)
        assert float(sketched @ sketched) == pytest.approx(float(whole @ whole), rel=0.05)
    assert not scores_BTS[1, 2].any() and not kl_BTS[1, 2].any()


def gradient_of(value: torch.Tensor, parameters: list[torch.nn.Parameter]) -> np.ndarray:
    """The gradient with respect to all weights, [W]."""
    found = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
    pairs = zip(parameters, found, strict=True)
    return torch.cat([(torch.zeros_like(p) if x is None else x).flatten() for p, x in pairs]).numpy()


def test_the_figures_of_a_prompt_are_those_of_its_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two groups of eight, against whole gradients of the stock model and the signals of eqs 2 and 5."""
    student, teacher = cases.model(0, sharpness=3.0), cases.model(5, sharpness=3.0)
    policy, prompt = HFPolicy(student, cases.processor(), "prefix"), cases.mixed_prompts()[0]
    drawn: list[Rollout] = []
    sample = policy.sample

    def recorded(*words: Any, **settings: Any) -> list[list[Rollout]]:
        rollouts = sample(*words, **settings)
        drawn.extend(rollouts[0])
        return rollouts

    monkeypatch.setattr(policy, "sample", recorded)
    monkeypatch.setattr(gradient_noise, "MAX_NEW_TOKENS", 2)
    monkeypatch.setattr(gradient_noise, "checked_reward", lambda _, sample, text: float(len(text) % 3))
    row = Sample(id="a", video=Path("a.mp4"), query="q", duration_s=4.0, spans=((1.0, 2.0),))
    other = LocalTeacher(HFPolicy(teacher, cases.processor(), "prefix"))
    found = measure_prompt(policy, other, row, prompt, 16, size=1 << 16)

    assert len(drawn) == 16 and found["tokens"] == statistics.fmean(len(r.token_ids) for r in drawn)
    parameters = list(student.parameters())
    # ∇ log π_t and ∇ KL_t of every token (W weights), r_t of eq 5, and KL_t
    scores_BTW, kls_BTW = np.zeros((2, 16, 2, sum(p.numel() for p in parameters)), dtype=np.float32)
    r_BT, kl_BT = np.zeros((2, 16, 2))
    for b, rollout in enumerate(drawn):
        own_TV = cases.stock_logprobs(student, prompt, rollout.token_ids, grad=True)
        theirs_TV = cases.stock_logprobs(teacher, prompt, rollout.token_ids)
        for t, token in enumerate(rollout.token_ids):
            own_V, theirs_V = own_TV[t][own_TV[t].isfinite()], theirs_TV[t][own_TV[t].isfinite()]
            kl = (own_V.exp() * (own_V - theirs_V)).sum()
            scores_BTW[b, t] = gradient_of(own_TV[t, token], parameters)
            kls_BTW[b, t] = gradient_of(kl, parameters)
            r_BT[b, t], kl_BT[b, t] = float((theirs_TV - own_TV.detach())[t, token]), float(kl.detach())
    rewards = np.array([len(rollout.text) % 3 for rollout in drawn]).reshape(2, 8)
    deviations = rewards.std(axis=1, ddof=1, keepdims=True)
    assert (deviations > 0).all()
    advantages_B1 = ((rewards - rewards.mean(axis=1, keepdims=True)) / (deviations + 1e-4)).reshape(16, 1)
    for name, g_BTW in {
        "grpo": advantages_B1[..., None] * scores_BTW,
        "video-opd": r_BT[..., None] * scores_BTW,
        "video-opd-baseline": (r_BT + kl_BT)[..., None] * scores_BTW,
        "video-opd-full": -kls_BTW,
    }.items():
        figures, g_BTW = found["estimators"][name], g_BTW.astype(np.float64)
        whole_BW = g_BTW.sum(axis=1)
        variance = whole_BW.var(axis=0, ddof=1).sum()
        groups = whole_BW.reshape(2, 8, -1).mean(axis=1)
        noise = groups.var(axis=0, ddof=1).sum() if name == "grpo" else variance / 8
        mean = (whole_BW.mean(axis=0) ** 2).sum()
        share = 1 - g_BTW.var(axis=0, ddof=1).sum() / variance
        assert figures["variance"] == pytest.approx(variance, rel=0.03), name
        assert figures["covariance_share"] == pytest.approx(share, abs=0.03), name
        assert figures["noise_of_mean"] == pytest.approx(noise, rel=0.03), name
        assert figures["signal"] == pytest.approx(mean - noise / 2, abs=0.03 * mean), name
        assert (figures["noise_to_signal"] is None) == (mean <= noise / 2), name


def test_figures_that_gradients_do_not_have_are_none() -> None:
    """GRPO gives equal rewards no gradient at all, and the mean of opposite gradients has no signal."""
    nothing = decompose(torch.zeros(32, 2, 4), grouped=True)
    assert nothing["noise_to_signal"] is None and nothing["covariance_share"] is None
    opposite = torch.ones(32, 1, 1)
    opposite[::2] = -1
    found = decompose(opposite, grouped=False)
    assert found["noise_to_signal"] is None and found["covariance_share"] == 0


@pytest.mark.parametrize("without", ["grpo", "video-opd"])
def test_prompts_without_a_signal_are_left_out_and_counted(without: str, tmp_path: Path) -> None:
    place = Place(out=tmp_path)
    prompts: list[dict[str, Any]] = []
    for n in range(4):
        figures = {"noise_to_signal": 10.0 if n == 0 else 2.0, "covariance_share": 0.5}
        prompts.append({"id": str(n), "estimators": {e: dict(figures) for e in appendix_a.ESTIMATORS}})
    prompts[0]["estimators"][without] = {"noise_to_signal": None, "covariance_share": None}
    path = appendix_a.measured_of(place, 0)
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps({"prompts": prompts}))
    record = json.loads(json.dumps(appendix_a.result(place, [0]), allow_nan=False))
    sampled, *_, covariances = appendix_a.claims(record)
    assert sampled.difference.count_above == covariances.difference.count_above == "0 of 3 prompts"
    assert sampled.difference.rise == 0  # the prompt with other noise is left out on either side
    name = appendix_a.ESTIMATORS[without]
    assert f"| {name} | 2.00 [2.00, 2.00] | 1 of 4 | 50% [50%, 50%] |" in "\n".join(appendix_a.tables(record))


def test_the_result_and_its_claims(tmp_path: Path) -> None:
    place, estimators = Place(out=tmp_path), appendix_a.ESTIMATORS

    def figures(k: int, factor: float) -> dict[str, float]:
        return {"noise_to_signal": factor * (10.0, 1.0, 0.5, 10.0)[k], "covariance_share": 0.01 * k}

    for seed in (0, 1):
        prompts = [
            {"id": str(n), "estimators": {e: figures(k, 1 + n / 10) for k, e in enumerate(estimators)}}
            for n in range(4)
        ]
        path = appendix_a.measured_of(place, seed)
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_text(json.dumps({"prompts": prompts}))
    record = json.loads(json.dumps(appendix_a.result(place, [0, 1])))
    sampled, _, full, covariances = appendix_a.claims(record)
    assert sampled.verdict == "holds" and sampled.difference.rise == pytest.approx(1)
    assert sampled.difference.count_above == "8 of 8 prompts"
    assert full.verdict == "cannot be told at this size"
    assert covariances.verdict == "does not hold" and covariances.difference.rise == pytest.approx(-1)
    assert "| GRPO | 11.50 [10.00, 13.00] | 0 of 8 | 0% [0%, 0%] |" in "\n".join(appendix_a.tables(record))


def test_rollouts_come_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--data", "d", "--out", "o", "--rollouts", "12"])
    assert "multiple of 8" in capsys.readouterr().err
    (task,) = appendix_a.stages(Place(out=Path("x")), [3])[0]
    assert task.module == "video_opd.reproduce.gradient_noise" and "--rollouts" in task.words()
