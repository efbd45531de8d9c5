"""The sizes of a Qwen3-VL model, from its ``config.json``: how many weights it has, where, in which shapes.

Symbols: ``D`` hidden size, ``F`` width of the feed-forward layer (in a mixture, of one expert), ``A`` query
heads × head size, ``C`` key heads × head size, ``V`` vocabulary; of the vision tower ``D`` and ``F``
likewise, and ``M`` the width of the patches of one video token side by side.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_opd.errors import UserError, need
from video_opd.files import read_text
from video_opd.models.checkpoint_files import FAMILIES, is_hub_name

KNOWN = Path(__file__).parent / "known_models.yaml"
_SIZE_IN_NAME = re.compile(r"qwen3-vl-(30b-a3b|32b|8b|4b|2b)(?![0-9a-z])", re.IGNORECASE)


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Weights of some modules. ``matrices`` are the linear layers, (numbers in, numbers out) each; ``others``
    counts all other weights: biases, norms, embeddings, experts."""

    matrices: tuple[tuple[int, int], ...] = ()
    others: int = 0
    largest_other: int = 0  # of one tensor among the others

    @property
    def in_matrices(self) -> int:
        return sum(a * b for a, b in self.matrices)

    @property
    def count(self) -> int:
        return self.in_matrices + self.others

    @property
    def largest(self) -> int:
        """The numbers of the largest tensor."""
        return max(self.largest_other, max((a * b for a, b in self.matrices), default=0))

    def adapters(self, rank: int) -> int:
        """The weights of LoRA's adapters of this rank on every linear layer."""
        return sum(rank * (a + b) for a, b in self.matrices)

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            matrices=self.matrices + other.matrices,
            others=self.others + other.others,
            largest_other=max(self.largest_other, other.largest_other),
        )

    def __mul__(self, times: int) -> Weights:
        return Weights(
            matrices=self.matrices * times, others=self.others * times, largest_other=self.largest_other
        )


def _others(*tensors: int) -> Weights:
    return Weights(others=sum(tensors), largest_other=max(tensors, default=0))


@dataclass(frozen=True, kw_only=True)
class TextSizes:
    """The language model."""

    hidden: int
    feed_forward: int
    layers: int
    heads: int
    key_heads: int
    head_size: int
    vocabulary: int
    attention_bias: bool = False
    experts: int = 0
    experts_a_token: int = 0
    expert_feed_forward: int = 0
    expert_layers: int = 0  # layers with experts; the others have one feed-forward layer

    @property
    def queries(self) -> int:
        """A: the numbers of a token's queries."""
        return self.heads * self.head_size

    @property
    def keys(self) -> int:
        """C: the numbers of a token's keys; it has as many values."""
        return self.key_heads * self.head_size

    @functools.cached_property
    def dense_layer(self) -> Weights:
        D, F = self.hidden, self.feed_forward
        return self._attention + Weights(matrices=((D, F), (D, F), (F, D)))

    @functools.cached_property
    def expert_layer(self) -> Weights:
        """The experts are two tensors, and the router is one: none of them is a linear layer."""
        D, E, F = self.hidden, self.experts, self.expert_feed_forward
        return self._attention + _others(E * 2 * F * D, E * D * F, E * D)

    @functools.cached_property
    def _attention(self) -> Weights:
        """Attention and the layer's norms."""
        D, A, C = self.hidden, self.queries, self.keys
        biases = (A, C, C, D) if self.attention_bias else ()
        return Weights(matrices=((D, A), (D, C), (D, C), (A, D))) + _others(
            *biases, D, D, self.head_size, self.head_size
        )

    @functools.cached_property
    def all_layers(self) -> Weights:
        dense = self.layers - self.expert_layers
        return self.dense_layer * dense + (
            self.expert_layer * self.expert_layers if self.expert_layers else Weights()
        )

    @property
    def largest_layer(self) -> Weights:
        return self.expert_layer if self.expert_layers else self.dense_layer


@dataclass(frozen=True, kw_only=True)
class VisionSizes:
    """The vision tower and its mergers: one ends the tower, and ``levels`` more belong to DeepStack."""

    hidden: int
    feed_forward: int
    depth: int
    heads: int
    patch_numbers: int  # channels × frames × height × width
    merge: int  # a video token is merge × merge patches
    out_hidden: int
    positions: int
    levels: int

    @property
    def patches_a_token(self) -> int:
        return self.merge**2

    @functools.cached_property
    def block(self) -> Weights:
        D, F = self.hidden, self.feed_forward
        matrices = ((D, 3 * D), (D, D), (D, F), (F, D))
        return Weights(matrices=matrices) + _others(D, D, D, D, 3 * D, D, F, D)

    @functools.cached_property
    def stem(self) -> Weights:
        """The patch embedding, which is a convolution, and the positions."""
        return _others(self.patch_numbers * self.hidden, self.hidden, self.positions * self.hidden)

    @functools.cached_property
    def mergers(self) -> Weights:
        M, out = self.hidden * self.merge**2, self.out_hidden
        each = Weights(matrices=((M, M), (M, out))) + _others(M, out)
        norms = [self.hidden] * 2 + [M] * 2 * self.levels  # a level's norm sees the patches side by side
        return each * (1 + self.levels) + _others(*norms)


