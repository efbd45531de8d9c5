"""How noisy is a gradient of Video-OPD, and one of GRPO, at equal rollouts? Appendix A, measured.

    python benchmarks/gradient_variance.py --out runs/variance --prompts 8 --rollouts 128

For every prompt, ``rollouts`` responses are sampled from the tiny base, and the gradient of log π(a_t|s_t)
with respect to all weights is taken for every single token. With the methods' advantages A_t they give

    g_t = A_t ∇log π_t,    G = Σ_t g_t,    Var(G) = Σ_t Var(g_t) + 2 Σ_{t<t'} Cov(g_t, g_t')      (eq 10)

(traces of covariances, over rollouts of the same prompt). Scales differ between methods, and an optimiser
such as Adam does not see them, so noise is compared relative to the signal: tr Var of the mean over eight
rollouts (GRPO's group), divided by the squared norm of the expected gradient. Eight rollouts are one group of
GRPO, or eight independent ones of Video-OPD.

Gradients are kept as count sketches (each weight is added to one of ``sketch`` sums with a random sign):
inner products are preserved on average, and the error of a trace is about 1/sqrt(sketch) of it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from common import BASE, TEACHER, machine, parser, write_result

from video_opd.algorithms.rewards import IoUReward, checked_reward
from video_opd.algorithms.signals import group_advantages, kl_baseline, sampled_reverse_kl
from video_opd.data.annotations import read_samples
from video_opd.models.inference import load_inference_model, read_inference_config
from video_opd.models.teachers import LocalTeacher
from video_opd.seeds import derive_seed
from video_opd.types import EncodedPrompt, Sample
from video_opd.world.demo import shipped
from video_opd.world.make import make_world

GROUP = 8


def main() -> None:
    arguments = parse()
    torch.manual_seed(0)
    data = make_world(Path(arguments.out), videos={"train": arguments.prompts}, seed=400)["train"]
    student = load_inference_model(
        read_inference_config(str(shipped(BASE)), []), cache_dir=Path(arguments.out) / "clips"
    )
    teacher = LocalTeacher(load_inference_model(read_inference_config(str(shipped(TEACHER)), [])).policy)
    one_each: dict[Path, Sample] = {}
    for sample in read_samples(data):
        one_each.setdefault(sample.video, sample)
    rows = []
    for sample, prompt in student.prompts(list(one_each.values())):
        row = measure(student.policy, teacher, sample, prompt, arguments.rollouts, arguments.sketch)
        rows.append(row)
        print(sample.id, json.dumps(row), file=sys.stderr, flush=True)
    record = {
        "command": sys.argv,
        "machine": machine(),
        "rollouts": arguments.rollouts,
        "group": GROUP,
        "prompts": rows,
    }
    print(table(rows))
    write_result("gradient_variance", record)


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--out", required=True, help="folder for the generated videos")
    options.add_argument("--prompts", type=int, default=8)
    options.add_argument("--rollouts", type=int, default=128, help="a prompt; a multiple of 8")
    options.add_argument("--sketch", type=int, default=4096)
    arguments = options.parse_args()
    if arguments.rollouts % GROUP or arguments.rollouts < 4 * GROUP:
        options.error("--rollouts must be a multiple of 8, at least 32")
    return arguments


def measure(
    policy: Any, teacher: LocalTeacher, sample: Sample, prompt: EncodedPrompt, count: int, size: int
) -> dict[str, Any]:
    """The figures of one prompt, by estimator."""
    seeds = [[derive_seed(0, "variance", sample.id, i) for i in range(count)]]
    (rollouts,) = policy.sample([prompt], n=count, max_new_tokens=16, seeds=seeds)
    responses = [[rollout.token_ids for rollout in rollouts]]
    scored_by_teacher = teacher.logprobs([prompt], responses, full=True)
    own = policy.logprobs([prompt], responses, full=True)
    assert scored_by_teacher.full_BTV is not None and own.full_BTV is not None
    mask_BT = own.mask_BT
    r_BT = sampled_reverse_kl(scored_by_teacher.logprobs_BT, own.logprobs_BT)
    rewards = [checked_reward(IoUReward(), sample, rollout.text) for rollout in rollouts]
    group_B = group_advantages(torch.tensor(rewards), GROUP, True)
    scores_BTS = token_gradients(policy, prompt, rollouts, size)  # ∇log π_t, sketched
    advantages = {
        "video-opd": r_BT,
        "video-opd, baseline kl": r_BT - kl_baseline(own.full_BTV, scored_by_teacher.full_BTV),
        "grpo": group_B[:, None].expand_as(r_BT),
    }
    found = {
        name: decompose(torch.where(mask_BT, a_BT, 0.0)[..., None] * scores_BTS, name == "grpo")
        for name, a_BT in advantages.items()
    }
    lengths = mask_BT.sum(1).float()
    return {
        "id": sample.id,
        "tokens": float(lengths.mean()),
        "reward_std": float(torch.tensor(rewards).std()),
        "estimators": found,
    }


def token_gradients(policy: Any, prompt: EncodedPrompt, rollouts: Any, size: int) -> torch.Tensor:
    """Sketches [B, T, size] of the gradient of each token's log-probability, 0 in the padding."""
    parameters = [p.requires_grad_(True) for p in policy.model.parameters()]
    total = sum(p.numel() for p in parameters)
    g = torch.Generator().manual_seed(1)
    bucket = torch.randint(size, (total,), generator=g)
    sign = torch.randint(2, (total,), generator=g).float() * 2 - 1
    longest = max(len(rollout.token_ids) for rollout in rollouts)
    result = torch.zeros(len(rollouts), longest, size)
    for start in range(0, len(rollouts), GROUP):
        piece = rollouts[start : start + GROUP]
        scored = policy.logprobs([prompt], [[rollout.token_ids for rollout in piece]], grad=True)
        for b, rollout in enumerate(piece):
            for t in range(len(rollout.token_ids)):
                grads = torch.autograd.grad(
                    scored.logprobs_BT[b, t], parameters, retain_graph=True, allow_unused=True
                )
                flat = torch.cat(
                    [
                        (torch.zeros_like(p) if x is None else x).flatten()
                        for p, x in zip(parameters, grads, strict=True)
                    ]
                )
                result[start + b, t].index_add_(0, bucket, flat * sign)
    return result


