"""What a process holds in a step, and what ``video-opd plan`` says: a model of 110 million random weights.

    python benchmarks/plan_memory.py --out runs/plan-memory

Each configuration makes two steps by the training loop's own code, in processes of its own: one on short
prompts, from which on moments exist, and one on prompts of 1,000 tokens, which is measured. Two figures are
taken:

- ``resident``: the largest resident set less that before the models are loaded. By then the process has made
  the same steps with models of some hundred thousand weights, so libraries are loaded, and what they take is
  the constant that a plan for a CPU leaves out (``runtime_bytes``). Allocations of 64 KiB or more are given
  back to the system at once (``MALLOC_MMAP_THRESHOLD_``), so the allocator keeps nothing, and of the kernels
  that oneDNN compiles for each shape, a megabyte each, four are kept (``ONEDNN_PRIMITIVE_CACHE_CAPACITY``).
  Temporaries inside an operation are in it.
- ``tensors``: the storage of all tensors that are alive at once, at most. Every operation is seen by a
  dispatch mode; a storage counts from the operation that makes it, or first reads it, until it is freed.
  Temporaries inside torchao's operations are not seen.

The first has to be within 10% of the plan. With several processes, the one that holds most counts. A
configuration that was measured is not measured again in the same folder (``--again``), so a script that was
stopped goes on; the plan is always made anew.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import machine, parser, write_result
from exact_plan import exact_plan, lengths_of
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from video_opd.bench.work import prompts_of
from video_opd.config import Recipe, recipe_from_dict
from video_opd.planning.plan import RecipeSizes
from video_opd.training.stopwatch import Stopwatch
from video_opd.types import EncodedPrompt, Sample

TEXT = {
    "hidden_size": 768, "intermediate_size": 2304, "num_attention_heads": 6, "num_key_value_heads": 2,
    "head_dim": 128, "vocab_size": 24000,
}  # fmt: skip
LAYERS = {"student": 8, "teacher": 10, "small": 0}  # 0: the test model as it is
VISION = {
    "hidden_size": 320, "intermediate_size": 1280, "depth": 8, "num_heads": 5, "out_hidden_size": 768,
    "num_position_embeddings": 2304, "deepstack_visual_indexes": [1, 3],
}  # fmt: skip
TOKENS, SIDE_PX, RESPONSE = 1000, 256, 12
SHORT = 40  # tokens of the first step's prompts
ADAPTERS = {"lora.parts": ["vision", "merger", "language"], "model.freeze": ["lm_head"]}
AS_8X80GB = {
    "model.dtype": "bfloat16",
    "model.sharding": "fsdp2",
    "model.reduce": "micro_batch",
    "teacher.dtype": "bfloat16",
    "teacher.placement": "sharded",
}
#: (what it is, processes, settings beside those of ``BASE``).
CONFIGURATIONS: list[tuple[str, int, dict[str, Any]]] = [
    ("full, keep", 1, {"model.gradient_checkpointing": False}),
    ("full, recompute", 1, {}),
    ("full, recompute, two micro-batches", 1, {"optim.batch_size": 2}),
    ("full, keep, autocast", 1, {"model.gradient_checkpointing": False, "model.dtype": "bfloat16"}),
    ("frozen tower, keep", 1, {"model.gradient_checkpointing": False, "model.freeze": ["vision", "merger"]}),
    ("adapters, keep", 1, {**ADAPTERS, "model.gradient_checkpointing": False}),
    ("adapters in bfloat16, recompute", 1,
     {**ADAPTERS, "model.dtype": "bfloat16", "teacher.dtype": "bfloat16"}),
    ("GRPO, 8 rollouts, a reference", 1, {"method": "grpo", "sampling.rollouts": 8, "loss.kl_beta": 0.1}),
    ("full, two processes, DDP", 2, {}),
    ("full, two processes, FSDP2", 2, {"model.sharding": "fsdp2"}),
    ("full, two processes, FSDP2, bfloat16", 2, {"model.sharding": "fsdp2", "model.dtype": "bfloat16"}),
    ("full, four processes, FSDP2", 4, {"model.sharding": "fsdp2"}),
    ("teacher in shards of two processes", 2, {"teacher.placement": "sharded", "model.sharding": "fsdp2"}),
    ("as 8x80gb.yaml, two processes", 2, {**AS_8X80GB, "optim.batch_size": 4}),
    ("as 8x80gb.yaml, four processes", 4, AS_8X80GB),
    ("teacher in int8", 1, {"teacher.quantization": "int8"}),
    ("moments in int8", 1, {"optim.moments": "int8"}),
    ("as 1x141gb.yaml", 1,
     {"model.weights": "bfloat16", "optim.moments": "int8", "model.dtype": "bfloat16", "optim.batch_size": 2,
      "teacher.dtype": "bfloat16", "teacher.quantization": "int8"}),
    ("adapters on an int8 base, teacher in int8", 1,
     {**ADAPTERS, "lora.base_quantization": "int8", "teacher.quantization": "int8",
      "model.dtype": "bfloat16"}),
    ("layers gathered one at a time, two processes", 2, {"model.sharding": "fsdp2", "model.gather": "layer"}),
    ("layers gathered one at a time, four processes, bfloat16", 4,
     {**AS_8X80GB, "model.gather": "layer", "optim.batch_size": 8}),
]  # fmt: skip
BASE: dict[str, Any] = {
    "method": "video-opd",
    "model.gradient_checkpointing": True,
    "optim.micro_batch_size": 1,
    "sampling.max_new_tokens": RESPONSE,
    "loss.ratio_tolerance": 1e6,  # rounding in a random model must not end a measurement
    "run.trackers": [],
}


def main() -> None:
    arguments = parse()
    if arguments.worker is not None:
        work(arguments)
        return
    out = Path(arguments.out)
    make_models(out)
    records = []
    for number in arguments.only or range(len(CONFIGURATIONS)):
        name, processes, _ = CONFIGURATIONS[number]
        measured = measure(out, number, processes, again=arguments.again)
        recipe = recipe_of(out, number, processes)
        records.append({"number": number, "configuration": name, **measured, **planned(recipe, measured)})
        print(row_of(records[-1]), flush=True)
    records.sort(key=lambda record: record["number"])
    print("\n".join([*HEADER, *map(row_of, records)]))
    write_result(arguments.result, {"machine": machine(), "records": records})
    off = [record["configuration"] for record in records if not within(record)]
    assert not off, f"more than {TOLERANCE:.0%} off: {off}"


HEADER = [
    "| configuration | planned | resident | ratio | tensors | ratio | fullest in the plan |",
    "|---|---|---|---|---|---|---|",
]
TOLERANCE = 0.1


def row_of(record: Mapping[str, Any]) -> str:
    plan = record["plan_bytes"]
    measured = (record[key] for key in ("resident_bytes", "tensor_bytes"))
    cells = [f"{found / 2**20:,.0f} MiB | {found / plan:.3f}" for found in measured]
    name, phase = record["configuration"], record["phase"]
    return f"| {name} | {plan / 2**20:,.0f} MiB | {' | '.join(cells)} | {phase} |"


def within(record: Mapping[str, Any]) -> bool:
    return abs(record["resident_bytes"] / record["plan_bytes"] - 1) <= TOLERANCE


def parse() -> argparse.Namespace:
    made = parser(__doc__)
    made.add_argument("--out", required=True, help="a folder for the models and the measurements")
    made.add_argument("--result", default="plan-memory", help="name under benchmarks/results/")
    made.add_argument("--only", type=int, nargs="*", help="numbers of the configurations; default: all")
    made.add_argument("--again", action="store_true", help="measure again what was measured in --out")
    made.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    return made.parse_args()


# ------------------------------------------------------------------------------------------------ the models


def make_models(out: Path) -> None:
    """Folders of student and teacher, with the tiny models' processor."""
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    from video_opd.world.tiny import build_model, build_processor

    for number, (name, layers) in enumerate(LAYERS.items()):
        if (out / name / "config.json").exists():
            continue
        base = build_model("test")
        config = base.config.to_dict()
        if layers:
            config["text_config"] |= {**TEXT, "num_hidden_layers": layers}
            config["text_config"]["rope_parameters"] |= {"mrope_section": [24, 20, 20]}
            config["vision_config"] |= VISION
        config["tie_word_embeddings"] = config["text_config"]["tie_word_embeddings"] = False
        torch.manual_seed(number)
        model = Qwen3VLForConditionalGeneration(Qwen3VLConfig.from_dict(config))
        model.generation_config = base.generation_config
        model.save_pretrained(out / name)
        build_processor().save_pretrained(out / name)


