"""Does the card compute what the CPU computes? The shipped tiny models, in float32 and bfloat16.

The reference is always the plain engine on the CPU in float32. Compared are log-probs, gradients and greedy
responses, the engines with each other, and one optimiser step of every method by the training loop itself.
float32 means float32: TF32 is off, but for one row that says what it would change.
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from section import Report, run

from video_opd.bench.engine import LOGPROB_TOLERANCE
from video_opd.bench.work import prompts_of
from video_opd.config import Recipe, load_recipe
from video_opd.jsonl import read_jsonl
from video_opd.models.loading import load_model
from video_opd.models.policy import HFPolicy
from video_opd.training.loop import train
from video_opd.types import EncodedPrompt
from video_opd.world.make import make_world
from video_opd.world.shipped import shipped
from video_opd.world.tiny import build_model, build_processor

ROOT = Path(__file__).resolve().parents[2]
BASE, TEACHER = "tiny-base", "tiny-teacher"
METHODS = ("video-opd", "grpo", "op-rkd", "op-fkd", "sft")
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.2}  # relative, in the Euclidean norm of all of them
SAME_CODE_TOLERANCE = {"float32": 1e-4, "bfloat16": 0.1}  # relative: the same sums in another order
STEP_TOLERANCE = 1e-3  # relative, of loss and gradient norm, in float32
TF32_TOLERANCE = 0.02  # nats
# After a resume. Where a gradient is 0 but for rounding, Adam makes a whole step of the rounding, so a few
# weights may differ by any step; without Adam's moments or with another batch, nearly all would.
WEIGHT_APART, SHARE_APART = 1e-5, 0.01
TOKENS = 16
LONG_PROMPT = 12_000  # tokens


@dataclass(frozen=True, kw_only=True)
class Setting:
    """The device and the settings with which a model computes."""

    device: str
    dtype: str = "float32"
    engine: str = "plain"
    recompute: bool = False
    attn: str = "sdpa"

    def __str__(self) -> str:
        words = (self.device, self.dtype, self.engine, self.attn, "recompute" if self.recompute else "")
        return " ".join(word for word in words if word)


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The CPU's values in float32 for its own greedy responses."""

    prompts: Sequence[EncodedPrompt]
    responses: list[list[tuple[int, ...]]]
    logprobs: torch.Tensor
    gradients: torch.Tensor


def compare_all(report: Report, tiny: bool) -> None:
    del tiny  # the models are tiny in any case
    device = "cuda" if torch.cuda.is_available() else "cpu"
    without_tf32()
    report.note(
        summary="nothing compared yet",
        device=device,
        tf32={"matmul": torch.backends.cuda.matmul.allow_tf32, "cudnn": torch.backends.cudnn.allow_tf32},
        float32_matmul_precision=torch.get_float32_matmul_precision(),
    )
    reference = make_reference()
    for dtype in ("float32", "bfloat16"):
        report.attempt(f"{dtype}: engines", lambda: compare_engines(report, reference, device, dtype))  # noqa: B023
        tell(report)
    report.attempt("TF32", lambda: compare_tf32(report, reference, device))
    report.attempt("attention", lambda: compare_attention(report, reference, device))
    report.attempt("shared heads", lambda: compare_shared_heads(report, device))
    with tempfile.TemporaryDirectory() as folder:
        compare_steps(report, Path(folder), device)
    tell(report)


def tell(report: Report) -> None:
    rows = report.record["rows"]
    report.note(
        summary=f"{sum(row['ok'] is True for row in rows)} comparisons hold, {len(report.failed)} do not"
        + (": " + "; ".join(report.failed) if report.failed else "")
    )


def without_tf32() -> None:
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False


# ------------------------------------------------------------------------------------------------- engines


def policy_of(setting: Setting, folder: Path | None = None) -> HFPolicy:
    """The shipped base, or another model; float32 weights, as a student has, and autocast for bfloat16."""
    path = folder or shipped(BASE)
    model, processor = load_model(path, dtype="float32", device=setting.device, attn=setting.attn)
    compute_dtype = None if setting.dtype == "float32" else getattr(torch, setting.dtype)
    engine: Any = setting.engine
    return HFPolicy(model, processor, engine, compute_dtype=compute_dtype, recompute=setting.recompute)


def make_reference() -> Reference:
    policy = policy_of(Setting(device="cpu"))
    prompts = prompts_of(policy.processor, 200, queries=2, videos=2)
    responses = greedy(policy, prompts)
    logprobs, gradients = scores(policy, prompts, responses)
    return Reference(prompts=prompts, responses=responses, logprobs=logprobs, gradients=gradients)


def greedy(policy: HFPolicy, prompts: Sequence[EncodedPrompt]) -> list[list[tuple[int, ...]]]:
    groups = policy.sample(prompts, max_new_tokens=TOKENS, temperature=0.0)
    return [[tuple(rollout.token_ids) for rollout in group] for group in groups]


