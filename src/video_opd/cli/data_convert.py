"""``video-opd data convert``: a data file from a public format of annotations."""

from __future__ import annotations

import argparse

from video_opd.cli.arguments import add_shared, positive
from video_opd.cli.output import print_json
from video_opd.cli.parser import NO_SETTINGS, Parser
from video_opd.errors import UserError
from video_opd.terminal import print_lines

HELP = "make a data file from a public format of annotations"
EXAMPLE = "video-opd data convert charades_sta_test.json --video-root Charades_v1 --out charades.jsonl"
SETTINGS = NO_SETTINGS


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "words",
        reads="file",
        nargs="*",
        metavar="[FORMAT] INPUT",
        help="the annotations, and the name of their format if it is not to be recognised",
    )
    parser.add_argument("--out", writes="file", metavar="D.jsonl", help="the new data file")
    parser.add_argument(
        "--list-formats", action="store_true", help="convert nothing: show the formats and how they look"
    )
    parser.add_argument("--video-root", metavar="DIR", help="where the videos are; they are looked up there")
    parser.add_argument(
        "--source", metavar="NAME", help="the source of all rows; default: the rows' own, or the format's"
    )
    parser.add_argument(
        "--durations",
        reads="file",
        action="append",
        default=[],
        metavar="FILE",
        help="JSON {vid: seconds} or a CSV with id and length; may be given several times",
    )
    parser.add_argument(
        "--probe", action="store_true", help="ask the videos for durations that are not stated anywhere"
    )
    parser.add_argument("--split", metavar="NAME", help="the split, for a folder or a set that has several")
    parser.add_argument(
        "--clips",
        choices=("cut", "whole"),
        default="cut",
        help="rows about a stretch of a video: a file holds that stretch alone (cut, the default) or the "
        "whole video (whole: their times are moved)",
    )
    parser.add_argument(
        "--workers", type=positive, default=4, metavar="N", help="threads of --probe; default: 4"
    )
    add_shared(parser, "--json")


def run(arguments: argparse.Namespace) -> None:
    from video_opd.convert.terminal import conversion_lines, format_lines

    if arguments.list_formats:
        if arguments.json:
            from video_opd.convert.formats import FORMATS

            print_json({name: format.layout for name, format in FORMATS.items()})
            return
        print_lines(format_lines())
        return
    if not 1 <= len(arguments.words) <= 2:
        raise UserError("convert needs INPUT, or FORMAT and INPUT; see video-opd data convert --help")
    if arguments.out is None:
        raise UserError("convert needs --out, the data file to write; see video-opd data convert --help")
    from video_opd.convert.conversion import ConvertSettings, convert
    from video_opd.convert.formats.durations import read_durations

    *format, source = arguments.words
    settings = ConvertSettings(
        video_root=arguments.video_root,
        name=arguments.source,
        durations=read_durations(arguments.durations),
        probe=arguments.probe,
        workers=arguments.workers,
        clips=arguments.clips,
        split=arguments.split,
    )
    result = convert(source, arguments.out, format[0] if format else None, settings)
    if arguments.json:
        print_json(result.to_json())
    else:
        print_lines(conversion_lines(result))
