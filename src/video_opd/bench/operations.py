"""Counts the floating-point operations of a step, and compares them with the least that its prompts need.

PyTorch's formulas count matrix products, convolutions and attention from their shapes: two
operations for each multiplication with its addition, and attention in full, masked or not. It does not count
norms, activations, the softmax, rotary positions, the draw of tokens and the optimiser. A count therefore
does not depend on the machine, and a second run gives the same one if it samples the same tokens.
:mod:`video_opd.planning.cost_model` predicts the same operations from a model's sizes, without running it.

The least is one forward of each prompt by the student, a backward of twice a forward, and one forward of each
prompt by the teacher, if the method has one. The gradient of the pixels is taken off, because nobody needs
it. These forwards are the stock model's over the prompt alone: vision tower and decoder, without ``lm_head``.
The tokens of responses belong to a step and not to the least. The backward of attention takes five products
to the forward's two, because it computes the scores again. A step with much attention thus cannot reach the
least.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, shape_wrapper

from video_opd.bench.timing import Work
from video_opd.bench.work import Steps, prompts_of
from video_opd.config import WITH_TEACHER, PromptConfig
from video_opd.progress import log
from video_opd.types import EncodedPrompt

Shape = Sequence[int]
WAYS: Mapping[str, Mapping[str, Any]] = {
    "plain update": {"engine": "plain", "cached": True},
    "prefix": {"engine": "prefix"},
    "prefix, recompute": {"engine": "prefix", "recompute": True},
}
ATTENTION = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")


def attention_operations(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """The scores and the weighted values: queries [..., Q, d], keys [..., K, d], values [..., K, v]."""
    return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def attention_backward_operations(
    _: Shape, query: Shape, key: Shape, value: Shape, *__: Any, **___: Any
) -> int:
    """The scores once more, and the gradients of scores, values, queries and keys."""
    return 2 * prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


def grouped_product_operations(a: Shape, b: Shape, *_: Any, **__: Any) -> int:
    """Products of experts: a row is multiplied with its own group's matrix only, unless both are batches."""
    groups = a[0] if len(a) == len(b) == 3 else 1
    return 2 * groups * a[-2] * a[-1] * b[-1]


def _formulas() -> dict[Any, Any]:
    """Formulas that some releases of PyTorch lack.

    They are for attention on a CPU, for attention with fewer key heads than query heads, and for experts.
    """
    formulas: dict[Any, Any] = {torch.ops.aten._grouped_mm: grouped_product_operations}
    for name in ATTENTION:
        formulas[getattr(torch.ops.aten, f"_scaled_dot_product_{name}")] = attention_operations
        backward = getattr(torch.ops.aten, f"_scaled_dot_product_{name}_backward")
        formulas[backward] = attention_backward_operations
    return formulas


class OperationCounter(TorchDispatchMode):
    """Adds up the operations of what runs inside, as ``FlopCounterMode`` does, with the same formulas.

    That class keeps an account of every module, and looks at each call of a kernel for longer than the kernel
    of a small model runs.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas = flop_registry | {name: shape_wrapper(f) for name, f in _formulas().items()}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        formula = self._formulas.get(func._overloadpacket)
        if formula is None and _is_composite(func):  # in inference mode: its parts may have formulas
            with self:
                return func.decompose(*args, **kwargs)
        out = func(*args, **kwargs)
        if formula is not None:
            self.total += formula(*args, **kwargs, out_val=out)
        return out


@functools.cache
def _is_composite(operation: Any) -> bool:
    return torch._C._dispatch_has_kernel_for_dispatch_key(operation.name(), "CompositeImplicitAutograd")


def operations(work: Work) -> int:
    """Counts the operations of ``work``, with those of its backward if it runs one."""
    with OperationCounter() as counter:
        work()
    return counter.total


@torch.no_grad()
def forward_prompts(model: Any, prompts: Sequence[EncodedPrompt]) -> None:
    """Runs the stock model over each prompt: vision tower and decoder, no ``lm_head``, no cache."""
    device = next(model.parameters()).device
    for prompt in prompts:
        tensors = {name: tensor.to(device) for name, tensor in prompt.tensors.items()}
        model.model(input_ids=prompt.input_ids.to(device), use_cache=False, **tensors)


@torch.no_grad()
def embed(model: Any, prompt: EncodedPrompt) -> None:
    """Runs the patch embedding alone. The gradient of its input would cost as much as this forward."""
    embedding = model.model.visual.patch_embed
    embedding(prompt.tensors["pixel_values_videos"].to(embedding.proj.weight.device))


def least_operations(student: Any, teacher: Any | None, prompts: Sequence[EncodedPrompt]) -> int:
    """The least for a step on ``prompts`` that trains all weights of ``student``.

    ``teacher`` is None for a method without one.
    """
    pixels = sum(operations(lambda p=p: embed(student, p)) for p in prompts)  # type: ignore[misc]
    by_student = operations(lambda: forward_prompts(student, prompts))
    by_teacher = 0 if teacher is None else operations(lambda: forward_prompts(teacher, prompts))
    return 3 * by_student - pixels + by_teacher


def count_operations(
    model: Any,
    processor: Any,
    teacher: Any,
    *,
    lengths: Sequence[int],
    rollouts: Sequence[int] = (8,),
    prompts: int = 1,
    dtype: str = "float32",
    tokens: int = 16,
    side_px: int = 64,
    prompt: PromptConfig | None = None,
) -> list[dict[str, Any]]:
    """Counts a step of every method at every prompt length, in each of ``WAYS``.

    Returns a record for each length and method (and number of ``rollouts`` of GRPO): the least and, for each
    way, the count and its ratio to the least.
    """
    records: list[dict[str, Any]] = []
    jobs = [
        ("video-opd", "video-opd", 1),
        *((f"grpo, {count} rollouts", "grpo", count) for count in rollouts),
        *((method, method, 1) for method in ("op-rkd", "op-fkd", "sft")),
    ]
    for length in lengths:
        shown = prompts_of(processor, length, videos=prompts, side_px=side_px, prompt=prompt)
        least = {
            with_teacher: least_operations(model, teacher if with_teacher else None, shown)
            for with_teacher in (False, True)
        }
        for job, method, count in jobs:
            needed = least[method in WITH_TEACHER]
            ways = {}
            for way, settings in WAYS.items():
                step = Steps(
                    model,
                    processor,
                    teacher,
                    shown,
                    method=method,
                    rollouts=count,
                    dtype=dtype,
                    tokens=tokens,
                    **settings,
                )
                counted = operations(step)
                ways[way] = {"counted": counted, "ratio": counted / needed}
            records.append(
                {
                    "job": job,
                    "prompt_tokens": shown[0].length,
                    "prompts": len(shown),
                    "least": needed,
                    "ways": ways,
                }
            )
            ratios = ", ".join(f"{name} {way['ratio']:.2f}" for name, way in ways.items())
            log(f"{job}, {shown[0].length} tokens, operations in times of the least: {ratios}")
    return records


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as a Markdown table, with operations in 10⁹."""
    lines = ["| job | prompt | way | operations | least | times the least |", "|---|---|---|---|---|---|"]
    for record in records:
        for name, way in record["ways"].items():
            lines.append(
                f"| {record['job']} | {record['prompt_tokens']} | {name} | {way['counted'] / 1e9:.2f} G "
                f"| {record['least'] / 1e9:.2f} G | {way['ratio']:.2f} |"
            )
    return "\n".join(lines)
