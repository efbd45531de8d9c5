"""``video-opd world make``: the generated videos."""

from __future__ import annotations

import argparse

from video_opd.cli.arguments import add_shared, positive
from video_opd.cli.output import print_json
from video_opd.cli.parser import NO_SETTINGS, Parser
from video_opd.progress import track
from video_opd.terminal import print_line
from video_opd.world import DEFAULT_VIDEOS

HELP = "render videos with exactly known events"
EXAMPLE = "video-opd world make --out world --videos train=200 short=40"
SETTINGS = NO_SETTINGS
_DEFAULTS = " ".join(f"{split}={n}" for split, n in DEFAULT_VIDEOS.items())


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--out", writes="folder", required=True, metavar="DIR", help="the folder to write")
    parser.add_argument(
        "--videos",
        nargs="+",
        type=_count_of,
        metavar="SPLIT=N",
        help=f"the splits to make, and how many videos of each; default: {_DEFAULTS}",
    )
    parser.add_argument(
        "--annotation-noise",
        type=float,
        default=0.0,
        metavar="LEVEL",
        help="how wrong the annotations of the split train are: 0 exact (default), 1 as loose as the web's",
    )
    add_shared(parser, "--seed")
    parser.add_argument(
        "--workers", type=positive, metavar="N", help="rendering processes; default: all cores"
    )
    add_shared(parser, "--json")


def run(arguments: argparse.Namespace) -> None:
    from video_opd.world.make import make_world

    files = make_world(
        arguments.out,
        videos=None if arguments.videos is None else dict(arguments.videos),
        seed=arguments.seed,
        annotation_noise=arguments.annotation_noise,
        workers=arguments.workers,
        track=track,
    )
    if arguments.json:
        print_json({split: str(path) for split, path in files.items()})
        return
    for split, path in files.items():
        print_line(f"{split}: {path}")


def _count_of(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not name or not number.isdecimal():
        raise argparse.ArgumentTypeError(
            f"{text!r} is not SPLIT=N, e.g. train=200; the splits are {', '.join(DEFAULT_VIDEOS)}"
        )
    return name, int(number)
