"""A tiny model with auxiliary heads, which teach it to see, to tell the time and to find events."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tiny_models.depth import resized
from tiny_models.examples import OBJECTS, STATES, patches
from tiny_models.packing import Batch, Sequences
from video_opd.models.vision_attention import use_batched_frames
from video_opd.world.queries import COLOURS, FAMILIES, SHAPES

POINTER_LAYER = 2  # the decoder layer whose first two attention heads learn to point at the event
EVENT_LAYER = 2  # the event head is given the hidden state that enters this layer
_TAPPED = "pretraining_tapped_sdpa"


class _Tap:
    """Keeps the attention queries and keys of the pointer layer of the last forward."""

    def __init__(self) -> None:
        self.query: torch.Tensor | None = None
        self.key: torch.Tensor | None = None


TAP = _Tap()


def _tapped_sdpa(module, query, key, value, attention_mask=None, **kwargs):
    if module.layer_idx == POINTER_LAYER:
        TAP.query, TAP.key = query, key
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(_TAPPED, _tapped_sdpa)


class EventHead(nn.Module):
    """Detects the events that a frame pair shows and the event that a query asks for, with the same vectors.

    Each colour, shape and family has one vector for each of four channels: active in the first frame, active
    in the second, begins, ends. The logit of an event is the sum of its three scores and a bias. The query's
    hidden state is scored with the vectors of "begins" where the start is about to be written, and with those
    of "ends" where the end is. Frame pairs and queries thus share one code, so that an attention head finds
    the pair by plain similarity.
    """

    CHANNELS = 4
    PARTS = (len(COLOURS), len(SHAPES), len(FAMILIES))

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(self.CHANNELS, sum(self.PARTS), hidden) * hidden**-0.5)
        self.bias = nn.Parameter(torch.full((self.CHANNELS, 1, 1, 1), -6.0))

    def scores(self, x: torch.Tensor, channels: torch.Tensor | slice) -> tuple[torch.Tensor, ...]:
        """Scores colours, shapes and families: [N, hidden] → [N, channels, ·], or [N, ·] for N channels."""
        x = F.rms_norm(x, x.shape[-1:])
        equation = "nd,cpd->ncp" if isinstance(channels, slice) else "nd,npd->np"
        return torch.einsum(equation, x, self.vectors[channels]).split(self.PARTS, -1)

    def events(self, x: torch.Tensor) -> torch.Tensor:
        """The logits of all events: [N, hidden] → [N, channels · looks · families]."""
        colour, shape, family = self.scores(x, slice(None))
        joint = colour[..., :, None, None] + shape[..., None, :, None] + family[..., None, None, :]
        return (joint + self.bias).flatten(1)


class Pretrainer(nn.Module):
    """The model with its auxiliary heads. ``fresh`` says that the model's weights are still random."""

    def __init__(self, model: Any, fresh: bool = True) -> None:
        super().__init__()
        self.model = model
        hidden = model.config.text_config.hidden_size
        self.events = EventHead(hidden)
        self.clock = nn.Linear(hidden, 3 * 11)
        self.objects = nn.Linear(hidden, OBJECTS + STATES)
        nn.init.constant_(self.objects.bias, -4.0)
        if fresh:  # equal queries and keys: attention begins as plain similarity
            attention = model.model.language_model.layers[POINTER_LAYER].self_attn
            with torch.no_grad():
                keys = attention.k_proj.weight
                keys.copy_(attention.q_proj.weight[: len(keys)])
        use_batched_frames(model)
        # The decoder gets a config of its own, so that this attention's name is not saved with the model.
        language = model.model.language_model
        own = copy.deepcopy(language.config)
        own._attn_implementation = _TAPPED
        for module in language.modules():
            if getattr(module, "config", None) is language.config and module is not language:
                module.config = own
        language.config = own

    def resized(self, size: str) -> Pretrainer:
        """Returns a deeper or shallower module with the same auxiliary heads."""
        module = Pretrainer(resized(self.model, size), fresh=False)
        heads = {k: v for k, v in self.state_dict().items() if not k.startswith("model.")}
        module.load_state_dict(heads, strict=False)
        return module

    def hidden(self, batch: Sequences) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Returns (last hidden state [B, L, D], the one that enters EVENT_LAYER, visual embeddings)."""
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

    def vision_loss(self, frames: list[np.ndarray], objects: np.ndarray) -> torch.Tensor:
        """The loss of the object head at the visual tokens; the decoder does not run."""
        t, h, w, _ = frames[0].shape
        pixels = torch.cat([patches(f) for f in frames])
        grid = torch.tensor([[t // 2, h // 16, w // 16]] * len(frames))
        visual = self.model.model.visual(pixels, grid_thw=grid)
        target = torch.from_numpy(objects).float()
        loss = F.binary_cross_entropy_with_logits(self.objects(visual.pooler_output), target, reduction="sum")
        return loss / (len(target) / (h // 32 * (w // 32)))

    def answer_loss(self, batch: Sequences) -> torch.Tensor:
        """The cross-entropy of the responses' tokens, without an auxiliary loss."""
        return self._answer_loss(self.hidden(batch)[0], batch)

    def _answer_loss(self, last: torch.Tensor, batch: Sequences) -> torch.Tensor:
        wanted = batch.targets >= 0
        logits = self.model.lm_head(last[wanted])
        return F.cross_entropy(logits.float(), batch.targets[wanted])

    def losses(self, batch: Batch) -> dict[str, torch.Tensor]:
        last, middle, visual = self.hidden(batch)
        answer = self._answer_loss(last, batch)
        at_end = middle[batch.ends[:, 0], batch.ends[:, 1]]
        events = F.binary_cross_entropy_with_logits(
            self.events.events(at_end), batch.events.flatten(1).float(), reduction="sum"
        ) / len(at_end)
        tenths = (batch.pair_times * 10).round().long()  # a time at .05 may be rounded either way
        digits = torch.stack(
            [torch.where(tenths >= 100, tenths // 100, 10), tenths // 10 % 10, tenths % 10], 1
        )
        clock = F.cross_entropy(self.clock(at_end).view(-1, 11), digits.view(-1))
        objects = F.binary_cross_entropy_with_logits(
            self.objects(visual), batch.objects.float(), reduction="sum"
        ) / len(at_end)
        b, q, head, k = batch.pointers.unbind(1)
        assert TAP.query is not None and TAP.key is not None
        groups = TAP.query.shape[1] // TAP.key.shape[1]
        queries = TAP.query[b, head, q]  # [M, d]
        keys = TAP.key[b, head // groups]  # [M, L, d]
        scores = torch.einsum("md,mld->ml", queries, keys) * queries.shape[-1] ** -0.5
        scores = scores.masked_fill(~batch.mask[b, 0, q], float("-inf"))
        pointer = F.cross_entropy(scores, k)
        asked = self.events.scores(middle[b, q], 2 + head)
        query = torch.stack([F.cross_entropy(part, batch.about[:, i]) for i, part in enumerate(asked)]).sum()
        TAP.query = TAP.key = None
        return {
            "answer": answer,
            "events": events,
            "clock": clock,
            "objects": objects,
            "pointer": pointer,
            "query": query,
        }
