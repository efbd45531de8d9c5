"""Measures a model in training: greedy responses about rendered scenes, with the package's own metrics."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from tiny_models.auxiliary import Pretrainer
from tiny_models.examples import Example, by_size
from tiny_models.packing import ANSWER_TOKENS, Batch, Packer
from video_opd.evaluation.metrics import evaluate
from video_opd.evaluation.query_swap import query_swap
from video_opd.temporal import parse_answer
from video_opd.types import Prediction, Sample

BATCH_SIZE = 16  # videos


@torch.no_grad()
def greedy(module: Pretrainer, batch: Batch, packer: Packer) -> list[str]:
    """Writes a greedy response to each query of a batch, to all queries of a video at once."""
    ids = batch.input_ids.clone()
    rows = torch.tensor([asked.row for asked in batch.answers])
    starts = torch.tensor([asked.position for asked in batch.answers])
    written = torch.zeros(len(rows), ANSWER_TOKENS, dtype=torch.long)
    current = replace(batch, input_ids=ids)
    for k in range(ANSWER_TOKENS):
        last, _, _ = module.hidden(current)
        written[:, k] = module.model.lm_head(last[rows, starts - 1 + k]).argmax(-1)
        if k < ANSWER_TOKENS - 1:
            ids[rows, starts + k] = written[:, k]
    texts = []
    for row in written.tolist():
        end = row.index(packer.eos[0]) if packer.eos[0] in row else len(row)
        texts.append(packer.tokenizer.decode(row[:end]))
    return texts


def check(module: Pretrainer, packer: Packer, examples: Sequence[Example]) -> dict[str, float]:
    """Returns mIoU, R@0.7 and query swap in percent, and the mIoU of each event family."""
    rng = np.random.default_rng(0)
    samples: list[Sample] = []
    predictions: dict[str, Prediction] = {}
    for group in by_size(examples):
        for i in range(0, len(group), BATCH_SIZE):
            videos = group[i : i + BATCH_SIZE]
            batch = packer.batch(videos, rng)
            for asked, text in zip(batch.answers, greedy(module, batch, packer), strict=True):
                scene, question = videos[asked.row].scene, asked.question
                identity = f"{scene.name}/{question.query}/{question.span}"
                parsed = parse_answer(text)
                samples.append(
                    Sample(
                        id=identity,
                        video=Path(scene.name),
                        query=question.query,
                        duration_s=scene.duration_s,
                        spans=(question.span,),
                        source=question.family,
                    )
                )
                predictions[identity] = Prediction(
                    id=identity, responses=(text,), spans=(parsed.span,), rules=(parsed.rule,)
                )
    result, swap = evaluate(samples, predictions), query_swap(samples, predictions)
    families = {name: part.values["mIoU"] for name, part in (result.by_source or {}).items()}
    return {
        "mIoU": result.values["mIoU"],
        "R@0.7": result.values["R@0.7"],
        "swap": swap.share if swap else float("nan"),
        **families,
    }
