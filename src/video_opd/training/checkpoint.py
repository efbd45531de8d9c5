"""Checkpoints that are either intact or not used, and model folders that anyone can load.

``checkpoints/step-N/`` holds ``model/`` (a ``from_pretrained`` folder, in ``model.weights``), ``training.pt``
(optimiser and random states, tensors and numbers only) and ``state.json`` (the step, the recipe, the size and
digest of every file, the seals of the run's rows, and digests of what the run reads). With LoRA, ``adapter/``
stands in place of ``model/``: it holds what is trained, and nothing of the base. Folders are replaced whole
or not at all (:mod:`video_opd.files`), so a kill or a full disk leaves the earlier checkpoints. Nothing that
is read here can run code.
"""

from __future__ import annotations

import codecs
import contextlib
import json
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from video_opd.config import Recipe
from video_opd.errors import UserError
from video_opd.files import read_text, replacing_folder
from video_opd.models.inference import SETTINGS_FILE, with_video_form
from video_opd.models.loading import no_library_bars
from video_opd.models.lora import has_adapters, save_adapter
from video_opd.models.parts import state_of
from video_opd.progress import log
from video_opd.seals import Seal
from video_opd.training.digests import Damage, check_files, read_list, write_list

ADAPTER = "adapter"
STATE = "state.json"
CARD = "README.md"  # the model card of a model folder, which people may edit
DIGESTS = "digests.json"  # in the model folder and the adapter folder of a finished run
_PREFIX = "step-"
_EXPERTS = re.compile(r"\.mlp\.experts\.(gate_up_proj|down_proj)$")
_STEP = re.compile(r"step-\d{1,12}")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint on disk, which :func:`check_checkpoint` may find damaged; ``step`` optimiser steps were
    done.

    ``recipe`` is that of its run, as :meth:`Recipe.to_dict` gives it; None in those that an earlier version
    wrote. ``files`` has (size, digest) by name; the digest is None in those. ``rows`` has the seals of the
    run's files of rows as of that step, by name; ``inputs`` has the digests of what the run reads
    (:mod:`~video_opd.training.inputs`). Earlier versions wrote none of both.
    """

    path: Path
    step: int
    recipe: Mapping[str, Any] | None = None
    files: Mapping[str, tuple[int, str | None]] = field(default_factory=dict, repr=False)
    rows: Mapping[str, Seal] = field(default_factory=dict, repr=False)
    inputs: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def model(self) -> Path:
        return self.path / "model"

    @property
    def weights(self) -> Path:
        """The folder that a resume loads: a whole model, or the adapters for the base."""
        adapted = any(name.startswith(f"{ADAPTER}/") for name in self.files)
        return self.path / ADAPTER if adapted else self.model


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
        write_list(folder, DIGESTS, {}, without=(CARD,))


def save_adapter_folder(model: Any, path: str | Path) -> None:
    """Writes the adapters in peft's format. It replaces and raises as :func:`save_model_folder` does."""
    with _replacing(path) as folder:
        save_adapter(model, folder)
        write_list(folder, DIGESTS, {})


def check_model_folder(path: Path, *, listed: bool) -> None:
    """Raises :class:`Damage` if a folder that :func:`save_model_folder` or :func:`save_adapter_folder` wrote
    has changed since, its card apart. Those of earlier versions have no list; ``listed`` says that it has."""
    if listed or (path / DIGESTS).exists():
        check_files(path, read_list(path, DIGESTS)["files"], without=(DIGESTS, CARD))


def save_checkpoint(
    root: Path,
    step: int,
    *,
    model: Any,
    processor: Any,
    training: Mapping[str, Any],
    recipe: Recipe,
    weights: dict[str, torch.Tensor] | None = None,
    rows: Mapping[str, Seal] | None = None,
    inputs: Mapping[str, str] | None = None,
) -> Checkpoint:
    """Writes ``root/step-N`` and deletes all but the newest ``run.keep_checkpoints``.

    ``training`` goes into ``training.pt``. ``weights`` is the model's state dict if the model does not hold
    it itself. ``rows`` are the seals of the run's files of rows, by name, and ``inputs`` the digests of what
    it reads.

    Raises :class:`UserError` when the disk is full; earlier checkpoints are then untouched.
    """
    path = root / f"{_PREFIX}{step}"
    with _replacing(path) as folder:
        if has_adapters(model):
            save_adapter(model, folder / ADAPTER, weights)
        else:
            _fill_model_folder(model, processor, folder / "model", recipe, weights)
        _save_state(dict(training), folder / "training.pt")
        sealed = {name: seal.to_json() for name, seal in (rows or {}).items()}
        facts = {"step": step, "recipe": recipe.to_dict(), "rows": sealed, "inputs": dict(inputs or {})}
        write_list(folder, STATE, facts)
    # Later ones are there only if they were found damaged, and this run will replace them.
    earlier = [found for found in find_checkpoints(root) if found.step <= step]
    for old in earlier[recipe.run.keep_checkpoints :]:
        shutil.rmtree(old.path)
    return _read_state(path)


def find_checkpoints(root: Path) -> list[Checkpoint]:
    """The checkpoints under ``root`` that are complete by the sizes of their files, newest first.

    :func:`intact_checkpoints` reads the files, too.
    """
    found = []
    for path in _folders(root):
        with contextlib.suppress(Damage):
            checkpoint = _read_state(path)
            _check_sizes(checkpoint)
            found.append(checkpoint)
    return found


