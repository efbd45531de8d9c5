"""The answer for one video.

The video is shown to the model whole, thinned to the frame budget where it is long, or in windows. In either
case a prompt speaks in seconds from the beginning of what is shown, as the models are trained; answers are
in seconds from the beginning of the video.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.config import VideoConfig
from video_opd.data.budget import PAIR, plan_frames
from video_opd.data.video import Window, load_windows
from video_opd.errors import UserError
from video_opd.evaluation.predict import GenerationSettings
from video_opd.grounding.consensus import agreement, consensus
from video_opd.progress import track
from video_opd.seeds import derive_seed
from video_opd.temporal import Interval, clamp, clock, parse_answer
from video_opd.types import Clip, EncodedPrompt, Rollout

if TYPE_CHECKING:
    from video_opd.data.encode import PromptEncoder
    from video_opd.models.interfaces import ChunkedPolicy


QUOTED = 120  # characters of what a model wrote, in a line for people


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One text that the model wrote, and how it was read.

    ``span`` is in seconds of the video, and within what was shown; it is None where the text holds none, or
    none within what was shown. Example: ``Reply(text="12.54 to 17.83", span=(72.54, 77.83), rule="exact",
    clamped=False, truncated=False, logprob=-0.02)`` about a window that begins at 60 s.
    """

    text: str
    span: Interval | None
    rule: str  # docs/evaluation.md, "Reading an answer"
    clamped: bool  # the text says more than was shown
    truncated: bool  # it was cut off at the length limit
    logprob: float  # mean over its tokens, in nats, under the distribution that was sampled

    def line(self, shown: str = "the video") -> str:
        """For people: ``00:12.54 → 00:17.83 (5.3 s)``, or why there is none. ``shown`` is what was seen."""
        if self.span is not None:
            start_s, end_s = self.span
            return f"{clock(start_s)} → {clock(end_s)} ({end_s - start_s:.1f} s)"
        if self.clamped:
            why = f"outside {shown}"
        elif self.rule != "none":
            why = "it does not end after it begins"
        elif self.truncated:
            why = "no time span in it, and cut off at the length limit"
        else:
            why = "no time span in it"
        text = self.text if len(self.text) <= QUOTED else f"{self.text[: QUOTED - 1]}…"
        return f"no answer: the model wrote {text!r} ({why})"


@dataclass(frozen=True, kw_only=True)
class WindowAnswer:
    """The answer about a stretch of the video: one reply, or the consensus of several samples."""

    window: Interval  # of the video, in seconds
    reply: Reply
    samples: tuple[Reply, ...]  # empty for a single reply
    agreement: float | None  # of the samples: docs/ground.md
    frames: int  # that the model saw
    video_tokens: int
    thinned: bool  # fewer than the budget's rate asks for: the window is long

    @property
    def rank(self) -> tuple[bool, float, float]:
        """Which window of a video is answered from: the highest (docs/ground.md). One with a span first,
        then by the agreement of its samples, if there are any, then by the log-probability of its reply."""
        return self.reply.span is not None, self.agreement or 0.0, self.reply.logprob

    def to_json(self) -> dict[str, Any]:
        return {"window": list(self.window), **_reply_json(self.reply), "agreement": self.agreement}


