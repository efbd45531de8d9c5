"""The forward passes of a Qwen3-VL model on Hugging Face, from tokens and videos to hidden states.

Shapes: ``B`` prompts, ``N`` rows (responses), ``P`` prompt tokens, ``R`` response tokens, ``Q`` new tokens of
a row, ``L`` columns of the cache and the new tokens, ``D`` hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from video_opd.models.prefix import Prefix, copy_cache, select_rows
from video_opd.models.prompt_batch import PromptBatch, batch_prompts, encode_videos, repeated_pixels
from video_opd.models.response_layout import ResponseLayout, mask_for, response_attention_mask
from video_opd.models.sharing import find_trunks
from video_opd.types import EncodedPrompt

if TYPE_CHECKING:
    from transformers import DynamicCache, Qwen3VLForConditionalGeneration


class ForwardPasses:
    """``compute_dtype`` is the dtype of autocast; None computes in the weights' own precision. ``capture``:
    sampling may use CUDA graphs (:mod:`~video_opd.models.captured_decoding`), until one of them fails."""

    def __init__(
        self, model: Qwen3VLForConditionalGeneration, pad_id: int, compute_dtype: torch.dtype | None
    ) -> None:
        self.model, self.pad_id, self.compute_dtype = model, pad_id, compute_dtype
        self.capture = True

    @property
    def device(self) -> torch.device:
        return self.model.model.language_model.embed_tokens.weight.device

    @property
    def side_by_side(self) -> bool:
        """Whether all responses to a prompt share one row. Flash attention takes no mask for that: each
        response then has a copy of its prompt's keys and values."""
        return self._attention in ("sdpa", "eager")

    @property
    def _attention(self) -> str:
        return self.model.config.text_config._attn_implementation

    def batch(self, prompts: Sequence[EncodedPrompt]) -> PromptBatch:
        return batch_prompts(prompts, self.model, pad_id=self.pad_id, device=self.device)

    def prefix_of(self, prompts: Sequence[EncodedPrompt] | Prefix) -> Prefix:
        """``prompts`` itself if it is a prefix, otherwise the prefix of these prompts."""
        if not isinstance(prompts, Prefix):
            return next(self.prefill_chunks(prompts, len(prompts)))
        assert prompts.prefilled_by is self.model, "another model prefilled this prefix"
        return prompts

    def prefill_chunks(self, prompts: Sequence[EncodedPrompt], size: int) -> Iterator[Prefix]:
        """Yields the prefix of ``size`` prompts at a time; tokens that prompts share are prefilled once."""
        from transformers import DynamicCache

        batch, trunks = self.batch(prompts), find_trunks(prompts, self.model.config.video_token_id)
        shared = DynamicCache(config=self.model.config)
        if trunks is not None:
            trunk, branches = trunks.split(batch, prompts, self.pad_id)
            _, trunk_mask_BP = self._prefill_first(trunk, shared)
        for start in range(0, len(prompts), size):
            rows = list(range(start, min(start + size, len(prompts))))
            cache = copy_cache(shared)
            if trunks is None:
                chunk = batch if len(rows) == len(prompts) else self.batch([prompts[row] for row in rows])
                last_hidden_BD, mask_BP = self._prefill_first(chunk, cache)
            else:
                chunk = branches.select(rows, self.pad_id)
                trunk_of_row = [trunks.of_prompt[row] for row in rows]
                select_rows(cache, trunk_of_row, len(trunks.lengths))
                mask_BP = torch.cat([trunk_mask_BP[trunk_of_row], chunk.attention_mask_BP], dim=1)
                last_hidden_BD = self._prefill(chunk, mask_BP, cache)[:, -1]
            yield Prefix(
                prefilled_by=self.model,
                last_hidden_BD=last_hidden_BD,
                prompts=tuple(prompts[row] for row in rows),
                cache=cache,
                attention_mask_BP=mask_BP,
                next_position_B=chunk.next_position_B,
                grad=torch.is_grad_enabled(),
            )

    def _prefill_first(self, batch: PromptBatch, cache: DynamicCache) -> tuple[torch.Tensor, torch.Tensor]:
        """(last hidden state [B, D] of each row of ``batch``, mask [B, P] of the columns of ``cache``), which
        is empty before.

        With the padding at the end, the attention is plainly causal and takes no mask: a mask costs it twice
        the products, those of future tokens included, and the fast kernels of a GPU. Flash attention leaves
        padding out by itself, wherever it is.
        """
        if not self.side_by_side:
            return self._prefill(batch, batch.attention_mask_BP, cache)[:, -1], batch.attention_mask_BP
        batch = batch.padded_right()
        hidden_BPD = self._prefill(batch, None, cache)
        last_B = batch.attention_mask_BP.sum(1) - 1
        return hidden_BPD[torch.arange(len(last_B), device=last_B.device), last_B], batch.attention_mask_BP

    def _prefill(self, batch: PromptBatch, mask_BL: torch.Tensor | None, cache: DynamicCache) -> torch.Tensor:
        """Hidden states [B, P, D] of ``batch`` on top of ``cache``; ``mask_BL`` covers both, and without it
        the attention is causal."""
        videos = encode_videos(self.model, batch)
        return self.model.model(
            input_ids=batch.input_ids_BP,
            attention_mask=mask_BL,
            position_ids=batch.position_ids_3BP,
            mm_encoder_outputs=None if videos is None else {"video": videos},
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state

    def extend(
        self,
        prefix: Prefix,
        ids_BQ: torch.Tensor,
        mask: torch.Tensor,
        first: int | torch.Tensor,
        width: int = 1,
    ) -> torch.Tensor:
        """Hidden states [B, Q, D] of the response tokens from number ``first`` on. Writes to the cache of
        ``prefix``.

        ``ids_BQ`` holds ``width`` responses to each prompt, side by side. ``mask`` is [B, L] over the prompt
        and one response, or the result of :meth:`response_mask`.
        """
        steps_Q = torch.arange(ids_BQ.shape[1], device=ids_BQ.device) // width + first
        positions_BQ = prefix.next_position_B[:, None] + steps_Q
        return self.model.model(
            input_ids=ids_BQ,
            attention_mask=mask,
            position_ids=positions_BQ.expand(3, -1, -1),  # text advances on all three axes together
            past_key_values=prefix.cache,
            use_cache=True,
        ).last_hidden_state

    def response_mask(
        self, prefix: Prefix, width: int, first: int | torch.Tensor, steps: int, room: int | None = None
    ) -> torch.Tensor:
        """The attention mask for ``steps`` tokens, from number ``first`` on, of ``width`` responses, as
        :func:`response_attention_mask` describes it."""
        mask_B1QK = response_attention_mask(prefix.attention_mask_BP, width, first, steps, room)
        dtype = prefix.last_hidden_BD.dtype if self.compute_dtype is None else self.compute_dtype
        return mask_for(mask_B1QK, self._attention, dtype)

    def on_prefix(
        self, prefix: Prefix, repeats: Sequence[int], ids_NR: torch.Tensor, mask_NR: torch.Tensor
    ) -> torch.Tensor:
        """The hidden states [N, R, D] that predict each response token. ``prefix`` is left unchanged."""
        from video_opd.models.kv_cache import read_only

        if max(repeats) > 1 and self.side_by_side:
            layout = ResponseLayout.of(repeats, self.device)
            return self._on_prefix_side_by_side(
                replace(prefix, cache=read_only(prefix.cache)), layout, ids_NR
            )
        prefix = prefix.repeated(repeats)
        prefix = replace(prefix, cache=read_only(prefix.cache))
        first_N1D = prefix.last_hidden_BD[:, None]
        if ids_NR.shape[1] <= 1:
            return first_N1D[:, : ids_NR.shape[1]]
        # The last token of a row predicts nothing that is scored.
        mask_NL = torch.cat([prefix.attention_mask_BP, mask_NR[:, :-1].long()], dim=1)
        return torch.cat([first_N1D, self.extend(prefix, ids_NR[:, :-1], mask_NL, first=0)], dim=1)

    def _on_prefix_side_by_side(
        self, prefix: Prefix, layout: ResponseLayout, ids_NR: torch.Tensor
    ) -> torch.Tensor:
        """Padding is at the end of a response, so no token of the response attends to it."""
        first_N1D = prefix.last_hidden_BD[layout.prompt_N][:, None]
        if ids_NR.shape[1] <= 1:
            return first_N1D[:, : ids_NR.shape[1]]
        ids_BQ = layout.interleave(ids_NR[:, :-1], self.pad_id)
        mask = self.response_mask(prefix, layout.width, first=0, steps=ids_NR.shape[1] - 1)
        hidden_BQD = self.extend(prefix, ids_BQ, mask, first=0, width=layout.width)
        return torch.cat([first_N1D, layout.separate(hidden_BQD)], dim=1)

    def concatenated(
        self, batch: PromptBatch, ids_NR: torch.Tensor, mask_NR: torch.Tensor, *, share_videos: bool
    ) -> torch.Tensor:
        """Hidden states [N, R + 1, D] that predict each response token and the one after the last.

        One forward of prompt and response; the model numbers the positions itself. ``share_videos`` encodes
        each distinct video once instead of once for each row.
        """
        pixels, grid = repeated_pixels(batch)
        vision: dict[str, Any] = {"pixel_values_videos": pixels}
        if share_videos and pixels is not None:
            vision = {"mm_encoder_outputs": {"video": encode_videos(self.model, batch)}}
        hidden_NLD = self.model.model(
            input_ids=torch.cat([batch.input_ids_BP, ids_NR], dim=1),
            attention_mask=torch.cat([batch.attention_mask_BP, mask_NR.long()], dim=1),
            mm_token_type_ids=torch.cat([batch.token_types_BP, torch.zeros_like(ids_NR)], dim=1),
            video_grid_thw=grid,
            use_cache=False,
            **vision,
        ).last_hidden_state
        return hidden_NLD[:, batch.input_ids_BP.shape[1] - 1 :]
