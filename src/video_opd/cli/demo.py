"""``video-opd demo``: the main job on embedded defaults."""

from __future__ import annotations

import argparse
from pathlib import Path

from video_opd.cli.arguments import add_shared, positive
from video_opd.cli.parser import NO_SETTINGS, Parser
from video_opd.terminal import print_line, print_lines

HELP = "generated videos, tiny models: select, train, evaluate, report"
EXAMPLE = "video-opd demo --out runs/demo --seed 0"
SETTINGS = NO_SETTINGS


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--out", writes="folder", default="runs/demo", metavar="DIR", help="default: %(default)s"
    )
    add_shared(parser, "--seed")
    parser.add_argument("--steps", type=positive, metavar="N", help="optimiser steps; fewer for a quick look")


def run(arguments: argparse.Namespace) -> None:
    from video_opd.reports.html import write_report
    from video_opd.reports.runs import read_run
    from video_opd.reports.terminal import before_after
    from video_opd.world.demo import run_demo

    folder = run_demo(Path(arguments.out), seed=arguments.seed, steps=arguments.steps)
    written = write_report([folder], Path(arguments.out) / "report.html")
    print_lines(before_after(read_run(folder)))
    print_line(f"report: {written}")
