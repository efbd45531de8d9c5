"""Encoded prompts as one batch, with every distinct video in it once.

Shapes: ``B`` rows, ``P`` prompt tokens (the longest), ``R`` response tokens (the longest). The axis of 3 is
time, height, width of the multimodal rotary positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch.nn.functional import pad

from video_opd.errors import UserError
from video_opd.types import EncodedPrompt

if TYPE_CHECKING:
    from transformers import Qwen3VLForConditionalGeneration
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

# The tensors of an encoded prompt that a forward uses; attention_mask follows from the length.
KNOWN_TENSORS = frozenset({"pixel_values_videos", "video_grid_thw", "mm_token_type_ids", "attention_mask"})


@dataclass(frozen=True, kw_only=True, eq=False)
class PromptBatch:
    """Prompts padded on the left, so the last column of every row is the last token of its prompt, or on the
    right (:meth:`padded_right`).

    ``pixel_values_videos`` and ``video_grid_thw`` hold each distinct video (by ``clip_digest``) once;
    ``videos_of_prompt[b]`` are the numbers of the videos in row b.
    """

    input_ids_BP: torch.Tensor
    attention_mask_BP: torch.Tensor  # int64, 1 for a token, 0 for padding
    token_types_BP: torch.Tensor  # mm_token_type_ids: 0 text, 2 video
    position_ids_3BP: torch.Tensor
    next_position_B: torch.Tensor  # rotary position of the first response token, of the whole prompt
    pixel_values_videos: torch.Tensor | None  # [patches, channels * time * height * width]
    video_grid_thw: torch.Tensor | None  # [videos, 3], on the CPU: its values drive Python loops
    videos_of_prompt: tuple[tuple[int, ...], ...]

    def repeated(self, repeats: Sequence[int]) -> PromptBatch:
        """Row b ``repeats[b]`` times in a row; the videos are not repeated."""
        rows = row_index(repeats)
        on_device = rows.to(self.input_ids_BP.device)
        return PromptBatch(
            input_ids_BP=self.input_ids_BP[on_device],
            attention_mask_BP=self.attention_mask_BP[on_device],
            token_types_BP=self.token_types_BP[on_device],
            position_ids_3BP=self.position_ids_3BP[:, on_device],
            next_position_B=self.next_position_B[on_device],
            pixel_values_videos=self.pixel_values_videos,
            video_grid_thw=self.video_grid_thw,
            videos_of_prompt=tuple(self.videos_of_prompt[row] for row in rows.tolist()),
        )

    def select(self, rows: Sequence[int], pad_id: int) -> PromptBatch:
        """Some rows of a batch without videos. Columns that are padding in all of them are dropped."""
        lengths = self.attention_mask_BP[list(rows)].sum(1).tolist()
        ends = [self.input_ids_BP.shape[1]] * len(rows)
        return self.cut(rows, ends, lengths, pad_id=pad_id, videos=False)

    def padded_right(self) -> PromptBatch:
        """The same rows with their padding at the end, which no token before it can see in a causal model.
        Only rows that are padded on the left can be cut, selected, or padded on the right."""
        width = self.input_ids_BP.shape[1]
        left_B1 = width - self.attention_mask_BP.sum(1, keepdim=True)
        column_BP = (torch.arange(width, device=left_B1.device) + left_B1) % width
        column_3BP = column_BP.expand(3, -1, -1)
        return replace(
            self,
            input_ids_BP=self.input_ids_BP.gather(1, column_BP),
            attention_mask_BP=self.attention_mask_BP.gather(1, column_BP),
            token_types_BP=self.token_types_BP.gather(1, column_BP),
            position_ids_3BP=self.position_ids_3BP.gather(2, column_3BP),
        )

    def cut(
        self, rows: Sequence[int], stops: Sequence[int], lengths: Sequence[int], *, pad_id: int, videos: bool
    ) -> PromptBatch:
        """A batch of the ``lengths[i]`` columns before column ``stops[i]`` of row ``rows[i]``, padded again.

        ``videos`` says whether the cut holds all videos of a row or none of them.
        """
        device, longest = self.input_ids_BP.device, max(lengths)
        offset_P = torch.arange(longest) - longest
        kept_BP = (offset_P >= -torch.tensor(lengths)[:, None]).to(device)
        column_BP = (torch.tensor(stops)[:, None] + offset_P).clamp(min=0).to(device)
        row_B1 = torch.tensor(rows, device=device)[:, None]

        def take(x: torch.Tensor, padding: int = 0) -> torch.Tensor:
            return x[..., row_B1, column_BP].masked_fill(~kept_BP, padding)

        return PromptBatch(
            input_ids_BP=take(self.input_ids_BP, pad_id),
            attention_mask_BP=take(self.attention_mask_BP),
            token_types_BP=take(self.token_types_BP),
            position_ids_3BP=take(self.position_ids_3BP),
            next_position_B=self.next_position_B[row_B1[:, 0]],
            pixel_values_videos=self.pixel_values_videos if videos else None,
            video_grid_thw=self.video_grid_thw if videos else None,
            videos_of_prompt=tuple(self.videos_of_prompt[row] if videos else () for row in rows),
        )


def batch_prompts(
    prompts: Sequence[EncodedPrompt],
    model: Qwen3VLForConditionalGeneration,
    *,
    pad_id: int,
    device: torch.device,
) -> PromptBatch:
    """Pads prompts on the left and numbers their positions with the model's own ``get_rope_index``.

    Raises :class:`UserError`, naming the sample, if its placeholders do not match its video under this model.
    """
    assert prompts, "an empty batch"
    for prompt in prompts:
        check_placeholders(prompt, model)
    longest = max(prompt.length for prompt in prompts)
    ids, types, positions, next_positions = [], [], [], []
    for prompt in prompts:
        left = longest - prompt.length
        token_types = prompt.tensors.get("mm_token_type_ids", torch.zeros_like(prompt.input_ids))
        positions_3P, next_position = _positions(prompt, token_types, model)
        ids.append(pad(prompt.input_ids[0], (left, 0), value=pad_id))
        types.append(pad(token_types[0], (left, 0)))
        positions.append(pad(positions_3P, (left, 0)))
        next_positions.append(next_position)
    lengths_B1 = torch.tensor([[prompt.length] for prompt in prompts])
    pixels, grid, videos_of_prompt = _distinct_videos(prompts)
    return PromptBatch(
        input_ids_BP=torch.stack(ids).to(device),
        attention_mask_BP=(torch.arange(longest) >= longest - lengths_B1).long().to(device),
        token_types_BP=torch.stack(types).to(device),
        position_ids_3BP=torch.stack(positions, dim=1).to(device),
        next_position_B=torch.tensor(next_positions, device=device),
        pixel_values_videos=None if pixels is None else pixels.to(device),
        video_grid_thw=grid,
        videos_of_prompt=videos_of_prompt,
    )


def _positions(
    prompt: EncodedPrompt, token_types_1P: torch.Tensor, model: Qwen3VLForConditionalGeneration
) -> tuple[torch.Tensor, int]:
    """(Rotary positions [3, P] of a prompt, on the CPU, the position of the token behind it)."""
    merge = model.config.vision_config.spatial_merge_size
    if merge not in prompt.positions:
        # One prompt at a time and on the CPU, because get_rope_index reads every grid entry in Python.
        positions_31P, delta_11 = model.model.get_rope_index(
            prompt.input_ids.cpu(),
            token_types_1P.cpu(),
            video_grid_thw=_cpu(prompt.tensors.get("video_grid_thw")),
        )
        prompt.positions[merge] = positions_31P[:, 0], prompt.length + int(delta_11)
    return prompt.positions[merge]


def check_placeholders(prompt: EncodedPrompt, model: Qwen3VLForConditionalGeneration) -> None:
    """Raises :class:`UserError` unless a prompt has one placeholder for each embedding of its video."""
    unknown = set(prompt.tensors) - KNOWN_TENSORS
    assert not unknown, f"{prompt.sample_id}: the forward would ignore {sorted(unknown)}"
    written = int((prompt.input_ids == model.config.video_token_id).sum())
    grid = prompt.tensors.get("video_grid_thw")
    merge = model.config.vision_config.spatial_merge_size
    shown = 0 if grid is None else int(grid.prod(-1).sum()) // merge**2
    if written != shown:
        raise UserError(
            f"sample {prompt.sample_id!r}: {written} video placeholders in the prompt, but its video has "
            f"{shown} tokens under this model; encode it with the processor that was saved with the model"
        )


def encode_videos(
    model: Qwen3VLForConditionalGeneration, batch: PromptBatch
) -> BaseModelOutputWithDeepstackFeatures | None:
    """Runs the vision tower once over the distinct videos and orders their features by prompt.

    The model takes the result as ``mm_encoder_outputs={"video": ...}``. It is None if no prompt has a video.
    """
    from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

    if batch.pixel_values_videos is None or batch.video_grid_thw is None:
        return None
    distinct = model.model.get_video_features(
        batch.pixel_values_videos, batch.video_grid_thw.to(batch.pixel_values_videos.device), return_dict=True
    )
    order = [video for videos in batch.videos_of_prompt for video in videos]
    return BaseModelOutputWithDeepstackFeatures(
        pooler_output=tuple(distinct.pooler_output[i] for i in order),
        deepstack_features=[tuple(layer[i] for i in order) for layer in distinct.deepstack_features],
    )


def repeated_pixels(batch: PromptBatch) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Pixels and grids of every row, as a plain forward takes them: repeated if rows share a video."""
    if batch.pixel_values_videos is None or batch.video_grid_thw is None:
        return None, None
    order = [video for videos in batch.videos_of_prompt for video in videos]
    per_video = batch.pixel_values_videos.split(batch.video_grid_thw.prod(-1).tolist())
    grid = batch.video_grid_thw[order].to(batch.pixel_values_videos.device)
    return torch.cat([per_video[i] for i in order]), grid


