"""Turns a clip and a query into the model's inputs, through the model's own processor.

The processor is given our frames, sizes and times. Its output is then checked: it must hold as many
placeholders as the vision tower will fill, and the right time before each frame pair. A mismatch here is the
most common silent defect of video training, so it is an error.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
import torch

from video_opd.config import PromptConfig
from video_opd.data.budget import CELL_PX, PAIR, count_tokens
from video_opd.data.prompts import CONTROL_TOKEN, build_messages, opens_thinking
from video_opd.errors import UserError
from video_opd.types import Clip, EncodedPrompt

if TYPE_CHECKING:
    from transformers import Qwen3VLProcessor

PLACED = "<|vision_start|><|video_pad|><|vision_end|>"  # a video in Qwen3-VL's chat templates
TIMESTAMP = re.compile(r"<(\d+\.\d) seconds>")


class PromptEncoder:
    """Makes :class:`EncodedPrompt` objects. Threads may share one encoder.

    ``prompt.video_form`` must be chosen: ``release`` is ``<0.2 seconds><|vision_start|>…<|vision_end|>`` for
    each pair of frames, and ``nested`` has one more ``<|vision_start|>`` before and ``<|vision_end|>`` behind
    the whole video. Without ``prompt`` it is ``release``. With ``keep_clips`` each prompt carries its clip.

    Raises UserError for a processor whose video tokens are not Qwen3-VL's, 32×32 px of a pair of frames, and
    for a chat template that opens ``<think>`` if ``prompt.thinking`` is not set, and for settings of the
    processor with which no video can be encoded.
    """

    def __init__(
        self,
        processor: Qwen3VLProcessor,
        prompt: PromptConfig | None = None,
        *,
        keep_clips: bool = False,
    ) -> None:
        self.processor = processor
        self.keep_clips = keep_clips
        self.prompt = prompt if prompt is not None else PromptConfig(video_form="release")
        assert self.prompt.video_form is not None, "choose_video_form says which"
        vision = processor.video_processor
        patch_px, merge, frames = vision.patch_size, vision.merge_size, vision.temporal_patch_size
        whole = all(type(size) is int and 1 <= size <= CELL_PX for size in (patch_px, merge, frames))
        side = patch_px * merge if whole else f"{patch_px!r:.40} × {merge!r:.40}"
        if side != CELL_PX or frames != PAIR:
            raise UserError(
                f"the processor's video tokens are {side} px of {frames!r:.40} frames, not {CELL_PX} px of "
                f"{PAIR}; take a Qwen3-VL model"
            )
        self.opens_thinking = opens_thinking(self._render(""))
        if self.opens_thinking and not self.prompt.thinking:
            raise UserError(
                "the model's chat template opens <think>, so it reasons before it answers: set "
                "prompt.thinking and a length limit for the reasoning, or take the Instruct checkpoint "
                "(methods sft, op-rkd and op-fkd need that one)"
            )
        added = processor.tokenizer.get_added_vocab()
        self._control = tuple(token for token in added if CONTROL_TOKEN.fullmatch(token))
        self._vision_end = processor.tokenizer.convert_tokens_to_ids("<|vision_end|>")
        # A fast tokenizer raises if one thread uses it while another changes one of its settings.
        self._lock = threading.Lock()
        self._try()

    def encode(self, clip: Clip, query: str, sample_id: str) -> EncodedPrompt:
        """Encodes one question. Raises UserError if the query holds one of the model's control tokens."""
        return self.encode_many(clip, [query], [sample_id])[0]

    def encode_many(
        self, clip: Clip, queries: Sequence[str], sample_ids: Sequence[str]
    ) -> list[EncodedPrompt]:
        """Encodes several questions about one clip. All prompts share its pixels, processed once."""
        assert len(queries) == len(sample_ids)
        if not queries:
            return []
        first = self._encode_first(clip, self._chat_text(queries[0], sample_ids[0]), sample_ids[0])
        return [first, *self.encode_more(first, queries[1:], sample_ids[1:])]

    def encode_more(
        self, prompt: EncodedPrompt, queries: Sequence[str], sample_ids: Sequence[str]
    ) -> list[EncodedPrompt]:
        """Encodes further questions about the clip of ``prompt``. All prompts share its pixels."""
        assert len(queries) == len(sample_ids)
        texts = [self._chat_text(q, i) for q, i in zip(queries, sample_ids, strict=True)]
        before, _ = self._split(prompt.text)
        assert all(self._split(text)[0] == before for text in texts)
        ids = prompt.input_ids[0]
        shared = self._through_video(ids)
        with self._lock:
            rows = [torch.cat([shared, self._ids(self._split(text)[1])]) for text in texts]
        return [
            replace(
                prompt,
                sample_id=sample_id,
                input_ids=row[None],
                tensors={**prompt.tensors, "mm_token_type_ids": self._types(row)[None]},
                text=text,
            )
            for sample_id, row, text in zip(sample_ids, rows, texts, strict=True)
        ]

    def _encode_first(self, clip: Clip, text: str, sample_id: str) -> EncodedPrompt:
        frames, times_s = _whole_pairs(clip)
        pair_times_s = tuple(((times_s[0::PAIR] + times_s[1::PAIR]) / 2).tolist())
        with self._lock:
            inputs = self._process(text, frames, times_s)
            ids = inputs["input_ids"][0]
            shared, behind = self._through_video(ids), self._ids(self._split(text)[1])
        assert torch.equal(torch.cat([shared, behind]), ids), (
            "the processor splits the text elsewhere than at the video's end"
        )
        return EncodedPrompt(
            sample_id=sample_id,
            input_ids=ids[None],
            tensors={
                **{key: inputs[key] for key in ("pixel_values_videos", "video_grid_thw")},
                "mm_token_type_ids": self._types(ids)[None],
            },
            text=text,
            pair_times_s=pair_times_s,
            video_tokens=self._check_parity(shared, inputs, frames, pair_times_s),
            clip_digest=clip.digest,
            duration_s=clip.duration_s,
            clip=clip if self.keep_clips else None,
        )

    def _through_video(self, ids: torch.Tensor) -> torch.Tensor:
        """The ids up to the last marker of the video, which all prompts on it share."""
        return ids[: int((ids == self._vision_end).nonzero()[-1]) + 1]

    def _try(self) -> None:
        """Encodes two small frames: settings with which no video can be encoded are found at once, and not
        when videos have been decoded. Raises UserError."""
        clip = Clip(
            path=Path("two frames"),
            frames=np.zeros((PAIR, CELL_PX, CELL_PX, 3), dtype=np.uint8),
            times_s=np.array([0.0, 0.5]),
            frame_indices=np.arange(PAIR),
            source_fps=2.0,
            duration_s=1.0,
            source_size_px=(CELL_PX, CELL_PX),
            digest="",
        )
        try:
            with np.errstate(all="ignore"):
                (prompt,) = self.encode_many(clip, ["?"], ["?"])
            reason = (
                "" if bool(prompt.tensors["pixel_values_videos"].isfinite().all()) else "black is not finite"
            )
        except UserError:
            raise
        except Exception as error:  # whatever a library raises for a setting that makes no sense
            reason = (str(error).splitlines() or [""])[0] or type(error).__name__
        if reason:
            raise UserError(
                f"the processor cannot encode a video ({reason}); copy the preprocessor and tokenizer files "
                "from the checkpoint that this one was made from"
            )

    def refusal(self, query: str) -> str | None:
        """The reason why this query cannot be encoded, or None. A query may not hold a control token."""
        token = next((token for token in self._control if token in query), None)
        return None if token is None else f"its query holds the control token {token}; remove it"

    def _chat_text(self, query: str, sample_id: str) -> str:
        if (reason := self.refusal(query)) is not None:
            raise UserError(f"sample {sample_id!r}: {reason}")
        text = self._render(query)
        # transformers replaces the video token alone. Without the markers around it, that is Qwen's form.
        return (
            text if self.prompt.video_form == "nested" else text.replace(PLACED, self.processor.video_token)
        )

    def _render(self, query: str) -> str:
        """The chat template's text, with the video as :data:`PLACED`. UserError for an unknown style."""
        messages = build_messages(query, self.prompt.style, self.prompt.thinking)
        try:  # transformers renders templates in jinja's sandbox
            text = self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (
            *(jinja2.TemplateError, TypeError, ValueError, ArithmeticError, LookupError, AttributeError),
            RecursionError,  # a macro that calls itself
        ) as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise UserError(f"the chat template fails ({reason}); take Qwen3-VL's own") from error
        assert isinstance(text, str)
        if text.count(self.processor.video_token) != 1 or PLACED not in text:
            raise UserError(f"the chat template does not place {PLACED} exactly once; take Qwen3-VL's own")
        return text

    def _split(self, text: str) -> tuple[str, str]:
        """The texts before the video token, and behind the last marker of the video."""
        before, _, after = text.partition(self.processor.video_token)
        return before, after if self.prompt.video_form == "release" else after.removeprefix("<|vision_end|>")

    def _process(self, text: str, frames: np.ndarray, times_s: np.ndarray) -> dict[str, torch.Tensor]:
        video = torch.from_numpy(frames).permute(0, 3, 1, 2).contiguous()
        # The processor computes times as frames_indices / fps, so at 1 fps the indices are the times. It
        # changes the list that it is given.
        metadata = {"total_num_frames": len(frames), "fps": 1.0, "frames_indices": times_s.tolist()}
        inputs = self.processor(
            text=[text],
            videos=[video],
            video_metadata=[metadata],
            input_data_format="channels_first",
            do_resize=False,
            do_sample_frames=False,
            cap_pixels_per_frame=False,  # no effect without resizing, but unset it causes a warning
            return_tensors="pt",
        )
        return dict(inputs)

    def _ids(self, text: str) -> torch.Tensor:
        ids = self.processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids, dtype=torch.int64)

    def _types(self, ids: torch.Tensor) -> torch.Tensor:
        return torch.where(ids == self.processor.video_token_id, 2, 0)

    def _check_parity(
        self,
        shared: torch.Tensor,
        inputs: Mapping[str, torch.Tensor],
        frames: np.ndarray,
        pair_times_s: tuple[float, ...],
    ) -> int:
        """Returns the number of video tokens, after checking that processor, grid and frames agree on it."""
        pads = int((shared == self.processor.video_token_id).sum())
        grid = int(inputs["video_grid_thw"].prod(-1).sum()) // self.processor.video_processor.merge_size**2
        ours = count_tokens(*frames.shape[:3])
        if not pads == grid == ours:
            raise AssertionError(
                f"video tokens: {pads} in the prompt, {grid} in the grid, {ours} in the frames"
            )
        kept = shared[shared != self.processor.video_token_id].tolist()
        written = TIMESTAMP.findall(self.processor.tokenizer.decode(kept, skip_special_tokens=False))
        expected = [f"{time_s:.1f}" for time_s in pair_times_s]
        if written != expected:
            raise AssertionError(f"the times in the prompt are {written}, those of the frames are {expected}")
        markers = len(pair_times_s) + (self.prompt.video_form == "nested")
        for name in ("<|vision_start|>", "<|vision_end|>"):
            found = int((shared == self.processor.tokenizer.convert_tokens_to_ids(name)).sum())
            assert found == markers, (
                f"{found} {name} around the video, not {markers} ({self.prompt.video_form})"
            )
        types = inputs["mm_token_type_ids"][0, : len(shared)]
        assert torch.equal(types, self._types(shared)), "the processor marks other tokens as video"
        assert inputs["pixel_values_videos"].dtype == torch.float32
        return pads


def _whole_pairs(clip: Clip) -> tuple[np.ndarray, np.ndarray]:
    """Returns frames and times; the last frame is repeated if their number is odd."""
    frames, times_s = clip.frames, clip.times_s
    assert len(frames) == len(times_s) > 0
    assert frames.dtype == np.uint8 and not any(side % CELL_PX for side in frames.shape[1:3])
    if len(frames) % PAIR:
        frames, times_s = np.concatenate([frames, frames[-1:]]), np.append(times_s, times_s[-1])
    return frames, times_s
