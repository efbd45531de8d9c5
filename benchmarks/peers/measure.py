"""The measurements of every framework's script, the same for all. They need only PyTorch and Linux.

A step ends where the optimiser has stepped, wherever that is called from; between two ends lies all that a
step needs, reading videos included. Memory is the resident set of the process. What the model was given to
compute is counted at the model's own modules.
"""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

RESET_PEAK = "5"  # of /proc/self/clear_refs


class Measure:
    """Counts from :meth:`loaded`, called when the models are in memory and no step has begun.

    ``warmup`` steps are not counted; the first always belongs to them.
    """

    def __init__(self, warmup: int) -> None:
        assert warmup >= 1, "the first step has no step's end before it"
        self.warmup = warmup
        self.ends_s: list[float] = []
        self.counted: list[dict[str, int]] = []  # at the end of each step
        self.counts = {"patches": 0, "positions": 0}
        self.prompts: list[dict[str, int]] = []
        self.answer_lengths: list[float] = []  # of each step
        self.hooks: list[Any] = []

    def loaded(self, *models: Any) -> None:
        """Hooks on ``models``, Qwen3-VL all of them, the student first; the resident set's high-water mark
        starts here."""
        trained = [weight for weight in models[0].parameters() if weight.requires_grad]
        self.trained = sum(weight.numel() for weight in trained)
        self.dtypes = sorted({str(weight.dtype) for weight in trained})
        self.hooks.append(register_optimizer_step_post_hook(lambda *_: self._step_ended()))
        for model in models:
            visual, layer = model.model.visual, model.model.language_model.layers[0]
            self.hooks.append(visual.register_forward_pre_hook(self._saw_patches, with_kwargs=True))
            self.hooks.append(layer.register_forward_pre_hook(self._saw_positions, with_kwargs=True))
        self.loaded_bytes = status("VmRSS")
        with open("/proc/self/clear_refs", "w") as file:
            file.write(RESET_PEAK)

    def _step_ended(self) -> None:
        self.ends_s.append(time.perf_counter())
        self.counted.append(dict(self.counts))

    def _saw_patches(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.counts["patches"] += (args[0] if args else kwargs["hidden_states"]).shape[0]

    def _saw_positions(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        batch, length = (args[0] if args else kwargs["hidden_states"]).shape[:2]
        self.counts["positions"] += batch * length

    def prompt(self, tokens: int, visual: int) -> None:
        """Notes one prompt's tokens, and how many of them stand for what is seen."""
        self.prompts.append({"tokens": tokens, "visual": visual})

    def stop(self) -> None:
        for hook in self.hooks:
            hook.remove()

    def record(self, **more: Any) -> dict[str, Any]:
        """Seconds and work of the steps after the warm-up, and memory."""
        seconds = differences(self.ends_s)[self.warmup - 1 :]
        assert seconds, f"{len(self.ends_s)} steps ended, {self.warmup} of them to warm up"
        work = {
            f"{key}_a_step": statistics.median(
                differences([counts[key] for counts in self.counted])[self.warmup - 1 :]
            )
            for key in self.counts
        }
        return {
            "seconds": [round(value, 4) for value in seconds],
            "loaded_bytes": self.loaded_bytes,
            # The kernel counts pages in batches, so its peak may be some pages behind.
            "peak_bytes": max(status("VmHWM"), self.loaded_bytes),
            "prompt_tokens": sorted({prompt["tokens"] for prompt in self.prompts}),
            "visual_tokens": sorted({prompt["visual"] for prompt in self.prompts}),
            "answer_tokens": round(statistics.fmean(self.answer_lengths[self.warmup :]), 2),
            **work,
            "trained_weights": self.trained,
            "trained_dtypes": self.dtypes,
            "threads": torch.get_num_threads(),
            "torch": torch.__version__,
            "load_after": round(os.getloadavg()[0], 2),
            **more,
        }


class Tokens:
    """Counts prompts and responses in the inputs of a student that transformers' Trainer trains.

    The first call after a step has the prompts to sample from; a call with gradients has them with their
    responses. Both are padded with ``pad``.
    """

    def __init__(self, measure: Measure, model: Any, pad: int, visual: Sequence[int]) -> None:
        self.measure, self.pad, self.visual = measure, pad, torch.tensor(visual)
        self.step = -1
        self.in_prompts: list[int] = []
        self.in_rows: list[int] = []
        measure.hooks.append(model.model.register_forward_pre_hook(self._called, with_kwargs=True))
        measure.hooks.append(register_optimizer_step_post_hook(lambda *_: self._step_ended()))

    def _called(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input_ids")
        if ids is None:
            return
        if torch.is_grad_enabled():
            self.in_rows += (ids != self.pad).sum(-1).tolist()
        elif len(self.measure.ends_s) > self.step:
            self.step = len(self.measure.ends_s)
            self.in_prompts = (ids != self.pad).sum(-1).tolist()
            seen = torch.isin(ids, self.visual).sum(-1).tolist()
            for tokens, visual in zip(self.in_prompts, seen, strict=True):
                self.measure.prompt(tokens, visual)

    def _step_ended(self) -> None:
        rows, prompts = statistics.fmean(self.in_rows), statistics.fmean(self.in_prompts)
        self.measure.answer_lengths.append(rows - prompts)
        self.in_rows = []


def differences(values: Sequence[float]) -> list[float]:
    return [after - before for before, after in pairwise(values)]


def status(key: str) -> int:
    """Bytes, from /proc/self/status."""
    with open("/proc/self/status") as file:
        for line in file:
            if line.startswith(key + ":"):
                return int(line.split()[1]) * 1024
    raise KeyError(key)


def read_settings(path: str) -> dict[str, Any]:
    """Reads the settings that ``settings_of`` in ``run.py`` made for a framework."""
    return json.loads(Path(path).read_text(encoding="utf-8"))


def write_record(path: str, record: dict[str, Any]) -> None:
    Path(path).write_text(json.dumps(record) + "\n", encoding="utf-8")
