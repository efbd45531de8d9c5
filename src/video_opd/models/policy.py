"""A Qwen3-VL policy on Hugging Face: prefill, sample, log-probabilities.

Shapes: ``B`` rows (responses), ``P`` prompt tokens, ``R`` and ``T`` response tokens, ``D`` hidden size,
``V`` vocabulary, ``N`` response tokens of all rows together.

Two engines that give the same numbers:

- ``prefix`` reads each prompt once and puts all responses on top of its key/value cache, side by side; what
  prompts on one video begin with, the video, is read once for all of them.
- ``plain`` is the reference: prompt and response concatenated, one ordinary forward of the stock model, which
  finds its own positions and sees every row's video.

Only positions that predict a response token meet ``lm_head``, in either.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from video_opd.errors import UserError
from video_opd.models.head import ResponseHead
from video_opd.models.interfaces import Responses
from video_opd.models.modes import call_through, computing_in, evaluating
from video_opd.models.prefix import Prefix, copied, select_rows
from video_opd.models.prompt_batch import (
    PromptBatch,
    batch_prompts,
    encode_videos,
    pad_responses,
    repeated_pixels,
)
from video_opd.models.response_layout import ResponseLayout, for_attention, response_attention_mask
from video_opd.models.sampling import SamplingSettings, draw, rollout_uniforms, sampled_logprobs
from video_opd.models.sharing import find_trunks
from video_opd.models.vocabulary import Vocabulary
from video_opd.types import EncodedPrompt, Rollout, TokenLogprobs

if TYPE_CHECKING:
    from transformers import DynamicCache, Qwen3VLForConditionalGeneration, Qwen3VLProcessor

logger = logging.getLogger(__name__)


class HFPolicy:
    """:class:`~video_opd.models.interfaces.Policy` around a ``Qwen3VLForConditionalGeneration``.

    ``model`` is the bare module. ``forward_module`` is what the training loop wrapped around it (DDP, FSDP),
    if anything: forwards with gradients are called through it. ``compute_dtype`` autocasts the transformer,
    for float32 master weights; ``lm_head`` and log-probabilities are in float32 whatever the weights are.

    ``recompute``: of what gradients go through, each decoder layer keeps its input, keys and values, and is
    run again in the backward; otherwise all that the backward needs is kept. For the ``prefix`` engine; the
    vision tower and the ``plain`` engine have transformers' own gradient checkpointing for that.
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
    ) -> None:
        if engine not in ("prefix", "plain"):
            raise ValueError(f"engine is {engine!r}; it must be 'prefix' or 'plain'")
        self.model = model
        self.processor = processor
        self.engine = engine
        self.compute_dtype = compute_dtype
        self.forward_module = forward_module
        self.recompute = recompute
        self.vocabulary = Vocabulary.of(model, processor)
        self.head = ResponseHead(model.lm_head, self.vocabulary)
        self._said_concatenated = False

    @property
    def device(self) -> torch.device:
        return self.model.model.language_model.embed_tokens.weight.device

    # ------------------------------------------------------------------------------------------ the border

    def prefill(self, prompts: Sequence[EncodedPrompt], *, grad: bool = False) -> Prefix:
        """Read the prompts: a video, and what its prompts begin with, once; the rest once a prompt.

        With ``grad`` the reading is recorded: it serves :meth:`sample`, and then :meth:`logprobs` with
        ``grad``, which is differentiated through it. It holds the memory of its forward until then. It is
        not called through ``forward_module``: DDP watches the parameters, and wants one call a backward.
        """
        with self._state(grad):
            return next(self._prefills(prompts, len(prompts)))

    def prefill_chunks(self, prompts: Sequence[EncodedPrompt], size: int) -> Iterator[Prefix]:
        """:meth:`prefill` of ``size`` prompts at a time: for more of them than memory can hold.

        What prompts have in common (the video) is still read once for all parts.
        """
        parts = self._prefills(prompts, size)
        while True:
            with self._state(grad=False):  # never open while the caller has its turn
                part = next(parts, None)
            if part is None:
                return
            yield part

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
        """``n`` rollouts of each prompt, from one reading of it.

        ``seeds[i][j]`` (non-negative) is rollout j of prompt i: its draws depend on that number and on
        nothing else, so rollouts do not change with micro-batches, ranks or resumes. Greedy
        (``temperature=0``) needs none. The recorded log-probabilities are those of the distribution that was
        sampled, filters included; greedy ones are the model's at temperature 1.

        Raises ``ValueError`` for settings out of range or seeds of the wrong shape.
        """
        settings = SamplingSettings(temperature=temperature, top_p=top_p, top_k=top_k)
        if n < 1 or max_new_tokens < 1:
            raise ValueError(f"n is {n}, max_new_tokens is {max_new_tokens}; both must be at least 1")
        count = len(prompts)
        uniforms_BT = None
        if not settings.greedy:
            if seeds is None or len(seeds) != count or any(len(row) != n for row in seeds):
                raise ValueError(f"sampling needs seeds: {count} lists of {n} integers, one for each rollout")
            flat = [seed for row in seeds for seed in row]
            uniforms_BT = torch.from_numpy(rollout_uniforms(flat, max_new_tokens)).to(self.device)
        with self._state(grad=False):
            rollouts = self._decode(self._decoder(prompts, n), settings, max_new_tokens, uniforms_BT)
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
        """Log-probabilities of ``responses[i]``, the answers to prompt i, flattened prompt-major.

        ``full`` adds ``full_BTV``, in which tokens that cannot be written hold a large negative number (not
        -inf). ``temperature`` must be the one that was sampled at; top-p and top-k have no counterpart here,
        because the ratio of an update to a filtered distribution is not defined outside the filter.
        With ``grad``, gradients flow through the prompt too, once, and through ``forward_module``; a prefix
        that is given must then have been read with ``grad``. Its graph is used up by the first backward.

        Raises :class:`UserError` for a response with a token that no policy can write.
        """
        if not temperature > 0:
            raise ValueError(f"temperature is {temperature}; log-probabilities need more than 0")
        if grad and isinstance(prompts, Prefix) and not prompts.grad:
            raise ValueError("gradients go through the reading of prompts: this prefix was read without them")
        assert len(prompts) == len(responses) and all(responses), "one or several responses for each prompt"
        self._check_writable(_prompts_of(prompts), responses)
        repeats = [len(group) for group in responses]
        ids_BR, mask_BR = pad_responses(
            [tokens for group in responses for tokens in group],
            pad_id=self.vocabulary.pad_id,
            device=self.device,
        )

        def compute() -> tuple[torch.Tensor, torch.Tensor | None]:
            if self._reads_prompts_once(grad):
                hidden_BRD = self._on_prefix(self._read_once(prompts), repeats, ids_BR, mask_BR)
            else:
                batch = self._batch(_prompts_of(prompts)).repeated(repeats)
                hidden_BRD = self._concatenated(batch, ids_BR, mask_BR)[:, :-1]
            return self.head.score(hidden_BRD[mask_BR], ids_BR[mask_BR], temperature=temperature, full=full)

        with self._state(grad):
            if grad and self.forward_module is not None:
                picked_N, full_NV = call_through(self.forward_module, self.model, compute)
            else:
                picked_N, full_NV = compute()
        return TokenLogprobs(
            logprobs_BT=_scatter(picked_N, mask_BR),
            mask_BT=mask_BR,
            full_BTV=None if full_NV is None else _scatter(full_NV, mask_BR),
        )

    # ------------------------------------------------------------------------------------- the transformer

    def _prefills(self, prompts: Sequence[EncodedPrompt], size: int) -> Iterator[Prefix]:
        from transformers import DynamicCache

        batch, trunks = self._batch(prompts), find_trunks(prompts, self.model.config.video_token_id)
        shared = DynamicCache(config=self.model.config)
        if trunks is not None:
            trunk, branches = trunks.split(batch, prompts, self.vocabulary.pad_id)
            self._read(trunk, trunk.attention_mask_BP, shared)
        for rows in _slices(len(prompts), size):
            cache = copied(shared)
            if trunks is None:
                part = batch if len(rows) == len(prompts) else self._batch([prompts[row] for row in rows])
                mask_BP = part.attention_mask_BP
            else:
                part = branches.select(rows, self.vocabulary.pad_id)
                of_row = [trunks.of_prompt[row] for row in rows]
                select_rows(cache, of_row, len(trunks.lengths))
                mask_BP = torch.cat([trunk.attention_mask_BP[of_row], part.attention_mask_BP], dim=1)
            yield Prefix(
                prefilled_by=self.model,
                last_hidden_BD=self._read(part, mask_BP, cache),
                prompts=tuple(prompts[row] for row in rows),
                cache=cache,
                attention_mask_BP=mask_BP,
                next_position_B=part.next_position_B,
                grad=torch.is_grad_enabled(),
            )

    def _read(self, batch: PromptBatch, mask_BL: torch.Tensor, cache: DynamicCache) -> torch.Tensor:
        """Last hidden state [B, D] of ``batch`` on top of ``cache``; ``mask_BL`` covers both."""
        videos = encode_videos(self.model, batch)
        return self.model.model(
            input_ids=batch.input_ids_BP,
            attention_mask=mask_BL,
            position_ids=batch.position_ids_3BP,
            mm_encoder_outputs=None if videos is None else {"video": videos},
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, -1]

    def _read_once(self, prompts: Sequence[EncodedPrompt] | Prefix) -> Prefix:
        """The prefix that was given, or one of the prompts that were."""
        if not isinstance(prompts, Prefix):
            return next(self._prefills(prompts, len(prompts)))
        assert prompts.prefilled_by is self.model, "another model read this prefix"
        return prompts

    def _continue(
        self, prefix: Prefix, ids_BQ: torch.Tensor, mask: torch.Tensor, first: int, beside: int = 1
    ) -> torch.Tensor:
        """Hidden states [B, Q, D] of tokens number ``first`` onwards; writes to the prefix's cache.

        ``ids_BQ`` has ``beside`` answers to each prompt, step after step. ``mask`` is [B, L] over the prompt
        and one answer so far, or what :func:`response_attention_mask` makes.
        """
        steps_Q = torch.arange(ids_BQ.shape[1], device=ids_BQ.device) // beside + first
        positions_BQ = prefix.next_position_B[:, None] + steps_Q
        return self.model.model(
            input_ids=ids_BQ,
            attention_mask=mask,
            position_ids=positions_BQ.expand(3, -1, -1),  # text advances on all three axes together
            past_key_values=prefix.cache,
            use_cache=True,
        ).last_hidden_state

    def _on_prefix(
        self, prefix: Prefix, repeats: Sequence[int], ids_NR: torch.Tensor, mask_NR: torch.Tensor
    ) -> torch.Tensor:
        """[N, R, D] that predict each response token, each prompt read once; leaves ``prefix`` as it is."""
        from video_opd.models.kv_cache import read_only

        if max(repeats) > 1 and self._responses_side_by_side:
            return self._beside(
                replace(prefix, cache=read_only(prefix.cache)),
                ResponseLayout.of(repeats, self.device),
                ids_NR,
            )
        prefix = prefix.repeated(repeats)
        prefix = replace(prefix, cache=read_only(prefix.cache))
        first_N1D = prefix.last_hidden_BD[:, None]
        if ids_NR.shape[1] <= 1:
            return first_N1D[:, : ids_NR.shape[1]]
        # The last token of a row predicts nothing that is scored.
        mask_NL = torch.cat([prefix.attention_mask_BP, mask_NR[:, :-1].long()], dim=1)
        return torch.cat([first_N1D, self._continue(prefix, ids_NR[:, :-1], mask_NL, first=0)], dim=1)

    def _beside(self, prefix: Prefix, beside: ResponseLayout, ids_NR: torch.Tensor) -> torch.Tensor:
        """The same with all answers to a prompt in one row. Padding comes last and is seen by nobody else."""
        first_N1D = prefix.last_hidden_BD[beside.prompt_N][:, None]
        if ids_NR.shape[1] <= 1:
            return first_N1D[:, : ids_NR.shape[1]]
        ids_BQ = beside.laid_out(ids_NR[:, :-1], self.vocabulary.pad_id)
        mask = self._response_mask(prefix, beside.width, first=0, steps=ids_NR.shape[1] - 1)
        hidden_BQD = self._continue(prefix, ids_BQ, mask, first=0, beside=beside.width)
        return torch.cat([first_N1D, beside.picked(hidden_BQD)], dim=1)

    def _response_mask(self, prefix: Prefix, beside: int, first: int, steps: int) -> torch.Tensor:
        mask_B1QK = response_attention_mask(prefix.attention_mask_BP, beside, first, steps)
        dtype = prefix.last_hidden_BD.dtype if self.compute_dtype is None else self.compute_dtype
        return for_attention(mask_B1QK, self._attention, dtype)

    @property
    def _attention(self) -> str:
        return self.model.config.text_config._attn_implementation

    @property
    def _responses_side_by_side(self) -> bool:
        """Whether the attention takes a mask of ours; flash attention is given the prompt once an answer."""
        return self._attention in ("sdpa", "eager")

    def _concatenated(self, batch: PromptBatch, ids_BR: torch.Tensor, mask_BR: torch.Tensor) -> torch.Tensor:
        """[B, R + 1, D] that predict each response token and the one after, at the model's own positions."""
        pixels, grid = repeated_pixels(batch)
        vision: dict[str, Any] = {"pixel_values_videos": pixels}
        if (
            self.engine == "prefix" and pixels is not None
        ):  # gradient checkpointing; the videos are still shared
            vision = {"mm_encoder_outputs": {"video": encode_videos(self.model, batch)}}
        hidden_BLD = self.model.model(
            input_ids=torch.cat([batch.input_ids_BP, ids_BR], dim=1),
            attention_mask=torch.cat([batch.attention_mask_BP, mask_BR.long()], dim=1),
            mm_token_type_ids=torch.cat([batch.token_types_BP, torch.zeros_like(ids_BR)], dim=1),
            video_grid_thw=grid,
            use_cache=False,
            **vision,
        ).last_hidden_state
        return hidden_BLD[:, batch.input_ids_BP.shape[1] - 1 :]

    # ------------------------------------------------------------------------------------------ the tokens

    def _decoder(self, prompts: Sequence[EncodedPrompt] | Prefix, n: int) -> _Decoder:
        if self.engine == "plain":
            return _PlainDecoder(self, _prompts_of(prompts), n)
        return _PrefixDecoder(self, self._read_once(prompts), n)

    def _decode(
        self,
        decoder: _Decoder,
        settings: SamplingSettings,
        max_new_tokens: int,
        uniforms_BT: torch.Tensor | None,
    ) -> list[Rollout]:
        """Token by token until every row has ended or the limit is reached."""
        eos = torch.tensor(sorted(self.vocabulary.eos_ids), device=self.device)
        tokens, logprobs = [], []
        hidden_BD = decoder.first()
        finished_B = torch.zeros(len(hidden_BD), dtype=torch.bool, device=self.device)
        for t in range(max_new_tokens):
            logprobs_BV = sampled_logprobs(self.head.logits(hidden_BD), settings)
            token_B = logprobs_BV.argmax(-1) if uniforms_BT is None else draw(logprobs_BV, uniforms_BT[:, t])
            tokens.append(token_B)
            logprobs.append(logprobs_BV.gather(-1, token_B[:, None]).squeeze(-1))
            finished_B = finished_B | torch.isin(token_B, eos)
            if t + 1 == max_new_tokens or bool(finished_B.all()):
                break
            hidden_BD = decoder.step(token_B)
        tokens_BT, logprobs_BT = torch.stack(tokens, 1).tolist(), torch.stack(logprobs, 1).tolist()
        return [self._rollout(ids, values) for ids, values in zip(tokens_BT, logprobs_BT, strict=True)]

    def _rollout(self, ids: list[int], logprobs: list[float]) -> Rollout:
        """Cut one row after its first end-of-sequence token."""
        ends = [t for t, token in enumerate(ids) if token in self.vocabulary.eos_ids]
        length = ends[0] + 1 if ends else len(ids)
        return Rollout(
            token_ids=tuple(ids[:length]),
            logprobs=tuple(logprobs[:length]),
            text=self.processor.tokenizer.decode(ids[:length], skip_special_tokens=True),
            truncated=not ends,
        )

    # ----------------------------------------------------------------------------------------- small things

    def _batch(self, prompts: Sequence[EncodedPrompt]) -> PromptBatch:
        return batch_prompts(prompts, self.model, pad_id=self.vocabulary.pad_id, device=self.device)

    def _state(self, grad: bool) -> ExitStack:
        """Gradients on or off; without them in evaluation mode, with them in the mode the caller chose."""
        stack = ExitStack()
        stack.enter_context(torch.set_grad_enabled(grad))
        if not grad:
            stack.enter_context(evaluating(self.model))
        elif self.recompute:
            from video_opd.models.recompute import recomputing

            stack.enter_context(recomputing(self.model.model.language_model.layers))
        stack.enter_context(computing_in(self.compute_dtype, self.device))
        return stack

    def _reads_prompts_once(self, grad: bool) -> bool:
        if self.engine == "plain":
            return False
        layers = self.model.model.language_model.layers
        if not (grad and any(layer.gradient_checkpointing and layer.training for layer in layers)):
            return True
        if not self._said_concatenated:
            logger.warning(
                "gradient checkpointing drops the key/value cache: updates read the prompt per response"
            )
            self._said_concatenated = True
        return False

    def _check_writable(self, prompts: Sequence[EncodedPrompt], responses: Responses) -> None:
        for prompt, group in zip(prompts, responses, strict=True):
            for tokens in group:
                if (bad := self.vocabulary.first_unwritable(tokens)) is not None:
                    raise UserError(
                        f"sample {prompt.sample_id!r}: token {bad} of a response is a vision placeholder or "
                        "not in the tokenizer; no policy can write it"
                    )


