"""How a model in training is watched: greedy answers, IoU, and whether they listen to the query."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch

from video_opd.temporal import Interval, iou, parse_answer
from video_opd.world.pretraining.auxiliary import Pretrainer
from video_opd.world.pretraining.examples import Example, by_size
from video_opd.world.pretraining.packing import ANSWER_TOKENS, Batch, Packer


@torch.no_grad()
def greedy(trainer: Pretrainer, batch: Batch, packer: Packer) -> list[str]:
    """Greedy answers to every question of a batch (all queries of a video at once)."""
    ids = batch.input_ids.clone()
    rows = torch.tensor([a[0] for a in batch.answers])
    starts = torch.tensor([a[1] for a in batch.answers])
    out = torch.zeros(len(rows), ANSWER_TOKENS, dtype=torch.long)
    current = replace(batch, input_ids=ids)
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


def evaluate(trainer: Pretrainer, packer: Packer, examples: Sequence[Example]) -> dict[str, float]:
    rng = np.random.default_rng(0)
    ious, families, right, pairs = [], [], 0, 0
    for group in by_size(examples):
        for i in range(0, len(group), 16):
            batch = packer.batch(group[i : i + 16], rng, per_video=0)
            spans = [parse_answer(t).span for t in greedy(trainer, batch, packer)]
            for (_, _, _, true, family), span in zip(batch.answers, spans, strict=True):
                ious.append(_overlap(span, true))
                families.append(family)
            for x, a in enumerate(batch.answers):
                for y, c in enumerate(batch.answers):
                    if x == y or a[0] != c[0] or _overlap(a[3], c[3]) > 0.1 or spans[x] is None:
                        continue
                    own, its = _overlap(spans[x], a[3]), _overlap(spans[x], c[3])
                    mid = sum(spans[x]) / 2
                    if own == its:
                        own, its = -abs(mid - sum(a[3]) / 2), -abs(mid - sum(c[3]) / 2)
                    right += own > its
                    pairs += 1
    result = {
        "mIoU": float(np.mean(ious)),
        "R@0.7": float(np.mean(np.array(ious) >= 0.7)),
        "swap": right / max(pairs, 1),
    }
    for f in sorted(set(families)):
        result[f] = float(np.mean([i for i, g in zip(ious, families, strict=True) if g == f]))
    return result


def _overlap(span: Interval | None, true: Interval) -> float:
    return 0.0 if span is None else iou(span, true)