# ---------------------------------------------------------------------------------------------- a measurement


def measure(out: Path, number: int, processes: int, *, again: bool) -> dict[str, Any]:
    """What the processes of a configuration measured, at most; they are run if there is nothing yet."""
    files = [out / f"measured-{number}-{rank}.json" for rank in range(processes)]
    if again or not all(file.exists() for file in files):
        run_processes(out, number, processes)
    found = [json.loads(file.read_text()) for file in files]
    return max(found, key=lambda each: each["tensor_bytes"])


def run_processes(out: Path, number: int, processes: int) -> None:
    environment = {
        **os.environ,
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "4",
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        "TOKENIZERS_PARALLELISM": "false",
    }
    launch = [sys.executable]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command = [*launch, __file__, "--out", str(out), "--worker", str(number)]
    subprocess.run(command, check=True, env=environment)


def recipe_of(out: Path, number: int, processes: int) -> Recipe:
    settings = {"optim.batch_size": processes, **BASE, **CONFIGURATIONS[number][2]}
    if settings["method"] != "grpo":
        settings["teacher.path"] = str(out / "teacher")
    tree: dict[str, Any] = {
        "model": {"path": str(out / "student")},
        "data": {"train": str(out / "rows.jsonl")},
        "run": {"dir": str(out / f"run-{number}")},
    }
    for key, value in settings.items():
        section, _, name = key.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[name] = value
    return recipe_from_dict(tree)


