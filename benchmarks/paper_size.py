"""Models of Qwen3-VL's published shapes with random weights, and the operations that a step on them takes.

The tokenizer is the tiny one: only tokens that can be written meet ``lm_head``, at response positions, so a
small vocabulary changes little.

Symbols: P prompt tokens, G rollouts, R tokens of a rollout, as in docs/performance.md.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch

from video_opd.bench.timing import take_turns
from video_opd.models.parts import cast_weights
from video_opd.models.patch_embedding import use_linear_patches
from video_opd.models.vision_attention import use_batched_frames
from video_opd.world.tiny import build_model

VISION = {
    "hidden_size": 1152, "intermediate_size": 4304, "depth": 27, "num_heads": 16,
    "num_position_embeddings": 2304, "deepstack_visual_indexes": [8, 16, 24],
}  # fmt: skip
SHAPES: dict[str, dict[str, dict[str, Any]]] = {
    "8b": {
        "text": {
            "hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
            "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936,
        },
        "vision": VISION | {"out_hidden_size": 4096},
    },
    "32b": {
        "text": {
            "hidden_size": 5120, "intermediate_size": 25600, "num_hidden_layers": 64,
            "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 151936,
        },
        "vision": VISION | {"out_hidden_size": 5120},
    },
}  # fmt: skip
LARGE = {"head_dim": 128, "max_position_embeddings": 262144}
SIZES = ("test", "tiny", "small", *SHAPES)
PATCHES = 4  # of a visual token

Trained = Literal["adapters", "full"]


def make(size: str, dtype: str, device: torch.device, seed: int, layers: int | None = None) -> Any:
    """A model of random weights, made on its device; frozen. ``layers``: only so many decoder layers."""
    from transformers import Qwen3VLForConditionalGeneration

    torch.manual_seed(seed)
    with device:
        model = Qwen3VLForConditionalGeneration._from_config(
            config_of(size, layers), dtype=getattr(torch, dtype), attn_implementation="sdpa"
        )
    cast_weights(model, getattr(torch, dtype))
    model.generation_config = build_model("test").generation_config
    use_batched_frames(model)
    use_linear_patches(model)
    return model.eval().requires_grad_(False)


def config_of(size: str, layers: int | None = None) -> Any:
    """Qwen3-VL's config of that size, with the tiny tokenizer's special tokens."""
    from transformers import Qwen3VLConfig

    config = build_model("test" if size in SHAPES else size).config.to_dict()
    text, vision = config["text_config"], config["vision_config"]
    if size in SHAPES:
        text |= SHAPES[size]["text"] | LARGE
        text["rope_parameters"] |= {"mrope_section": [24, 20, 20], "rope_theta": 5_000_000}
        vision |= SHAPES[size]["vision"]
    if layers is not None:
        text["num_hidden_layers"] = layers
        deepstack = vision["deepstack_visual_indexes"]
        vision["deepstack_visual_indexes"] = deepstack[:layers]  # one for each of the first decoder layers
    config["tie_word_embeddings"] = text["tie_word_embeddings"] = False
    return Qwen3VLConfig.from_dict(config)


@dataclass(frozen=True, kw_only=True)
class Costs:
    """The work of a model for each token: the weights that it meets, and the attention scores."""

    weights: int  # weights of the decoder layers
    last: int  # those of them in the product that ends a layer
    scores: int  # decoder layers × heads × head size; 4 operations on each for a pair of query and key
    vision_weights: float  # of the vision tower, that a patch meets; mergers in proportion
    vision_scores: int

    @classmethod
    def of(cls, model: Any) -> Costs:
        """From the base weights of ``model``; adapters are not counted."""
        text, vision = model.config.text_config, model.config.vision_config
        tower, layers = model.model.visual, model.model.language_model.layers
        mergers = _base_weights(tower.merger) + _base_weights(tower.deepstack_merger_list)
        return cls(
            weights=_base_weights(layers),
            last=sum(layer.mlp.down_proj.weight.numel() for layer in layers),
            scores=text.num_hidden_layers * text.num_attention_heads * text.head_dim,
            vision_weights=_base_weights(tower.patch_embed) + _base_weights(tower.blocks) + mergers / PATCHES,
            vision_scores=vision.depth * vision.hidden_size,
        )

    def forward(self, tokens: int, pairs: float) -> float:
        """Operations of the decoder on ``tokens`` that see ``pairs`` keys together."""
        return 2.0 * self.weights * tokens + 4.0 * self.scores * pairs

    def again(self, tokens: int, pairs: float) -> float:
        """The work of a forward that is recomputed. It stops before the last product of a layer, which the
        backward does not need."""
        return self.forward(tokens, pairs) - 2.0 * self.last * tokens

    def backward(self, tokens: int, pairs: float, trained: Trained) -> float:
        """Adapters leave no gradients of the weights to be computed; scores have two operands in any case."""
        return (2.0 if trained == "adapters" else 4.0) * self.weights * tokens + 8.0 * self.scores * pairs

    def see(self, video_tokens: int, frame_pairs: int) -> float:
        """Operations of the vision tower; a patch attends to those of its own pair of frames."""
        patches = PATCHES * video_tokens
        return patches * (2.0 * self.vision_weights + 4.0 * self.vision_scores * patches / frame_pairs)


def _base_weights(module: Any) -> int:
    return sum(p.numel() for name, p in module.named_parameters() if p.ndim > 1 and "lora_" not in name)


@dataclass(frozen=True, kw_only=True)
class StepWork:
    """A step on one prompt: how much is read, how much is written, and which way."""

    prompt: int  # P, the video's tokens among them
    video_tokens: int
    frame_pairs: int
    rollouts: int  # G
    response: int  # R
    shared: bool  # the prefix engine; otherwise each response stands behind a prompt of its own in the update
    recompute: bool
    trained: Trained = "adapters"

    def operations(self, student: Costs, teacher: Costs | None) -> dict[str, float]:
        """The work of each stage, by the cost model of docs/performance.md; 0 for a stage that is left out.

        The first token of a response comes from the prefill. The vision tower is frozen.
        """
        P, G, steps = self.prompt, self.rollouts, self.response - 1
        read = (P, P * (P + 1) / 2)
        written = (G * steps, G * (steps * P + steps * (steps + 1) / 2))
        both = (read[0] + written[0], read[1] + written[1])
        apart = (G * (P + self.response), G * (P + self.response) * (P + self.response + 1) / 2)

        def see(costs: Costs) -> float:
            return costs.see(self.video_tokens, self.frame_pairs)

        prefill = see(student) + student.forward(*read)
        sample = student.forward(*written)
        update = both if self.shared else apart
        again = student.again(*update) if self.recompute else 0.0
        stages = {
            "prefill": prefill if self.shared else 0.0,
            "sample": sample if self.shared else prefill + sample,
            "teacher": 0.0,
            "update": student.forward(*written)
            if self.shared
            else G * see(student) + student.forward(*apart),
            "backward": student.backward(*update, self.trained) + again,
        }
        if teacher is not None:
            videos = 1 if self.shared else G
            stages["teacher"] = videos * see(teacher) + teacher.forward(*(both if self.shared else apart))
        return stages


def matrix_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """Operations a second of a product of two square matrices, the best of ten."""
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    _, seconds = take_turns({"product": lambda: a @ b}, 10, device)
    return 2 * size**3 / min(seconds["product"])
