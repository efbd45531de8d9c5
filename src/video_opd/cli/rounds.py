"""``video-opd rounds``: score, select, train and evaluate, repeated."""

from __future__ import annotations

import argparse
from pathlib import Path

from video_opd.cli.arguments import add_shared
from video_opd.cli.output import print_json
from video_opd.cli.parser import ALL_SETTINGS, Parser
from video_opd.progress import is_first_process
from video_opd.terminal import print_line, print_lines

HELP = "score, select, train and evaluate, repeated from the last student; repeated, it continues"
EXAMPLE = "video-opd rounds recipes/tiny/rounds.yaml --rounds.count 2 --tvdf.k 128 --run.dir runs/b"
SETTINGS = ALL_SETTINGS


def add_arguments(parser: Parser) -> None:
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file as for train; data.train is the pool")
    add_shared(parser, "--json")


def run(arguments: argparse.Namespace) -> None:
    from video_opd.config import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    recipe.check_rounds()  # before torch is imported
    from video_opd.reports.html import write_report
    from video_opd.reports.runs import read_run
    from video_opd.reports.terminal import before_after
    from video_opd.training.rounds import run_rounds

    def report(folder: Path) -> Path:
        return write_report([folder], folder / "report.html")

    result = run_rounds(recipe, after_round=report)
    if not is_first_process():
        return
    written = report(result.path)
    if arguments.json:
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
