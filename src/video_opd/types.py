"""The records that rooms hand to each other.

Shapes: ``T`` frames, ``H`` height, ``W`` width, ``C`` channels, ``P`` prompt tokens, ``R`` response
tokens, ``V`` vocabulary. Times are seconds from the start of the video. Nothing here imports torch at
run time; tensors appear in annotations only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    import torch


Strategy: TypeAlias = Literal["topk", "dsus", "bbds", "gwds", "gaussian", "random"]  # curriculum/samplers.py
RankBy: TypeAlias = Literal["iou_gap", "reverse_kl"]
UNGATED: tuple[Strategy, ...] = ("gaussian", "random")  # without TVDF there is no gate unless it is asked for
MIN_TEACHER_IOU = 0.5  # the gate of the other strategies; the paper leaves it open (sec. 3.2, step 1)


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One row of a data file: a query about a video, and the annotated spans that answer it.

    Example: ``Sample(id="a", video=Path("v/a.mp4"), query="the cup falls", duration_s=30.0,
    spans=((3.0, 5.5),))``.
    """

    id: str
    video: Path  # resolved against the data file's folder or the video root
    query: str
    duration_s: float | None = None
    spans: tuple[tuple[float, float], ...] = ()  # empty: not annotated
    source: str | None = None
    row: Mapping[str, Any] = field(default_factory=dict)  # the row of the file, unknown keys included


@dataclass(frozen=True, kw_only=True)
class Clip:
    """A video, decoded, sampled and resized once. Every model is given this same object."""

    path: Path
    frames: np.ndarray  # uint8 [T, H, W, 3], RGB, resized; H and W are multiples of 32
    times_s: np.ndarray  # float64 [T], presentation times of the frames
    frame_indices: np.ndarray  # int64 [T], positions in the source's display order
    source_fps: float  # mean rate of the source
    duration_s: float
    source_size_px: tuple[int, int]  # (height, width) before resizing
    digest: str  # hash of frames and times: clips with equal digests are equal


@dataclass(frozen=True, kw_only=True)
class EncodedPrompt:
    """A prompt as the arguments of the model's ``forward``. Sampler, teacher and trainer share it.

    ``input_ids`` is [1, P]. ``tensors`` holds everything else that the forward takes, by its argument names
    (``pixel_values_videos``, ``video_grid_thw``, ``mm_token_type_ids`` ...), unpadded, as a batch of 1.
    """

    sample_id: str
    input_ids: torch.Tensor
    tensors: Mapping[str, torch.Tensor]
    text: str
    pair_times_s: tuple[float, ...]  # the timestamp written before each frame pair
    video_tokens: int
    clip_digest: str
    duration_s: float
    clip: Clip | None = None  # kept only for a teacher in another process, which is sent its frames
    # By the spatial merge size of a model: rotary positions [3, P], and the next token's. Student and teacher
    # share them, because numbering a long video takes tens of milliseconds.
    positions: dict[int, tuple[torch.Tensor, int]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def length(self) -> int:
        return int(self.input_ids.shape[1])


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """A response that a policy sampled, with the log-probability of each token when it was sampled.

    The end-of-sequence token is the last token, unless the length limit came first: then ``truncated`` is
    True and nothing is appended. An annotation that is trained on is a ``Rollout`` without ``logprobs``,
    because nobody sampled it.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] | None  # nats, of the distribution that was sampled
    text: str  # decoded without special tokens
    truncated: bool

    def __post_init__(self) -> None:
        assert self.logprobs is None or len(self.token_ids) == len(self.logprobs), (
            "one log-prob for each token"
        )

    @property
    def recorded(self) -> tuple[float, ...]:
        """``logprobs``, for a response that was sampled."""
        assert self.logprobs is not None, "an annotation was not sampled"
        return self.logprobs


@dataclass(frozen=True, kw_only=True)
class TokenLogprobs:
    """Log-probabilities of given responses under a model, right-padded to the longest.

    ``logprobs_BT`` [B, R] is 0 where ``mask_BT`` [B, R] is False. ``full_BTV`` [B, R, V] holds the
    log-probabilities of the whole vocabulary; it is None unless it was asked for. All are natural logarithms.
    """

    logprobs_BT: torch.Tensor
    mask_BT: torch.Tensor
    full_BTV: torch.Tensor | None = None

    def to(self, device: torch.device) -> TokenLogprobs:
        """The same on ``device``."""
        return TokenLogprobs(
            logprobs_BT=self.logprobs_BT.to(device),
            mask_BT=self.mask_BT.to(device),
            full_BTV=None if self.full_BTV is None else self.full_BTV.to(device),
        )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A model's responses to one sample, with the spans that were parsed from them: a row of a predictions
    file."""

    id: str
    responses: tuple[str, ...]
    spans: tuple[tuple[float, float] | None, ...]
    rules: tuple[str, ...]  # the parse rule of each response; "none" where nothing matched


@dataclass(frozen=True, kw_only=True)
class ForTopK:
    """A selection that lazy scores are exact for: the first ``k`` by δ with this gate.

    They are exact for a smaller k and for a lower gate, too.
    Example: ``ForTopK(k=2500, min_teacher_iou=0.5)``.
    """

    k: int
    min_teacher_iou: float = MIN_TEACHER_IOU


@dataclass(frozen=True, kw_only=True)
class Score:
    """TVDF's measurements of one row of a pool (appendix B). NaN stands for a value that was not measured."""

    id: str
    teacher_iou: float
    student_iou: float
    reverse_kl: float | None = None  # nats a token, along the student's rollout
    teacher_spans: tuple[tuple[float, float] | None, ...] = ()
    student_spans: tuple[tuple[float, float] | None, ...] = ()
    for_topk: ForTopK | None = None  # set if the teacher was not asked, because the row cannot be selected so

    @property
    def delta(self) -> float:
        """eq 12: δ = τ − σ."""
        return self.teacher_iou - self.student_iou