class _Decoder:
    """The hidden state [B, D] that predicts the next token, for the first token and after each one."""

    def first(self) -> torch.Tensor:
        raise NotImplementedError

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError


class _PrefixDecoder(_Decoder):
    """One token of every answer at a time on top of the cache, which is the decoder's own."""

    def __init__(self, policy: HFPolicy, prefix: Prefix, n: int) -> None:
        from video_opd.models.kv_cache import grow_in_place

        self.policy = policy
        self.beside = n if policy._responses_side_by_side else 1
        self.prefix = prefix.repeated([n // self.beside] * len(prefix))
        grow_in_place(self.prefix.cache, self.beside)
        self.mask_BL, self.done = self.prefix.attention_mask_BP, 0

    def first(self) -> torch.Tensor:
        return self.prefix.last_hidden_BD.repeat_interleave(self.beside, 0)

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        if self.beside == 1:
            self.mask_BL = torch.cat([self.mask_BL, torch.ones_like(token_B)[:, None]], dim=1)
            mask = self.mask_BL
        else:
            mask = self.policy._response_mask(self.prefix, self.beside, self.done, 1)
        ids_BG = token_B.view(-1, self.beside)
        hidden_BGD = self.policy._continue(self.prefix, ids_BG, mask, self.done, self.beside)
        self.done += 1
        return hidden_BGD.flatten(0, 1)


class _PlainDecoder(_Decoder):
    """The whole sequence again for every token."""

    def __init__(self, policy: HFPolicy, prompts: Sequence[EncodedPrompt], n: int) -> None:
        self.policy = policy
        self.batch = policy._batch(prompts).repeated([n] * len(prompts))
        self.ids_BR = self.batch.input_ids_BP[:, :0]

    def first(self) -> torch.Tensor:
        mask_BR = torch.ones_like(self.ids_BR, dtype=torch.bool)
        return self.policy._concatenated(self.batch, self.ids_BR, mask_BR)[:, -1]

    def step(self, token_B: torch.Tensor) -> torch.Tensor:
        self.ids_BR = torch.cat([self.ids_BR, token_B[:, None]], dim=1)
        return self.first()


def _slices(count: int, size: int) -> list[list[int]]:
    return [list(range(start, min(start + size, count))) for start in range(0, count, size)]


def _prompts_of(prompts: Sequence[EncodedPrompt] | Prefix) -> Sequence[EncodedPrompt]:
    return prompts.prompts if isinstance(prompts, Prefix) else prompts


def _scatter(flat_N: torch.Tensor, mask_BR: torch.Tensor) -> torch.Tensor:
    """[N, ...] back to [B, R, ...], 0 where the mask is False."""
    padded = flat_N.new_zeros((*mask_BR.shape, *flat_N.shape[1:]))
    padded[mask_BR] = flat_N
    return padded
