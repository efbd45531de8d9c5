"""``video-opd report``: run folders as one HTML file."""

from __future__ import annotations

import argparse

from video_opd.cli.parser import NO_SETTINGS, Parser
from video_opd.terminal import print_line

HELP = "one HTML file about one or several runs"
EXAMPLE = "video-opd report runs/a runs/b --out report.html"
SETTINGS = NO_SETTINGS
WATCH_S = 5.0  # between two looks at the run folders


def add_arguments(parser: Parser) -> None:
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument(
        "--out", writes="file", required=True, metavar="report.html", help="the file to write"
    )
    parser.add_argument(
        "--watch",
        nargs="?",
        type=seconds,
        const=WATCH_S,
        metavar="SECONDS",
        help=f"write it again while the runs go on, and reload the open page; default: every {WATCH_S:g} s",
    )


def seconds(text: str) -> float:
    number = float(text)
    if not 0.1 <= number <= 3600:
        raise argparse.ArgumentTypeError(f"{text} is not between 0.1 and 3600")
    return number


def run(arguments: argparse.Namespace) -> None:
    if arguments.watch is None:
        from video_opd.reports.html import write_report

        print_line(str(write_report(arguments.runs, arguments.out)))
    else:
        from video_opd.reports.watch import watch_report

        print_line(str(watch_report(arguments.runs, arguments.out, arguments.watch)))
