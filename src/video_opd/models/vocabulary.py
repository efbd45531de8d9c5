"""The tokens that a policy can write, and those that end a response.

The same restriction holds when a response is sampled and when student, teacher or trainer scores it. So every
log-probability in this project belongs to the distribution *renormalised* over the tokens that can be
written: the ratio of an update to its own sampling is exactly 1, and a model that is its own teacher gives
r_t = 0 everywhere.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from video_opd.errors import UserError, need

if TYPE_CHECKING:
    from transformers import Qwen3VLProcessor

# Added to the logit of a token that cannot be written: its probability is then exactly 0 in float32. The
# value is finite so that 0 * (log p - log q) in a divergence over the vocabulary is 0 instead of NaN.
FORBIDDEN_LOGIT = -1e30
_MOST_TOKENS = 1 << 31


class Configured(Protocol):
    """A loaded model, or what its folder says of it (:func:`video_opd.models.loading.read_model_configs`)."""

    @property
    def config(self) -> Any: ...

    @property
    def generation_config(self) -> Any: ...


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """The token ids ``0 <= id < size`` of a tokenizer.

    ``size`` is the V of every ``full_BTV``: the tokenizer's largest id plus one, not the rows of the
    embedding, which are padded differently from one model size to the next.
    """

    size: int
    forbidden_ids: frozenset[int]  # vision placeholders, and ids without a token
    eos_ids: frozenset[int]
    pad_id: int  # fills masked positions; its value never matters

    @classmethod
    def of(cls, model: Configured, processor: Qwen3VLProcessor) -> Vocabulary:
        """The vocabulary of a model and its processor. Raises :class:`UserError` if they do not fit."""
        token_ids = set(processor.tokenizer.get_vocab().values())
        size = max(token_ids) + 1
        rows = model.config.text_config.vocab_size
        if rows < size:
            raise UserError(
                f"{model.config.name_or_path or 'the model'}: {rows} embedding rows for a tokenizer of "
                f"{size} tokens; take the processor that was saved with the model"
            )
        eos_ids = eos_token_ids(model, processor)
        if not eos_ids:
            raise UserError(
                f"{model.config.name_or_path or 'the model'}: no end-of-sequence token is configured; "
                "set eos_token_id in generation_config.json"
            )
        forbidden_ids = frozenset((set(range(size)) - token_ids) | set(vision_token_ids(model).values()))
        need(
            not eos_ids & forbidden_ids,
            f"{model.config.name_or_path or 'the model'}: a token that stands for pixels, or none, is to end "
            "a response; copy config.json and generation_config.json from the checkpoint that it was made "
            "from",
        )
        pad_id = processor.tokenizer.pad_token_id
        return cls(
            size=size,
            forbidden_ids=forbidden_ids,
            eos_ids=eos_ids,
            pad_id=min(eos_ids) if pad_id is None else pad_id,
        )

    def logit_bias(self, device: torch.device) -> torch.Tensor:
        """Float32 [V]: 0 for tokens that may be written, :data:`FORBIDDEN_LOGIT` for the others."""
        bias_V = torch.zeros(self.size, device=device)
        if self.forbidden_ids:
            bias_V[torch.tensor(sorted(self.forbidden_ids), device=device)] = FORBIDDEN_LOGIT
        return bias_V

    def first_unwritable(self, token_ids: Iterable[int]) -> int | None:
        """The first of ``token_ids`` that no policy can write, or None."""
        return next((i for i in token_ids if not 0 <= i < self.size or i in self.forbidden_ids), None)


def vision_token_ids(model: Configured) -> dict[str, int]:
    """The ids of vision placeholders by their names in the model's config. UserError for what is no id."""
    names = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
    return {name: _id(model, name, getattr(model.config, name)) for name in names}


def eos_token_ids(model: Configured, processor: Qwen3VLProcessor) -> frozenset[int]:
    """Every id that ends a response, from generation config, model config and tokenizer together.

    Raises :class:`UserError` for what is no id.
    """
    found: list[Any] = [
        getattr(model.generation_config, "eos_token_id", None),
        getattr(model.config, "eos_token_id", None),
        getattr(model.config.text_config, "eos_token_id", None),
        processor.tokenizer.eos_token_id,
    ]
    ids: set[int] = set()
    for entry in found:
        several = entry if isinstance(entry, (list, tuple)) else () if entry is None else (entry,)
        ids.update(_id(model, "eos_token_id", value) for value in several)
    return frozenset(ids)


def _id(model: Configured, name: str, value: Any) -> int:
    need(
        type(value) is int and 0 <= value < _MOST_TOKENS,
        f"{model.config.name_or_path or 'the model'}: {name} is {value!r:.40}, and no token has such an id; "
        "copy config.json and generation_config.json from the checkpoint that it was made from",
    )
    return int(value)