def pad_responses(
    responses: Sequence[Sequence[int]], *, pad_id: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids [B, R] padded on the right, and the bool mask [B, R], which is True for tokens."""
    longest = max(map(len, responses), default=0)
    ids_BR = torch.full((len(responses), longest), pad_id, dtype=torch.long)
    for row, tokens in enumerate(responses):
        ids_BR[row, : len(tokens)] = torch.tensor(tokens, dtype=torch.long)
    mask_BR = torch.arange(longest) < torch.tensor([[len(tokens)] for tokens in responses]).reshape(-1, 1)
    return ids_BR.to(device), mask_BR.to(device)


def scattered(flat_N: torch.Tensor, mask_BR: torch.Tensor) -> torch.Tensor:
    """[N, ...] back to [B, R, ...], with 0 where the mask is False."""
    padded = flat_N.new_zeros((*mask_BR.shape, *flat_N.shape[1:]))
    padded[mask_BR] = flat_N
    return padded


def row_index(repeats: Sequence[int]) -> torch.Tensor:
    """``[2, 1]`` → ``[0, 0, 1]``."""
    return torch.arange(len(repeats)).repeat_interleave(torch.tensor(repeats, dtype=torch.long))


def _distinct_videos(
    prompts: Sequence[EncodedPrompt],
) -> tuple[torch.Tensor | None, torch.Tensor | None, tuple[tuple[int, ...], ...]]:
    pixels: list[torch.Tensor] = []
    grids: list[torch.Tensor] = []
    place: dict[str, tuple[int, ...]] = {}
    count = 0
    videos_of_prompt: list[tuple[int, ...]] = []
    for prompt in prompts:
        grid = prompt.tensors.get("video_grid_thw")
        if grid is None:
            videos_of_prompt.append(())
            continue
        if prompt.clip_digest not in place:
            place[prompt.clip_digest] = tuple(range(count, count + len(grid)))
            count += len(grid)
            pixels.append(prompt.tensors["pixel_values_videos"])
            grids.append(grid.cpu())
        videos_of_prompt.append(place[prompt.clip_digest])
    if not pixels:
        return None, None, tuple(videos_of_prompt)
    # A single video is not copied: its pixels may be large.
    joined = pixels[0] if len(pixels) == 1 else torch.cat(pixels)
    return joined, torch.cat(grids), tuple(videos_of_prompt)


def _cpu(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.cpu()
