"""Checkpoints that are either complete or not there, and model folders that anyone can load.

``checkpoints/step-N/`` holds ``model/`` (a ``from_pretrained`` folder, float32), ``training.pt`` (optimiser
and random states) and ``state.json`` (the step, and the sizes of all files). With LoRA, ``adapter/`` stands
in place of ``model/``: it holds what is trained, and nothing of the base. Folders are replaced whole or not
at all (:mod:`video_opd.files`), so a kill or a full disk leaves the earlier checkpoints.
"""

from __future__ import annotations

import contextlib
import json
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from video_opd.config import Recipe
from video_opd.files import replacing_folder
from video_opd.models.inference import SETTINGS_FILE, with_video_form
from video_opd.models.loading import no_library_bars
from video_opd.models.lora import has_adapters, save_adapter
from video_opd.models.parts import state_of
from video_opd.training.model_card import CARD

ADAPTER = "adapter"
_PREFIX = "step-"
_EXPERTS = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A complete checkpoint on disk; ``step`` optimiser steps were done."""

    path: Path
    step: int

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def weights(self) -> Path:
        """The folder that a resume loads: a whole model, or the adapters for the base."""
        adapter = self.path / ADAPTER
        return adapter if adapter.is_dir() else self.model


def save_model_folder(
    model: Any, processor: Any, path: str | Path, recipe: Recipe, card: str | None = None
) -> None:
    """Writes a folder for ``from_pretrained``, with the processor, ``video_opd.json`` and the model card.

    ``video_opd.json`` holds the video budget, the prompt and the precision that the model was trained with,
    so that prediction uses the same. ``card`` is the text of ``README.md``, if it is given one. ``path`` is
    replaced atomically.

    Raises :class:`UserError` when the disk is full; what was at ``path`` is then still there.
    """
    with _replacing(path) as folder:
        _fill_model_folder(model, processor, folder, recipe)
        if card is not None:
            (folder / CARD).write_text(card, encoding="utf-8")


def save_adapter_folder(model: Any, path: str | Path) -> None:
    """Writes the adapters in peft's format. It replaces and raises as :func:`save_model_folder` does."""
    with _replacing(path) as folder:
        save_adapter(model, folder)


def save_checkpoint(
    root: Path,
    step: int,
    *,
    model: Any,
    processor: Any,
    training: Mapping[str, Any],
    recipe: Recipe,
    weights: dict[str, torch.Tensor] | None = None,
) -> Checkpoint:
    """Writes ``root/step-N`` and deletes all but the newest ``run.keep_checkpoints``.

    ``training`` goes into ``training.pt``. ``weights`` is the model's state dict if the model does not hold
    it itself.

    Raises :class:`UserError` when the disk is full; earlier checkpoints are then untouched.
    """
    path = root / f"{_PREFIX}{step}"
    with _replacing(path) as folder:
        if has_adapters(model):
            save_adapter(model, folder / ADAPTER, weights)
        else:
            _fill_model_folder(model, processor, folder / "model", recipe, weights)
        torch.save(dict(training), folder / "training.pt")
        state = {"step": step, "files": _sizes(folder)}
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
    for old in find_checkpoints(root)[recipe.run.keep_checkpoints :]:
        shutil.rmtree(old.path)
    return Checkpoint(path=path, step=step)


def find_checkpoints(root: Path) -> list[Checkpoint]:
    """The complete checkpoints under ``root``, newest first."""
    found = []
    for path in root.glob(f"{_PREFIX}*") if root.is_dir() else ():
        step = _complete_step(path)
        if step is not None:
            found.append(Checkpoint(path=path, step=step))
    return sorted(found, key=lambda checkpoint: -checkpoint.step)


def load_training_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ``training`` of :func:`save_checkpoint`, on the CPU."""
    # weights_only refuses the random states of numpy and Python. The file is this run's own.
    return torch.load(checkpoint.path / "training.pt", map_location="cpu", weights_only=False)


def random_state() -> dict[str, Any]:
    """The states of all generators of this process."""
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.set_rng_state(state["torch"])
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"])


def _fill_model_folder(
    model: Any,
    processor: Any,
    folder: Path,
    recipe: Recipe,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    state = state or state_of(model)
    with no_library_bars():
        if any(_EXPERTS.search(name) for name in state):
            # transformers would write its own layout of experts. It reads both; other tools read the hub's.
            state = {name: _as_on_hub(name, value) for name, value in state.items()}
            model.save_pretrained(folder, state_dict=state, save_original_format=False)
        else:
            model.save_pretrained(folder, state_dict=state)
    _write_one_truth(folder / "config.json")
    processor.save_pretrained(folder)
    facts = {
        "method": recipe.method,
        "dtype": recipe.model.dtype,
        "video": recipe.video.without_decoder(),
        "prompt": with_video_form(recipe).prompt.model_dump(),
    }
    (folder / SETTINGS_FILE).write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _as_on_hub(name: str, value: torch.Tensor) -> torch.Tensor:
    """Experts as [E, in, out]; transformers holds [E, out, in].

    transformers tells the two apart by their sizes, so a square matrix has to stay as it is held. No
    published model has one.
    """
    if not _EXPERTS.search(name) or value.shape[1] == value.shape[2]:
        return value
    return value.transpose(1, 2).contiguous()


def _write_one_truth(file: Path) -> None:
    """Completes ``config.json``, which transformers 5 writes in its own way, for other tools.

    ``tie_word_embeddings`` stands in it twice, and the text section may have its class's default in place of
    the model's value. ``num_experts``, ``rope_scaling`` and ``rope_theta`` are added under the names of the
    hub's files; transformers 4 does not load a Qwen3-VL without the last two.
    """
    config = json.loads(file.read_text(encoding="utf-8"))
    text = config["text_config"]
    if "tie_word_embeddings" in text:
        text["tie_word_embeddings"] = config["tie_word_embeddings"]
    if "num_local_experts" in text:
        text["num_experts"] = text["num_local_experts"]
    if (rope := text.get("rope_parameters")) is not None:
        text["rope_theta"] = rope["rope_theta"]
        text["rope_scaling"] = {key: value for key, value in rope.items() if key != "rope_theta"}
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")


@contextlib.contextmanager
def _replacing(path: str | Path) -> Iterator[Path]:
    """:func:`replacing_folder` for writers that report a failed write in their own ways, not as OSError."""
    from safetensors import SafetensorError

    with replacing_folder(path) as folder:
        try:
            yield folder
        except SafetensorError as error:
            raise OSError(str(error)) from error
        except RuntimeError as error:
            # torch.save has no error of its own: it says "unexpected pos 64 vs 0" or "iostream error".
            if re.search("PytorchStreamWriter|inline_container|iostream error", str(error)):
                raise OSError(str(error)) from error
            raise


def _sizes(folder: Path) -> dict[str, int]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _complete_step(path: Path) -> int | None:
    """The step of a checkpoint whose files are all there in full, else None."""
    try:
        state = json.loads((path / "state.json").read_text(encoding="utf-8"))
        complete = all((path / name).stat().st_size == size for name, size in state["files"].items())
        return int(state["step"]) if complete else None
    except (OSError, ValueError, KeyError):
        return None
