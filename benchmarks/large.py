"""Steps at the paper's size with random weights: seconds, tokens a second, share of the matrix rate, memory.

    python benchmarks/large.py --student 8b --teacher 32b --video-tokens 8192     # one GPU of 140 GB
    python benchmarks/large.py --student tiny --teacher small --video-tokens 1000 # anywhere

The student is held in bfloat16 and trained through adapters of all its linear layers, which is what fits
beside a 32B teacher on one card; a step is the training loop's own. Ways take turns, as in ``video-opd bench
engine``; the matrix rate is measured on the same device with the same type. ``benchmarks/device/`` measures
an 8B teacher on a card of 80 GB, stage by stage.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import asdict
from typing import Any

import torch
from common import parser, write_result
from paper_size import SIZES, costs_of, make, matrix_rate

from video_opd.bench.timing import machine, peak_bytes, summary, take_turns
from video_opd.bench.work import Steps, prompts_of
from video_opd.config import LoraConfig
from video_opd.models.lora import add_adapters
from video_opd.planning.cost_model import StepWork
from video_opd.world.tiny import build_processor


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    processor = build_processor()
    student = make(arguments.student, arguments.dtype, device, seed=0)
    teacher = make(arguments.teacher, arguments.dtype, device, seed=1)
    costs = {name: costs_of(model) for name, model in (("student", student), ("teacher", teacher))}
    adapt(student, arguments)
    prompts = prompts_of(processor, arguments.video_tokens, side_px=arguments.frame_side)
    print(f"{prompts[0].length} tokens, of them {prompts[0].video_tokens} of the video")

    def step(method: str, rollouts: int, engine: Any, *, recompute: bool) -> Steps:
        return Steps(
            student, processor, teacher, prompts, method=method, engine=engine, rollouts=rollouts,
            dtype=arguments.dtype, tokens=arguments.max_new_tokens, recompute=recompute, cached=True,
        )  # fmt: skip

    rate = matrix_rate(device, getattr(torch, arguments.dtype), arguments.matrix)
    records = []
    for method, rollouts in (("video-opd", 1), ("grpo", arguments.rollouts)):
        ways = {
            "plain update, recompute": step(method, rollouts, "plain", recompute=True),
            "prefix, recompute": step(method, rollouts, "prefix", recompute=True),
            "prefix": step(method, rollouts, "prefix", recompute=False),
        }
        _, seconds = take_turns(ways, arguments.repeats, device)
        found = summary(seconds, next(iter(ways)))
        for name, way in found.items():
            work = StepWork(
                prompt=prompts[0].length,
                video_tokens=prompts[0].video_tokens,
                frame_pairs=len(prompts[0].pair_times_s),
                rollouts=rollouts,
                response=arguments.max_new_tokens,
                shared=name.startswith("prefix"),
                recompute="recompute" in name,
            )
            teacher = costs["teacher"] if method == "video-opd" else None
            operations = sum(work.operations(costs["student"], teacher).values())
            way["share_of_matrix_rate"] = operations / way["seconds"] / rate
            way["prompt_tokens_a_second"] = prompts[0].length / way["seconds"]
            way["peak_bytes"] = peak_bytes(ways[name], device)
            print(
                f"{method}, {rollouts} rollouts, {name}: {way['seconds']:.2f} s, "
                f"{way['speedup']['median']:.2f}x, {way['share_of_matrix_rate']:.0%} of the matrix rate, "
                f"{(way['peak_bytes'] or 0) / 2**20:.0f} MiB above the models"
            )
        records.append({"method": method, "rollouts": rollouts, "ways": found})
    write_result(
        arguments.name,
        {
            "command": sys.argv,
            "machine": machine(device),
            "prompt_tokens": prompts[0].length,
            "video_tokens": prompts[0].video_tokens,
            "costs": {name: asdict(cost) for name, cost in costs.items()},
            "matrix_rate": rate,
            "results": records,
        },
    )


def adapt(model: Any, arguments: argparse.Namespace) -> None:
    add_adapters(model, LoraConfig(parts=("language",), rank=arguments.rank, alpha=2 * arguments.rank), 0)
    model.to(next(model.parameters()).device)


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--student", choices=SIZES, default="8b")
    options.add_argument("--teacher", choices=SIZES, default="32b")
    options.add_argument("--video-tokens", type=int, default=8192, help="of the prompt, at least")
    options.add_argument("--frame-side", type=int, default=320, help="pixels; 100 tokens a frame pair")
    options.add_argument("--rollouts", type=int, default=8, help="of GRPO")
    options.add_argument("--rank", type=int, default=64, help="of the adapters")
    options.add_argument("--max-new-tokens", type=int, default=16)
    options.add_argument("--repeats", type=int, default=5)
    options.add_argument("--matrix", type=int, default=8192, help="side of the matrices that are multiplied")
    options.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    options.add_argument("--device", help="default: a GPU where there is one")
    options.add_argument("--name", default="large", help="of the file in benchmarks/results")
    return options.parse_args()


if __name__ == "__main__":
    main()