def decompose(g_BTS: torch.Tensor, grouped: bool) -> dict[str, float]:
    """eq 10 over rollouts, and the noise of the mean of eight relative to the signal."""
    g_BTS = g_BTS.double()
    count = len(g_BTS)
    centred = g_BTS - g_BTS.mean(0)
    tokens = float((centred**2).sum() / (count - 1))  # Σ_t tr Var(g_t)
    whole = g_BTS.sum(1)
    total = float(((whole - whole.mean(0)) ** 2).sum() / (count - 1))  # tr Var(Σ_t g_t)
    # GRPO's advantages tie a group together, so its mean is the unit; Video-OPD's rollouts are independent.
    means = whole.view(-1, GROUP, whole.shape[-1]).mean(1)
    of_mean = float(((means - means.mean(0)) ** 2).sum() / (len(means) - 1)) if grouped else total / GROUP
    signal = float((whole.mean(0) ** 2).sum()) - of_mean * GROUP / count  # unbiased
    return {
        "variance": total,
        "variance_of_tokens": tokens,
        "covariance_share": (total - tokens) / total,
        "noise_of_mean": of_mean,
        "signal": signal,
        "noise_to_signal": of_mean / signal if signal > 0 else float("inf"),
    }


def table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["estimators"])
    lines = [
        "| estimator | noise / signal, 8 rollouts: median [min, max] | share of Var(G) from covariances |",
        "|---|---|---|",
    ]
    for name in names:
        noise = [row["estimators"][name]["noise_to_signal"] for row in rows]
        share = [row["estimators"][name]["covariance_share"] for row in rows]
        lines.append(
            f"| {name} | {statistics.median(noise):.2f} [{min(noise):.2f}, {max(noise):.2f}] "
            f"| {statistics.median(share):.0%} [{min(share):.0%}, {max(share):.0%}] |"
        )
    ratio = [
        row["estimators"]["grpo"]["noise_to_signal"] / row["estimators"]["video-opd"]["noise_to_signal"]
        for row in rows
    ]
    lines.append(f"\nGRPO's noise / signal over Video-OPD's: median {statistics.median(ratio):.1f}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