def work(arguments: argparse.Namespace) -> None:
    """One process of a configuration."""
    from video_opd.training.batches import Row
    from video_opd.training.components import build_components
    from video_opd.training.launch import make_accelerator
    from video_opd.training.run_folder import RunFolder
    from video_opd.training.step import Stepper, StepSettings
    from video_opd.world.tiny import build_processor

    out, number = Path(arguments.out), arguments.worker
    processes = CONFIGURATIONS[number][1]
    recipe = recipe_of(out, number, processes)
    accelerator = make_accelerator(recipe)
    long, short = (
        prompts_of(build_processor(), tokens, videos=recipe.optim.batch_size, side_px=side_px)
        for tokens, side_px in ((TOKENS, SIDE_PX), (SHORT, 64))
    )
    samples = [
        Sample(id=p.sample_id, video=Path("noise.mp4"), query="", duration_s=p.duration_s, spans=((0, 1),))
        for p in long
    ]
    if accelerator.is_main_process:
        row = {"video": "noise.mp4", "query": "q", "duration": long[0].duration_s, "spans": [[0, 1]]}
        lines = [json.dumps({"id": sample.id, **row}) for sample in samples]
        (out / "rows.jsonl").write_text("\n".join(lines) + "\n")
    accelerator.wait_for_everyone()
    mine = range(accelerator.process_index, len(samples), accelerator.num_processes)

    def two_steps(recipe: Recipe, batches: Sequence[Sequence[EncodedPrompt]], tracker: LiveTensors) -> Any:
        components = build_components(recipe, accelerator, RunFolder(recipe.run.dir), recipe.model.path)
        settings, stages = StepSettings.of(recipe, components.method.needs), StagePeaks(tracker)
        stepper = Stepper(settings, accelerator, components, stages)
        for step, prompts in enumerate(batches):
            stages.start_again()
            forget_peak()
            rows = [Row(position=i, sample=samples[i], prompt=prompts[i]) for i in mine]
            stepper.update(step, stepper.prepare(step, len(samples), rows))
        stages.end()
        return stages.peaks

    small = {"model.path": str(out / "small"), "run.dir": f"{recipe.run.dir}-small"}
    if recipe.teacher.path:
        small["teacher.path"] = str(out / "small")
    with LiveTensors() as tracker:
        two_steps(recipe.changed(**small), (short, short), tracker)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    runtime = resident_bytes("VmRSS")
    with LiveTensors() as tracker:
        peaks = two_steps(recipe, (short, long), tracker)
    measured = {
        "processes": processes,
        **lengths_of(long),
        "prompts_a_step": len(long) // processes,
        "tensor_bytes": max(peaks.values()),
        "stage_bytes": peaks,
        "runtime_bytes": runtime,
        "resident_bytes": resident_bytes("VmHWM") - runtime,
        "largest": tracker.at_peak,
    }
    (out / f"measured-{number}-{accelerator.process_index}.json").write_text(json.dumps(measured))
    accelerator.wait_for_everyone()


