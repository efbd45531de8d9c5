"""``docs/reproduction.md`` from the results: every claim with its figures, and who wins where. No torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources
from pathlib import Path
from types import ModuleType
from typing import Any

from video_opd.errors import UserError
from video_opd.files import read_text
from video_opd.reproduce.claims import FAILS, HOLDS, OPEN, Claim

Results = Mapping[str, Mapping[str, Any]]
"""The content of a result's file, by the experiment's name."""


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


def document(results: Results, experiments: Mapping[str, ModuleType]) -> str:
    """The page as Markdown."""
    parts = [(resources.files("video_opd.reproduce") / "templates" / "head.md").read_text(encoding="utf-8")]
    made = {name: experiments[name].claims(record["result"]) for name, record in results.items()}
    parts.append("\n".join(_claims(made)))
    for name, record in results.items():
        parts.append("\n".join(_section(experiments[name], record)))
    missing = [experiment.TITLE for name, experiment in experiments.items() if name not in results]
    if missing:
        parts.append("## Not run\n\n" + "\n".join(f"* {title}" for title in missing) + "\n")
    return "\n".join(parts)


def _claims(made: Mapping[str, Sequence[Claim]]) -> Iterator[str]:
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
    yield "| claim | source | where | of | rise [95%] | seeds above | verdict | command |"
    yield "|---|---|---|---|---|---|---|---|"
    for name, claim in claims:
        seeds = f"{claim.difference['seeds_above']} of {claim.difference['seeds']}"
        cells = (claim.says, claim.source, claim.where, claim.score, claim.figures, seeds, claim.verdict)
        yield f"| {' | '.join(cells)} | `video-opd reproduce --suite {name}` |"
    yield ""


def _section(experiment: ModuleType, record: Mapping[str, Any]) -> Iterator[str]:
    machine = record["machine"]
    yield f"## {experiment.TITLE}\n"
    yield (
        f"Seeds {', '.join(map(str, record['seeds']))}; commit {record['commit'] or 'unknown'}; "
        f"{machine['cpus']} CPU cores, torch {machine['torch']}.\n"
    )
    yield from experiment.tables(record["result"])
