"""Teachers: frozen models that score the student's responses token by token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Literal

import torch

from video_opd.errors import UserError
from video_opd.models.interfaces import CollectiveTeacher, Responses, Teacher
from video_opd.models.lora import adapter_on, adapters_off, trained_in_full
from video_opd.models.policy import HFPolicy
from video_opd.types import EncodedPrompt, TokenLogprobs

Nonfinite = Literal["raise", "mask"]


class LocalTeacher:
    """:class:`~video_opd.models.interfaces.Teacher` in this process.

    It is given the same :class:`EncodedPrompt` objects as the student. Creating it freezes the weights of
    ``policy``. The ``prefix`` engine prefills each prompt once, however many responses are scored.

    ``nonfinite`` decides about scores that are not finite: ``"raise"`` raises :class:`UserError` naming the
    sample, ``"mask"`` removes their tokens from the mask.
    """

    def __init__(self, policy: HFPolicy, *, nonfinite: Nonfinite = "raise") -> None:
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
        """As :meth:`Teacher.logprobs`."""
        scores = self.policy.logprobs(prompts, responses, full=full, temperature=temperature)
        return finite_scores(scores, prompts, responses, self.nonfinite)


class AdaptersOffReference:
    """The reference of a student that trains only adapters: the student with its adapters switched off.

    A :class:`~video_opd.models.interfaces.Teacher` that needs no memory of its own.
    """

    def __init__(self, policy: HFPolicy, *, nonfinite: Nonfinite = "raise") -> None:
        assert not trained_in_full(policy.model), "weights that are trained in full cannot be switched off"
        self.policy, self.nonfinite = policy, nonfinite

    def _put_on(self) -> AbstractContextManager[None]:
        """The student's model is this teacher inside."""
        return adapters_off(self.policy.model)

    def logprobs(
        self,
        prompts: Sequence[EncodedPrompt],
        responses: Responses,
        *,
        full: bool = False,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """As :meth:`Teacher.logprobs`."""
        with self._put_on():
            scores = self.policy.logprobs(prompts, responses, full=full, temperature=temperature)
        return finite_scores(scores, prompts, responses, self.nonfinite)


class AdapterTeacher(AdaptersOffReference):
    """A teacher that is an adapter on the student's own base: one set of base weights serves both.

    ``policy`` runs the student's model, to which :func:`~video_opd.models.lora.add_frozen_adapter` added
    ``adapter``.
    """

    def __init__(self, policy: HFPolicy, adapter: str, *, nonfinite: Nonfinite = "raise") -> None:
        super().__init__(policy, nonfinite=nonfinite)
        self.adapter = adapter

    def _put_on(self) -> AbstractContextManager[None]:
        """The student's own adapter is off inside."""
        return adapter_on(self.policy.model, self.adapter)


class RoutedTeacher:
    """Several teachers, each for some of the samples (``teacher.by_source``).

    ``route`` gives the name of a prompt's teacher. The prompts of one teacher are scored together; the result
    keeps the order of ``prompts``. A teacher that processes hold together is asked in each call, by all.
    """

    def __init__(self, teachers: Mapping[str, Teacher], route: Callable[[EncodedPrompt], str]) -> None:
        self.teachers, self.route = teachers, route

    def logprobs(
        self,
        prompts: Sequence[EncodedPrompt],
        responses: Responses,
        *,
        full: bool = False,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """As :meth:`Teacher.logprobs`, each row by the teacher of its prompt."""
        mine: dict[str, list[int]] = {}
        for i, prompt in enumerate(prompts):
            mine.setdefault(self.route(prompt), []).append(i)
        scored, order = [], []  # the prompts in the order in which they were scored
        for name, teacher in self.teachers.items():
            if group := mine.get(name):
                order += group
                scored.append(
                    teacher.logprobs(
                        [prompts[i] for i in group],
                        [responses[i] for i in group],
                        full=full,
                        temperature=temperature,
                    )
                )
            elif isinstance(teacher, CollectiveTeacher):
                teacher.attend()
        starts, row = {}, 0
        for i in order:
            starts[i], row = row, row + len(responses[i])
        rows = torch.tensor([starts[i] + j for i in range(len(prompts)) for j in range(len(responses[i]))])
        whole = join_logprobs(scored)
        rows = rows.to(whole.mask_BT.device)
        return TokenLogprobs(
            logprobs_BT=whole.logprobs_BT[rows],
            mask_BT=whole.mask_BT[rows],
            full_BTV=None if whole.full_BTV is None else whole.full_BTV[rows],
        )

    def attend(self) -> None:
        """As :meth:`CollectiveTeacher.attend`, of those that processes hold together."""
        for teacher in self.teachers.values():
            if isinstance(teacher, CollectiveTeacher):
                teacher.attend()


def finite_scores(
    scores: TokenLogprobs,
    prompts: Sequence[EncodedPrompt],
    responses: Responses,
    nonfinite: Nonfinite,
) -> TokenLogprobs:
    """The scores, if they are finite; else what ``nonfinite`` says (:class:`LocalTeacher`)."""
    finite_BT = scores.logprobs_BT.isfinite()
    if scores.full_BTV is not None:
        finite_BT = finite_BT & scores.full_BTV.isfinite().all(-1)
    if bool(finite_BT.all()):
        return scores
    if nonfinite == "raise":
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


def join_logprobs(pieces: Sequence[TokenLogprobs]) -> TokenLogprobs:
    """The rows of all ``pieces`` in one, padded to the longest response."""
    longest = max(piece.mask_BT.shape[1] for piece in pieces)

    def join(name: str) -> torch.Tensor:
        padded = []
        for piece in pieces:
            x = getattr(piece, name)
            shape = (x.shape[0], longest - x.shape[1], *x.shape[2:])
            padded.append(torch.cat([x, x.new_zeros(shape)], dim=1))
        return torch.cat(padded)

    return TokenLogprobs(
        logprobs_BT=join("logprobs_BT"),
        mask_BT=join("mask_BT"),
        full_BTV=None if pieces[0].full_BTV is None else join("full_BTV"),
    )
