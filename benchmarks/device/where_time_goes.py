"""The time of a step by kernel: the longest kernels, and how long the card waits for the host.

A step of the student alone, at the shape of the paper, with adapters; each stage is run without the profiler,
for its seconds, and then under it. The card waits where no kernel runs: 1 − (union of the kernels' intervals)
/ (wall time). The profiler slows the host down, so the share is given for both wall times. At the end, the
model's norm beside torch's, which is one kernel on a card.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from paper_size import make
from real_shape import DTYPE, REAL, TINY, Plan
from section import Report, run
from torch.nn.functional import rms_norm
from torch.profiler import ProfilerActivity, profile

from video_opd.bench.timing import settle
from video_opd.bench.work import prompts_of, seeds_of
from video_opd.config import LoraConfig, OptimConfig
from video_opd.models.lora import add_adapters
from video_opd.models.policy import HFPolicy
from video_opd.training.optimizers import make_optimizer
from video_opd.world.tiny import build_processor

LONGEST = 20
NORM_TURNS = 20
NAME_LENGTH = 90  # of a kernel in the table: templates have long ones
# Categories of the trace's events: what runs on the card, or on a machine without one, the operators.
ON_CARD = frozenset({"kernel", "gpu_memcpy", "gpu_memset"})
ON_CPU = frozenset({"cpu_op"})


@dataclass(frozen=True, kw_only=True)
class Event:
    name: str
    start_us: float
    end_us: float


def read_trace(path: Path, categories: frozenset[str]) -> list[Event]:
    """The events of these categories in a trace that torch's profiler exported."""
    events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return [
        Event(
            name=event["name"], start_us=float(event["ts"]), end_us=float(event["ts"]) + float(event["dur"])
        )
        for event in events
        if event.get("ph") == "X" and event.get("cat") in categories
    ]


