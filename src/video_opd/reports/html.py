"""One self-contained HTML file about one or several runs: tables, curves, failures on frames, tokens.

No script, no font and no picture is fetched: the file can be mailed, archived and opened offline. A content
security policy allows the page its own script and pictures, and nothing else. Text that comes from data
(queries, responses, paths) is escaped by the template engine.
"""

from __future__ import annotations

import base64
import functools
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.errors import UserError
from video_opd.evaluation.failures import SHOWN
from video_opd.files import write_text
from video_opd.progress import log
from video_opd.reports import story, tables
from video_opd.reports.curves import curves, round_curves
from video_opd.reports.gallery import MOST_TIMELINES, Pictures, gallery, timeline
from video_opd.reports.pairs import differences, widest
from video_opd.reports.runs import Run, read_run
from video_opd.reports.selections import (
    EXAMPLE_HEADER,
    round_selections,
    selection_chart,
    selection_tables,
)
from video_opd.reports.tokens import HOW_TO_ASK, TOKEN_HELP, Explainer, strength
from video_opd.terminal import visible

if TYPE_CHECKING:
    from jinja2 import Environment

# Of each of several runs, fewer examples are shown: failures of a kind and test set, and timelines.
FEW_FAILURES, FEW_TIMELINES = 1, 2


@dataclass(frozen=True, kw_only=True)
class Reload:
    """A page that is watched loads itself every ``every_s`` seconds.

    It stops if it is loaded after ``until_s`` (seconds since 1970): nobody writes it any more then.
    """

    every_s: float
    until_s: float


def write_report(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Reads the run folders and writes one HTML file, whole or not at all.

    The page and stderr name what a run's files held and could not be used. Raises UserError for a folder
    that is not a run's, and when the file cannot be written.
    """
    written = write_text(out, render(read_runs(run_dirs)))
    log(f"wrote {written}")
    return written


def read_runs(run_dirs: Sequence[str | Path], *, tell: bool = True) -> list[Run]:
    """Reads the run folders; ``tell`` names on stderr what could not be used."""
    if not run_dirs:
        raise UserError("a report needs at least one run folder")
    runs = [read_run(folder) for folder in run_dirs]
    for run in runs if tell else ():
        for line in run.left_out:
            log(f"{run.folder}: left out: {line}")
    return runs


def render(runs: Sequence[Run], *, reload: Reload | None = None) -> str:
    """Returns the page as text; ``reload`` makes it load itself again and again."""
    from markupsafe import Markup

    template = environment().get_template("report.html.j2")
    script = environment().get_template("report.js").render()
    single = len(runs) == 1
    comparison = None if single else tables.compare(runs)
    rises = [] if single else differences(runs)
    pictures, explainer = Pictures(), Explainer()
    return template.render(
        title=runs[0].name if single else f"{len(runs)} runs",
        content_security_policy=content_security_policy(script),
        script=Markup(script),
        reload=reload,
        comparison=comparison,
        differences=rises,
        most_rise=widest(rises),
        settings=[] if comparison is None else [[name, *values] for name, values in comparison.settings],
        overlay=[] if single else curves(runs),
        sections=[_section(run, single, pictures, explainer) for run in runs],
        legend=[(f"{r:+g}" if r else "0", strength(r)) for r in (-2, -1, -0.5, 0, 0.5, 1, 2)],
        how_to_ask=HOW_TO_ASK,
        example_header=EXAMPLE_HEADER,
    )


def content_security_policy(script: str) -> str:
    """Returns what a page with this script may load and run: the script itself, and pictures in the page."""
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return (
        "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
        f"script-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    )


@functools.cache
def environment() -> Environment:
    """Returns the template engine, which compiles each template once.

    It escapes everything from data, and a missing value is an error.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    engine = Environment(
        loader=PackageLoader("video_opd.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    engine.filters["visible"] = visible
    return engine


def _section(run: Run, single: bool, pictures: Pictures, explainer: Explainer) -> dict[str, Any]:
    failures = gallery(run, pictures, explainer, SHOWN if single else FEW_FAILURES)
    most = MOST_TIMELINES if single else FEW_TIMELINES
    early, late = explainer.rollouts(run)
    return {
        "run": run,
        "method": story.METHODS.get(run.method, run.method),
        "headline": story.headline(run),
        "tiles": story.tiles(run),
        "outcome": story.outcome(run),
        "outcome_header": story.OUTCOME_HEADER,
        "blocks": tables.blocks(run),
        "facts": tables.selection_facts(run.selection or {}),
        "histogram": selection_chart(run.selection or {}),
        "rounds": tables.rounds_table(run),
        "round_header": tables.ROUND_HEADER,
        "round_charts": [*round_curves(run), *round_selections(run)],
        "selections": selection_tables(run),
        "charts": curves([run]) if single else [],
        "failures": failures,
        "timelines": [timeline(row, pictures) for row in run.timelines[:most]],
        "timelines_left_out": max(0, len(run.timelines) - most),
        "token_help": TOKEN_HELP.get(run.method, TOKEN_HELP["video-opd"]),
        "early": early,
        "explained": any(token.identity for view in (*early, *late) for token in view.tokens),
        "late": late,
        "environment": tables.table(run.environment),
    }
