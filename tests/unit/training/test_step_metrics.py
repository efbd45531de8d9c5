"""The numbers of a metrics row, by hand and against their definitions; the share of weights that changed;
updates that bfloat16 loses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from training_cases import prompt

from video_opd.algorithms.method import Needs, Signal, Trajectories
from video_opd.training.batches import Row
from video_opd.training.loss_batch import ScoredBatch
from video_opd.training.step_metrics import (
    Measured,
    Summary,
    TokenValues,
    measure,
    step_metrics,
    token_counts,
    token_values,
)
from video_opd.training.stopwatch import Stopwatch
from video_opd.training.weight_probe import WeightProbe
from video_opd.types import EncodedPrompt, Rollout, Sample, TokenLogprobs

NAN = math.nan
TOKEN_VALUES = [field.name for field in fields(TokenValues)]


def a_prompt(length: int, video_tokens: int) -> EncodedPrompt:
    return EncodedPrompt(
        sample_id="a", input_ids=torch.zeros(1, length, dtype=torch.long), tensors={}, text="",
        pair_times_s=(), video_tokens=video_tokens, clip_digest="", duration_s=4.0,
    )  # fmt: skip


def record(**changes: Any) -> dict[str, Any]:
    """The facts of one rollout, which is the only one of its prompt unless ``position`` says otherwise."""
    facts: dict[str, Any] = {
        "position": None, "text": "1.0 to 2.0", "sampled": True, "truncated": False, "rollout_reward": None,
        "spans": ((1.0, 2.0),), "prompt_tokens": 100, "video_tokens": 80,
        "old": (-1.0, -2.0), "teacher": (-2.0, -1.5),
        "reward": (-1.0, 0.5), "advantage": (-1.0, 0.5), "ratio": (1.0, 1.0), "kl": (0.2, 0.4),
        "entropy": (1.0, 3.0), "current": (-1.0, -2.0), "reference": (NAN, NAN), "weight": (NAN, NAN),
    }  # fmt: skip
    return {**facts, **changes}


def measured(
    records: Sequence[dict[str, Any]], clip: tuple[float, float] | None = None, thinking: bool = False
) -> Measured:
    """``records`` as one micro-batch; those of one position are a group, and stand together."""
    rows: list[Row] = []
    groups: list[list[Rollout]] = []
    samples: list[Sample] = []
    positions: list[Any] = []
    for i, facts in enumerate(records):
        sample = Sample(id=f"s{i}", video=Path("a.mp4"), query="q", duration_s=4.0, spans=facts["spans"])
        rollout = Rollout(
            token_ids=tuple(range(len(facts["old"]))),
            logprobs=facts["old"] if facts["sampled"] else None,
            text=facts["text"],
            truncated=facts["truncated"],
        )
        samples.append(sample)
        if positions and facts["position"] is not None and facts["position"] == positions[-1]:
            groups[-1].append(rollout)
            continue
        positions.append(facts["position"])
        encoded = a_prompt(facts["prompt_tokens"], facts["video_tokens"])
        rows.append(Row(position=i, sample=sample, prompt=encoded))
        groups.append([rollout])
    longest = max(len(facts["old"]) for facts in records)
    values = {
        name: torch.tensor(
            [[*facts[name], *[NAN] * (longest - len(facts[name]))] for facts in records], dtype=torch.float64
        )
        for name in TOKEN_VALUES
    }
    rewards = [facts["rollout_reward"] for facts in records]
    scored = ScoredBatch(
        rows=rows,
        groups=groups,
        trajectories=Trajectories(
            samples=samples,
            rollouts=[rollout for group in groups for rollout in group],
            old_BT=values["old"],
            mask_BT=values["old"].isfinite(),
        ),
        signal=Signal(reward_B=None if None in rewards else torch.tensor(rewards)),
    )
    return measure(scored, TokenValues(**values), clip, thinking)


def metrics_of(*records: dict[str, Any], **settings: Any) -> dict[str, float]:
    return step_metrics([measured(records, **settings)])


def test_each_metric_by_hand():
    row = metrics_of(
        record(),
        record(
            truncated=True, text="no idea", reward=(-6.0, NAN, 0.5),
            ratio=(1.25, NAN, 0.5), kl=(0.6, NAN, 0.0), entropy=(2.0, NAN, 2.0), old=(-1.0, NAN, -2.0),
            teacher=(-7.0, NAN, -1.5), current=(-1.0, NAN, -3.0), advantage=(3.0, NAN, -1.0),
            reference=(NAN, NAN, NAN), weight=(NAN, NAN, NAN),
        ),
        record(
            spans=(), reward=(1.0,), ratio=(1.0,), kl=(0.0,), entropy=(NAN,),
            old=(-1.0,), teacher=(0.0,), current=(-1.0,), advantage=(1.0,), reference=(NAN,), weight=(NAN,),
        ),
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
    assert math.isclose(row["policy/entropy"], (1 + 3 + 2 + 2) / 4)
    assert row["policy/ratio_off_max"] == 0.5
    assert row["policy/clipped_share"] == 2 / 5  # 1.25 with A > 0, 0.5 with A < 0
    assert math.isclose(row["response/nll"], (1 + 2 + 1 + 3 + 1) / 5)
    advantages = [-1.0, 0.5, 3.0, -1.0, 1.0]
    assert math.isclose(row["advantage/mean"], sum(advantages) / 5)
    assert row["response/length_mean"] == 2.0 and row["response/length_max"] == 3
    assert row["response/truncated_share"] == row["response/unparsed_share"] == 1 / 3
    assert row["response/iou_mean"] == 0.5  # of the two annotated ones; an unparsed response counts 0
    assert row["loss/masked_tokens"] == 1


def test_what_was_not_measured_is_not_zero():
    row = step_metrics([])
    assert row["rollouts"] == 0
    assert all(math.isnan(row[key]) for key in ("reverse_kl/sampled", "reward/max", "response/iou_mean"))
    unmeasured = metrics_of(record(kl=(NAN, NAN), entropy=(NAN, NAN)))
    assert math.isnan(unmeasured["reverse_kl/analytic"]) and unmeasured["reverse_kl/sampled"] == 0.25


def test_tokens_are_counted_a_stage():
    three = {name: (0.0,) * 3 for name in TOKEN_VALUES}
    found = [measured([record(position=0), record(position=0, **three)])]
    found.append(measured([record(prompt_tokens=50, video_tokens=20)]))
    once = token_counts(
        found, Needs(sampling=True, teacher=True), prefix_engine=True, continued_prefill=False
    )
    assert once == {
        "tokens/video": 100, "tokens/prompt": 150, "tokens/response": 7, "tokens/prefill": 150,
        "tokens/sample": 7, "tokens/teacher": 157, "tokens/reference": 0, "tokens/update": 157,
    }  # fmt: skip
    continued = token_counts(
        found, Needs(sampling=True, teacher=True), prefix_engine=True, continued_prefill=True
    )
    assert continued == {**once, "tokens/update": 7}
    needs = Needs(sampling=True, reference=True)
    again = token_counts(found, needs, prefix_engine=False, continued_prefill=False)
    assert again["tokens/update"] == 257 and again["tokens/prefill"] == 0 and again["tokens/teacher"] == 0
    assert again["tokens/reference"] == 257
    annotated = token_counts(found, Needs(annotation=True), prefix_engine=True, continued_prefill=False)
    assert annotated["tokens/prefill"] == annotated["tokens/sample"] == 0
    assert annotated["tokens/update"] == 157


def test_a_group_reward_is_of_whole_answers():
    row = metrics_of(
        *(
            record(rollout_reward=reward, position=i // 2, reward=(NAN, NAN), teacher=(NAN, NAN))
            for i, reward in enumerate((0.0, 1.0, 0.5, 0.5))
        )
    )
    assert row["reward/mean"] == 0.5 and (row["reward/min"], row["reward/max"]) == (0.0, 1.0)
    assert row["reward/equal_group_share"] == 0.5  # a group without a difference teaches nothing
    assert math.isnan(row["reverse_kl/sampled"]) and math.isnan(row["reward/outlier_share"])


def test_an_annotation_estimates_no_reverse_kl():
    row = metrics_of(record(sampled=False))
    assert math.isnan(row["reverse_kl/sampled"]) and row["reward/mean"] == -0.25


def test_the_distance_to_the_initial_student_is_k3():
    row = metrics_of(record(reference=(-1.5, -1.0)))
    assert math.isclose(row["reference_kl/sampled"], (math.exp(-0.5) - 0.5 + math.exp(1.0) - 2) / 2)


def test_summaries_of_disjoint_sets_merge_into_that_of_their_union():
    """Also far from 0, where a difference of squares would lose every digit."""
    numbers = 1e6 + 1e-3 * torch.randn(1000, generator=torch.manual_seed(0), dtype=torch.float64)
    whole = Summary.merged([Summary.of(numbers)])
    for sizes in ([1000], [1, 999], [300, 0, 700], [1] * 1000):
        cut = Summary.merged([Summary.of(some) for some in numbers.split(sizes)])
        assert (cut.n, cut.smallest, cut.largest) == (1000, numbers.min(), numbers.max())
        assert math.isclose(cut.mean, numbers.mean(), rel_tol=1e-15)
        assert math.isclose(cut.std, numbers.std(correction=0), rel_tol=1e-6)
    assert Summary.of([NAN, math.inf, 2.0]) == Summary.of([2.0])
    assert math.isnan(whole.merged([]).mean) and math.isnan(Summary().std) and math.isnan(Summary().largest)


# ------------------------------------------------------- against the definitions of docs/metrics.md, in lists


def random_rollouts(rollouts: int, *, sampled: bool, rewards: bool) -> list[dict[str, Any]]:
    """Nine prompts with ``rollouts`` rollouts each, of 1 to 5 tokens; every sixth token is masked."""
    draws = torch.Generator().manual_seed(rollouts)

    def log_softmax(length: int) -> torch.Tensor:
        return torch.randn(length, 7, generator=draws).mul(3).log_softmax(-1)

    found = []
    for i in range(9 * rollouts):
        length = int(torch.randint(1, 6, (), generator=draws))
        ids = torch.randint(7, (length,), generator=draws)
        student, teacher, before, reference = (log_softmax(length) for _ in range(4))
        found.append(
            {
                "position": i // rollouts,
                "index": i % rollouts,
                "ids": tuple(ids.tolist()),
                "student": student,
                "teacher": teacher,
                "old": before[range(length), ids],
                "reference": reference[range(length), ids],
                "advantage": torch.randn(length, generator=draws),
                "weight": torch.rand(length, generator=draws) * 2,
                "kept": (torch.arange(length) + i) % 6 != 5,
                "reward": float(torch.randint(3, (), generator=draws)) / 2 if rewards else None,
                "text": ["1.0 to 2.5", "3 to 2", "never", "0.5 to 1.5"][i % 4],
                "truncated": i % 5 == 0,
                "sampled": sampled,
                "spans": ((1.0, 2.0), (0.0, 0.5)) if i // rollouts % 3 else (),
            }
        )
    return found


def scored_batch(found: Sequence[dict[str, Any]]) -> tuple[ScoredBatch, TokenLogprobs]:
    """A micro-batch as training makes it, and the student's scores at the update. Padding is nonsense."""
    longest = max(len(each["ids"]) for each in found)

    def padded(name: str) -> torch.Tensor:
        return torch.stack(
            [torch.cat([each[name], torch.full((longest - len(each[name]),), 1e9)]) for each in found]
        )

    def full(name: str) -> torch.Tensor:
        uniform = torch.full((longest, 7), 1 / 7).log()
        return torch.stack([torch.cat([each[name], uniform[len(each["ids"]) :]]) for each in found])

    def chosen(full_BTV: torch.Tensor) -> torch.Tensor:
        ids = torch.tensor([[*each["ids"], *[0] * (longest - len(each["ids"]))] for each in found])
        return full_BTV.gather(-1, ids[..., None]).squeeze(-1)

    real_BT = torch.tensor([[t < len(each["ids"]) for t in range(longest)] for each in found])
    mask_BT = real_BT & padded("kept").bool()
    student, teacher = full("student"), full("teacher")
    rows: list[Row] = []
    groups: list[list[Rollout]] = []
    samples: list[Sample] = []
    for each in found:
        i = each["position"]
        sample = Sample(id=f"s{i}", video=Path("a.mp4"), query="q", duration_s=4.0, spans=each["spans"])
        rollout = Rollout(
            token_ids=each["ids"],
            logprobs=tuple(each["old"].tolist()) if each["sampled"] else None,
            text=each["text"],
            truncated=each["truncated"],
        )
        if each["index"] == 0:
            rows.append(Row(position=i, sample=sample, prompt=prompt(i)))
            groups.append([])
        groups[-1].append(rollout)
        samples.append(sample)
    whole = found[0]["reward"] is not None
    trajectories = Trajectories(
        samples=samples,
        rollouts=[rollout for group in groups for rollout in group],
        old_BT=padded("old"),
        mask_BT=mask_BT,
        teacher=TokenLogprobs(logprobs_BT=chosen(teacher), mask_BT=real_BT, full_BTV=teacher),
        reference=TokenLogprobs(logprobs_BT=padded("reference"), mask_BT=real_BT),
        weight_BT=padded("weight"),
    )
    signal = Signal(
        advantage_BT=padded("advantage"),
        token_reward_BT=None if whole else chosen(teacher) - padded("old"),
        reward_B=torch.tensor([each["reward"] for each in found]) if whole else None,
    )
    scored = ScoredBatch(rows=rows, groups=groups, trajectories=trajectories, signal=signal)
    return scored, TokenLogprobs(logprobs_BT=chosen(student), mask_BT=real_BT, full_BTV=student)


