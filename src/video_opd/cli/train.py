"""``video-opd train``: one post-training run."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from video_opd.cli.arguments import add_shared
from video_opd.cli.output import locked_outputs, print_json
from video_opd.cli.parser import ALL_SETTINGS, Output, Parser
from video_opd.progress import is_first_process
from video_opd.terminal import print_line

HELP = "one post-training run; repeated, it continues"
EXAMPLE = "video-opd train recipes/tiny/video-opd.yaml --optim.lr 1e-4 --run.dir runs/a"
SETTINGS = ALL_SETTINGS


def add_arguments(parser: Parser) -> None:
    parser.add_argument("recipe", reads="file", metavar="RECIPE", help="a YAML file")
    add_shared(parser, "--json")


def run(arguments: argparse.Namespace) -> None:
    from video_opd.config import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)  # before torch is imported
    with locked_outputs([Output(recipe.run.dir, "folder")]):
        from video_opd.reports.html import write_report
        from video_opd.training.loop import train

        result = train(recipe)
        report = result.path / "report.html"
        if is_first_process():
            write_report([result.path], report)
    if not is_first_process():
        return
    if arguments.json:
        print_json({**asdict(result), "report": report})
    else:
        print_line(f"{result.steps} steps; model: {result.model}; report: {report}")
