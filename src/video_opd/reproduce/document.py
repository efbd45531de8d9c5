"""``docs/reproduction.md`` from the results: who leads where, and every claim with its figures. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

from video_opd.errors import UserError
from video_opd.files import read_text
from video_opd.reproduce.claims import FAILS, HOLDS, OPEN, SEEDS, Claim, Difference

Results = Mapping[str, Mapping[str, Any]]
"""The content of a result's file, by the experiment's name."""

REPEATED = "repeated"  # the folder, inside that of the results, with results of the same that were made again


def read_results(folder: str | Path, experiments: Mapping[str, ModuleType]) -> Results:
    """The results in a folder, ``NAME.json`` each. Raises UserError for a file that is not such a result."""
    found = {}
    for name in experiments:
        path = Path(folder) / f"{name}.json"
        if path.exists():
            try:
                found[name] = json.loads(read_text(path))
                experiments[name].claims(found[name]["result"])
            except (ValueError, KeyError, TypeError) as error:
                raise UserError(f"{path} is no result of {name}: {error}") from error
    return found


def document(results: Results, experiments: Mapping[str, ModuleType], repeated: Results | None = None) -> str:
    """The page as Markdown. ``repeated`` are results of the same experiments, made again."""
    parts = [(resources.files("video_opd.reproduce") / "templates" / "head.md").read_text(encoding="utf-8")]
    made = {name: experiments[name].claims(record["result"]) for name, record in results.items()}
    parts.append("\n".join(_map(results, experiments)))
    parts.append("\n".join(_claims(results, made)))
    parts.append("\n".join(_repeated(results, made, repeated, experiments)))
    for name, record in results.items():
        parts.append("\n".join(_section(experiments[name], record)))
    missing = [experiment.TITLE for name, experiment in experiments.items() if name not in results]
    if missing:
        parts.append("## Not run\n\n" + "\n".join(f"* {title}" for title in missing) + "\n")
    return "\n".join(parts)


def _map(results: Results, experiments: Mapping[str, ModuleType]) -> Iterator[str]:
    """The method that leads at each level of annotation noise, from each start."""
    rows = [
        row
        for name, record in results.items()
        if hasattr(experiments[name], "leaders")
        for row in experiments[name].leaders(record["result"])
    ]
    if rows:
        yield "## Which method when\n"
        yield (
            "The method that leads, by the student's mean IoU before and by how loose the annotations are, "
            "and the methods whose difference from it has an interval with 0 inside:\n"
        )
        yield "| student before | annotation noise | leads | its mean IoU | cannot be told from it |"
        yield "|---|---|---|---|---|"
        yield from (f"| {' | '.join(row)} |" for row in rows)
        yield ""


def agree(one: Difference, other: Difference) -> bool:
    """Whether each difference lies inside of the other's interval."""
    return one.low <= other.rise <= one.high and other.low <= one.rise <= other.high


def _repeated(
    results: Results,
    made: Mapping[str, Sequence[Claim]],
    repeated: Results | None,
    experiments: Mapping[str, ModuleType],
) -> Iterator[str]:
    """The claims of repeated experiments, beside those of the first time."""
    again = {name: record for name, record in (repeated or {}).items() if name in made}
    if again:
        yield "## Repeated\n"
        yield (
            "Runs made again from nothing, with the same seeds or some of them. Two results agree if each "
            "difference lies in the other's interval:\n"
        )
        for name, record in again.items():
            yield f"* {experiments[name].TITLE}: first {_made_by(results[name])}; again {_made_by(record)}"
        yield ""
        yield "| claim | where | first | again | agree |"
        yield "|---|---|---|---|---|"
        for name, record in again.items():
            for first, second in zip(made[name], experiments[name].claims(record["result"]), strict=True):
                word = "yes" if agree(first.difference, second.difference) else "no"
                yield f"| {first.says} | {first.where} | {first.difference} | {second.difference} | {word} |"
        yield ""


def _claims(results: Results, made: Mapping[str, Sequence[Claim]]) -> Iterator[str]:
    claims = [(name, claim) for name, found in made.items() for claim in found]
    if not claims:
        yield "## Claims\n\nNo experiment has been run.\n"
        return
    counts = {word: sum(claim.verdict == word for _, claim in claims) for word in (HOLDS, FAILS, OPEN)}
    yield "## Claims\n"
    yield (
        ", ".join(f"{count} {'claim' if count == 1 else 'claims'}: {word}" for word, count in counts.items())
        + ".\n"
    )
    yield "| claim | source | where | of | rise [95%] | above 0 | verdict | command |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, claim in claims:
        found = claim.difference
        said = (claim.says, claim.source, claim.where, claim.score)
        cells = (*said, str(found), found.count_above, claim.verdict)
        yield f"| {' | '.join(cells)} | `{_command(name, results[name])}` |"
    yield ""


def _command(name: str, record: Mapping[str, Any]) -> str:
    seeds = len(record["seeds"])
    return f"video-opd reproduce --suite {name}" + ("" if seeds == SEEDS else f" --seeds {seeds}")


def _made_by(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    where = ", ".join(str(machine[key]) for key in ("processor", "platform") if machine.get(key))
    return f"commit {(record['commit'] or 'unknown')[:7]} on {where or 'a machine without a name'}"


def _commits(record: Mapping[str, Any]) -> str:
    """The commit that made the result, and those at which runs were made, if these are others."""
    made, runs = record["commit"] or "unknown", record.get("commits_of_runs", [])
    return f"commit {made}" + (f", runs of {', '.join(runs)}" if set(runs) - {made} else "")


def _section(experiment: ModuleType, record: Mapping[str, Any]) -> Iterator[str]:
    machine = record["machine"]
    yield f"## {experiment.TITLE}\n"
    yield (
        f"Seeds {', '.join(map(str, record['seeds']))}; {_commits(record)}; "
        f"{machine['cpus']} CPU cores, torch {machine['torch']}.\n"
    )
    yield from experiment.tables(record["result"])
