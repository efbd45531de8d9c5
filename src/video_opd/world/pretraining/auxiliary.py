"""A tiny model with the heads that teach it to see, to tell the time, and where to look."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from video_opd.models.vision_attention import use_batched_frames
from video_opd.world.pretraining.examples import patches
from video_opd.world.pretraining.packing import Batch
from video_opd.world.queries import COLOURS, FAMILIES, SHAPES

POINTER_LAYER = 2  # the decoder layer whose first two heads are taught where to look
EVENT_LAYER = 2  # events are read from the hidden state that enters this layer
_TAPPED = "pretraining_tapped_sdpa"


class _Tap:
    """Keeps the queries and keys of the pointer layer while the decoder runs."""

    def __init__(self) -> None:
        self.query: torch.Tensor | None = None
        self.key: torch.Tensor | None = None


TAP = _Tap()


def _tapped_sdpa(module, query, key, value, attention_mask=None, **kwargs):
    if module.layer_idx == POINTER_LAYER:
        TAP.query, TAP.key = query, key
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_TAPPED, _tapped_sdpa)


class FactoredHead(nn.Module):
    """Logits of (colour, shape) or (colour, shape, family), from parts that are shared between classes.

    Each of a few slots scores every colour, shape and family by itself; a class is as likely as the best slot
    finds its parts together. So a red ring helps to learn both red and ring, and two events at once keep
    their attributes apart.
    """

    def __init__(self, hidden: int, channels: int, slots: int, *, families: bool, bias: float) -> None:
        super().__init__()
        self.shape = (channels, slots)
        self.parts = (len(COLOURS), len(SHAPES), len(FAMILIES) if families else 1)
        self.linear = nn.Linear(hidden, channels * slots * sum(self.parts))
        self.bias = nn.Parameter(torch.full((channels, slots, 1, 1, 1), bias))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[N, hidden] → logits [N, channels · colours · shapes (· families)]."""
        colour, shape, family = self.linear(x).view(len(x), *self.shape, -1).split(self.parts, -1)
        joint = colour[..., :, None, None] + shape[..., None, :, None] + family[..., None, None, :]
        return torch.logsumexp(joint + self.bias, dim=2).flatten(1)


class Pretrainer(nn.Module):
    """The model and the auxiliary heads."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        hidden = model.config.text_config.hidden_size
        self.events = FactoredHead(hidden, 4, 3, families=True, bias=-6.0)
        self.clock = nn.Linear(hidden, 3 * 11)
        self.objects = nn.ModuleList(
            [
                FactoredHead(hidden, 2, 2, families=False, bias=-5.0),
                FactoredHead(hidden, 1, 2, families=True, bias=-6.0),
            ]
        )
        use_batched_frames(model)
        # a config of its own: the name must not reach what is saved
        language = model.model.language_model
        own = copy.deepcopy(language.config)
        own._attn_implementation = _TAPPED
        for module in language.modules():
            if getattr(module, "config", None) is language.config and module is not language:
                module.config = own
        language.config = own

    def hidden(self, batch: Batch) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(last hidden [B, L, D], hidden entering EVENT_LAYER, visual embeddings)."""
        inner = self.model.model
        embeds = inner.language_model.embed_tokens(batch.input_ids)
        vision = inner.visual(batch.pixel_values, grid_thw=batch.grid_thw)
        where = batch.input_ids == inner.config.video_token_id
        embeds = embeds.masked_scatter(where[..., None], vision.pooler_output)
        kept: list[torch.Tensor] = []
        handle = inner.language_model.layers[EVENT_LAYER].register_forward_pre_hook(
            lambda _, args: kept.append(args[0])
        )
        out = inner.language_model(
            inputs_embeds=embeds,
            position_ids=batch.position_ids,
            attention_mask=batch.mask,
            visual_pos_masks=where,
            deepstack_visual_embeds=vision.deepstack_features,
            use_cache=False,
        )
        handle.remove()
        return out.last_hidden_state, kept[0], vision.pooler_output

    def see(self, visual: torch.Tensor) -> torch.Tensor:
        """Logits [N, OBJECTS + STATES] at visual tokens [N, hidden]."""
        return torch.cat([head(visual) for head in self.objects], dim=1)

    def vision_loss(self, frames: list[np.ndarray], objects: np.ndarray) -> torch.Tensor:
        """Objects at visual tokens, without the decoder."""
        t, h, w, _ = frames[0].shape
        pixels = torch.cat([patches(f) for f in frames])
        grid = torch.tensor([[t // 2, h // 16, w // 16]] * len(frames))
        visual = self.model.model.visual(pixels, grid_thw=grid)
        target = torch.from_numpy(objects).float()
        loss = F.binary_cross_entropy_with_logits(self.see(visual.pooler_output), target, reduction="sum")
        return loss / (len(target) / (h // 32 * (w // 32)))

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        last, middle, visual = self.hidden(batch)
        wanted = batch.targets >= 0
        logits = self.model.lm_head(last[wanted])
        answer = F.cross_entropy(logits.float(), batch.targets[wanted])
        at_end = middle[batch.ends[:, 0], batch.ends[:, 1]]
        events = F.binary_cross_entropy_with_logits(
            self.events(at_end), batch.events.flatten(1).float(), reduction="sum"
        ) / len(at_end)
        tenths = (batch.pair_times * 10).round().long()  # the tie at .05 is noise
        digits = torch.stack(
            [torch.where(tenths >= 100, tenths // 100, 10), tenths // 10 % 10, tenths % 10], 1
        )
        clock = F.cross_entropy(self.clock(at_end).view(-1, 11), digits.view(-1))
        objects = F.binary_cross_entropy_with_logits(
            self.see(visual), batch.objects.float(), reduction="sum"
        ) / len(at_end)
        b, q, head, k = batch.pointers.unbind(1)
        assert TAP.query is not None and TAP.key is not None
        groups = TAP.query.shape[1] // TAP.key.shape[1]
        queries = TAP.query[b, head, q]  # [M, d]
        keys = TAP.key[b, head // groups]  # [M, L, d]
        scores = torch.einsum("md,mld->ml", queries, keys) * queries.shape[-1] ** -0.5
        scores = scores.masked_fill(~batch.mask[b, 0, q], float("-inf"))
        pointer = F.cross_entropy(scores, k)
        TAP.query = TAP.key = None
        return {"answer": answer, "events": events, "clock": clock, "objects": objects, "pointer": pointer}