def union_us(events: Iterable[Event]) -> float:
    """The time in which at least one of them runs: kernels of several streams overlap."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event.start_us):
        total += max(0.0, event.end_us - max(event.start_us, until))
        until = max(until, event.end_us)
    return total


def longest(events: Sequence[Event], count: int) -> list[dict[str, Any]]:
    """By name, those that take the most time together, with the share of all of them."""
    seconds: dict[str, float] = defaultdict(float)
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        seconds[event.name] += (event.end_us - event.start_us) / 1e6
        calls[event.name] += 1
    whole = sum(seconds.values())
    names = sorted(seconds, key=lambda name: -seconds[name])[:count]
    return [
        {"name": name, "seconds": seconds[name], "calls": calls[name], "share": seconds[name] / whole}
        for name in names
    ]


class Student:
    """A student and its prompt; the stages of a step, to be called in this order."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan = plan
        processor = build_processor()
        model = make(plan.size, DTYPE, device, 0)
        add_adapters(model, LoraConfig(parts=("language",), rank=plan.rank, alpha=2 * plan.rank), 0)
        model.to(device)
        self.policy = HFPolicy(model, processor, compute_dtype=getattr(torch, DTYPE), recompute=True)
        self.prompts = prompts_of(processor, plan.long, side_px=plan.side_px)
        trained = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = make_optimizer(trained, OptimConfig())
        self.prefix: Any = None
        self.responses: list[list[tuple[int, ...]]] = []
        self.recorded: list[float] = []  # log-probs of all their tokens

    def prefill(self) -> None:
        self.prefix = self.policy.prefill(self.prompts, grad=True)

    def sample(self, rollouts: int = 1) -> None:
        groups = self.policy.sample(
            self.prefix,
            n=rollouts,
            max_new_tokens=self.plan.response,
            seeds=seeds_of(self.prompts, rollouts),
        )
        self.responses = [[tuple(rollout.token_ids) for rollout in group] for group in groups]
        self.recorded = [value for group in groups for rollout in group for value in rollout.recorded]

    def sample_many(self) -> None:
        self.sample(self.plan.rollouts)

    def update(self) -> None:
        found = self.policy.logprobs(self.prefix, self.responses, grad=True)
        (-found.logprobs_BT.sum()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.prefix = None


def measure(report: Report, tiny: bool) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    report.note(summary="nothing profiled yet")
    student = Student(TINY if tiny else REAL, device)
    stages: dict[str, Callable[[], None]] = {
        "prefill": student.prefill,
        "sampling, one rollout": student.sample,
        f"sampling, {student.plan.rollouts} rollouts": student.sample_many,
        "update": student.update,
    }
    seconds = {}
    for _ in range(2):  # the first round warms up
        seconds = {name: timed(work, device) for name, work in stages.items()}
    with profile(activities=activities(device)):
        settle(device)  # the profiler's own start takes seconds
    waits = []
    for name, work in stages.items():
        events, profiled_s = profiled(work, device)
        share = add(report, name, events, seconds[name], profiled_s, kind_of(device))
        waits.append(f"{name} {share:.0%} of {seconds[name]:.2f} s")
        report.note(summary=f"no {kind_of(device)} runs in: " + "; ".join(waits))
    report.attempt("norms", lambda: compare_norms(report, student, device))


def compare_norms(report: Report, student: Student, device: torch.device) -> None:
    """Forward and backward of a norm over the prompt's hidden states, as the model and as torch writes it:
    seconds (ways take turns), and how far each is from float64."""
    norm = student.policy.model.model.language_model.norm
    weight, eps = norm.weight.detach(), norm.variance_epsilon
    shape = (student.prompts[0].length, len(weight))
    x = torch.randn(shape, device=device, dtype=weight.dtype).requires_grad_()
    exact = rms_norm(x.detach().double(), weight.shape, weight.double(), eps)
    ways: dict[str, Callable[[], torch.Tensor]] = {
        "the model's": lambda: norm(x),
        "torch's": lambda: rms_norm(x, weight.shape, weight, eps),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(1 + NORM_TURNS):  # the first one warms up
        for name, way in ways.items():
            seconds[name].append(timed(partial(there_and_back, way, x.detach()), device))
    for name, way in ways.items():
        off = (way().detach().double() - exact).abs().max().item()
        median_s = statistics.median(seconds[name][1:])
        report.add(
            f"norm, {name}",
            f"{1e3 * median_s:.3f} ms for {list(shape)} in {weight.dtype}, {off:.1e} from float64",
            seconds=median_s,
            from_float64=off,
        )


def there_and_back(way: Callable[[], torch.Tensor], gradient: torch.Tensor) -> None:
    way().backward(gradient)


def add(
    report: Report, name: str, events: Sequence[Event], alone_s: float, profiled_s: float, kind: str
) -> float:
    """Rows of a stage; returns the share of its time, without the profiler, in which nothing runs."""
    busy_s = union_us(events) / 1e6
    share = max(0.0, 1 - busy_s / alone_s)
    found = longest(events, LONGEST)
    report.add(
        name,
        f"{alone_s:.3f} s ({profiled_s:.3f} s under the profiler), {len(events)} {kind}s run for "
        f"{busy_s:.3f} s: nothing runs in {share:.0%} (profiled: {max(0.0, 1 - busy_s / profiled_s):.0%})",
        bool(events),
        seconds=alone_s,
        profiled_seconds=profiled_s,
        busy_seconds=busy_s,
        waits=share,
        waits_profiled=max(0.0, 1 - busy_s / profiled_s),
        kernels=len(events),
        longest=found,
    )
    for kernel in found:
        short = kernel["name"][:NAME_LENGTH].replace("|", "/")
        report.add(
            f"{name}: `{short}`", f"{kernel['share']:.1%}, {kernel['seconds']:.4f} s, {kernel['calls']} calls"
        )
    return share


def timed(work: Callable[[], None], device: torch.device) -> float:
    settle(device)
    began_s = time.perf_counter()
    work()
    settle(device)
    return time.perf_counter() - began_s


def profiled(work: Callable[[], None], device: torch.device) -> tuple[list[Event], float]:
    """(what ran, seconds under the profiler)."""
    with profile(activities=activities(device)) as profiler:
        seconds = timed(work, device)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return read_trace(path, ON_CARD if device.type == "cuda" else ON_CPU), seconds


def kind_of(device: torch.device) -> str:
    return "kernel" if device.type == "cuda" else "operator"


def activities(device: torch.device) -> list[ProfilerActivity]:
    """Without the operators on the host, where a card is there: recording them would slow the host down."""
    return [ProfilerActivity.CUDA if device.type == "cuda" else ProfilerActivity.CPU]


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
