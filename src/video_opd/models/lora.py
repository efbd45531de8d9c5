"""Low-rank adapters (LoRA, arXiv 2106.09685) through peft: added, switched off, saved, merged.

peft replaces the linear layers of the adapted parts in place. The model stays a
``Qwen3VLForConditionalGeneration``, so no other code depends on adapters. An adapted layer computes
W x + (alpha / rank) B A x, with W frozen and A [rank, in] and B [out, rank] in float32.
"""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from video_opd.config import LoraConfig
from video_opd.errors import UserError
from video_opd.files import read_text
from video_opd.models.checkpoint_files import FULL_WEIGHTS, check_files_of, has_full_weights
from video_opd.models.parts import part_modules, state_of
from video_opd.seeds import derive_seed

NAME = "default"  # peft keeps adapters by name: this is the one that is trained
WEIGHTS = "adapter_model.safetensors"  # peft's own file name
# Keys of peft's config that say where an adapter comes from, and change nothing.
_DESCRIPTIVE = ("auto_mapping", "inference_mode", "peft_version", "revision", "task_type")
_MOST_ALPHA = 1e6
_PREFIX = "base_model.model."  # every key in peft's file begins with this


def add_adapters(model: nn.Module, settings: LoraConfig, seed: int, base: str | None = None) -> None:
    """Adapts every linear layer (attention, MLP) of ``settings.parts`` and freezes the rest of these parts.

    B starts at 0, so the model's output does not change. A is uniform, a function of ``seed`` and the layer's
    name. ``base`` is recorded in the adapter's config as the model that it belongs to.
    """
    import peft

    names = [
        f"{prefix}.{name}"
        for part in settings.parts
        for prefix, module in part_modules(model)[part]
        for name, child in module.named_modules()
        if type(child) is nn.Linear
    ]
    _inject(
        model,
        peft.LoraConfig(
            r=settings.rank,
            lora_alpha=settings.alpha,
            lora_dropout=0.0,
            target_modules=_pattern(names),
            base_model_name_or_path=base,
        ),
    )
    assert {name for name, _ in adapted_layers(model)} == set(names), "the pattern matches other layers"
    for name, layer in adapted_layers(model):
        generator = torch.Generator().manual_seed(derive_seed(seed, "lora", name))
        weight = torch.empty(layer.lora_A[NAME].weight.shape)
        nn.init.kaiming_uniform_(weight, a=math.sqrt(5), generator=generator)  # as peft does
        layer.lora_A[NAME].weight.data.copy_(weight)


def has_adapters(model: nn.Module) -> bool:
    return any(True for _ in adapted_layers(model))


def adapted_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """(name, peft's layer) of every layer with an adapter."""
    for name, module in model.named_modules():
        if isinstance(getattr(module, "lora_A", None), nn.ModuleDict):  # importing peft takes two seconds
            yield name, module


def adapter_weights(model: nn.Module, adapter: str = NAME) -> dict[str, nn.Parameter]:
    """Every A and B of an adapter, by its name in the model."""
    return {
        f"{layer_name}.{name}": parameter
        for layer_name, layer in adapted_layers(model)
        for name, parameter in layer.named_parameters()
        if name.startswith((f"lora_A.{adapter}.", f"lora_B.{adapter}."))
    }


