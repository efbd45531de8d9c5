"""The record of a conversion: how many questions were written, and which were left out, with the reason."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Literal

_MANY = 10  # rows: fewer may all be about the first seconds
_EARLY = 0.02  # share of the duration: spans in minutes and durations in seconds end before 1/60


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Something that was left out: a question (``what`` is "question") or one of its spans."""

    where: str
    what: Literal["question", "span"]
    reason: str
    detail: str

    def line(self) -> str:
        return f"{self.where}: {self.reason}" + (f" ({self.detail})" if self.detail else "")


@dataclass(frozen=True, kw_only=True)
class Cut:
    """A span whose end was moved to the end of the video."""

    where: str
    id: str
    from_s: float
    to_s: float


@dataclass(kw_only=True)
class Conversion:
    """The outcome for a whole source. Each of the ``read`` questions is ``written`` or has a problem."""

    format: str
    input: str
    out: str
    read: int = 0
    written: int = 0
    unannotated: int = 0  # questions written without spans, as in the source
    without_duration: int = 0
    latest_end: float | None = None  # where the last span ends, as a share of its video's duration
    on_clips: int = 0  # questions whose times count from the start of a clip
    notes: Counter[str] = field(default_factory=Counter)  # what the format notes -> how many rows it is about
    videos: set[str] = field(default_factory=set)
    not_found: set[str] = field(default_factory=set)  # videos that are not under the video root
    of_two_lengths: set[str] = field(default_factory=set)  # videos with more than one duration
    cut: list[Cut] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def dropped(self) -> int:
        return sum(problem.what == "question" for problem in self.problems)

    @property
    def ends_early(self) -> bool:
        """Whether all spans end within the first percents of their videos, as if units were mixed up."""
        enough = self.written - self.without_duration >= _MANY
        return enough and self.latest_end is not None and self.latest_end < _EARLY

    @property
    def reasons(self) -> dict[str, int]:
        """How many questions were left out, by reason; the most frequent first."""
        return dict(Counter(p.reason for p in self.problems if p.what == "question").most_common())

    def to_json(self) -> dict[str, Any]:
        return {
            "format": self.format,
            "input": self.input,
            "out": self.out,
            "read": self.read,
            "written": self.written,
            "dropped": self.dropped,
            "dropped_by_reason": self.reasons,
            "dropped_spans": len(self.problems) - self.dropped,
            "clamped": len(self.cut),
            "unannotated": self.unannotated,
            "without_duration": self.without_duration,
            "on_clips": self.on_clips,
            "notes": dict(self.notes),
            "latest_end": self.latest_end,
            "videos": len(self.videos),
            "videos_not_found": sorted(self.not_found),
            "videos_of_two_lengths": sorted(self.of_two_lengths),
            "clamped_spans": [vars(cut) for cut in self.cut],
            "problems": [vars(problem) for problem in self.problems],
        }
