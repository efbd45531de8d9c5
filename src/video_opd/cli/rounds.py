"""``video-opd rounds``: score, select, train and evaluate, repeated."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from video_opd.cli.arguments import add_shared
from video_opd.cli.output import locked_outputs, print_json
from video_opd.cli.parser import ALL_SETTINGS, Output, Parser
from video_opd.progress import is_first_process
from video_opd.terminal import print_line, print_lines

if TYPE_CHECKING:
    from video_opd.config import Recipe

HELP = "score, select, train and evaluate, repeated from the last student; repeated, it continues"
EXAMPLE = "video-opd rounds recipes/tiny/rounds.yaml --rounds.count 2 --tvdf.k 128 --run.dir runs/b"
SETTINGS = ALL_SETTINGS


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "recipe", reads="file", metavar="RECIPE", help="a YAML file as for train; data.train is the pool"
    )
    add_shared(parser, "--json")


def run(arguments: argparse.Namespace) -> None:
    from video_opd.config import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    recipe.check_rounds()  # before torch is imported
    with locked_outputs([Output(recipe.run.dir, "folder")]):
        _run(recipe, as_json=arguments.json)


def _run(recipe: Recipe, *, as_json: bool) -> None:
    from video_opd.reports.html import write_report
    from video_opd.reports.runs import read_run
    from video_opd.reports.terminal import before_after
    from video_opd.training.rounds import run_rounds

    written = Path(recipe.run.dir) / "report.html"
    result = run_rounds(recipe, after_round=lambda folder: write_report([folder], written))
    if not is_first_process():
        return
    if as_json:
        print_json({"path": result.path, "model": result.model, "report": written, **result.summary})
        return
    for record in result.summary["rounds"]:
        counts = f"{record['selected']} of {record['rows']} rows, {record['steps']} steps"
        print_line(f"round {record['round']}: {counts}; model: {result.path / record['model']}")
    finished = read_run(result.path)
    if finished.testsets:
        print_lines(before_after(finished))
    if result.summary["ended"]:
        print_line(result.summary["ended"])
    print_line(f"report: {written}")