def trained_in_full(model: nn.Module) -> dict[str, nn.Parameter]:
    """The trained weights that are not adapters."""
    adapters = {id(parameter) for parameter in adapter_weights(model).values()}
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in adapters
    }


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes exactly as its base. Not to be used between a forward and its backward."""
    layers = _as_trained(model)
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@contextmanager
def adapter_on(model: nn.Module, adapter: str) -> Iterator[None]:
    """Inside, the model computes with another adapter, which :func:`add_frozen_adapter` put there, in place
    of the one that is trained. Not to be used between a forward and its backward."""
    layers = _as_trained(model)
    for layer in layers:
        layer.set_adapter([adapter], inference_mode=True)
    try:
        yield
    finally:
        for layer in layers:
            layer.set_adapter([NAME])


def _as_trained(model: nn.Module) -> list[Any]:
    """The adapted layers, which must compute with the trained adapter: of one student that is several models,
    each must be left before another is put on, or the inner one computes as the outer."""
    layers = [layer for _, layer in adapted_layers(model)]
    for layer in layers:
        trained = NAME not in layer.lora_A or layer.active_adapters == [NAME]
        assert trained and not layer.disable_adapters, "the student is another model already"
    return layers


@torch.no_grad()
def merge_adapters(model: nn.Module, dtype: torch.dtype = torch.float32) -> None:
    """Turns an adapted model into a plain one in place.

    Adapted weights become W + (alpha / rank) B A, summed in float32 and held in ``dtype``. Other weights do
    not change. Adapters of a teacher are taken off.
    """
    for name, layer in list(adapted_layers(model)):
        linear = layer.get_base_layer()
        if NAME in layer.lora_A:
            weight = linear.weight.float() + layer.get_delta_weight(NAME).float()
            linear.weight = nn.Parameter(weight.to(dtype), requires_grad=linear.weight.requires_grad)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, linear)
    if hasattr(model, "peft_config"):
        del model.peft_config


def merged_weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields the weights of the plain model that :func:`merge_adapters` would make, one after the other, by
    its names; ``model`` stays as it is. Weights that share their memory come once."""
    layers = dict(adapted_layers(model))
    seen: set[tuple[int, torch.Size]] = set()
    for name, tensor in state_of(model).items():
        held = (tensor.data_ptr(), tensor.shape)  # a sum of its own may lie where an earlier one was
        layer, _, rest = name.rpartition(".base_layer.")
        if layer in layers:
            if rest == "weight" and NAME in layers[layer].lora_A:
                tensor = tensor.float() + layers[layer].get_delta_weight(NAME).float()
            name = f"{layer}.{rest}"
        elif any(name.startswith(f"{other}.lora_") for other in layers):
            continue
        if held not in seen:
            seen.add(held)
            yield name, tensor.detach()


def save_adapter(model: nn.Module, folder: str | Path, state: dict[str, torch.Tensor] | None = None) -> None:
    """Writes the trained weights: the adapter in peft's format, and the parts trained in full, if any.

    ``state`` gives the weights if the model itself does not hold them (:func:`state_of`).
    """
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    inner: Any = model
    state = state or state_of(model)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    inner.peft_config[NAME].save_pretrained(folder)
    own = {name: state[name] for name in adapter_weights(model)}  # peft would take a teacher's, too
    # If peft were to look for embeddings, it would ask a hub about the base.
    weights = get_peft_model_state_dict(model, state_dict=own, adapter_name=NAME, save_embedding_layers=False)
    save_file(
        {f"{_PREFIX}{name}": weight.contiguous() for name, weight in weights.items()},
        folder / WEIGHTS,
        metadata={"format": "pt"},
    )
    if full := trained_in_full(model):
        held = {name: state[name].contiguous() for name in full}
        save_file(held, folder / FULL_WEIGHTS)


def load_adapter(model: nn.Module, folder: str | Path) -> None:
    """Adds to a plain model, the base, the adapter that :func:`save_adapter` wrote.

    Raises :class:`UserError` for an adapter that does not fit the model.
    """
    assert not has_adapters(model), "the model has an adapter already"
    folder = Path(folder)
    config, weights, full = _read_adapter(folder)
    with _fitting(folder):
        _inject(model, config)
    _copy_adapter(weights, model, NAME, folder)
    others = {name: parameter.data for name, parameter in model.named_parameters() if name in full}
    _copy(full, others, folder)


def add_frozen_adapter(model: nn.Module, folder: str | Path, adapter: str) -> None:
    """Adds a second adapter, frozen, to a model that trains one; only :func:`adapter_on` uses it.

    Raises :class:`UserError` for an adapter that does not fit the model.
    """
    from peft import inject_adapter_in_model
    from peft.functional import cast_adapter_dtype

    folder = Path(folder)
    inner: Any = model
    config, weights, full = _read_adapter(folder)
    assert not full, "weights that were trained in full cannot share a base"
    trained = {id(parameter) for parameter in model.parameters() if parameter.requires_grad}
    with _fitting(folder), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft warns that the model has an adapter already
        inject_adapter_in_model(config, model, adapter_name=adapter)
    cast_adapter_dtype(model, adapter)
    _copy_adapter(weights, model, adapter, folder)
    for _, layer in adapted_layers(model):
        layer.set_adapter([NAME])
    for parameter in model.parameters():  # peft froze what is trained, and made the new one trainable
        parameter.requires_grad_(id(parameter) in trained)
    del inner.peft_config[adapter]  # what is saved is the adapter that is trained


