"""How far do a teacher's log-probs move when its weights are held in 8 bits?

    python benchmarks/quantised_teacher.py --out runs/quantised-teacher

The shipped tiny base answers generated rows, one sampled response each, and the shipped tiny teacher scores
every token: in float32 and bfloat16, in int8 and float8, and once more with ``lm_head`` rounded, too. Each is
compared with the teacher in float32. The last column is what the student learns from, r_t of eq 5.

With ``--demo int8``, ``video-opd demo``'s run (seed 0) is also made twice: with the teacher in float32 and in
int8, which then scores the pool and teaches. Repeated, the script goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from common import BASE, SPLITS, TEACHER, machine, make_pools, parser, write_result
from common import scores as of_record
from common import table as scores_table

from video_opd.data.annotations import read_samples
from video_opd.jsonl import read_jsonl
from video_opd.models.inference import load_inference_model, read_inference_config
from video_opd.models.loading import load_teacher
from video_opd.models.policy import HFPolicy
from video_opd.models.quantisation import QuantisedLinear
from video_opd.models.teachers import LocalTeacher
from video_opd.seeds import derive_seed
from video_opd.world.demo import run_demo
from video_opd.world.shipped import shipped

POOL_SEED = 1400
WAYS: tuple[tuple[str, str | None, bool], ...] = (
    ("float32", None, False),
    ("float32", "int8", False),
    ("float32", "int8", True),
    ("float32", "float8", False),
    ("float32", "float8", True),
    ("bfloat16", None, False),
    ("bfloat16", "int8", False),
    ("bfloat16", "float8", False),
)


def main() -> None:
    arguments = parse()
    (pool,) = make_pools(Path(arguments.out), [0], POOL_SEED, arguments.videos).values()
    student = load_inference_model(read_inference_config(str(shipped(BASE)), []), "cpu")
    made = list(student.prompts(read_samples(pool)))
    batches = [[prompt for _, prompt in made[i : i + 32]] for i in range(0, len(made), 32)]
    rollouts = []
    for batch in batches:
        seeds = [[derive_seed(0, "quantised-teacher", prompt.sample_id)] for prompt in batch]
        rollouts.append(student.policy.sample(batch, max_new_tokens=16, seeds=seeds))
    responses = [[[r.token_ids for r in group] for group in groups] for groups in rollouts]
    old_N = torch.tensor([x for groups in rollouts for (r,) in groups for x in r.recorded])

    def scores(dtype: str, quantization: Any, head: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
        """The log-probs of all response tokens, [N], the distributions, [N, V], and the teacher's bytes."""
        loaded, processor = load_teacher(shipped(TEACHER), dtype, "cpu", quantization=quantization)
        if head:
            rounded = QuantisedLinear.of(loaded.lm_head, quantization, torch.device("cpu"))
            loaded.lm_head.weight = torch.nn.Parameter(rounded.weight.dequantize(), requires_grad=False)
        teacher = LocalTeacher(HFPolicy(loaded, processor, vocabulary=student.policy.vocabulary))
        picked, whole = [], []
        for batch, texts in zip(batches, responses, strict=True):
            found = teacher.logprobs(batch, texts, full=True)
            assert found.full_BTV is not None
            picked.append(found.logprobs_BT[found.mask_BT])
            whole.append(found.full_BTV[found.mask_BT])
        return torch.cat(picked), torch.cat(whole), weight_bytes(loaded)

    exact_N, exact_NV, _ = scores("float32", None, False)
    assert len(exact_N) == len(old_N)
    reward_N = exact_N - old_N
    record: dict[str, Any] = {
        "command": sys.argv,
        "machine": machine(),
        "rows": len(made),
        "tokens": len(exact_N),
        "mean_reward": reward_N.abs().mean().item(),
        "ways": [],
    }
    for dtype, quantization, head in WAYS:
        own_N, own_NV, size = scores(dtype, quantization, head)
        off_N = (own_N - exact_N).abs()
        rewards = torch.stack([reward_N, own_N - old_N])
        record["ways"].append(
            {
                "dtype": dtype,
                "quantization": quantization,
                "lm_head": "rounded, too" if head else "as loaded",
                "bytes": size,
                "mean": off_N.mean().item(),
                "p99": off_N.quantile(0.99).item(),
                "max": off_N.max().item(),
                "kl": (exact_NV.exp() * (exact_NV - own_NV)).sum(-1).mean().item(),
                "reward_correlation": torch.corrcoef(rewards)[0, 1].item(),
            }
        )
    print(table(record))
    if arguments.demo:
        record["demo"] = {
            quantization or "float32": demo(Path(arguments.out), quantization)
            for quantization in (None, *arguments.demo)
        }
        print(demo_table(record["demo"]))
    write_result("quantised_teacher", record)


def demo(out: Path, quantization: str | None) -> dict[str, Any]:
    """The student's, the teacher's and the base's figures on the test sets, and what was learnt from."""
    folder = out / f"demo-{quantization or 'float32'}"
    run_demo(folder, changes={"teacher.quantization": quantization})
    selected = [row["id"] for _, row in read_jsonl(folder / "selected.jsonl")]
    return {
        "selected": selected,
        "scores": {
            role: {
                split: of_record(json.loads((folder / "eval" / f"{role}-{split}.json").read_text()))
                for split in SPLITS
            }
            for role in ("base", "student", "teacher")
        },
    }


def demo_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    rows = {f"student, teacher in {name}": [run["scores"]["student"]] for name, run in found.items()}
    (first, one), *others = found.items()
    lines = [scores_table(rows)]
    for name, other in others:
        shared = len(set(one["selected"]) & set(other["selected"]))
        lines.append(f"{shared} of {len(one['selected'])} rows that {first} selects are selected with {name}")
    return "\n".join(lines)


def weight_bytes(model: torch.nn.Module) -> int:
    parameters: list[Any] = list(model.parameters())
    held = [w for p in parameters for w in ((p.qdata, p.scale) if hasattr(p, "qdata") else (p,))]
    return sum(w.numel() * w.element_size() for w in held)


def parse() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--out", default="runs/quantised-teacher", help="for the generated videos")
    options.add_argument("--videos", type=int, default=48)
    options.add_argument(
        "--demo",
        nargs="*",
        choices=("int8", "float8"),
        default=[],
        help="runs of the demo with such teachers",
    )
    return options.parse_args()


def table(record: dict[str, Any]) -> str:
    lines = [
        f"{record['rows']} rows, {record['tokens']} tokens, mean |r_t| {record['mean_reward']:.3f} nats",
        "| teacher | lm_head | MB | mean \u2502Δ log p\u2502 | 99% | largest | KL | correlation of r_t |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for way in record["ways"]:
        name = f"{way['quantization'] or 'whole'}, {way['dtype']}"
        numbers = f"{way['mean']:.5f} | {way['p99']:.4f} | {way['max']:.3f} | {way['kl']:.2g}"
        correlation = f"{way['reward_correlation']:.6f}"
        lines.append(f"| {name} | {way['lm_head']} | {way['bytes'] / 1e6:.1f} | {numbers} | {correlation} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