def scores(
    policy: HFPolicy, prompts: Sequence[EncodedPrompt], responses: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the log-probs of the responses' tokens, and the gradient of their sum by every weight as one
    vector, both on the CPU."""
    policy.model.zero_grad(set_to_none=True)
    found = policy.logprobs(prompts, responses, grad=True)
    found.logprobs_BT[found.mask_BT].sum().backward()
    gradients = [p.grad.flatten() for p in policy.model.parameters() if p.grad is not None]
    return found.logprobs_BT.detach()[found.mask_BT].float().cpu(), torch.cat(gradients).float().cpu()


def compare_engines(report: Report, reference: Reference, device: str, dtype: str) -> None:
    found = {}
    for name, setting in {
        "plain": Setting(device=device, dtype=dtype),
        "prefix": Setting(device=device, dtype=dtype, engine="prefix"),
        "recompute": Setting(device=device, dtype=dtype, engine="prefix", recompute=True),
    }.items():
        policy = policy_of(setting)
        found[name] = scores(policy, reference.prompts, reference.responses)
        against_cpu(report, str(setting), found[name], reference, dtype)
        if name != "recompute":
            compare_responses(report, str(setting), greedy(policy, reference.prompts), reference, dtype)
    tolerance = SAME_CODE_TOLERANCE[dtype]
    for a, b in (("prefix", "plain"), ("recompute", "prefix")):
        where = f"{device} {dtype}, {a} against {b}"
        report.compare(f"log-probs, {where}", apart(found[a][0], found[b][0]), LOGPROB_TOLERANCE[dtype])
        report.compare(f"gradients, {where}", relative(found[a][1], found[b][1]), tolerance)


def against_cpu(
    report: Report,
    name: str,
    found: tuple[torch.Tensor, torch.Tensor],
    reference: Reference,
    dtype: str,
) -> None:
    report.compare(f"log-probs, {name}", apart(found[0], reference.logprobs), LOGPROB_TOLERANCE[dtype])
    report.compare(f"gradients, {name}", relative(found[1], reference.gradients), GRADIENT_TOLERANCE[dtype])


def compare_responses(report: Report, name: str, responses: Any, reference: Reference, dtype: str) -> None:
    """In bfloat16 two tokens may be nearly as likely: every second response may differ."""
    same = [a == b for a, b in zip(responses, reference.responses, strict=True)]
    report.compare(
        f"share of other greedy responses, {name}",
        1 - sum(same) / len(same),
        0.0 if dtype == "float32" else 0.5,
    )


def compare_tf32(report: Report, reference: Reference, device: str) -> None:
    torch.set_float32_matmul_precision("high")
    try:
        found, _ = scores(
            policy_of(Setting(device=device, engine="prefix")), reference.prompts, reference.responses
        )
    finally:
        without_tf32()
    report.compare("log-probs, prefix with TF32", apart(found, reference.logprobs), TF32_TOLERANCE)


def compare_attention(report: Report, reference: Reference, device: str) -> None:
    """The other attention implementations. Flash attention computes in bfloat16 only."""
    eager = Setting(device=device, engine="prefix", attn="eager")
    found = scores(policy_of(eager), reference.prompts, reference.responses)
    against_cpu(report, str(eager), found, reference, "float32")
    if device != "cuda" or importlib.util.find_spec("flash_attn") is None:
        report.add("flash attention", "not installed" if device == "cuda" else "needs a GPU")
        return
    flash = Setting(device=device, dtype="bfloat16", engine="prefix", attn="flash_attention_2")
    found = scores(policy_of(flash), reference.prompts, reference.responses)
    against_cpu(report, str(flash), found, reference, "bfloat16")


def compare_shared_heads(report: Report, device: str) -> None:
    """Query heads that share keys, which those of the shipped models do not: a random model of a few thousand
    weights, prompts of several lengths, three responses to each. In float32 no kernel of a GPU takes fewer
    heads of keys than of queries, and the scores of a prompt must not be in memory at once."""
    with tempfile.TemporaryDirectory() as folder:
        made = build_model("test")
        made.save_pretrained(folder)
        processor = build_processor()
        processor.save_pretrained(folder)
        prompts = [*prompts_of(processor, 200, queries=2), *prompts_of(processor, 300)]
        responses = [[tuple(range(first, first + 5)) for first in (9, 20, 31)]] * len(prompts)
        expected = scores(policy_of(Setting(device="cpu"), Path(folder)), prompts, responses)
        reference = Reference(
            prompts=prompts, responses=responses, logprobs=expected[0], gradients=expected[1]
        )
        for dtype in ("float32", "bfloat16"):
            setting = Setting(device=device, dtype=dtype, engine="prefix")
            found = scores(policy_of(setting, Path(folder)), prompts, responses)
            against_cpu(report, f"{setting}, shared heads", found, reference, dtype)
        if device == "cuda":
            policy = policy_of(Setting(device=device, engine="prefix"), Path(folder))
            (long,) = prompts_of(processor, LONG_PROMPT)
            held = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            policy.prefill([long])
            bytes_taken = torch.cuda.max_memory_allocated() - held
            heads = made.config.text_config.num_attention_heads
            all_scores = 4 * heads * long.length**2
            report.add(
                f"a prompt of {long.length:,} tokens in float32, shared heads",
                f"{bytes_taken / 2**20:,.0f} MiB; its scores are {all_scores / 2**20:,.0f}",
                bytes_taken < all_scores / 2,
            )


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    return (a - b).abs().max().item()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


# --------------------------------------------------------------------------------------------------- steps


def compare_steps(report: Report, folder: Path, device: str) -> None:
    """A step of every method on the CPU and on the device, and a run that was cut off and goes on."""
    data = make_world(folder / "world", videos={"train": 3}, seed=7)["train"]
    for method in METHODS:
        report.attempt(f"a step of {method}", lambda: compare_step(report, folder, data, method, device))  # noqa: B023
        tell(report)
    report.attempt("resume", lambda: compare_resume(report, folder, data, device))


def compare_step(report: Report, folder: Path, data: Path, method: str, device: str) -> None:
    """In float32 the responses are those of the CPU. In bfloat16 they may differ: the step must be finite."""
    cpu = one_step(recipe_of(method, data, folder / f"{method}-cpu"), "cpu")
    mine = one_step(recipe_of(method, data, folder / f"{method}-float32"), device)
    worst = max(abs(mine[key] - cpu[key]) / max(abs(cpu[key]), 1e-3) for key in ("loss", "update/grad_norm"))
    report.compare(f"loss and gradient norm, a step of {method}, {device} float32", worst, STEP_TOLERANCE)
    low = one_step(recipe_of(method, data, folder / f"{method}-bfloat16", dtype="bfloat16"), device)
    report.add(
        f"a step of {method}, {device} bfloat16",
        f"loss {low['loss']:.4f} (CPU {cpu['loss']:.4f}), gradient norm {low['update/grad_norm']:.4f} "
        f"(CPU {cpu['update/grad_norm']:.4f})",
        low["update/done"] == 1 and math.isfinite(low["loss"]) and math.isfinite(low["update/grad_norm"]),
        loss=low["loss"],
        grad_norm=low["update/grad_norm"],
    )


def compare_resume(report: Report, folder: Path, data: Path, device: str) -> None:
    """Two steps in a row, and the second of them again from the checkpoint after the first."""
    recipe = recipe_of("video-opd", data, folder / "resumed", steps=2)
    with on(device):
        whole = weights_of(train(recipe).model)
        run_folder = Path(recipe.run.dir)
        shutil.rmtree(run_folder / "model")
        newest = sorted((run_folder / "checkpoints").iterdir())[-1]
        shutil.rmtree(newest)
        result = train(recipe)
    again = weights_of(result.model)
    off = torch.cat([((again[name] - whole[name]).abs() > WEIGHT_APART).flatten() for name in whole])
    report.compare(
        f"share of weights more than {WEIGHT_APART:.0e} apart, resumed at step 1 of {result.steps}, {device}",
        off.float().mean().item(),
        SHARE_APART,
    )


def recipe_of(method: str, data: Path, out: Path, *, dtype: str = "float32", steps: int = 1) -> Recipe:
    changes: Mapping[str, Any] = {
        "model.path": shipped(BASE),
        "model.dtype": dtype,
        "data.train": data,
        "data.workers": 0,
        "data.cache_dir": data.parent / "clips",
        "optim.batch_size": 4,
        "optim.micro_batch_size": 2,
        "optim.max_steps": steps,
        "run.dir": out,
        "run.trackers": "[]",
        "run.save_every": 1,
        "evaluate.data": "[]",
        **({} if method in ("grpo", "sft") else {"teacher.path": shipped(TEACHER)}),
    }
    texts = [text for key, value in changes.items() for text in (f"--{key}", str(value))]
    return load_recipe(ROOT / "recipes" / "tiny" / f"{method}.yaml", texts)


def one_step(recipe: Recipe, device: str) -> dict[str, Any]:
    with on(device):
        train(recipe)
    return [row for _, row in read_jsonl(Path(recipe.run.dir) / "metrics.jsonl")][-1]


@contextmanager
def on(device: str) -> Iterator[None]:
    """Inside, the training loop uses this device: Accelerate remembers its first choice otherwise."""
    from accelerate.state import AcceleratorState

    before = os.environ.get("ACCELERATE_USE_CPU")
    os.environ["ACCELERATE_USE_CPU"] = str(device == "cpu").lower()
    AcceleratorState._reset_state(True)
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)
        if before is None:
            del os.environ["ACCELERATE_USE_CPU"]
        else:
            os.environ["ACCELERATE_USE_CPU"] = before


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return load_file(folder / "model.safetensors")


if __name__ == "__main__":
    sys.exit(run(compare_all, __doc__))
