"""The suite's results and requirements, printed. No torch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

from video_opd.evaluation.notes import interval_text
from video_opd.suites.accuracy import Accuracy
from video_opd.terminal import print_rows, say, stdout

if TYPE_CHECKING:
    from rich.console import Console

    from video_opd.suites.requirements import Survey
    from video_opd.suites.suite import SuiteResult

MOST_NAMES = 2  # more subtasks that were left out are counted, not named
HEADER = ("", "accuracy", "rows", "videos", "notes")


def print_suite(result: SuiteResult, console: Console | None = None) -> None:
    """Prints a row for each benchmark, with its subtasks and groups below it; to stdout by default."""
    console = console or stdout()
    rows: list[tuple[str, ...]] = []
    for score in result.scores:
        mean = "mean of subtasks" if score.benchmark.mean == "subtasks" and len(score.tasks) > 1 else ""
        rows.append(_row(score.benchmark.title, score.overall, mean, _without(score.left_out)))
        if len(score.tasks) > 1:
            rows += [_row(f"  {name}", accuracy) for name, accuracy in score.tasks.items()]
        rows += [
            _row(f"  {score.benchmark.group_by}: {name}", accuracy) for name, accuracy in score.groups.items()
        ]
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
    """Prints a line for each thing that the suite needs, and below a missing one the way to get it."""
    console = console or stdout()
    for need, after in itertools.zip_longest(found.needs, found.needs[1:]):
        say(console, f"{need.what}: {', '.join(filter(None, (need.found, need.missing or 'ok')))}")
        if need.missing is not None and (after is None or after.get != need.get):  # said once for several
            say(console, f"    {need.get}")


def _row(name: str, accuracy: Accuracy, *notes: str) -> tuple[str, ...]:
    counts = (("unparsed", accuracy.unparsed), ("missing", accuracy.missing))
    told = [*(note for note in notes if note), *(f"{count} {what}" for what, count in counts if count)]
    return (
        name,
        f"{accuracy.accuracy:.1f} {interval_text(accuracy.ci95)}".strip(),
        str(accuracy.n),
        str(accuracy.videos),
        ", ".join(told),
    )


def _without(names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"without {', '.join(names)}" if len(names) <= MOST_NAMES else f"without {len(names)} subtasks"