def by_definition(found: Sequence[dict[str, Any]], clip: tuple[float, float]) -> dict[str, float]:
    """docs/metrics.md, token by token."""
    tokens = []
    for each in found:
        for t, token in enumerate(each["ids"]):
            if each["kept"][t]:
                p, q = each["student"][t].tolist(), each["teacher"][t].tolist()
                old, reference = each["old"][t].item(), each["reference"][t].item()
                tokens.append(
                    {
                        "sampled": each["sampled"],
                        "to_teacher": old - q[token],
                        "analytic": sum(math.exp(a) * (a - b) for a, b in zip(p, q, strict=True)),
                        "entropy": -sum(math.exp(a) * a for a in p),
                        "k3": math.exp(reference - p[token]) - (reference - p[token]) - 1,
                        "r": q[token] - old,
                        "advantage": each["advantage"][t].item(),
                        "ratio": math.exp(p[token] - old),
                        "weight": each["weight"][t].item(),
                        "nll": -p[token],
                    }
                )

    def mean(values: Sequence[float]) -> float:
        return sum(values) / len(values) if values else NAN

    def std(values: Sequence[float]) -> float:
        return math.sqrt(mean([(value - mean(values)) ** 2 for value in values]))

    whole = found[0]["reward"] is not None
    rewards = [each["reward"] for each in found] if whole else [token["r"] for token in tokens]
    groups: dict[int, list[float]] = {}
    for each in found:
        groups.setdefault(each["position"], []).append(each["reward"])
    advantages = [token["advantage"] for token in tokens]
    clipped = [
        (a > 0 and token["ratio"] > 1 + clip[1]) or (a < 0 and token["ratio"] < 1 - clip[0])
        for a, token in zip(advantages, tokens, strict=True)
    ]
    iou = {"1.0 to 2.5": 1.0 / 1.5, "3 to 2": 0.0, "never": 0.0, "0.5 to 1.5": 0.5 / 1.5}
    lengths = [len(each["ids"]) for each in found]
    return {
        "rollouts": len(found),
        "reverse_kl/sampled": mean([token["to_teacher"] for token in tokens if token["sampled"]]),
        "reverse_kl/analytic": mean([token["analytic"] for token in tokens]),
        "reference_kl/sampled": mean([token["k3"] for token in tokens]),
        "reward/mean": mean(rewards),
        "reward/std": std(rewards),
        "reward/min": min(rewards),
        "reward/max": max(rewards),
        "reward/outlier_share": NAN if whole else mean([abs(r) > 5 for r in rewards]),
        "reward/equal_group_share": mean([len(set(g)) == 1 for g in groups.values()]) if whole else NAN,
        "advantage/mean": mean(advantages),
        "advantage/std": std(advantages),
        "policy/ratio_off_max": max(abs(token["ratio"] - 1) for token in tokens),
        "policy/clipped_share": mean(clipped),
        "policy/importance_weight_mean": mean([token["weight"] for token in tokens]),
        "policy/entropy": mean([token["entropy"] for token in tokens]),
        "response/length_mean": mean(lengths),
        "response/length_max": max(lengths),
        "response/truncated_share": mean([each["truncated"] for each in found]),
        "response/unparsed_share": mean([each["text"] in ("3 to 2", "never") for each in found]),
        "response/iou_mean": mean([iou[each["text"]] for each in found if each["spans"]]),
        "response/nll": mean([token["nll"] for token in tokens]),
        "loss/masked_tokens": sum(lengths) - len(tokens),
    }


