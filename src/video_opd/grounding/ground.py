"""Finds events in one video.

The model is shown either the whole video, with fewer frames a second if it is longer than the video budget
allows, or one window after another. A prompt and its response count seconds from the beginning of what is
shown, because models are trained that way. An answer counts them from the beginning of the video.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.config import VideoConfig
from video_opd.data.video import Window, load_windows
from video_opd.errors import UserError
from video_opd.evaluation.predict import GenerationSettings
from video_opd.grounding.consensus import agreement, consensus
from video_opd.progress import track
from video_opd.seeds import derive_seed
from video_opd.temporal import Interval, clamp, clock, parse_answer
from video_opd.types import EncodedPrompt, Rollout

if TYPE_CHECKING:
    from video_opd.data.encode import PromptEncoder
    from video_opd.models.interfaces import ChunkedPolicy


QUOTED = 120  # characters of a response that a message quotes at most


@dataclass(frozen=True, kw_only=True)
class Response:
    """One text that the model wrote, and the span that was parsed from it.

    ``span`` is in seconds of the video and lies within what was shown. It is None if the text holds no such
    span. Example, for a window that begins at 60 s: ``Response(text="12.54 to 17.83", span=(72.54, 77.83),
    rule="exact", clamped=False, truncated=False, logprob=-0.02)``.
    """

    text: str
    span: Interval | None
    rule: str  # the rule by which the span was parsed: docs/evaluation.md, "Reading an answer"
    clamped: bool  # whether the text's span went beyond what was shown, and was cut
    truncated: bool  # whether the text was cut off at the length limit
    logprob: float  # mean over the tokens, in nats, under the distribution that they were sampled from

    def line(self, shown: str = "the video") -> str:
        """A line for people: ``00:12.54 → 00:17.83 (5.3 s)``, or why there is no span.

        ``shown`` names what the model was shown.
        """
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
    """The answer within one window of the video: one response, or the consensus of several."""

    window: Interval  # seconds of the video
    response: Response  # the chosen response
    samples: tuple[Response, ...]  # all of them; empty if only one was written
    agreement: float | None  # mean overlap of the samples (docs/ground.md); None without samples
    frames: int  # number of frames that the model was shown
    video_tokens: int
    thinned: bool  # whether the budget's bounds left fewer frames than its rate asks for: a long window

    @property
    def rank(self) -> tuple[bool, float, float]:
        """The window with the highest rank answers for the video (docs/ground.md).

        A window with a span comes before one without, then the agreement of the samples counts, if there are
        any, and then the log-probability of the response.
        """
        return self.response.span is not None, self.agreement or 0.0, self.response.logprob

    def to_json(self) -> dict[str, Any]:
        return {"window": list(self.window), **_response_json(self.response), "agreement": self.agreement}


@dataclass(frozen=True, kw_only=True)
class GroundedAnswer:
    """The answer to one query on a video.

    ``windows`` holds an answer for every window that the model was shown, the best first. A video that was
    shown whole has one window. ``span`` and the other attributes are those of the best window. Example:
    ``answer.span == (12.54, 17.83)`` and ``answer.line() == "00:12.54 → 00:17.83 (5.3 s)"``.
    """

    query: str
    duration_s: float  # duration of the video
    windows: tuple[WindowAnswer, ...]

    @property
    def best(self) -> WindowAnswer:
        return self.windows[0]

    @property
    def span(self) -> Interval | None:
        """Seconds from the beginning of the video; None if the model wrote no span within the video."""
        return self.best.response.span

    @property
    def text(self) -> str:
        """The text that the model wrote. Its times count from the beginning of the window."""
        return self.best.response.text

    @property
    def rule(self) -> str:
        return self.best.response.rule

    @property
    def clamped(self) -> bool:
        return self.best.response.clamped

    @property
    def truncated(self) -> bool:
        return self.best.response.truncated

    @property
    def logprob(self) -> float:
        return self.best.response.logprob

    @property
    def samples(self) -> tuple[Response, ...]:
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
            **_response_json(self.best.response),
            "agreement": self.agreement,
            "samples": [_response_json(response) for response in self.samples],
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
        """A line for people: ``00:12.54 → 00:17.83 (5.3 s)``, with notes on how it came about."""
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
            notes.append(self._rate())
        text = self.best.response.line(shown)
        return text + (f" [{'; '.join(notes)}]" if notes else "")

    def _rate(self) -> str:
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
    """Returns one answer for each query. The video is decoded and prefilled once for all of them.

    Args:
        policy: writes the responses.
        encoder: makes the prompts.
        budget: the frames, and their size, that the model is shown at most.
        video: a video file.
        queries: the events to look for.
        settings: one greedy response a query if None; if ``n`` is above 1, the answer is the consensus of
            ``n`` responses.
        window_s: seconds of a window, each shown like a video of its own; None shows the video whole.
        overlap_s: seconds that neighbouring windows share; half of ``window_s`` if None.
        batch_size: responses that are sampled together.
        backend: the decoder of the video.

    Raises:
        VideoError: if the video cannot be used.
        UserError: if there is no query, if one is empty, and if the windows are impossible.
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
        groups = _sample(policy, prompts, settings, batch_size)
        for answers, prompt, rollouts in zip(found, prompts, groups, strict=True):
            answers.append(_answer(window, prompt, rollouts, settings.thinking))
    return [
        GroundedAnswer(
            query=query,
            duration_s=window.end_s,  # the last window ends with the video
            windows=tuple(
                sorted(answers, key=lambda answer: answer.rank, reverse=True)
            ),  # the sort is stable
        )
        for query, answers in zip(queries, found, strict=True)
    ]


