"""Steps at the paper's size with random weights: seconds, tokens a second, share of the matrix rate, memory.

    python benchmarks/large.py --student 8b --teacher 32b --video-tokens 8192     # one GPU of 140 GB
    python benchmarks/large.py --student tiny --teacher small --video-tokens 1000 # anywhere

Models have Qwen3-VL's own shapes and the tiny tokenizer (only tokens that can be written meet ``lm_head``,
at response positions, so a small vocabulary changes little). The student is held in bfloat16 and trained
through adapters of all its linear layers, which is what fits beside a 32B teacher on one card; a step is the
training loop's own. Ways take turns, as in ``video-opd bench engine``; the matrix rate is measured on the
same device with the same type.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from common import write_result

from video_opd.bench.timing import machine, peak_bytes, summary, take_turns
from video_opd.bench.work import Steps, prompts_of
from video_opd.config import LoraConfig
from video_opd.models.lora import add_adapters
from video_opd.models.parts import cast_weights
from video_opd.world.tiny import build_model, build_processor

SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "8b": {
        "text": {
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
        },
        "vision": {
            "hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16,
            "out_hidden_size": 4096, "deepstack_visual_indexes": [8, 16, 24],
        },
    },
    "32b": {
        "text": {
            "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 151936,
        },
        "vision": {
            "hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16,
            "out_hidden_size": 5120, "deepstack_visual_indexes": [8, 16, 24],
        },
    },
}  # fmt: skip
LARGE = {"head_dim": 128, "mrope_section": [24, 20, 20]}


def main() -> None:
    arguments = parse()
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    processor = build_processor()
    student = make(arguments.student, arguments.dtype, device, seed=0)
    teacher = make(arguments.teacher, arguments.dtype, device, seed=1)
    weights = {name: forward_weights(model) for name, model in (("student", student), ("teacher", teacher))}
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
            work = operations(method, rollouts, name, prompts[0].length, arguments.max_new_tokens, weights)
            way["share_of_matrix_rate"] = work / way["seconds"] / rate
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
            "weights": weights,
            "matrix_rate": rate,
            "results": records,
        },
    )


def make(size: str, dtype: str, device: torch.device, seed: int) -> Any:
    """A model of random weights, made on its device; frozen."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    if size not in SHAPES:
        model = build_model(size, seed)
        cast_weights(model, getattr(torch, dtype))
        return model.to(device).eval().requires_grad_(False)
    config = build_model("test").config.to_dict()
    text, vision = config["text_config"], config["vision_config"]
    text |= SHAPES[size]["text"] | {"head_dim": LARGE["head_dim"]}
    text["rope_parameters"] |= {"mrope_section": LARGE["mrope_section"], "rope_theta": 5_000_000}
    vision |= SHAPES[size]["vision"]
    config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    torch.manual_seed(seed)
    with device:
        model = Qwen3VLForConditionalGeneration._from_config(
            Qwen3VLConfig.from_dict(config), dtype=getattr(torch, dtype)
        )
    model.generation_config = build_model("test").generation_config
    return model.eval().requires_grad_(False)


def adapt(model: Any, arguments: argparse.Namespace) -> None:
    add_adapters(model, LoraConfig(parts=("language",), rank=arguments.rank, alpha=2 * arguments.rank), 0)
    model.to(next(model.parameters()).device)


def forward_weights(model: Any) -> int:
    """Weights of the language model that every token meets."""
    return sum(p.numel() for p in model.model.language_model.layers.parameters())


def operations(
    method: str, rollouts: int, way: str, prompt: int, answer: int, weights: dict[str, int]
) -> float:
    """Of a step, after the cost model of docs/performance.md, without the vision tower and attention scores.

    With P prompt and A answer tokens, in forwards of the student: the prompt is read and answers are sampled
    (P + A); the update runs forward, again where it recomputes, and backward, which costs one forward,
    because adapters leave no gradients of W to be computed. Its prompt was read before where it is shared.
    """
    answers = rollouts * answer
    shared = way.startswith("prefix")
    update = prompt + answers if shared else rollouts * (prompt + answer)
    tokens = prompt + answers + (answers if shared else update) + update
    if "recompute" in way:
        tokens += update
    score = 2.0 * weights["teacher"] * (prompt + answers) if method == "video-opd" else 0.0
    return 2.0 * weights["student"] * tokens + score


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a product of two square matrices, the best of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    _, seconds = take_turns({"product": lambda: a @ b}, 10, device)
    return 2 * size**3 / min(seconds["product"])


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--student", choices=("test", "tiny", "small", "8b", "32b"), default="8b")
    parser.add_argument("--teacher", choices=("test", "tiny", "small", "8b", "32b"), default="32b")
    parser.add_argument("--video-tokens", type=int, default=8192, help="of the prompt, at least")
    parser.add_argument("--frame-side", type=int, default=320, help="pixels; 100 tokens a frame pair")
    parser.add_argument("--rollouts", type=int, default=8, help="of GRPO")
    parser.add_argument("--rank", type=int, default=64, help="of the adapters")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--matrix", type=int, default=8192, help="side of the matrices that are multiplied")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--device", help="default: a GPU where there is one")
    parser.add_argument("--name", default="large", help="of the file in benchmarks/results")
    return parser.parse_args()


if __name__ == "__main__":
    main()
