"""``video-opd report``: run folders as one HTML file."""

from __future__ import annotations

import argparse

from video_opd.cli.parser import NO_SETTINGS, Parser
from video_opd.terminal import print_line

HELP = "one HTML file about one or several runs"
EXAMPLE = "video-opd report runs/a runs/b --out report.html"
SETTINGS = NO_SETTINGS


def add_arguments(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--out", writes="file", required=True, metavar="report.html", help="the file to write"
    )


def run(arguments: argparse.Namespace) -> None:
    from video_opd.reports.html import write_report

    print_line(str(write_report(arguments.runs, arguments.out)))
