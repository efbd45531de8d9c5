"""``video-opd bench engine``: what the prefix engine saves."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from video_opd.cli.arguments import add_shared, positive
from video_opd.cli.output import write_json
from video_opd.cli.parser import NO_SETTINGS, Parser
from video_opd.terminal import print_text

HELP = (
    "the prefix engine against the plain one: operations, seconds and peak memory of steps; scoring; "
    "queries on a video"
)
EXAMPLE = "video-opd bench engine --lengths 400 1000 --json engine.json"
SETTINGS = NO_SETTINGS


def add_arguments(parser: Parser) -> None:
    parser.add_argument("--model", metavar="M", help="the student; default: the shipped tiny base")
    parser.add_argument("--teacher", metavar="M", help="default: the shipped tiny teacher, or --model")
    parser.add_argument(
        "--lengths", type=positive, nargs="+", default=[300, 1000, 3000], metavar="N",
        help="prompt tokens; default: 300 1000 3000",
    )  # fmt: skip
    parser.add_argument(
        "--plain-up-to", type=positive, default=1500, metavar="N",
        help="longer prompts are not sampled without a cache; default: 1500",
    )  # fmt: skip
    parser.add_argument("--prompts", type=positive, default=1, metavar="N", help="prompts a step; default: 1")
    parser.add_argument(
        "--rollouts", type=positive, nargs="+", default=[8], metavar="G", help="of GRPO, a prompt; default: 8"
    )
    parser.add_argument("--repeats", type=positive, default=5, metavar="N", help="turns; default: 5")
    add_shared(parser, "--max-new-tokens", default=16)
    parser.add_argument(
        "--frame-side", type=positive, default=64, metavar="PX", help="side of the frames; default: 64"
    )
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32"
    )
    add_shared(parser, "--device")
    parser.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    parser.add_argument(
        "--operations-only",
        action="store_true",
        help="count the operations of a step of each method, and time nothing",
    )
    parser.add_argument("--json", writes="file", metavar="OUT.json", help="also write everything there")


def run(arguments: argparse.Namespace) -> None:
    import torch

    from video_opd.bench.engine import against_grpo, bench_engine, table
    from video_opd.bench.operations import count_operations
    from video_opd.bench.operations import table as operations_table
    from video_opd.bench.timing import machine
    from video_opd.models.inference import read_inference_config
    from video_opd.models.loading import load_model
    from video_opd.models.same_tokens import check_same_tokens
    from video_opd.world.shipped import shipped

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    student = arguments.model or shipped("tiny-base")
    teacher = arguments.teacher or arguments.model or shipped("tiny-teacher")
    model, processor = load_model(student, dtype="float32", device=device)
    loaded_teacher = load_model(teacher, dtype=arguments.dtype, device=device)
    check_same_tokens((model, processor), loaded_teacher)
    work: dict[str, Any] = {
        "lengths": arguments.lengths,
        "rollouts": arguments.rollouts,
        "prompts": arguments.prompts,
        "dtype": arguments.dtype,
        "tokens": arguments.max_new_tokens,
        "side_px": arguments.frame_side,
        "prompt": read_inference_config(str(student), []).prompt,
    }
    operations = count_operations(model, processor, loaded_teacher[0], **work)
    results: list[dict[str, Any]] = []
    if not arguments.operations_only:
        results = bench_engine(
            model,
            processor,
            loaded_teacher[0],
            **work,
            repeats=arguments.repeats,
            memory=not arguments.no_memory,
            plain_up_to=arguments.plain_up_to,
        )
    if arguments.json:
        record = {"command": sys.argv[1:], "machine": machine(device)}
        write_json(arguments.json, {**record, "operations": operations, "results": results})
    print_text(operations_table(operations))
    if results:
        print_text("\n".join(["", table(results), "", *against_grpo(results)]))
