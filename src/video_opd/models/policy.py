"""The policy around a Qwen3-VL model on Hugging Face: prefill, sample, log-probabilities.

Shapes: ``B`` rows (responses), ``R`` and ``T`` response tokens, ``D`` hidden size, ``V`` vocabulary,
``N`` response tokens of all rows together.

Two engines give the same numbers:

- ``prefix`` prefills each prompt once and puts all of its responses on top of the key/value cache, side by
  side. Tokens that prompts on one video share are prefilled once for all of them.
- ``plain`` is the stock forward that ``prefix`` is tested against: one ordinary call of the model over prompt
  and response. The model numbers the positions itself, and every row has its own copy of the video.

Both engines apply ``lm_head`` only at positions that predict a response token.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from video_opd.errors import UserError
from video_opd.models.captured_decoding import WORTH_RECORDING, CapturedDecoder, can_capture
from video_opd.models.decoding import Decoder, PlainDecoder, PrefixDecoder, decode
from video_opd.models.forward_passes import ForwardPasses
from video_opd.models.head import ResponseHead
from video_opd.models.interfaces import Responses
from video_opd.models.modes import call_through, computing_in, evaluating
from video_opd.models.prefix import Prefix, prompts_of
from video_opd.models.prompt_batch import pad_responses, scattered
from video_opd.models.sampling import SamplingSettings, rollout_uniforms, seeds_of_rollouts
from video_opd.models.vocabulary import Vocabulary
from video_opd.types import EncodedPrompt, Rollout, TokenLogprobs

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration, Qwen3VLProcessor

logger = logging.getLogger(__name__)


class HFPolicy:
    """:class:`~video_opd.models.interfaces.Policy` around a ``Qwen3VLForConditionalGeneration``.

    ``model`` is the bare module. ``forward_module`` is the wrapper that the training loop put around it (DDP,
    FSDP), if any: forwards with gradients are called through it. ``compute_dtype`` autocasts the transformer,
    for float32 master weights; ``lm_head`` and log-probabilities are computed in float32 in any case.

    With ``recompute``, each decoder layer keeps only its input, keys and values for the backward, which runs
    the layer again; without it, everything that the backward needs is kept. It concerns the language model of
    the ``prefix`` engine. The vision tower and the ``plain`` engine have transformers' own gradient
    checkpointing.

    ``vocabulary`` is the student's, for a teacher: log-probabilities are then renormalised over the tokens
    that the student can write, though the teacher may know more. Without it, it is the model's own.
    """

    def __init__(
        self,
        model: Qwen3VLForConditionalGeneration,
        processor: Qwen3VLProcessor,
        engine: Literal["prefix", "plain"] = "prefix",
        *,
        compute_dtype: torch.dtype | None = None,
        forward_module: nn.Module | None = None,
        recompute: bool = False,
        vocabulary: Vocabulary | None = None,
    ) -> None:
        if engine not in ("prefix", "plain"):
            raise ValueError(f"engine is {engine!r}; it must be 'prefix' or 'plain'")
        self.model = model
        self.processor = processor
        self.engine = engine
        self.compute_dtype = compute_dtype
        self.forward_module = forward_module
        self.recompute = recompute
        self.vocabulary = vocabulary or Vocabulary.of(model, processor)
        self.head = ResponseHead(model.lm_head, self.vocabulary)
        self.passes = ForwardPasses(model, self.vocabulary.pad_id, compute_dtype)
        self._warned_of_concatenation = False

    @property
    def device(self) -> torch.device:
        return self.passes.device

    def prefill(self, prompts: Sequence[EncodedPrompt], *, grad: bool = False) -> Prefix:
        """Prefill each prompt once, and tokens that prompts on one video share once for all of them.

        With ``grad`` the prefill records its graph: :meth:`sample` can use the prefix, and then one
        :meth:`logprobs` with ``grad`` is differentiated through it. The graph stays in memory until then. The
        prefill is not called through ``forward_module``, because DDP expects one forward for each backward.
        """
        with self._state(grad):
            return next(self.passes.prefill_chunks(prompts, len(prompts)))

    def prefill_chunks(self, prompts: Sequence[EncodedPrompt], size: int) -> Iterator[Prefix]:
        """Yields the prefix of ``size`` prompts at a time, for more prompts than memory can hold.

        Tokens that prompts share (the video) are prefilled once for all chunks.
        """
        prefixes = self.passes.prefill_chunks(prompts, size)
        while True:
            with self._state(grad=False):  # left before the caller has its turn
                prefix = next(prefixes, None)
            if prefix is None:
                return
            yield prefix

    def sample(
        self,
        prompts: Sequence[EncodedPrompt] | Prefix,
        *,
        n: int = 1,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_p: float = 1.0,
        top_k: int = 0,
        seeds: Sequence[Sequence[int]] | None = None,
    ) -> list[list[Rollout]]:
        """``n`` rollouts of each prompt from one prefill, as :meth:`Policy.sample` describes.

        Raises ``ValueError`` if a setting is out of range or the seeds have the wrong shape.
        """
        settings = SamplingSettings(temperature=temperature, top_p=top_p, top_k=top_k)
        if n < 1 or max_new_tokens < 1:
            raise ValueError(f"n is {n}, max_new_tokens is {max_new_tokens}; both must be at least 1")
        count = len(prompts)
        uniforms_BT = None
        if not settings.greedy:
            flat = [seed for row in seeds_of_rollouts(seeds, count, n) for seed in row]
            uniforms_BT = torch.from_numpy(rollout_uniforms(flat, max_new_tokens)).to(self.device)
        with self._state(grad=False):
            decoder = self._decoder(prompts, n, max_new_tokens)
            rows = decode(decoder, self.head, settings, max_new_tokens, uniforms_BT)
        rollouts = [self._rollout(ids, logprobs) for ids, logprobs in rows]
        return [rollouts[i * n : (i + 1) * n] for i in range(count)]

    def logprobs(
        self,
        prompts: Sequence[EncodedPrompt] | Prefix,
        responses: Responses,
        *,
        grad: bool = False,
        full: bool = False,
        temperature: float = 1.0,
    ) -> TokenLogprobs:
        """Log-probabilities of ``responses``, as :meth:`Policy.logprobs` describes.

        Top-p and top-k have no counterpart here, because the ratio of an update to a filtered distribution is
        not defined outside the filter. With ``grad``, the forward goes through ``forward_module``, and
        gradients flow through the prompt too, once. The first backward uses up the graph of a prefix.

        Raises :class:`UserError` for a response with a token that no policy can write.
        """
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; log-probabilities need more than 0")
        if grad and isinstance(prompts, Prefix) and not prompts.grad:
            raise ValueError(
                "this prefix was prefilled without gradients; prefill the prompts with grad=True"
            )
        assert len(prompts) == len(responses) and all(responses), "one or several responses for each prompt"
        self._check_writable(prompts_of(prompts), responses)
        repeats = [len(group) for group in responses]
        ids_BR, mask_BR = pad_responses(
            [tokens for group in responses for tokens in group],
            pad_id=self.vocabulary.pad_id,
            device=self.device,
        )

        def compute() -> tuple[torch.Tensor, torch.Tensor | None]:
            hidden_ND = self._hidden(prompts, repeats, ids_BR, mask_BR, grad)
            return self.head.score(hidden_ND, ids_BR[mask_BR], temperature=temperature, full=full)

        with self._state(grad):
            if grad and self.forward_module is not None:
                logprobs_N, full_NV = call_through(self.forward_module, self.model, compute)
            else:
                logprobs_N, full_NV = compute()
        return TokenLogprobs(
            logprobs_BT=scattered(logprobs_N, mask_BR),
            mask_BT=mask_BR,
            full_BTV=None if full_NV is None else scattered(full_NV, mask_BR),
        )

    def hidden_states(
        self, prompts: Sequence[EncodedPrompt] | Prefix, responses: Responses
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(what ``lm_head`` is applied to at each token of ``responses`` [B, R, D], which of these there are
        [B, R]), without gradients: :meth:`ResponseHead.score` makes log-probs of it."""
        self._check_writable(prompts_of(prompts), responses)
        repeats = [len(group) for group in responses]
        flat = [tokens for group in responses for tokens in group]
        ids_BR, mask_BR = pad_responses(flat, pad_id=self.vocabulary.pad_id, device=self.device)
        with self._state(grad=False):
            return scattered(self._hidden(prompts, repeats, ids_BR, mask_BR, False), mask_BR), mask_BR

    def _hidden(
        self,
        prompts: Sequence[EncodedPrompt] | Prefix,
        repeats: Sequence[int],
        ids_BR: torch.Tensor,
        mask_BR: torch.Tensor,
        grad: bool,
    ) -> torch.Tensor:
        """What predicts each response token, [N, D]."""
        if self._uses_cache(grad):
            hidden_BRD = self.passes.on_prefix(self.passes.prefix_of(prompts), repeats, ids_BR, mask_BR)
        else:
            batch = self.passes.batch(prompts_of(prompts)).repeated(repeats)
            share_videos = self.engine == "prefix"
            read = self.passes.concatenated(batch, ids_BR, mask_BR, share_videos=share_videos)
            hidden_BRD = read[:, :-1]
        return hidden_BRD[mask_BR]

    def _decoder(self, prompts: Sequence[EncodedPrompt] | Prefix, n: int, tokens: int) -> Decoder:
        """For responses of at most ``tokens`` tokens."""
        if self.engine == "plain":
            return PlainDecoder(self.passes, prompts_of(prompts), n)
        prefix = self.passes.prefix_of(prompts)
        capture = self.passes.capture and self.passes.side_by_side and tokens >= WORTH_RECORDING
        if capture and can_capture(self.model):
            return CapturedDecoder(self.passes, prefix, n)
        return PrefixDecoder(self.passes, prefix, n)

    def _rollout(self, ids: list[int], logprobs: list[float]) -> Rollout:
        return Rollout(
            token_ids=tuple(ids),
            logprobs=tuple(logprobs),
            text=self.processor.tokenizer.decode(ids, skip_special_tokens=True),
            truncated=ids[-1] not in self.vocabulary.eos_ids,
        )

    def _state(self, grad: bool) -> ExitStack:
        """Gradients on or off. Without them the model is in evaluation mode; with them it stays in the mode
        that the caller chose."""
        stack = ExitStack()
        stack.enter_context(torch.set_grad_enabled(grad))
        if not grad:
            stack.enter_context(evaluating(self.model))
        elif self.recompute:
            from video_opd.models.recompute import recomputing

            stack.enter_context(recomputing(self.model.model.language_model.layers))
        stack.enter_context(computing_in(self.compute_dtype, self.device))
        return stack

    def _uses_cache(self, grad: bool) -> bool:
        """Whether responses go on top of a prefix. transformers' gradient checkpointing rules that out."""
        if self.engine == "plain":
            return False
        layers = self.model.model.language_model.layers
        if not (grad and any(layer.gradient_checkpointing and layer.training for layer in layers)):
            return True
        if not self._warned_of_concatenation:
            logger.warning(
                "gradient checkpointing drops the key/value cache: updates run the prompt once per response"
            )
            self._warned_of_concatenation = True
        return False

    def _check_writable(self, prompts: Sequence[EncodedPrompt], responses: Responses) -> None:
        for prompt, group in zip(prompts, responses, strict=True):
            for tokens in group:
                if (bad := self.vocabulary.first_unwritable(tokens)) is not None:
                    raise UserError(
                        f"sample {prompt.sample_id!r}: token {bad} of a response is a vision placeholder or "
                        "not in the tokenizer; no policy can write it"
                    )