def stated_recipes(root: Path) -> list[Mapping[str, Any]]:
    """The recipes that the checkpoints under ``root`` state, damaged ones included, newest first."""
    found = []
    for path in _folders(root):
        with contextlib.suppress(Damage):
            found.append(_read_state(path).recipe)
    return [recipe for recipe in found if recipe is not None]


def intact_checkpoints(root: Path) -> Iterator[Checkpoint]:
    """Yields the checkpoints that are as they were written, newest first. It logs what is wrong with others.

    All files are read, half a second a gigabyte; the caller takes as many as it needs.
    """
    for path in _folders(root):
        try:
            checkpoint = _read_state(path)
            check_checkpoint(checkpoint)
        except Damage as damage:
            log(f"{path} is damaged and left out: {damage}")
        else:
            yield checkpoint


def check_checkpoint(checkpoint: Checkpoint) -> None:
    """Raises :class:`Damage` unless all files are there as they were written, and no others.

    A checkpoint of an earlier version states sizes only.
    """
    files = checkpoint.files
    if all(digest is not None for _, digest in files.values()):
        check_files(checkpoint.path, files, without=(STATE,))
        return
    log(f"{checkpoint.path} was written by an earlier version: only the sizes of its files are checked")
    _check_sizes(checkpoint)


def _check_sizes(checkpoint: Checkpoint) -> None:
    for name, (size, _) in checkpoint.files.items():
        try:
            found = (checkpoint.path / name).stat().st_size
        except OSError:
            raise Damage(f"{name} is missing") from None
        if found != size:
            raise Damage(f"{name} has {found} bytes, and was written with {size}")


def load_training_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """The ``training`` of :func:`save_checkpoint`, on the CPU.

    Raises :class:`UserError` if the file holds anything but tensors, numbers, texts and lists and mappings of
    these: reading other objects would run their code.
    """
    path = checkpoint.path / "training.pt"
    try:
        with torch.serialization.safe_globals(_OLD_GENERATORS):
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged file may raise anything
        lines = str(error).strip().splitlines()
        raise UserError(
            f"{path}: not a training state of tensors and numbers ({lines[0] if lines else error!r}); "
            f"delete {checkpoint.path} to continue from the checkpoint before it"
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: a {type(state).__name__}, not a training state; delete {checkpoint.path}")
    return state


# Earlier versions kept numpy's state as an array. These classes only hold bytes and their form.
_OLD_GENERATORS: list[Any] = [
    np.ndarray,
    np.dtype,
    type(np.dtype(np.uint32)),
    np.ndarray(0).__reduce__()[0],  # the function that makes an empty array
    codecs.encode,  # pickle's way to write bytes
]


def random_state() -> dict[str, Any]:
    """The states of all generators of this process, as numbers and tensors."""
    name, key, position, has_gauss, cached = np.random.get_state()
    state: dict[str, Any] = {
        "python": random.getstate(),
        "numpy": (name, [int(word) for word in key], int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def restore_random_state(state: Mapping[str, Any]) -> None:
    """Gives the generators of this process what :func:`random_state` returned."""
    name, key, *rest = state["numpy"]
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    np.random.set_state((name, np.asarray(key, dtype=np.uint32), *rest))
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
            state = {name: as_on_hub(name, value) for name, value in state.items()}
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


def as_on_hub(name: str, value: torch.Tensor) -> torch.Tensor:
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


def _save_state(state: Mapping[str, Any], path: Path) -> None:
    with path.open("wb") as file:  # of a path, torch 2.9 does not say that the last bytes were not written
        torch.save(state, file)


def _folders(root: Path) -> list[Path]:
    """The folders named step-N, the highest N first."""
    named = [path for path in root.glob(f"{_PREFIX}*") if _STEP.fullmatch(path.name)] if root.is_dir() else []
    return sorted(named, key=lambda path: -int(path.name.removeprefix(_PREFIX)))


def _read_state(path: Path) -> Checkpoint:
    """The checkpoint at ``path``; its other files are not read. Raises :class:`Damage`."""
    try:
        written = json.loads(read_text(path / STATE))
        sizes = written["files"]
        old = bool(sizes) and all(type(size) is int for size in sizes.values()) and "digest" not in written
        state = written if old else read_list(path, STATE)
        files = {name: (size, None) if old else tuple(size) for name, size in state["files"].items()}
        step, recipe = state["step"], state.get("recipe")
        rows = {name: Seal.read(seal) for name, seal in state.get("rows", {}).items()}
        inputs = dict(state.get("inputs", {}))
        if not all(len(file) == 2 for file in files.values()) or not files:
            raise Damage(f"{STATE} holds no list of files")
        if recipe is not None and not isinstance(recipe, dict):
            raise Damage(f"{STATE} holds no recipe")
    except OSError as error:
        raise Damage(f"{STATE} cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, Damage):
            raise
        raise Damage(f"{STATE} is not what a checkpoint holds") from None
    if type(step) is not int or path.name != f"{_PREFIX}{step}":
        raise Damage(f"{STATE} is that of step {step}")
    known = {name: seal for name, seal in rows.items() if seal is not None}
    return Checkpoint(path=path, step=step, recipe=recipe, files=files, rows=known, inputs=inputs)
