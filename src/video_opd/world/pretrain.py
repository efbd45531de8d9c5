"""How the tiny models came to be: from random weights to a base and a teacher, on a CPU.

A real checkpoint brings vision, a sense of time, and the circuit that looks a query up in a video. A tiny one
must be given all three, so pretraining supervises each part densely, beside the answers themselves:

* **objects**: at every visual token, which (colour, shape) is there, in either frame of the pair;
* **events**: at the ``<|vision_end|>`` that closes a frame pair, which (colour, shape, family) is active,
  begins or ends, and the digits of the pair's timestamp;
* **pointers**: while the answer's digits are written, one attention head looks at the pair where the event
  begins, another at the pair where it ends.

The heads for objects and events are thrown away; the model that is saved is a plain Qwen3-VL. All queries of
a video share its prefix in one packed sequence, exactly as each would see it alone: same positions, and a
mask that hides the others.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from video_opd.world.queries import COLOURS, FAMILIES, SHAPES, phrase, variants
from video_opd.world.render import Renderer
from video_opd.world.scene import Scene, compose

LOOKS = [(c, s) for c in COLOURS for s in SHAPES]
POINTER_LAYER = 2  # the decoder layer whose first two heads are taught where to look
EVENT_LAYER = 2  # events are read from the hidden state that enters this layer
ANSWER_TOKENS = 12


# ---------------------------------------------------------------- data


@dataclass(frozen=True, kw_only=True)
class Example:
    """A rendered scene: frames uint8 [T, H, W, 3] as the decoder would give them, and their times."""

    scene: Scene
    frames: np.ndarray
    times_s: np.ndarray


def window(example: Example, pairs: int, rng: np.random.Generator) -> Example:
    """A stretch of ``pairs`` frame pairs that holds at least one whole event; times stay what they were."""
    total = len(example.times_s) // 2
    if pairs >= total:
        return example
    times = example.times_s.reshape(-1, 2)
    target = example.scene.questions[int(rng.integers(len(example.scene.questions)))].span
    first = min(int(np.searchsorted(times[:, 0], target[0], "right")) - 1, total - pairs)
    last = min(int(np.searchsorted(times[:, 1], target[1])), total - 1)
    start = int(rng.integers(max(0, min(last - pairs + 1, first)), max(0, min(first, total - pairs)) + 1))
    cut = slice(2 * start, 2 * (start + pairs))
    inside = tuple(
        q for q in example.scene.questions if times[start, 0] <= q.span[0] + 1e-6 and q.span[1] <= times[start + pairs - 1, 1] + 0.25
    )
    return Example(scene=replace(example.scene, questions=inside), frames=example.frames[cut], times_s=example.times_s[cut])


def sampled_times(scene: Scene, fps: float = 2.0) -> np.ndarray:
    """The times at which the budget samples this scene's file (constant rate)."""
    total = int(round(scene.duration_s * scene.fps))
    n = max(4, int(total / scene.fps * fps) // 2 * 2)
    return np.linspace(0, total - 1, n).round() / scene.fps


def model_size_px(scene: Scene) -> tuple[int, int]:
    h, w = scene.size_px
    return (64, 64) if h == w else ((64, 96) if w > h else (96, 64))


def render_example(split: str, seed: int, index: int) -> Example:
    from torchvision.transforms.v2 import functional as tv

    torch.set_num_threads(1)
    scene = compose(split, seed, index)
    renderer = Renderer(scene)
    times = sampled_times(scene)
    frames = np.stack([renderer.frame(float(t)) for t in times])
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    small = tv.resize(pixels, list(model_size_px(scene)), interpolation=tv.InterpolationMode.BICUBIC, antialias=True)
    return Example(scene=scene, frames=small.permute(0, 2, 3, 1).contiguous().numpy(), times_s=times)


def _render(args: tuple[str, int, int]) -> Example:
    return render_example(*args)


def render_pool(split: str, seed: int, indices: Sequence[int], workers: int = 2) -> list[Example]:
    with ProcessPoolExecutor(workers) as pool:
        return list(pool.map(_render, [(split, seed, i) for i in indices], chunksize=16))


# ---------------------------------------------------------------- batches


@dataclass(frozen=True, kw_only=True)
class Batch:
    """B videos of one frame size, Q questions in all, L positions (prefix and packed questions)."""

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    input_ids: torch.Tensor  # [B, L]
    position_ids: torch.Tensor  # [3, B, L]
    mask: torch.Tensor  # bool [B, 1, L, L], True where attention is allowed
    targets: torch.Tensor  # [B, L], -100 where no loss
    ends: torch.Tensor  # [N, 2] (b, position) of the vision_end of every pair
    pair_times: torch.Tensor  # [N]
    events: torch.Tensor  # uint8 [N, 4, looks, families]: first frame, second frame, begins, ends
    objects: torch.Tensor  # uint8 [visual tokens, OBJECTS + STATES]
    pointers: torch.Tensor  # [M, 4] (b, query position, head, key position)
    answers: tuple[tuple[int, int, int, tuple[float, float], str], ...]  # (b, first answer position, scene question, span, family)


class Packer:
    """Turns examples into batches, token for token what the processor would write."""

    def __init__(self, processor) -> None:
        self.tokenizer = tok = processor.tokenizer
        from video_opd.world.tokenizer import PHRASES

        ids = tok.convert_tokens_to_ids
        self.pad, self.vstart, self.vend = ids("<|video_pad|>"), ids("<|vision_start|>"), ids("<|vision_end|>")
        self.head = tok.encode(f"<|im_start|>system\n{PHRASES[0]}<|im_end|>\n<|im_start|>user\n<|vision_start|>")
        self.before = tok.encode("<|vision_end|>" + PHRASES[1])
        self.after = tok.encode(PHRASES[2] + "<|im_end|>\n<|im_start|>assistant\n")
        self.eos = tok.encode("<|im_end|>")
        self.zero = [ids(str(d)) for d in range(10)]

    def question(self, query: str, span: tuple[float, float]) -> tuple[list[int], list[int]]:
        answer = f"{span[0]:.2f} to {span[1]:.2f}"
        return self.before + self.tokenizer.encode(query) + self.after, self.tokenizer.encode(answer) + self.eos

    def batch(self, examples: Sequence[Example], rng: np.random.Generator, per_video: int, jitter: float = 0.0) -> Batch:
        h, w = examples[0].frames.shape[1:3]
        gh, gw = h // 32, w // 32
        cells = gh * gw
        rows, positions, targets, blocks = [], [], [], []
        ends, times, events, objects, pointers, answers = [], [], [], [], [], []
        for b, ex in enumerate(examples):
            ids = list(self.head)
            pos = [np.arange(len(ids))[None].repeat(3, 0)]
            cursor = len(ids)
            pair_times = ex.times_s.reshape(-1, 2)
            end_positions = []
            for first, second in pair_times:
                mean = (first + second) / 2
                stamp = self.tokenizer.encode(f"<{mean:.1f} seconds>") + [self.vstart]
                ids += stamp + [self.pad] * cells + [self.vend]
                pos.append(cursor + np.arange(len(stamp))[None].repeat(3, 0))
                cursor += len(stamp)
                yy, xx = np.divmod(np.arange(cells), gw)
                pos.append(np.stack([np.full(cells, cursor), cursor + yy, cursor + xx]))
                cursor += max(gh, gw)
                pos.append(np.full((3, 1), cursor))
                cursor += 1
                end_positions.append(len(ids) - 1)
                times.append(mean)
            prefix, start = len(ids), cursor
            ends += [(b, e) for e in end_positions]
            labels = label_events(ex.scene, pair_times)
            events.append(labels)
            objects.append(label_cells(ex.scene, pair_times, gh, gw))
            target = [-100] * prefix
            block = [0] * prefix
            order = rng.permutation(len(ex.scene.questions))
            chosen = [int(order[i % len(order)]) for i in range(per_video)] if per_video and len(order) else list(range(len(order)))
            for number, qi in enumerate(chosen, start=1):
                q = ex.scene.questions[qi]
                query, span = q.query, q.span
                if per_video:
                    query = reword(ex.scene, qi, rng)
                    if jitter:
                        span = blur(span, ex.scene.duration_s, jitter, rng)
                prompt, answer = self.question(query, span)
                if not per_video:  # room for the longest answer, written over by `greedy`
                    answer = answer + self.eos * (ANSWER_TOKENS + 1 - len(answer))
                at = len(ids) + len(prompt)
                ids += prompt + answer[:-1]
                n = len(prompt) + len(answer) - 1
                pos.append(start + np.arange(n)[None].repeat(3, 0))
                target += [-100] * (len(prompt) - 1) + answer
                block += [number] * n
                answers.append((b, at, qi, q.span, q.family))
                begin = min(int(np.searchsorted(ex.times_s, q.span[0] - 1e-6)), len(ex.times_s) - 1) // 2
                end = min(int(np.searchsorted(ex.times_s, q.span[1] - 1e-6)), len(ex.times_s) - 1) // 2
                cut = len(f"{span[0]:.2f}")
                for k in range(len(answer) - 1 if per_video else 0):
                    if k < cut:
                        pointers.append((b, at - 1 + k, 0, end_positions[begin]))
                    elif k >= cut + 2:
                        pointers.append((b, at - 1 + k, 1, end_positions[end]))
            rows.append(ids)
            positions.append(np.concatenate(pos, 1))
            targets.append(target)
            blocks.append(block)
        length = max(map(len, rows))
        n = len(rows)
        input_ids = torch.full((n, length), self.tokenizer.pad_token_id)
        position_ids = torch.zeros(3, n, length, dtype=torch.long)
        target_ids = torch.full((n, length), -100)
        block_ids = torch.full((n, length), -1)
        for b in range(n):
            k = len(rows[b])
            input_ids[b, :k] = torch.tensor(rows[b])
            position_ids[:, b, :k] = torch.from_numpy(positions[b])
            target_ids[b, :k] = torch.tensor(targets[b])
            block_ids[b, :k] = torch.tensor(blocks[b])
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        same = block_ids[:, :, None] == block_ids[:, None, :]
        mask = causal & (same | (block_ids[:, None, :] == 0))
        pixels = torch.cat([patches(ex.frames) for ex in examples])
        grid = torch.tensor([[len(ex.times_s) // 2, 2 * gh, 2 * gw] for ex in examples])
        return Batch(
            pixel_values=pixels, grid_thw=grid, input_ids=input_ids, position_ids=position_ids, mask=mask[:, None],
            targets=target_ids, ends=torch.tensor(ends), pair_times=torch.tensor(times),
            events=torch.from_numpy(np.concatenate(events)), objects=torch.from_numpy(np.concatenate(objects)),
            pointers=torch.tensor(pointers), answers=tuple(answers),
        )  # fmt: skip


def patches(frames: np.ndarray) -> torch.Tensor:
    """Qwen3-VL's patch layout of uint8 frames [T, H, W, 3], scaled to [-1, 1]: [T/2·H/16·W/16, 1536]."""
    t, h, w, _ = frames.shape
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = x.view(t // 2, 2, 3, h // 32, 2, 16, w // 32, 2, 16).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t // 2 * (h // 16) * (w // 16), 1536)


def reword(scene: Scene, index: int, rng: np.random.Generator) -> str:
    """The same question in other words."""
    from video_opd.world.queries import noun

    q = scene.questions[index]
    actor = scene.actors[q.actor]
    article = "the" if rng.random() < 0.7 else "a"
    spell = next((s for s in actor.spells if s.family == q.family), actor.spells[0])
    other = None
    if spell.other is not None:
        met = scene.actors[spell.other]
        other = noun(met.colour, met.shape, article=article)
    name = noun(actor.colour, actor.shape, article=article)
    return phrase(q.family, name, int(rng.integers(variants(q.family))), other=other, colour=spell.colour)


def blur(span: tuple[float, float], duration: float, jitter: float, rng: np.random.Generator) -> tuple[float, float]:
    """Loose boundaries, as in weakly aligned data."""
    length = span[1] - span[0]
    s, e = span[0] + rng.normal(0, jitter * length), span[1] + rng.normal(0, jitter * length)
    s, e = np.clip(s, 0, duration), np.clip(e, 0, duration)
    if e - s < 0.5:
        return span
    return round(float(s) * 2) / 2, round(float(e) * 2) / 2


def label_events(scene: Scene, pair_times: np.ndarray) -> np.ndarray:
    """uint8 [pairs, 4, looks, families]: active in the first and second frame, begins, ends in this pair."""
    out = np.zeros((len(pair_times), 4, len(LOOKS), len(FAMILIES)), np.uint8)
    flat = pair_times.reshape(-1)
    for q in scene.questions:
        actor = scene.actors[q.actor]
        look, family = LOOKS.index((actor.colour, actor.shape)), FAMILIES.index(q.family)
        active = (flat >= q.span[0] - 1e-6) & (flat < q.span[1] - 1e-6)
        out[:, :2, look, family] |= active.reshape(-1, 2)
        for channel, when in ((2, q.span[0]), (3, q.span[1])):
            if not flat[0] - 0.3 <= when <= flat[-1] + 0.3:
                continue
            at = min(int(np.searchsorted(flat, when - 1e-6)), len(flat) - 1) // 2
            out[at, channel, look, family] = 1
    return out


OBJECTS, STATES = 2 * len(LOOKS), len(LOOKS) * len(FAMILIES)


def label_cells(scene: Scene, pair_times: np.ndarray, gh: int, gw: int) -> np.ndarray:
    """uint8 [pairs·gh·gw, 2·looks + looks·families]: whose centre lies in this cell in either frame of the
    pair, and which event of whom is going on here."""
    out = np.zeros((len(pair_times), gh, gw, OBJECTS + STATES), np.uint8)
    for actor in scene.actors:
        own = LOOKS.index((actor.colour, actor.shape))
        for spell in actor.spells:
            x0, y0, x1, y1 = spell.path
            begin, end = spell.event_s
            inside = (pair_times >= spell.start_s - 1e-6) & (pair_times < spell.end_s - 1e-6)
            for i, frame in np.argwhere(inside):
                t = float(pair_times[i, frame]) + 1e-6
                active = begin <= t < end
                if spell.family == "blinks" and active and int((t - begin) / 0.5) % 2 == 1:
                    continue
                p = float(active) if spell.family == "meets" else min(max((t - begin) / (end - begin), 0.0), 1.0)
                look = own
                if spell.family == "recolours" and active and spell.colour:
                    look = LOOKS.index((spell.colour, actor.shape))
                y, x = y0 + (y1 - y0) * p, x0 + (x1 - x0) * p
                cell = out[i, min(gh - 1, int(y * gh)), min(gw - 1, int(x * gw))]
                cell[frame * len(LOOKS) + look] = 1
                if active and spell.family != "idle":
                    cell[OBJECTS + own * len(FAMILIES) + FAMILIES.index(spell.family)] = 1
    return out.reshape(-1, OBJECTS + STATES)


# ---------------------------------------------------------------- model


def _frames_flash(module, query, key, value, attention_mask=None, scaling=None, dropout=0.0, **kwargs):
    """Vision attention for packed frames of one size: [1, heads, frames·n, d] as a batch of frames."""
    cu = kwargs["cu_seq_lens_q"]
    n = int(cu[1] - cu[0])
    _, heads, total, d = query.shape
    split = [x.view(heads, total // n, n, d).transpose(0, 1) for x in (query, key, value)]
    out = F.scaled_dot_product_attention(*split, scale=scaling)
    return out.transpose(1, 2).reshape(1, total, heads, d), None


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


AttentionInterface.register("pretrain_frames_flash", _frames_flash)
AttentionInterface.register("pretrain_tapped_sdpa", _tapped_sdpa)


class Pretrainer(nn.Module):
    """The model and the auxiliary heads."""

    def __init__(self, model) -> None:
        super().__init__()
        self.model = model
        hidden = model.config.text_config.hidden_size
        self.events = nn.Linear(hidden, 4 * len(LOOKS) * len(FAMILIES))
        self.clock = nn.Linear(hidden, 3 * 11)
        self.objects = nn.Linear(hidden, OBJECTS + STATES)
        nn.init.constant_(self.events.bias, -5.0)
        nn.init.constant_(self.objects.bias, -4.0)
        model.model.visual.config._attn_implementation = "pretrain_frames_flash"
        model.model.language_model.config._attn_implementation = "pretrain_tapped_sdpa"

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

    def vision_loss(self, frames: list[np.ndarray], objects: np.ndarray) -> torch.Tensor:
        """Objects at visual tokens, without the decoder."""
        t, h, w, _ = frames[0].shape
        pixels = torch.cat([patches(f) for f in frames])
        grid = torch.tensor([[t // 2, h // 16, w // 16]] * len(frames))
        visual = self.model.model.visual(pixels, grid_thw=grid)
        target = torch.from_numpy(objects).float()
        loss = F.binary_cross_entropy_with_logits(self.objects(visual.pooler_output), target, reduction="sum")
        return loss / (len(target) / (h // 32 * (w // 32)))

    def losses(self, batch: Batch, smooth: float = 0.0) -> dict[str, torch.Tensor]:
        last, middle, visual = self.hidden(batch)
        wanted = batch.targets >= 0
        logits = self.model.lm_head(last[wanted])
        answer = F.cross_entropy(logits.float(), batch.targets[wanted])
        at_end = middle[batch.ends[:, 0], batch.ends[:, 1]]
        events = F.binary_cross_entropy_with_logits(
            self.events(at_end), batch.events.flatten(1).float(), reduction="sum"
        ) / len(at_end)
        tenths = (batch.pair_times * 10).round().long()  # the tie at .05 is noise
        digits = torch.stack([torch.where(tenths >= 100, tenths // 100, 10), tenths // 10 % 10, tenths % 10], 1)
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
        TAP.query = TAP.key = None
        return {"answer": answer, "events": events, "clock": clock, "objects": objects, "pointer": pointer}


@torch.no_grad()
def greedy(trainer: Pretrainer, batch: Batch, packer: Packer) -> list[str]:
    """Greedy answers to every question of a batch (all queries of a video at once)."""
    ids = batch.input_ids.clone()
    rows = torch.tensor([a[0] for a in batch.answers])
    starts = torch.tensor([a[1] for a in batch.answers])
    out = torch.zeros(len(rows), ANSWER_TOKENS, dtype=torch.long)
    current = Batch(**{**batch.__dict__, "input_ids": ids})
    for k in range(ANSWER_TOKENS):
        last, _, _ = trainer.hidden(current)
        out[:, k] = trainer.model.lm_head(last[rows, starts - 1 + k]).argmax(-1)
        if k < ANSWER_TOKENS - 1:
            ids[rows, starts + k] = out[:, k]
    texts = []
    for row in out.tolist():
        end = row.index(packer.eos[0]) if packer.eos[0] in row else len(row)
        texts.append(packer.tokenizer.decode(row[:end]))
    return texts


def span_of(text: str) -> tuple[float, float] | None:
    try:
        a, b = text.split(" to ")
        return (float(a), float(b)) if float(b) > float(a) else None
    except ValueError:
        return None


def overlap(a, b) -> float:
    if a is None:
        return 0.0
    inter = max(0.0, min(a[1], b[1]) - max(a[0], b[0]))
    return inter / (a[1] - a[0] + b[1] - b[0] - inter)


def evaluate(trainer: Pretrainer, packer: Packer, examples: Sequence[Example]) -> dict[str, float]:
    rng = np.random.default_rng(0)
    ious, families, right, pairs = [], [], 0, 0
    for group in by_size(examples):
        for i in range(0, len(group), 16):
            batch = packer.batch(group[i : i + 16], rng, per_video=0)
            spans = [span_of(t) for t in greedy(trainer, batch, packer)]
            for (_, _, _, true, family), span in zip(batch.answers, spans, strict=True):
                ious.append(overlap(span, true))
                families.append(family)
            for x, a in enumerate(batch.answers):
                for y, c in enumerate(batch.answers):
                    if x == y or a[0] != c[0] or overlap(a[3], c[3]) > 0.1 or spans[x] is None:
                        continue
                    own, its = overlap(spans[x], a[3]), overlap(spans[x], c[3])
                    mid = sum(spans[x]) / 2
                    if own == its:
                        own, its = -abs(mid - sum(a[3]) / 2), -abs(mid - sum(c[3]) / 2)
                    right += own > its
                    pairs += 1
    result = {"mIoU": float(np.mean(ious)), "R@0.7": float(np.mean(np.array(ious) >= 0.7)), "swap": right / max(pairs, 1)}
    for f in sorted(set(families)):
        result[f] = float(np.mean([i for i, g in zip(ious, families, strict=True) if g == f]))
    return result


def by_size(examples: Sequence[Example]) -> list[list[Example]]:
    groups: dict[tuple[int, ...], list[Example]] = {}
    for ex in examples:
        groups.setdefault(ex.frames.shape[1:3], []).append(ex)
    return list(groups.values())


def batches(pool: Sequence[Example], size: int, rng: np.random.Generator) -> Iterator[list[Example]]:
    groups = by_size(pool)
    weights = np.array([len(g) for g in groups]) / len(pool)
    while True:
        group = groups[int(rng.choice(len(groups), p=weights))]
        yield [group[int(i)] for i in rng.choice(len(group), size, replace=False)]


# ---------------------------------------------------------------- optimiser


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum; ``torch.optim.Muon`` orthogonalises in bf16, which a CPU only emulates.

    Matrices of one shape are orthogonalised together, in float32.
    """

    def __init__(self, params, lr: float, momentum: float = 0.95, weight_decay: float = 0.01) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            shapes: dict[tuple[int, ...], list[tuple[torch.Tensor, torch.Tensor]]] = {}
            for p in group["params"]:
                if p.grad is None:
                    continue
                buffer = self.state[p].setdefault("momentum", torch.zeros_like(p))
                buffer.lerp_(p.grad, 1 - group["momentum"])
                shapes.setdefault(tuple(p.shape), []).append((p, p.grad.lerp(buffer, group["momentum"])))
            for shape, members in shapes.items():
                scale = group["lr"] * max(1.0, shape[0] / shape[1]) ** 0.5
                updates = orthogonalise(torch.stack([u for _, u in members]))
                for (p, _), update in zip(members, updates, strict=True):
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-scale)


def orthogonalise(x: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest semi-orthogonal matrices, roughly: Newton–Schulz on [N, rows, columns]."""
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        a = x @ x.mT
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x.mT if tall else x
