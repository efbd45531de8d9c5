"""``video-opd data stats``: what a data file holds."""

from __future__ import annotations

import argparse

from video_opd.cli.arguments import add_shared, positive
from video_opd.cli.output import print_json
from video_opd.cli.parser import VIDEO_SETTINGS, Parser
from video_opd.progress import log
from video_opd.terminal import print_lines

HELP = "describe a data file: durations, spans, queries, sources, tokens"
EXAMPLE = "video-opd data stats train.jsonl --size 640x360 --html stats.html"
SETTINGS = VIDEO_SETTINGS


def add_arguments(parser: Parser) -> None:
    parser.add_argument("data", reads="file", metavar="DATA", help="a data file (JSON Lines)")
    add_shared(parser, "--video-root")
    parser.add_argument("--html", writes="file", metavar="OUT.html", help="also write one page with charts")
    tokens = parser.exclusive()
    tokens.add_argument(
        "--size", type=_size, metavar="WxH", help="count tokens as if every video had this size, e.g. 640x360"
    )
    tokens.add_argument(
        "--probe", action="store_true", help="open every video to count its tokens; repeated, it continues"
    )
    parser.add_argument(
        "--out",
        writes="file",
        writes_if=lambda arguments: arguments.probe,  # it is read otherwise
        metavar="C.jsonl",
        help="what --probe or data check found; default: DATA.check.jsonl",
    )
    parser.add_argument(
        "--workers", type=positive, default=4, metavar="N", help="threads of --probe; default: 4"
    )
    add_shared(parser, "--json")


def run(arguments: argparse.Namespace) -> None:
    from video_opd.convert import check
    from video_opd.convert.describe import describe, read_budget
    from video_opd.convert.terminal import stats_lines
    from video_opd.data.annotations import read_annotations

    budget = read_budget(arguments.overrides)
    annotations = read_annotations(arguments.data, arguments.video_root)
    out = arguments.out or check.default_out(arguments.data)
    if arguments.probe:
        checked = check.check_videos(annotations.samples, out, check.CheckSettings(workers=arguments.workers))
    else:
        checked = check.known_videos(annotations.samples, out)
    record = describe(annotations, budget, size_px=arguments.size, checked=checked)
    record = {"data": arguments.data, **record}
    if arguments.json:
        print_json(record)
    else:
        print_lines(stats_lines(record))
    if arguments.html:
        from video_opd.reports.dataset import write_page

        log(f"wrote {write_page(record, arguments.html)}")


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, e.g. 640x360")
    return int(width), int(height)