def check_queries(queries: Sequence[str]) -> None:
    """Raises :class:`UserError` unless there is a query, and no query is empty."""
    if not queries or not all(query.strip() for query in queries):
        raise UserError("an empty query: say which event to look for")


def _sample_id(window: Window, query: str) -> str:
    """The id that seeds the draws, so that a query's answer does not depend on the other queries."""
    name = window.clip.path.name
    return f"{name}: {query}" if window.count == 1 else f"{name} from {window.start_s:.3f} s: {query}"


def _sample(
    policy: ChunkedPolicy, prompts: Sequence[EncodedPrompt], settings: GenerationSettings, batch_size: int
) -> Iterator[list[Rollout]]:
    """Yields ``settings.n`` rollouts of each prompt, sampled ``batch_size`` at a time from one prefill."""
    size = max(1, batch_size // settings.n)
    step = max(1, batch_size // min(size, len(prompts)))
    greedy = settings.temperature == 0
    for prefix in policy.prefill_chunks(prompts, size):
        chunk = prompts[:size]
        prompts = prompts[size:]
        groups: list[list[Rollout]] = [[] for _ in chunk]
        for start in range(0, settings.n, step):
            numbers = range(start, min(start + step, settings.n))
            seeds = [[derive_seed(settings.seed, "ground", p.sample_id, i) for i in numbers] for p in chunk]
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
    window: Window, prompt: EncodedPrompt, rollouts: Sequence[Rollout], thinking: bool
) -> WindowAnswer:
    responses = tuple(_parse(rollout, window, thinking) for rollout in rollouts)
    spans = [response.span for response in responses]
    several = len(responses) > 1
    return WindowAnswer(
        window=(window.start_s, window.end_s),
        response=responses[consensus(spans, [response.logprob for response in responses])],
        samples=responses if several else (),
        agreement=agreement(spans) if several else None,
        frames=len(window.clip.times_s),
        video_tokens=prompt.video_tokens,
        thinned=window.thinned,
    )


def _parse(rollout: Rollout, window: Window, thinking: bool) -> Response:
    parsed = parse_answer(rollout.text, thinking=thinking)
    inside = None if parsed.span is None else clamp(parsed.span, window.clip.duration_s)
    return Response(
        text=rollout.text,
        span=None if inside is None else (window.start_s + inside[0], window.start_s + inside[1]),
        rule=parsed.rule,
        clamped=inside != parsed.span,
        truncated=rollout.truncated,
        logprob=sum(rollout.recorded) / len(rollout.recorded),
    )


def _response_json(response: Response) -> dict[str, Any]:
    return {**asdict(response), "span": None if response.span is None else list(response.span)}