@pytest.mark.parametrize(
    ("rollouts", "sampled", "rewards"), [(1, True, False), (1, False, False), (3, True, True)]
)
@pytest.mark.parametrize("cut", [[9], [4, 4, 1], [1] * 9, [6, 3]])
def test_every_metric_is_what_the_docs_define_however_the_batch_is_cut(
    rollouts: int, sampled: bool, rewards: bool, cut: list[int]
):
    found = random_rollouts(rollouts, sampled=sampled, rewards=rewards)
    clip = (0.2, 0.3)
    measured_batches, start = [], 0
    for size in cut:
        scored, student = scored_batch(found[start * rollouts : (start + size) * rollouts])
        values = token_values(scored.trajectories, student, scored.signal)
        measured_batches.append(measure(scored, values, clip, thinking=False))
        start += size
    row, expected = step_metrics(measured_batches), by_definition(found, clip)
    assert list(row) == list(expected)
    for key, value in expected.items():
        same = math.isnan(row[key]) if math.isnan(value) else math.isclose(row[key], value, rel_tol=2e-6)
        assert same, (key, row[key], value)
    reordered = step_metrics(measured_batches[::-1])
    assert all(math.isnan(row[key]) or math.isclose(reordered[key], row[key], rel_tol=1e-12) for key in row)
    assert math.isnan(row["reverse_kl/sampled"]) == (not sampled)


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
