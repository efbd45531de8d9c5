"""``video-opd reproduce``: the paper's tables on the generated world."""

from __future__ import annotations

import argparse
from pathlib import Path

from video_opd.cli.arguments import positive
from video_opd.cli.parser import NO_SETTINGS, Parser
from video_opd.progress import log
from video_opd.reproduce.claims import SEEDS
from video_opd.terminal import print_text

HELP = "the paper's tables and figures on the generated world; repeated, it continues"
EXAMPLE = "video-opd reproduce --suite tables --seeds 3"
SETTINGS = NO_SETTINGS


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "--suite",
        default="all",
        metavar="NAME",
        help="tables, figures, studies, all, or one experiment, such as table-1; default: %(default)s",
    )
    parser.add_argument("--seeds", type=positive, default=SEEDS, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--out",
        writes="folder",
        writes_if=lambda arguments: not arguments.no_runs,
        default="runs/reproduce",
        metavar="DIR",
        help="for videos and runs; default: %(default)s",
    )
    parser.add_argument(
        "--results",
        writes="folder",
        writes_if=lambda arguments: not arguments.no_runs,
        default="runs/reproduction",
        metavar="DIR",
        help="for NAME.json of each experiment; default: %(default)s",
    )
    parser.add_argument("--page", writes="file", metavar="PAGE.md", help="also write all results as one page")
    parser.add_argument("--no-runs", action="store_true", help="only print or write the page of the results")
    parser.add_argument(
        "--jobs", type=positive, default=2, metavar="N", help="commands at a time; default: %(default)s"
    )


def run(arguments: argparse.Namespace) -> None:
    from video_opd.files import write_text
    from video_opd.reproduce.document import REPEATED, document, read_results
    from video_opd.reproduce.experiments import EXPERIMENTS, chosen, with_models

    experiments = chosen(arguments.suite)
    if not arguments.no_runs:
        from video_opd.reproduce.reproduce import reproduce

        ready = with_models(experiments)
        reproduce(ready, arguments.out, arguments.results, seeds=arguments.seeds, jobs=arguments.jobs)
    results = Path(arguments.results)
    page = document(
        read_results(results, EXPERIMENTS), EXPERIMENTS, read_results(results / REPEATED, EXPERIMENTS)
    )
    if arguments.page:
        log(f"wrote {write_text(Path(arguments.page), page)}")
    else:
        print_text(page)