@dataclass(frozen=True, kw_only=True)
class GroundedAnswer:
    """Where an event lies in a video.

    ``windows`` holds the answer about every stretch that the model was shown, the best first; the video as a
    whole is one of them where it was not searched in windows. What ``span`` and the other attributes say is
    the best one's. Example: ``answer.span == (12.54, 17.83)``, ``answer.line() == "00:12.54 → 00:17.83
    (5.3 s)"``.
    """

    query: str
    duration_s: float  # of the video
    windows: tuple[WindowAnswer, ...]

    @property
    def best(self) -> WindowAnswer:
        return self.windows[0]

    @property
    def span(self) -> Interval | None:
        """Seconds from the beginning of the video, within it; None where there is no answer."""
        return self.best.reply.span

    @property
    def text(self) -> str:
        """As the model wrote it; its times count from the beginning of what it was shown."""
        return self.best.reply.text

    @property
    def rule(self) -> str:
        return self.best.reply.rule

    @property
    def clamped(self) -> bool:
        return self.best.reply.clamped

    @property
    def truncated(self) -> bool:
        return self.best.reply.truncated

    @property
    def logprob(self) -> float:
        return self.best.reply.logprob

    @property
    def samples(self) -> tuple[Reply, ...]:
        return self.best.samples

    @property
    def agreement(self) -> float | None:
        return self.best.agreement

    @property
    def frames(self) -> int:
        return self.best.frames

    @property
    def video_tokens(self) -> int:
        return self.best.video_tokens

    @property
    def thinned(self) -> bool:
        return self.best.thinned

    def to_json(self) -> dict[str, Any]:
        several = len(self.windows) > 1
        return {
            "query": self.query,
            **_reply_json(self.best.reply),
            "agreement": self.agreement,
            "samples": [_reply_json(reply) for reply in self.samples],
            "duration": self.duration_s,
            "frames": self.frames,
            "video_tokens": self.video_tokens,
            "thinned": self.thinned,
            "window": list(self.best.window),
            "windows": [window.to_json() for window in self.windows] if several else [],
        }

    def __str__(self) -> str:
        return self.line()

    def line(self) -> str:
        """For people: ``00:12.54 → 00:17.83 (5.3 s)``, and what is to be known about it."""
        shown = "the window" if len(self.windows) > 1 else "the video"
        notes = []
        if self.clamped and self.span is not None:
            notes.append(f"cut to {shown}")
        if self.agreement is not None:
            notes.append(f"agreement of {len(self.samples)} samples {self.agreement:.2f}")
        if len(self.windows) > 1:
            start_s, end_s = self.best.window
            notes.append(f"best of {len(self.windows)} windows: {clock(start_s)} to {clock(end_s)}")
        if self.thinned and self.span is not None:
            notes.append(self._pace())
        text = self.best.reply.line(shown)
        return text + (f" [{'; '.join(notes)}]" if notes else "")

    def _pace(self) -> str:
        start_s, end_s = self.best.window
        what = "window" if len(self.windows) > 1 else "video"
        return f"a long {what}: one frame every {(end_s - start_s) / self.frames:.1f} s was seen"


def ground(
    policy: ChunkedPolicy,
    encoder: PromptEncoder,
    budget: VideoConfig,
    video: str | Path,
    queries: Sequence[str],
    *,
    settings: GenerationSettings | None = None,
    window_s: float | None = None,
    overlap_s: float | None = None,
    batch_size: int = 8,
    backend: str = "pyav",
) -> list[GroundedAnswer]:
    """One answer for each query. The video is decoded once and read once, for all of them.

    Args:
        settings: greedy for one answer; with ``n`` above 1 the answer is the consensus of ``n`` samples.
        window_s: search the video in windows of so many seconds, each a clip of its own; none: show it whole.
        overlap_s: of neighbouring windows; half of ``window_s`` when None.
        batch_size: replies that are written at a time.

    Raises:
        VideoError: a video that cannot be used.
        UserError: no query or an empty one, an impossible window.
    """
    settings = settings or GenerationSettings()
    check_queries(queries)
    if overlap_s is None:
        overlap_s = (window_s or 0.0) / 2
    found: list[list[WindowAnswer]] = [[] for _ in queries]
    windows: Iterator[Window] = load_windows(video, budget, window_s, overlap_s, backend)
    first = next(windows)
    windows = itertools.chain([first], windows)
    for window in track(windows, "searching windows", first.count) if first.count > 1 else windows:
        ids = [_sample_id(window, query) for query in queries]
        prompts = encoder.encode_many(window.clip, queries, ids)
        thinned = is_thinned(window.clip, budget)
        replies = _replies(policy, prompts, settings, batch_size)
        for answers, prompt, rollouts in zip(found, prompts, replies, strict=True):
            answers.append(_answer(window, prompt, rollouts, settings.thinking, thinned))
    return [
        GroundedAnswer(
            query=query,
            duration_s=window.end_s,  # the last one ends with the video
            windows=tuple(sorted(answers, key=lambda answer: answer.rank, reverse=True)),  # stable
        )
        for query, answers in zip(queries, found, strict=True)
    ]


