"""The numbers of a metrics row, by hand; the share of weights that changed; updates that bfloat16 loses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from video_opd.algorithms.method import Needs
from video_opd.config import OptimConfig
from video_opd.training.components import make_optimizer
from video_opd.training.step_metrics import RolloutRecord, Stopwatch, rollout_metrics, token_counts
from video_opd.training.weight_probe import WeightProbe

NAN = math.nan


def record(**changes: Any) -> RolloutRecord:
    facts: dict[str, Any] = {
        "position": 0, "index": 0, "sample_id": "a", "video": "a.mp4", "query": "q", "text": "1.0 to 2.0",
        "token_ids": (5, 6), "sampled": True, "truncated": False, "answer_reward": None, "rule": "exact",
        "span": (1.0, 2.0), "spans": ((1.0, 2.0),),
        "iou": 1.0, "prompt_tokens": 100, "video_tokens": 80, "old": (-1.0, -2.0), "teacher": (-2.0, -1.5),
        "reward": (-1.0, 0.5), "advantage": (-1.0, 0.5), "ratio": (1.0, 1.0), "kl": (0.2, 0.4),
        "entropy": (1.0, 3.0), "current": (-1.0, -2.0), "reference": (NAN, NAN), "weight": (NAN, NAN),
    }  # fmt: skip
    return RolloutRecord(**{**facts, **changes})


def test_each_metric_by_hand():
    row = rollout_metrics(
        [
            record(),
            record(
                position=1, token_ids=(7, 8, 9), truncated=True, span=None, iou=0.0, reward=(-6.0, NAN, 0.5),
                ratio=(1.25, NAN, 0.5), kl=(0.6, NAN, 0.0), entropy=(2.0, NAN, 2.0), old=(-1.0, NAN, -2.0),
                teacher=(-7.0, NAN, -1.5), current=(-1.0, NAN, -3.0), advantage=(3.0, NAN, -1.0),
                reference=(NAN, NAN, NAN),
            ),
            record(
                position=2, spans=(), iou=None, token_ids=(1,), reward=(1.0,), ratio=(1.0,), kl=(0.0,),
                old=(-1.0,), teacher=(0.0,), current=(-1.0,), advantage=(1.0,), reference=(NAN,),
            ),
        ],
        clip=(0.2, 0.2),
    )  # fmt: skip
    signal = [-1.0, 0.5, -6.0, 0.5, 1.0]
    mean = sum(signal) / 5
    assert row["rollouts"] == 3
    assert math.isclose(row["reward/mean"], mean) and math.isclose(row["reverse_kl/sampled"], -mean)
    assert math.isclose(row["reward/std"], math.sqrt(sum((x - mean) ** 2 for x in signal) / 5))
    assert (row["reward/min"], row["reward/max"]) == (-6.0, 1.0)
    assert row["reward/outlier_share"] == 1 / 5
    assert math.isclose(row["reverse_kl/analytic"], (0.2 + 0.4 + 0.6 + 0.0 + 0.0) / 5)
    assert math.isclose(row["policy/entropy"], (1 + 3 + 2 + 2 + 1 + 3) / 6)
    assert row["policy/ratio_off_max"] == 0.5
    assert row["policy/clipped_share"] == 2 / 5  # 1.25 with A > 0, 0.5 with A < 0
    assert math.isclose(row["response/nll"], (1 + 2 + 1 + 3 + 1) / 5)
    advantages = [-1.0, 0.5, 3.0, -1.0, 1.0]
    assert math.isclose(row["advantage/mean"], sum(advantages) / 5)
    assert row["response/length_mean"] == 2.0 and row["response/length_max"] == 3
    assert row["response/truncated_share"] == row["response/unparsed_share"] == 1 / 3
    assert row["response/iou_mean"] == 0.5  # of the two annotated ones; an unparsed answer counts 0
    assert row["loss/masked_tokens"] == 1


def test_what_was_not_measured_is_not_zero():
    row = rollout_metrics([])
    assert row["rollouts"] == 0
    assert all(math.isnan(row[key]) for key in ("reverse_kl/sampled", "reward/max", "response/iou_mean"))
    unmeasured = rollout_metrics([record(kl=(NAN, NAN), entropy=(NAN, NAN))])
    assert math.isnan(unmeasured["reverse_kl/analytic"]) and unmeasured["reverse_kl/sampled"] == 0.25


def test_tokens_are_counted_a_stage():
    records = [
        record(),
        record(index=1, token_ids=(1, 2, 3)),
        record(position=1, prompt_tokens=50, video_tokens=20),
    ]
    once = token_counts(records, reads_prompts_once=True, needs=Needs(sampling=True, teacher=True))
    assert once == {
        "tokens/video": 100, "tokens/prompt": 150, "tokens/response": 7, "tokens/prefill": 150,
        "tokens/sample": 7, "tokens/teacher": 157, "tokens/reference": 0, "tokens/update": 157,
    }  # fmt: skip
    again = token_counts(records, reads_prompts_once=False, needs=Needs(sampling=True, reference=True))
    assert again["tokens/update"] == 257 and again["tokens/prefill"] == 0 and again["tokens/teacher"] == 0
    assert again["tokens/reference"] == 257
    annotated = token_counts(records, reads_prompts_once=True, needs=Needs(annotation=True))
    assert annotated["tokens/prefill"] == annotated["tokens/sample"] == 0
    assert annotated["tokens/update"] == 157


def test_a_group_reward_is_of_whole_answers():
    rows = [
        record(answer_reward=reward, position=i // 2, reward=(NAN, NAN), teacher=(NAN, NAN))
        for i, reward in enumerate((0.0, 1.0, 0.5, 0.5))
    ]
    row = rollout_metrics(rows)
    assert row["reward/mean"] == 0.5 and (row["reward/min"], row["reward/max"]) == (0.0, 1.0)
    assert row["reward/equal_group_share"] == 0.5  # a group without a difference teaches nothing
    assert math.isnan(row["reverse_kl/sampled"]) and math.isnan(row["reward/outlier_share"])


def test_an_annotation_estimates_no_reverse_kl():
    row = rollout_metrics([record(sampled=False)])
    assert math.isnan(row["reverse_kl/sampled"]) and row["reward/mean"] == -0.25


def test_the_distance_to_the_initial_student_is_k3():
    row = rollout_metrics([record(reference=(-1.5, -1.0))])
    assert math.isclose(row["reference_kl/sampled"], (math.exp(-0.5) - 0.5 + math.exp(1.0) - 2) / 2)


def test_the_stopwatch_adds_up_and_starts_again():
    settled = []
    watch = Stopwatch(settle=lambda: settled.append(1))
    for _ in range(2):
        with watch.stage("sample"):
            sum(range(1000))
    row = watch.take(("sample", "update"))
    assert row["time/sample_s"] > 0 and row["time/update_s"] == 0 and len(settled) == 4
    assert watch.take(("sample",)) == {"time/sample_s": 0.0}
    with watch.stage("unheard of"):
        pass
    with pytest.raises(AssertionError, match="unheard of"):
        watch.take(("sample",))


def test_the_probe_counts_changed_weights():
    parameters = [torch.nn.Parameter(torch.ones(30, 10)), torch.nn.Parameter(torch.ones(100))]
    probe = WeightProbe(parameters, seed=0)
    before = probe.read()
    assert before.numel() == 400  # all of them
    with torch.no_grad():
        parameters[0][0] += 1e-6  # 10 weights, below the rounding step of bfloat16
        parameters[1][:30] += 1.0
    assert probe.changed(before) == (40, 30, 400)


def test_a_subset_estimates_the_share():
    parameters = [torch.nn.Parameter(torch.zeros(size)) for size in (7000, 1, 20_000, 3000)]
    probe = WeightProbe(parameters, seed=1, size=4000)
    before = probe.read()
    assert before.numel() == 4000
    with torch.no_grad():
        parameters[2].add_(1.0)
    changed, _, size = probe.changed(before)
    assert size == 4000
    assert abs(changed / size - 20_000 / 30_001) < 0.03
    assert torch.equal(WeightProbe(parameters, seed=1, size=4000).read(), probe.read())


def test_bfloat16_weights_lose_updates_that_ours_keep():
    """lr 1e-6 on weights like a trained model's: plain AdamW on bfloat16 hardly moves them."""
    torch.manual_seed(0)
    start, gradient = torch.randn(2000) * 0.02, torch.randn(2000)
    optim = OptimConfig()
    assert optim.lr == 1e-6

    def moved(dtype: torch.dtype) -> float:
        weight = torch.nn.Parameter(start.to(torch.bfloat16).to(dtype))
        if dtype == torch.float32:
            optimizer = make_optimizer([weight], optim)
        else:
            with pytest.raises(AssertionError, match="loses updates"):
                make_optimizer([weight], optim)
            optimizer = torch.optim.AdamW([weight], lr=optim.lr, betas=optim.betas, weight_decay=0.0)
        first = weight.detach().clone()
        for _ in range(100):
            weight.grad = gradient.to(dtype)
            optimizer.step()
        return (weight - first).abs().double().mean().item()

    ours, lost = moved(torch.float32), moved(torch.bfloat16)
    assert math.isclose(ours, 100 * optim.lr, rel_tol=0.01)  # 100 steps of 1e-6, all in one direction
    assert lost < 0.1 * ours


def test_vectors_are_not_decayed():
    matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    optimizer = make_optimizer([matrix, vector], OptimConfig(weight_decay=0.1, lr=1.0))
    matrix.grad, vector.grad = torch.zeros(2, 2), torch.zeros(2)
    optimizer.step()
    assert torch.allclose(matrix, torch.full((2, 2), 0.9)) and torch.equal(vector, torch.ones(2))
