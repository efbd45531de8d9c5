"""Video-OPD: on-policy distillation for temporal grounding (section 3.1, eqs 4–6).

Who samples: the student, one rollout for each prompt, at temperature 1 (eq 4). The teacher never writes a
token, and the annotation is not used.
Signal: r_t = log π_tea(a_t|s_t) − log π_old(a_t|s_t) for every token, without normalisation (eq 5).
Loss: −Σ_t sg(r_t) · π_θ(a_t|s_t) / π_old(a_t|s_t), mean over trajectories (eq 6).

Three options go beyond the paper. ``loss.estimator`` full or topk computes the reverse KL at each visited
state from the whole distributions instead of from the sampled token. ``loss.baseline`` kl subtracts the
expectation of r_t. ``teacher.reward_scale`` λ > 1 moves the student past the teacher, relative to the initial
student (G-OPD).
"""

from __future__ import annotations

import torch

from video_opd.algorithms.losses import reverse_kl_loss, topk_reverse_kl_loss
from video_opd.algorithms.method import Needs, Signal, Trajectories
from video_opd.algorithms.policy_gradient import policy_gradient_loss, teacher_rewards
from video_opd.algorithms.signals import kl_baseline
from video_opd.algorithms.trajectories import SampledTrajectories
from video_opd.config import OnPolicySamplingConfig, VideoOPDLossConfig
from video_opd.types import TokenLogprobs


class VideoOPD:
    def __init__(
        self,
        sampling: OnPolicySamplingConfig,
        settings: VideoOPDLossConfig | None = None,
        reward_scale: float = 1.0,
    ) -> None:
        self.trajectories = SampledTrajectories(sampling)
        self.settings, self.reward_scale = settings or VideoOPDLossConfig(), reward_scale
        self.needs = Needs(
            sampling=True,
            teacher=True,
            distributions=self.settings.estimator != "sampled" or self.settings.baseline == "kl",
            reference=reward_scale != 1,
        )

    def signal(self, batch: Trajectories) -> Signal:
        """eq 5. The analytic estimators have no advantage: r_t is then only a metric."""
        r_BT = teacher_rewards(batch, self.reward_scale)
        if self.settings.estimator != "sampled":
            return Signal(token_reward_BT=r_BT)
        advantage_BT = r_BT
        if self.settings.baseline == "kl":
            assert batch.old_full_BTV is not None, "the baseline needs the student's distributions"
            assert batch.teacher is not None and batch.teacher.full_BTV is not None, "and the teacher's"
            advantage_BT = r_BT - kl_baseline(batch.old_full_BTV, batch.teacher.full_BTV)
        return Signal(advantage_BT=advantage_BT, token_reward_BT=r_BT)

    def loss(
        self, student: TokenLogprobs, batch: Trajectories, signal: Signal, divisor: float
    ) -> torch.Tensor:
        """eq 6, or the analytic reverse KL at the visited states."""
        if signal.advantage_BT is not None:
            return policy_gradient_loss(student, batch, signal, divisor, self.settings.clip)
        assert student.full_BTV is not None, "an analytic estimator needs the student's distributions"
        assert batch.teacher is not None and batch.teacher.full_BTV is not None, "and the teacher's"
        arguments = student.full_BTV, batch.teacher.full_BTV, batch.mask_BT, divisor
        if self.settings.estimator == "topk":
            return topk_reverse_kl_loss(*arguments, self.settings.top_k)
        return reverse_kl_loss(*arguments)
