"""The suite's results and what it still needs, for people. No torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

from video_opd.evaluation.general.scores import Accuracy
from video_opd.evaluation.tables import print_rows, say, stdout

if TYPE_CHECKING:
    from rich.console import Console

    from video_opd.evaluation.general.check import Survey
    from video_opd.evaluation.general.suite import SuiteResult

HEADER = ("", "accuracy", "rows", "videos", "notes")


def print_suite(result: SuiteResult, console: Console | None = None) -> None:
    """A row for each benchmark, its subtasks and groups below it, to stdout by default."""
    console = console or stdout()
    rows: list[tuple[str, ...]] = []
    for score in result.scores:
        mean = "mean of subtasks" if score.benchmark.mean == "subtasks" and len(score.tasks) > 1 else ""
        left_out = f"without {', '.join(score.left_out)}" if score.left_out else ""
        rows.append(_row(score.benchmark.title, score.overall, mean, left_out))
        if len(score.tasks) > 1:
            rows += [_row(f"  {name}", part) for name, part in score.tasks.items()]
        rows += [_row(f"  {score.benchmark.group_by}: {name}", part) for name, part in score.groups.items()]
    if len(result.scores) > 1:
        rows.append(("mean of benchmarks", f"{result.mean:.1f}", "", "", ""))
    print_rows(console, HEADER, rows)
    protocol = result.protocol
    answers, video = protocol["answers"], protocol["video"]
    say(
        console,
        f"protocol: lmms-eval {result.versions['lmms-eval']}, greedy, {answers['max_new_tokens']} tokens, "
        f"{video['fps']:g} fps, at most {video['max_frames']} frames and {video['max_video_tokens']} video "
        f"tokens, judge {protocol['judge'] or 'none'}, 95% by {protocol['ci95']}"
        + (f", the first {protocol['limit']} rows of each task" if protocol["limit"] else ""),
    )


def print_survey(found: Survey, console: Console | None = None) -> None:
    """A line for each thing that the suite needs, and below what is missing the way to get it."""
    console = console or stdout()
    for need in found.needs:
        state = "ok" if need.missing is None else need.missing
        say(
            console,
            f"{need.what}: {f'{need.found}, ' if need.found and need.missing else ''}{state}"
            + (f" ({need.found})" if need.found and need.missing is None else ""),
        )
        if need.missing is not None:
            say(console, f"    {need.get}")


def _row(name: str, part: Accuracy, *notes: str) -> tuple[str, ...]:
    low, high = part.ci95
    counts = (("unparsed", part.unparsed), ("missing", part.missing))
    told = [*(note for note in notes if note), *(f"{count} {what}" for what, count in counts if count)]
    return (
        name,
        f"{part.accuracy:.1f} [{low:.1f}, {high:.1f}]",
        str(part.n),
        str(part.videos),
        ", ".join(told),
    )
