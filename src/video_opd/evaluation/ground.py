"""The answer for one video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.data.budget import PAIR, VideoBudget, plan_frames
from video_opd.data.video import load_clip
from video_opd.errors import UserError
from video_opd.evaluation.predict import AnswerSettings, answer
from video_opd.temporal import Interval, clamp, parse_answer
from video_opd.types import Clip

if TYPE_CHECKING:
    from video_opd.data.encode import PromptEncoder
    from video_opd.models.protocols import Policy


@dataclass(frozen=True, kw_only=True)
class GroundedAnswer:
    """Where an event lies in a video.

    ``span`` lies within the video; it is None where the text holds none, or none within the video.
    Example: ``GroundedAnswer(query="the cup falls", span=(12.54, 17.83), text="12.54 to 17.83",
    rule="exact", clamped=False, duration_s=35.0, frames=70, thinned=False)``.
    """

    query: str
    span: Interval | None
    text: str  # as the model wrote it
    rule: str
    clamped: bool  # the text says more than the video has
    duration_s: float
    frames: int  # that the model saw
    thinned: bool  # fewer than the budget's rate asks for: the video is long

    def to_json(self) -> dict[str, Any]:
        return {
            "query": self.query,
            "span": None if self.span is None else list(self.span),
            "text": self.text,
            "rule": self.rule,
            "clamped": self.clamped,
            "duration": self.duration_s,
            "frames": self.frames,
            "thinned": self.thinned,
        }

    def line(self) -> str:
        """For people: ``00:12.54 → 00:17.83 (5.3 s)``, and what is to be known about it."""
        if self.span is None:
            outside = "outside the video" if self.clamped else "no time span in it"
            return f"no answer: the model wrote {self.text!r} ({outside})"
        start_s, end_s = self.span
        notes = [
            note
            for note, holds in (("cut to the video", self.clamped), (self._pace(), self.thinned))
            if holds
        ]
        text = f"{clock(start_s)} → {clock(end_s)} ({end_s - start_s:.1f} s)"
        return text + (f" [{'; '.join(notes)}]" if notes else "")

    def _pace(self) -> str:
        return f"a long video: one frame every {self.duration_s / self.frames:.1f} s was seen"


def clock(time_s: float) -> str:
    """``00:12.54``, from an hour on ``1:02:03.00``."""
    hundredths = round(time_s * 100)
    minutes, rest = divmod(hundredths, 6000)
    seconds = f"{rest // 100:02d}.{rest % 100:02d}"
    return f"{minutes:02d}:{seconds}" if minutes < 60 else f"{minutes // 60}:{minutes % 60:02d}:{seconds}"


def ground(
    policy: Policy,
    encoder: PromptEncoder,
    budget: VideoBudget,
    video: str | Path,
    queries: Sequence[str],
    *,
    settings: AnswerSettings | None = None,
    backend: str = "pyav",
) -> list[GroundedAnswer]:
    """One answer for each query; the video is decoded once, and read once where the policy shares it.

    Raises :class:`~video_opd.data.video.VideoError` for a video that cannot be used and :class:`UserError`
    for an empty query.
    """
    settings = settings or AnswerSettings()
    if not queries or not all(query.strip() for query in queries):
        raise UserError("an empty query: say which event to look for")
    clip = load_clip(Path(video), budget, backend)
    prompts = encoder.encode_many(clip, queries, [f"{Path(video).name}:{i}" for i in range(len(queries))])
    answers = []
    for query, rollouts in zip(queries, answer(policy, prompts, settings, "ground"), strict=True):
        parsed = parse_answer(rollouts[0].text, thinking=settings.thinking)
        inside = None if parsed.span is None else clamp(parsed.span, clip.duration_s)
        answers.append(
            GroundedAnswer(
                query=query,
                span=inside,
                text=rollouts[0].text,
                rule=parsed.rule,
                clamped=inside != parsed.span,
                duration_s=clip.duration_s,
                frames=len(clip.times_s),
                thinned=is_thinned(clip, budget),
            )
        )
    return answers


def is_thinned(clip: Clip, budget: VideoBudget) -> bool:
    """Whether a bound (frames, or tokens in total) left fewer frames than ``budget.fps`` asks for."""
    source_frames = max(1, round(clip.duration_s * clip.source_fps))
    unbounded = plan_frames(
        source_frames, clip.source_fps, replace(budget, max_frames=max(source_frames, PAIR))
    )
    return len(clip.times_s) + PAIR < unbounded  # the count of the source's frames is one off at times