@dataclass(frozen=True, kw_only=True)
class ModelSizes:
    """A model: ``name`` says whose sizes these are."""

    name: str
    text: TextSizes
    vision: VisionSizes
    tied: bool  # whether embedding and lm_head are one tensor

    @property
    def embedding(self) -> int:
        """The weights of the embedding, and of ``lm_head``."""
        return self.text.vocabulary * self.text.hidden

    @functools.cached_property
    def parts(self) -> Mapping[str, Weights]:
        """The weights of each part that a recipe names; a tied ``lm_head`` has none of its own."""
        text, vision = self.text, self.vision
        return {
            "vision": vision.stem + vision.block * vision.depth,
            "merger": vision.mergers,
            "language": text.all_layers + _others(self.embedding, text.hidden),
            "lm_head": Weights() if self.tied else Weights(matrices=((text.hidden, text.vocabulary),)),
        }

    @functools.cached_property
    def weights(self) -> int:
        return sum(part.count for part in self.parts.values())

    @property
    def rest(self) -> int:
        """The weights that are in no decoder layer and no vision block."""
        return self.weights - self.text.all_layers.count - self.vision.depth * self.vision.block.count

    @property
    def largest_unit(self) -> int:
        """The weights of the largest layer that FSDP gathers by itself."""
        return max(self.text.largest_layer.count, self.vision.block.count)


# --------------------------------------------------------------------------------------- reading config.json


def read_sizes(path: str | Path) -> ModelSizes:
    """The sizes of a model: of a folder by its ``config.json``, otherwise of the published model that the
    name names.

    Raises :class:`UserError` for a folder without a config, a config that is none of Qwen3-VL, and a name
    that is not known.
    """
    folder = Path(path)
    if folder.is_dir():
        file = folder / "config.json"
        try:
            config = json.loads(read_text(file))
        except OSError as error:
            raise UserError(
                f"{path}: no config.json in it ({error.strerror}); give a folder that save_pretrained wrote"
            ) from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{file}: not JSON ({error}); copy it from the checkpoint again") from error
        return sizes_of(config, str(path))
    if found := _SIZE_IN_NAME.search(folder.name):
        name = f"Qwen3-VL-{found[1].upper()}"
        return sizes_of(known_models()[name], name)
    if downloaded := _downloaded(str(path)):
        return read_sizes(downloaded)
    raise UserError(
        f"{path}: no such folder, and not the name of a model whose sizes are known "
        f"({', '.join(known_models())}); give a folder with its config.json"
    )


def sizes_of(config: Mapping[str, Any], name: str) -> ModelSizes:
    """The sizes in the contents of a ``config.json``. Raises :class:`UserError` for one that is not
    Qwen3-VL's."""
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    need(
        isinstance(kind, str) and kind in FAMILIES,
        f"{name}: config.json is of a {kind!r} model; a plan knows {' and '.join(FAMILIES)}",
    )
    text, vision = _Section(config, "text_config", name), _Section(config, "vision_config", name)
    heads = text("num_attention_heads")
    layers = text("num_hidden_layers")
    # transformers 5 writes the number of experts under the second name.
    name_of_experts = "num_experts" if "num_experts" in text.values else "num_local_experts"
    experts = text(name_of_experts) if kind == "qwen3_vl_moe" else 0
    levels = vision.values.get("deepstack_visual_indexes")
    merge = vision("spatial_merge_size")
    patch = vision("patch_size")
    tied = config.get("tie_word_embeddings", text.values.get("tie_word_embeddings", False))
    return ModelSizes(
        name=name,
        text=TextSizes(
            hidden=text("hidden_size"),
            feed_forward=text("intermediate_size"),
            layers=layers,
            heads=heads,
            key_heads=text("num_key_value_heads"),
            head_size=text("head_dim", text("hidden_size") // heads),
            vocabulary=text("vocab_size"),
            attention_bias=bool(text.values.get("attention_bias")),
            experts=experts,
            experts_a_token=text("num_experts_per_tok") if experts else 0,
            expert_feed_forward=text("moe_intermediate_size") if experts else 0,
            expert_layers=_expert_layers(text.values, layers) if experts else 0,
        ),
        vision=VisionSizes(
            hidden=vision("hidden_size"),
            feed_forward=vision("intermediate_size"),
            depth=vision("depth"),
            heads=vision("num_heads"),
            patch_numbers=vision("in_channels", 3) * vision("temporal_patch_size") * patch**2,
            merge=merge,
            out_hidden=vision("out_hidden_size"),
            positions=vision("num_position_embeddings"),
            levels=len(levels) if isinstance(levels, Sequence) else 0,
        ),
        tied=bool(tied),
    )


class _Section:
    """The sizes in a section of a config."""

    def __init__(self, config: Mapping[str, Any], section: str, name: str) -> None:
        values = config.get(section)
        need(isinstance(values, Mapping), f"{name}: config.json has no {section}")
        self.values: Mapping[str, Any] = values  # type: ignore[assignment]
        self.section, self.name = section, name

    def __call__(self, key: str, default: int | None = None) -> int:
        size = self.values.get(key)
        size = default if size is None else size
        need(
            isinstance(size, int) and not isinstance(size, bool) and size >= 1,
            f"{self.name}: config.json has {self.section}.{key} {size!r}, and it must be an integer from 1; "
            "copy config.json from the checkpoint that it was made from",
        )
        assert size is not None
        return size


def _expert_layers(text: Mapping[str, Any], layers: int) -> int:
    dense, every = text.get("mlp_only_layers") or (), text.get("decoder_sparse_step") or 1
    return sum(i not in dense and (i + 1) % every == 0 for i in range(layers))


@functools.cache
def known_models() -> Mapping[str, Any]:
    """The configs of the published models by name, with the keys that say how large they are."""
    import yaml

    known: Mapping[str, Any] = yaml.safe_load(KNOWN.read_text(encoding="utf-8"))
    return known


def _downloaded(name: str) -> Path | None:
    """The folder to which a hub's model was downloaded before; nobody is asked."""
    if not is_hub_name(name):
        return None
    from huggingface_hub import try_to_load_from_cache

    file = try_to_load_from_cache(name, "config.json")
    return Path(file).parent if isinstance(file, str) else None
