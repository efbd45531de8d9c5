"""Appendix A: gradients of tokens are those of autograd, and noise is decomposed as eq 10 says."""

from __future__ import annotations

import json
from pathlib import Path

import model_cases as cases
import pytest
import torch

from video_opd.models.policy import HFPolicy
from video_opd.reproduce import appendix_a
from video_opd.reproduce.gradient_noise import decompose, main, token_gradients
from video_opd.reproduce.places import Place
from video_opd.world.tiny import build_model, build_processor


def test_the_parts_of_the_variance_add_up():
    """Three tokens, of which the second repeats the first: eq 10 by numpy's covariances."""
    g = torch.Generator().manual_seed(0)
    first = torch.randn(64, 1, 5, generator=g)
    g_BTS = torch.cat([first, first, torch.randn(64, 1, 5, generator=g)], 1) + 1.0
    found = decompose(g_BTS, grouped=False)
    tokens = [torch.cov(g_BTS[:, t].T.double()).trace() for t in range(3)]
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
    assert "| GRPO | 11.50 [10.00, 13.00] | 0% [0%, 0%] |" in "\n".join(appendix_a.tables(record))


def test_rollouts_come_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--data", "d", "--out", "o", "--rollouts", "12"])
    assert "multiple of 8" in capsys.readouterr().err
    (task,) = appendix_a.stages(Place(out=Path("x")), [3])[0]
    assert task.module == "video_opd.reproduce.gradient_noise" and "--rollouts" in task.words()
