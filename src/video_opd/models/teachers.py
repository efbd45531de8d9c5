"""A frozen model that scores the student's own answers, token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch

from video_opd.errors import UserError
from video_opd.models.policy import HFPolicy
from video_opd.models.protocols import Responses
from video_opd.types import EncodedPrompt, TokenLogprobs


class LocalTeacher:
    """:class:`~video_opd.models.protocols.Teacher` in this process.

    It is given the very :class:`EncodedPrompt` objects that the student was given. Its weights are frozen
    when it is made. With the ``prefix`` engine each prompt is read once, however many answers are scored.
    """

    def __init__(self, policy: HFPolicy, *, nonfinite: Literal["raise", "mask"] = "raise") -> None:
        if nonfinite not in ("raise", "mask"):
            raise ValueError(f"nonfinite is {nonfinite!r}; it must be 'raise' or 'mask'")
        self.policy = policy
        self.nonfinite = nonfinite
        policy.model.requires_grad_(False)
        policy.model.eval()

    def logprobs(
        self,
        prompts: Sequence[EncodedPrompt],
        responses: Responses,
        *,
        full: bool = False,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """Scores [B, R] of ``responses`` (as in :meth:`HFPolicy.logprobs`), finite wherever the mask is True.

        Raises :class:`UserError` naming the sample when a score is not finite; with ``nonfinite="mask"``
        those tokens are taken out of the mask instead.
        """
        scores = self.policy.logprobs(prompts, responses, full=full, temperature=temperature)
        finite_BT = scores.logprobs_BT.isfinite()
        if scores.full_BTV is not None:
            finite_BT = finite_BT & scores.full_BTV.isfinite().all(-1)
        if bool(finite_BT.all()):
            return scores
        if self.nonfinite == "raise":
            row, token = (~finite_BT).nonzero()[0].tolist()
            sample_ids = [p.sample_id for p, group in zip(prompts, responses, strict=True) for _ in group]
            raise UserError(
                f"sample {sample_ids[row]!r}: the teacher's log-probability of response token {token} is "
                f"{scores.logprobs_BT[row, token].item()}; check the teacher's weights and precision, or set "
                "nonfinite to 'mask'"
            )
        full_BTV = scores.full_BTV
        return TokenLogprobs(
            logprobs_BT=torch.where(finite_BT, scores.logprobs_BT, 0.0),
            mask_BT=scores.mask_BT & finite_BT,
            full_BTV=None if full_BTV is None else torch.where(finite_BT[..., None], full_BTV, 0.0),
        )
