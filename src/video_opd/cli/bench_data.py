"""``video-opd bench data``: what the path from a video file to a prompt costs."""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from video_opd.cli.arguments import positive
from video_opd.cli.output import write_json
from video_opd.cli.parser import VIDEO_SETTINGS, Parser
from video_opd.terminal import print_text

HELP = "from a video file to a prompt, against qwen-vl-utils and the processor"
EXAMPLE = "video-opd bench data holiday.mp4 lecture.mkv --json data.json"
SETTINGS = VIDEO_SETTINGS


def add_arguments(parser: Parser) -> None:
    parser.add_argument(
        "videos", reads="file", nargs="*", metavar="VIDEO", help="default: three that are made"
    )
    parser.add_argument(
        "--model", metavar="M", help="the model whose processor is used; default: the shipped tiny base"
    )
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="turns; default: 5")
    parser.add_argument("--workers", type=positive, default=2, metavar="N", help="default: 2")
    parser.add_argument("--json", writes="file", metavar="OUT.json", help="also write everything there")


def run(arguments: argparse.Namespace) -> None:
    import torch

    from video_opd.bench.data import bench_data, make_videos, table
    from video_opd.bench.timing import machine
    from video_opd.convert.describe import read_budget
    from video_opd.models.loading import load_processor
    from video_opd.world.shipped import shipped

    processor = load_processor(arguments.model or shipped("tiny-base"))
    budget = read_budget(arguments.overrides)
    with tempfile.TemporaryDirectory() as folder:
        videos = [Path(video) for video in arguments.videos]
        videos = videos or make_videos(Path(folder), (10, 60, 180), (360, 640))
        results = bench_data(
            processor, videos, budget=budget, repeats=arguments.repeats, workers=arguments.workers
        )
    if arguments.json:
        record = {"command": sys.argv[1:], "machine": machine(torch.device("cpu")), "results": results}
        write_json(arguments.json, record)
    print_text(table(results))