def _read_adapter(folder: Path) -> tuple[Any, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(peft's config, A and B, weights trained in full) of an adapter folder."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    check_files_of(folder)
    try:
        config = _read_config(folder / "adapter_config.json")
        weights = load_file(folder / WEIGHTS)
        full = load_file(folder / FULL_WEIGHTS) if has_full_weights(folder) else {}
    except (OSError, ValueError, TypeError, RecursionError, SafetensorError) as error:
        raise UserError(f"{folder}: the adapter cannot be read ({error})") from error
    return config, weights, full


@contextmanager
def _fitting(folder: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, RuntimeError, re.error) as error:
        raise UserError(f"{folder}: the adapter does not fit the model ({error})") from error


def _copy_adapter(weights: dict[str, torch.Tensor], model: nn.Module, adapter: str, folder: Path) -> None:
    mine = {
        name.replace(f".{adapter}.", "."): parameter.data
        for name, parameter in adapter_weights(model, adapter).items()
    }
    _copy({name.removeprefix(_PREFIX): weight for name, weight in weights.items()}, mine, folder)


def _read_config(file: Path) -> Any:
    """peft's config of an adapter, made of rank, alpha and layers alone.

    Other settings would change what is computed, and peft imports the module that ``megatron_core`` names.
    Raises ValueError if one of them is not at its default.
    """
    import peft

    stored = json.loads(read_text(file))
    if not isinstance(stored, dict):
        raise ValueError(f"{file.name} is no object")
    rank, layers, alpha = stored.get("r"), stored.get("target_modules"), stored.get("lora_alpha")
    listed = isinstance(layers, list) and all(isinstance(name, str) for name in layers)
    if type(rank) is not int or rank < 1 or not isinstance(alpha, int | float) or not layers:
        raise ValueError(f"{file.name} lacks r, lora_alpha or target_modules")
    if isinstance(alpha, bool) or not 0 < alpha <= _MOST_ALPHA:  # NaN is not, either
        raise ValueError(f"{file.name}: lora_alpha is {alpha!r:.40}, and no adapter is scaled so")
    if not listed and not isinstance(layers, str):
        raise ValueError(f"{file.name}: target_modules is neither a pattern nor a list of names")
    config = peft.LoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=0.0,
        target_modules=layers,
        base_model_name_or_path=stored.get("base_model_name_or_path"),
    )
    plain = json.loads(json.dumps(config.to_dict(), default=list))
    for key, value in stored.items():
        if key not in _DESCRIPTIVE and value != plain.get(key) and key != "target_modules":
            raise ValueError(f"{file.name}: {key} is {value!r}, and only plain adapters are read")
    return config


def _copy(source: dict[str, torch.Tensor], target: dict[str, torch.Tensor], folder: Path) -> None:
    for name in sorted(source.keys() | target.keys()):
        if name not in source or name not in target or source[name].shape != target[name].shape:
            raise UserError(
                f"{folder}: {name} is not the same layer there as in the model; use the model and the lora "
                "settings that the adapter was trained with"
            )
        if not source[name].is_floating_point():
            raise UserError(
                f"{folder}: {name} holds {source[name].dtype}; save the adapter in floating point"
            )
        target[name].copy_(source[name])


def _inject(model: nn.Module, config: Any) -> None:
    """Puts peft's adapters into the model. peft then freezes everything else; parts without adapters are set
    back to being trained if they were before."""
    from peft import inject_adapter_in_model
    from peft.functional import cast_adapter_dtype

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[]):  # peft draws random weights, which are then replaced
        inject_adapter_in_model(config, model, adapter_name=NAME)
    cast_adapter_dtype(model, NAME)  # peft creates adapters in the precision of the base
    for _, layer in adapted_layers(model):
        layer._cast_input_dtype = _input_for_adapter
    of_adapted_parts = {
        id(parameter)
        for part in part_modules(model).values()
        if any(has_adapters(module) for _, module in part)
        for _, module in part
        for parameter in module.parameters()
    }
    for parameter in trained:  # a tensor that two parts share is frozen if one of them has adapters
        parameter.requires_grad_(id(parameter) not in of_adapted_parts)


def _input_for_adapter(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The input of A, in place of peft's own cast to the dtype of A.

    Autocast casts the input and A to its own dtype, so it is left alone there: a cast to float32 before would
    change no number, and takes a copy of twice the size for every layer.
    """
    return x if torch.is_autocast_enabled(x.device.type) else x.to(dtype)


def _pattern(names: list[str]) -> str:
    """A regular expression that matches these layers in every block.

    It is shorter than a list of names, and equal parts give equal text in peft's config. peft would store a
    list as a set, in any order.
    """
    kinds = {re.sub(r"\.\d+(?=\.)", r".\\d+", name) for name in names}
    return "|".join(sorted(kind.replace(".", r"\.") for kind in kinds))