def planned(recipe: Recipe, measured: Mapping[str, Any]) -> dict[str, Any]:
    """The plan for prompts of exactly the measured lengths: its bounds are not what is measured."""
    known = ("prompt_tokens", "video_tokens", "frame_pairs", "prompts_a_step")
    work = {key: measured[key] for key in known}
    processes = measured["processes"]
    memory = exact_plan(recipe, RecipeSizes.of(recipe), work, processes=processes, cuda=False)
    phases = {phase: sum(parts.values()) for phase, parts in memory.phases.items()}
    return {
        "plan_bytes": memory.peak,
        "phase": memory.fullest,
        "parts": dict(memory.parts),
        "phases": phases,
    }


def resident_bytes(key: str) -> int:
    """``VmRSS`` (now) or ``VmHWM`` (at most) of this process."""
    status = Path("/proc/self/status").read_text().splitlines()
    (line,) = [line for line in status if line.startswith(f"{key}:")]
    return int(line.split()[1]) * 1024


def forget_peak() -> None:
    """Sets ``VmHWM`` back to what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")


class StagePeaks(Stopwatch):
    """The largest sum of live tensors in each stage of a step, and ``outside`` of all of them.

    A stage within another one counts for itself alone.
    """

    def __init__(self, tracker: LiveTensors) -> None:
        super().__init__()
        self.tracker = tracker
        self.peaks: dict[str, int] = {}
        self._open = ["outside"]

    def start_again(self) -> None:
        self.peaks.clear()
        self.tracker.start_again()

    def end(self) -> None:
        self._border()

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        self._border()
        self._open.append(name)
        try:
            yield
        finally:
            self._border()
            self._open.pop()

    def _border(self) -> None:
        name = self._open[-1]
        self.peaks[name] = max(self.peaks.get(name, 0), self.tracker.peak)
        self.tracker.start_again()


class LiveTensors(TorchDispatchMode):
    """Adds up the storage of all tensors that are alive, and keeps the largest sum.

    FSDP frees the storage of a gathered weight by resizing it to 0, so ``resize_`` is watched, too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self.at_peak: list[list[Any]] = []
        self._sizes: dict[int, int] = {}
        self._shapes: dict[int, str] = {}
        self._references: dict[int, Any] = {}

    def __enter__(self) -> LiveTensors:
        self._resize = torch.UntypedStorage.resize_

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = self._resize(storage, size)
            self._see(storage, "")
            self._compare()
            return result

        torch.UntypedStorage.resize_ = resize  # type: ignore[method-assign,assignment]
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in storages([args, kwargs, result]):
            self._see(tensor.untyped_storage(), str(tuple(tensor.shape)))
        self._compare()
        return result

    def start_again(self) -> None:
        self.peak = self.now

    def _see(self, storage: torch.UntypedStorage, shape: str) -> None:
        key, size = storage._cdata, storage.nbytes()
        before = self._sizes.get(key)
        if before is None:
            self._references[key] = weakref.ref(storage, partial(self._forget, key))
        if before != size:
            self.now += size - (before or 0)
            self._sizes[key] = size
            self._shapes[key] = shape or self._shapes.get(key, "")

    def _forget(self, key: int, _: Any = None) -> None:
        self.now -= self._sizes.pop(key, 0)
        self._shapes.pop(key, None)
        self._references.pop(key, None)

    def _compare(self) -> None:
        if self.now > self.peak:
            self.peak = self.now
            if self.now > 1.01 * getattr(self, "_described", 0):
                self._described = self.now
                of_shape: dict[str, list[int]] = {}
                for key, size in self._sizes.items():
                    of_shape.setdefault(self._shapes[key], []).append(size)
                largest = sorted(of_shape.items(), key=lambda item: -sum(item[1]))[:12]
                self.at_peak = [[shape, len(sizes), sum(sizes)] for shape, sizes in largest]


def storages(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors with a storage of their own; a tensor that wraps others stands for these."""
    for leaf in tree_leaves(tree):
        if not isinstance(leaf, torch.Tensor):
            continue
        if hasattr(leaf, "_local_tensor"):
            yield from storages(leaf._local_tensor)
        elif hasattr(leaf, "__tensor_flatten__"):
            names, _ = leaf.__tensor_flatten__()
            yield from storages([getattr(leaf, name) for name in names])
        elif leaf.device.type == "cpu":
            yield leaf


if __name__ == "__main__":
    main()
