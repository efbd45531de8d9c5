"""Batches: all questions of a video in one sequence, token for token what the processor would write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from video_opd.temporal import format_span
from video_opd.world.pretraining.examples import Example, blur, label_cells, label_events, patches, reword
from video_opd.world.tokenizer import PHRASES

ANSWER_TOKENS = 12  # of the longest answer, with its end-of-sequence token, less one


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
    answers: tuple[
        tuple[int, int, int, tuple[float, float], str], ...
    ]  # (b, first answer position, scene question, span, family)


class Packer:
    """Turns examples into batches, token for token what the processor would write."""

    def __init__(self, processor: Any) -> None:
        self.tokenizer = tok = processor.tokenizer
        ids = tok.convert_tokens_to_ids
        self.pad, self.vstart, self.vend = (
            ids("<|video_pad|>"),
            ids("<|vision_start|>"),
            ids("<|vision_end|>"),
        )
        self.head = tok.encode(
            f"<|im_start|>system\n{PHRASES[0]}<|im_end|>\n<|im_start|>user\n<|vision_start|>"
        )
        self.before = tok.encode("<|vision_end|>" + PHRASES[1])
        self.after = tok.encode(PHRASES[2] + "<|im_end|>\n<|im_start|>assistant\n")
        self.eos = tok.encode("<|im_end|>")

    def question(self, query: str, span: tuple[float, float]) -> tuple[list[int], list[int]]:
        answer = format_span(span)
        return self.before + self.tokenizer.encode(query) + self.after, self.tokenizer.encode(
            answer
        ) + self.eos

    def batch(
        self, examples: Sequence[Example], rng: np.random.Generator, per_video: int, jitter: float = 0.0
    ) -> Batch:
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
            objects.append(label_cells(ex.scene, pair_times, gh, gw, ex.shift))
            target = [-100] * prefix
            block = [0] * prefix
            order = rng.permutation(len(ex.scene.questions))
            chosen = (
                [int(order[i % len(order)]) for i in range(per_video)]
                if per_video and len(order)
                else list(range(len(order)))
            )
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
