"""How noisy are the gradients of Video-OPD's estimators and of GRPO, at equal rollouts? Appendix A, measured.

For every prompt, ``B`` responses are sampled from the student, and the gradient of log π(a_t|s_t) with
respect to all weights is taken for every single token. With the methods' advantages A_t they give

    g_t = A_t ∇log π_t,    G = Σ_t g_t,    Var(G) = Σ_t Var(g_t) + 2 Σ_{t<t'} Cov(g_t, g_t')      (eq 10)

(traces of covariances, over rollouts of the same prompt). The estimator full has the gradient of the whole
reverse KL at each state as its g_t. Scales differ between methods, and an optimiser such as Adam does not see
them, so noise is compared relative to the signal: tr Var of the mean over eight rollouts (GRPO's group),
divided by the squared norm of the expected gradient. Eight rollouts are one group of GRPO, or eight
independent ones of Video-OPD.

Gradients are kept as count sketches (each weight is added to one of ``S`` sums with a random sign): inner
products are preserved on average, and the error of a trace is about 1/sqrt(S) of it.

Shapes: ``B`` rollouts of a prompt, ``T`` tokens of the longest, ``S`` sums of a sketch.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from video_opd.algorithms.rewards import IoUReward, checked_reward
from video_opd.algorithms.signals import group_advantages, kl_baseline, sampled_reverse_kl
from video_opd.data.annotations import read_samples
from video_opd.files import write_text
from video_opd.models.inference import load_inference_model, read_inference_config
from video_opd.models.teachers import LocalTeacher
from video_opd.progress import track
from video_opd.reproduce.places import BASE, TEACHER
from video_opd.seeds import derive_seed
from video_opd.types import EncodedPrompt, Sample
from video_opd.world.shipped import shipped

GROUP = 8
SKETCH = 4096
MAX_NEW_TOKENS = 16
SAMPLED, BASELINE, FULL, GRPO = "video-opd", "video-opd-baseline", "video-opd-full", "grpo"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m video_opd.reproduce.gradient_noise")
    parser.add_argument("--data", required=True, help="a data file; one row of each video is asked")
    parser.add_argument("--out", required=True, help="the JSON file to write")
    parser.add_argument("--rollouts", type=int, default=64, help="of a prompt; a multiple of 8, at least 32")
    arguments = parser.parse_args(argv)
    if arguments.rollouts % GROUP or arguments.rollouts < 4 * GROUP:
        parser.error("--rollouts must be a multiple of 8, at least 32")
    torch.manual_seed(0)
    folder = Path(arguments.out).parent
    config = read_inference_config(str(shipped(BASE)), [])
    student = load_inference_model(config, cache_dir=folder / "clips")
    teacher = LocalTeacher(load_inference_model(read_inference_config(str(shipped(TEACHER)), [])).policy)
    one_each: dict[Path, Sample] = {}
    for sample in read_samples(arguments.data):
        one_each.setdefault(sample.video, sample)
    asked = track(student.prompts(list(one_each.values())), "gradients", len(one_each))
    rows = [measure_prompt(student.policy, teacher, s, prompt, arguments.rollouts) for s, prompt in asked]
    write_text(Path(arguments.out), json.dumps({"rollouts": arguments.rollouts, "prompts": rows}) + "\n")


def measure_prompt(
    policy: Any, teacher: LocalTeacher, sample: Sample, prompt: EncodedPrompt, count: int, size: int = SKETCH
) -> dict[str, Any]:
    """The figures of one prompt, by estimator."""
    seeds = [[derive_seed(0, "variance", sample.id, i) for i in range(count)]]
    (rollouts,) = policy.sample([prompt], n=count, max_new_tokens=MAX_NEW_TOKENS, seeds=seeds)
    responses = [[rollout.token_ids for rollout in rollouts]]
    by_teacher = teacher.logprobs([prompt], responses, full=True)
    own = policy.logprobs([prompt], responses, full=True)
    assert by_teacher.full_BTV is not None and own.full_BTV is not None
    r_BT = sampled_reverse_kl(by_teacher.logprobs_BT, own.logprobs_BT)
    rewards = [checked_reward(IoUReward(), sample, rollout.text) for rollout in rollouts]
    group_B = group_advantages(torch.tensor(rewards), GROUP, True)
    scores_BTS, kl_BTS = token_gradients(policy, prompt, responses[0], by_teacher.full_BTV, size)
    advantages = {
        SAMPLED: r_BT,
        BASELINE: r_BT - kl_baseline(own.full_BTV, by_teacher.full_BTV),
        GRPO: group_B[:, None].expand_as(r_BT),
    }
    gradients = {
        name: torch.where(own.mask_BT, a_BT, 0.0)[..., None] * scores_BTS for name, a_BT in advantages.items()
    }
    gradients[FULL] = -kl_BTS
    return {
        "id": sample.id,
        "tokens": float(own.mask_BT.sum(1).float().mean()),
        "reward_std": float(torch.tensor(rewards).std()),
        "estimators": {name: decompose(g_BTS, name == GRPO) for name, g_BTS in gradients.items()},
    }


def token_gradients(
    policy: Any, prompt: EncodedPrompt, responses: list[Any], teacher_BTV: torch.Tensor, size: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sketches [B, T, S] of each token's ∇log π_t, and of ∇KL(π ‖ π_tea) at its state; 0 in the padding."""
    parameters = [p.requires_grad_(True) for p in policy.model.parameters()]
    total = sum(p.numel() for p in parameters)
    g = torch.Generator().manual_seed(1)
    bucket = torch.randint(size, (total,), generator=g)
    sign = torch.randint(2, (total,), generator=g).float() * 2 - 1

    def sketch(value: torch.Tensor) -> torch.Tensor:
        grads = torch.autograd.grad(value, parameters, retain_graph=True, allow_unused=True)
        flat = [
            (torch.zeros_like(p) if x is None else x).flatten()
            for p, x in zip(parameters, grads, strict=True)
        ]
        return torch.zeros(size).index_add_(0, bucket, torch.cat(flat) * sign)

    longest = max(map(len, responses))
    scores_BTS, kl_BTS = torch.zeros(2, len(responses), longest, size)
    for start in range(0, len(responses), GROUP):
        piece = responses[start : start + GROUP]
        scored = policy.logprobs([prompt], [piece], grad=True, full=True)
        own_BTV = scored.full_BTV
        width = own_BTV.shape[1]
        kl_BT = (own_BTV.exp() * (own_BTV - teacher_BTV[start : start + GROUP, :width])).sum(-1)
        for b, t in _places(piece):
            scores_BTS[start + b, t] = sketch(scored.logprobs_BT[b, t])
            kl_BTS[start + b, t] = sketch(kl_BT[b, t])
    return scores_BTS, kl_BTS


def _places(responses: list[Any]) -> Iterator[tuple[int, int]]:
    return ((b, t) for b, response in enumerate(responses) for t in range(len(response)))


def decompose(g_BTS: torch.Tensor, grouped: bool) -> dict[str, float | None]:
    """eq 10 over rollouts, and the noise of the mean of eight relative to the signal.

    ``covariance_share`` is None if there is no variance (GRPO gives equal rewards no advantage), and
    ``noise_to_signal`` is None if the estimate of the signal is not above 0.
    """
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
        "covariance_share": (total - tokens) / total if total > 0 else None,
        "noise_of_mean": of_mean,
        "signal": signal,
        "noise_to_signal": of_mean / signal if signal > 0 else None,
    }


if __name__ == "__main__":
    main()