def check_queries(queries: Sequence[str]) -> None:
    """Raises UserError unless there is a query and none is empty."""
    if not queries or not all(query.strip() for query in queries):
        raise UserError("an empty query: say which event to look for")


def is_thinned(clip: Clip, budget: VideoConfig) -> bool:
    """Whether a bound (frames, or tokens in total) left fewer frames than ``budget.fps`` asks for."""
    source_frames = max(1, round(clip.duration_s * clip.source_fps))
    unbounded = plan_frames(
        source_frames, clip.source_fps, budget.changed(max_frames=max(source_frames, budget.min_frames))
    )
    return len(clip.times_s) + PAIR < unbounded  # the count of the source's frames is one off at times


def _sample_id(window: Window, query: str) -> str:
    """Draws depend on it: a query is answered alike whichever others are asked with it."""
    name = window.clip.path.name
    return f"{name}: {query}" if window.count == 1 else f"{name} from {window.start_s:.3f} s: {query}"


def _replies(
    policy: ChunkedPolicy, prompts: Sequence[EncodedPrompt], settings: GenerationSettings, batch_size: int
) -> Iterator[list[Rollout]]:
    """``settings.n`` rollouts of each prompt, ``batch_size`` at a time, from one reading of the video."""
    size = max(1, batch_size // settings.n)
    step = max(1, batch_size // min(size, len(prompts)))
    greedy = settings.temperature == 0
    for prefix in policy.prefill_chunks(prompts, size):
        part = prompts[:size]
        prompts = prompts[size:]
        groups: list[list[Rollout]] = [[] for _ in part]
        for start in range(0, settings.n, step):
            numbers = range(start, min(start + step, settings.n))
            seeds = [[derive_seed(settings.seed, "ground", p.sample_id, i) for i in numbers] for p in part]
            sampled = policy.sample(
                prefix,
                n=len(numbers),
                max_new_tokens=settings.max_new_tokens,
                temperature=settings.temperature,
                seeds=None if greedy else seeds,
            )
            for group, more in zip(groups, sampled, strict=True):
                group += more
        yield from groups


def _answer(
    window: Window, prompt: EncodedPrompt, rollouts: Sequence[Rollout], thinking: bool, thinned: bool
) -> WindowAnswer:
    replies = tuple(_read(rollout, window, thinking) for rollout in rollouts)
    spans = [reply.span for reply in replies]
    several = len(replies) > 1
    return WindowAnswer(
        window=(window.start_s, window.end_s),
        reply=replies[consensus(spans, [reply.logprob for reply in replies])],
        samples=replies if several else (),
        agreement=agreement(spans) if several else None,
        frames=len(window.clip.times_s),
        video_tokens=prompt.video_tokens,
        thinned=thinned,
    )


def _read(rollout: Rollout, window: Window, thinking: bool) -> Reply:
    parsed = parse_answer(rollout.text, thinking=thinking)
    inside = None if parsed.span is None else clamp(parsed.span, window.clip.duration_s)
    return Reply(
        text=rollout.text,
        span=None if inside is None else (window.start_s + inside[0], window.start_s + inside[1]),
        rule=parsed.rule,
        clamped=inside != parsed.span,
        truncated=rollout.truncated,
        logprob=sum(rollout.recorded) / len(rollout.recorded),
    )


def _reply_json(reply: Reply) -> dict[str, Any]:
    return {**asdict(reply), "span": None if reply.span is None else list(reply.span)}
