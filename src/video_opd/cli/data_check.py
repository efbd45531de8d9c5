"""``video-opd data check``: which rows of a data file cannot be used."""

from __future__ import annotations

import argparse

from video_opd.cli.arguments import add_shared, positive
from video_opd.cli.output import print_json
from video_opd.cli.parser import NO_SETTINGS, Parser
from video_opd.terminal import print_lines

HELP = "open every video and find what cannot be used; exit code 1 if there is any; repeated, it continues"
EXAMPLE = "video-opd data check train.jsonl --write-good train-good.jsonl"
SETTINGS = NO_SETTINGS


def add_arguments(parser: Parser) -> None:
    parser.add_argument("data", reads="file", metavar="DATA", help="a data file (JSON Lines)")
    add_shared(parser, "--video-root")
    parser.add_argument(
        "--out",
        writes="file",
        metavar="C.jsonl",
        help="what the videos hold; default: DATA.check.jsonl",
    )
    parser.add_argument(
        "--write-good", writes="file", metavar="OUT.jsonl", help="write the rows without problems there"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds by which a duration or a span's end may differ from the video's; default: %(default)s",
    )
    parser.add_argument(
        "--decode", action="store_true", help="also decode the frames that a model is shown: thorough, slow"
    )
    parser.add_argument("--workers", type=positive, default=4, metavar="N", help="default: %(default)s")
    add_shared(parser, "--json")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when a row cannot be used."""
    from video_opd.config import VideoConfig
    from video_opd.convert.check import CheckSettings, check, default_out
    from video_opd.convert.terminal import check_lines

    record = check(
        arguments.data,
        arguments.out or default_out(arguments.data),
        video_root=arguments.video_root,
        settings=CheckSettings(
            tolerance_s=arguments.tolerance,
            decode=VideoConfig() if arguments.decode else None,
            workers=arguments.workers,
        ),
        good=arguments.write_good,
    )
    if arguments.json:
        print_json(record)
    else:
        print_lines(check_lines(record))
    return 1 if record["problems"] else 0
