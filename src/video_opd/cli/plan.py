"""``video-opd plan``: the memory and time that a recipe needs, before it is started. It needs no torch."""

from __future__ import annotations

import argparse
import math
from pathlib import Path

from video_opd.cli.arguments import add_shared, positive
from video_opd.cli.output import print_json
from video_opd.cli.parser import ALL_SETTINGS, Parser
from video_opd.planning.rate import DEFAULT_RATE
from video_opd.progress import log
from video_opd.terminal import print_line

HELP = "the memory and time that a recipe needs, before it is started"
EXAMPLE = "video-opd plan recipes/qwen3-vl-8b/video-opd.yaml --gpus 8 --gpu-memory 80 --suggest"
SETTINGS = ALL_SETTINGS
MOST_GPUS = 4096
OF_ROUNDS = (
    "this is the plan of train, on all rows of the data file: rounds trains on tvdf.k of them each time, and "
    "scores and evaluates besides"
)
FORMER_RATE = "--matrix-rate"  # the former name of --rate


def add_arguments(parser: Parser) -> None:
    parser.add_argument("recipe", reads="file", metavar="RECIPE", help="a YAML file")
    parser.add_argument("--gpus", type=_gpus, default=1, metavar="N", help="default: %(default)s")
    parser.add_argument(
        "--gpu-memory",
        type=_gib,
        required=True,
        metavar="GIB",
        help="of each GPU, e.g. 80; one GiB is 2^30 bytes",
    )
    parser.add_argument(
        "--suggest",
        action="store_true",
        help="also say what to change if it does not fit, as lines of a recipe",
    )
    parser.add_argument(
        "--rate",
        type=_rate,
        default=DEFAULT_RATE,
        metavar="TFLOPS",
        help="what a GPU attains over a whole step; default: %(default)g, an H200 in bfloat16",
    )
    parser.add_argument(FORMER_RATE, type=_rate, help=argparse.SUPPRESS)
    add_shared(parser, "--json")


def run(arguments: argparse.Namespace) -> int:
    """Exit code 1 when the recipe does not fit."""
    from video_opd.config import load_recipe
    from video_opd.data.annotations import read_annotations
    from video_opd.planning.plan import make_plan
    from video_opd.planning.suggest import gpus_needed, suggest
    from video_opd.planning.terminal import plan_lines, suggestion_lines

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    samples = None
    if Path(recipe.data.train).is_file():
        samples = read_annotations(recipe.data.train, recipe.data.video_root).samples
    memory_bytes = int(arguments.gpu_memory * 2**30)
    rate_tflops = arguments.rate
    if arguments.matrix_rate is not None:
        log(f"{FORMER_RATE} is called --rate now")
        rate_tflops = arguments.matrix_rate
    plan = make_plan(recipe, arguments.gpus, memory_bytes, samples=samples, rate_tflops=rate_tflops)
    record, lines = plan.to_json(), list(plan_lines(plan))
    if "k" in recipe.given().get("tvdf", {}):
        record["note"] = OF_ROUNDS
        lines += ["", OF_ROUNDS]
    if arguments.suggest:
        found = suggest(recipe, arguments.gpus, memory_bytes, samples=samples, sizes=plan.sizes)
        larger = None
        if not found.plan.fits:
            larger = gpus_needed(recipe, arguments.gpus, memory_bytes, samples=samples, sizes=plan.sizes)
        record["suggestion"] = {**found.to_json(), "gpus_needed": larger}
        lines += ["", *suggestion_lines(found, larger)]
    if arguments.json:
        print_json(record)
    else:
        for line in lines:
            print_line(line)
    return 0 if plan.fits else 1


def _gpus(text: str) -> int:
    count = positive(text)
    if count > MOST_GPUS:
        raise argparse.ArgumentTypeError(f"{count} GPUs are more than any plan is for ({MOST_GPUS:,})")
    return count


def _gib(text: str) -> float:
    return _between(text, 0.001, 10_000, "GiB, such as 80")


def _rate(text: str) -> float:
    return _between(text, 0.001, 1_000_000, "TFLOP/s, such as 200")


def _between(text: str, least: float, most: float, what: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not least <= number <= most:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of {what}")
    return number
