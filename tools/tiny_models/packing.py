"""Packs all queries of a video into one sequence, with the same tokens that the processor would write.

Shapes: B videos, L positions, N frame pairs in the whole batch, M supervised response positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from tiny_models.examples import (
    Example,
    blur,
    label_cells,
    label_events,
    patches,
)
from video_opd.data.prompts import THINKING_INSTRUCTION
from video_opd.temporal import format_span
from video_opd.world.queries import COLOURS, FAMILIES, SHAPES, noun
from video_opd.world.questions import general_questions
from video_opd.world.scene import Question, reword, spell_of
from video_opd.world.tokenizer import PHRASES

_RESPOND = "<|im_end|>\n<|im_start|>assistant\n"
ANSWER_TOKENS = 12  # tokens of the longest response, without its end token
COLOUR_NAMES = tuple(COLOURS)
START_HEAD, END_HEAD = 0, 1  # the attention heads that point at the event's start and at its end


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question of the batch, and the place of its response in the sequence."""

    row: int
    position: int  # index of the response's first token
    digits: int  # number of tokens of the written start, which " to" and a space follow
    question: Question


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A question about a video and its response, as tokens."""

    prompt: list[int]  # what follows the video, up to the response
    response: list[int]  # with the end token


@dataclass(frozen=True, kw_only=True)
class Sequences:
    """Videos of one frame size with their questions."""

    pixel_values: torch.Tensor
    grid_thw: torch.Tensor
    input_ids: torch.Tensor  # [B, L]
    position_ids: torch.Tensor  # [3, B, L]
    mask: torch.Tensor  # bool [B, 1, L, L], True where attention is allowed
    targets: torch.Tensor  # [B, L], -100 for tokens without a loss


@dataclass(frozen=True, kw_only=True)
class Batch(Sequences):
    """Videos with grounding queries, and the labels of the auxiliary losses."""

    ends: torch.Tensor  # [N, 2] (row, position) of each pair's vision_end
    pair_times: torch.Tensor  # [N] seconds
    events: torch.Tensor  # uint8 [N, 4, looks, families]: first frame, second frame, begins, ends
    objects: torch.Tensor  # uint8 [visual tokens, OBJECTS + STATES]
    pointers: torch.Tensor  # [M, 4] (row, query position, head, key position)
    about: torch.Tensor  # [M, 3] colour, shape and family that the query asks for
    answers: tuple[Asked, ...]


@dataclass(kw_only=True)
class _Row:
    """One video's sequence while it is written. Block 0 is the video, block k its k-th query."""

    ids: list[int] = field(default_factory=list)
    positions: list[np.ndarray] = field(default_factory=list)  # [3, n] pieces
    targets: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    cursor: int = 0  # the next position

    def text(self, ids: Sequence[int], *, block: int = 0, targets: Sequence[int] | None = None) -> None:
        self.ids += ids
        self.positions.append(self.cursor + np.arange(len(ids))[None].repeat(3, 0))
        self.targets += targets if targets is not None else [-100] * len(ids)
        self.blocks += [block] * len(ids)
        self.cursor += len(ids)

    def exchange(self, exchange: Exchange, block: int) -> None:
        """Appends a question and its response. A position's target is the token that follows."""
        prompt, response = exchange.prompt, exchange.response
        targets = [-100] * (len(prompt) - 1) + response
        self.text([*prompt, *response[:-1]], block=block, targets=targets)

    def picture(self, pad: int, rows: int, columns: int) -> None:
        """Appends the visual tokens of a frame pair: one temporal position, each row and column its own."""
        y, x = np.divmod(np.arange(rows * columns), columns)
        self.ids += [pad] * (rows * columns)
        self.positions.append(self.cursor + np.stack([np.zeros_like(y), y, x]))
        self.targets += [-100] * (rows * columns)
        self.blocks += [0] * (rows * columns)
        self.cursor += max(rows, columns)


class Packer:
    """Turns examples into batches."""

    def __init__(self, processor: Any) -> None:
        self.tokenizer = tok = processor.tokenizer
        ids = tok.convert_tokens_to_ids
        self.pad, self.vstart, self.vend = (
            ids(f"<|{t}|>") for t in ("video_pad", "vision_start", "vision_end")
        )
        system = f"<|im_start|>system\n{PHRASES[0]}<|im_end|>\n"
        self.head = tok.encode(f"{system}<|im_start|>user\n<|vision_start|>")
        self.plain_head = tok.encode("<|im_start|>user\n<|vision_start|>")  # of the prompt style "question"
        self.before = tok.encode("<|vision_end|>" + PHRASES[1])
        self.after = tok.encode(PHRASES[2] + _RESPOND)
        self.think = tok.encode(PHRASES[2] + THINKING_INSTRUCTION + _RESPOND)
        self.eos = tok.encode("<|im_end|>")

    def batch(
        self, examples: Sequence[Example], rng: np.random.Generator, per_video: int = 0, jitter: float = 0.0
    ) -> Batch:
        """Packs ``per_video`` queries of each video, reworded, with boundaries blurred by ``jitter``.

        With ``per_video`` 0 all queries are packed as they are, each with room for a response (for
        :func:`watch.greedy`).
        """
        height, width = examples[0].frames.shape[1:3]
        rows, columns = height // 32, width // 32
        sequences: list[_Row] = []
        ends: list[tuple[int, int]] = []
        pointers: list[tuple[int, int, int, int]] = []
        about: list[tuple[int, int, int]] = []
        answers: list[Asked] = []
        for b, example in enumerate(examples):
            row = _Row()
            closing = self._video(row, example, self.head)
            ends += [(b, position) for position in closing]
            after_video = row.cursor
            for number, index in enumerate(_chosen(example, rng, per_video), start=1):
                row.cursor = after_video  # every query stands right after the video
                asked = self._question(row, b, number, example, index, rng, per_video, jitter)
                answers.append(asked)
                if per_video:
                    found = _pointers(asked, len(row.ids), example, closing)
                    pointers += found
                    about += [_about(example, asked.question)] * len(found)
            sequences.append(row)
        pairs = [example.times_s.reshape(-1, 2) for example in examples]
        return Batch(
            **self._inputs(examples, sequences),
            ends=torch.tensor(ends),
            pair_times=torch.from_numpy(np.concatenate(pairs).mean(1)),
            events=_labels(label_events(e.scene, times) for e, times in zip(examples, pairs, strict=True)),
            objects=_labels(
                label_cells(e.scene, times, rows, columns, e.shift)
                for e, times in zip(examples, pairs, strict=True)
            ),
            pointers=torch.tensor(pointers),
            about=torch.tensor(about),
            answers=tuple(answers),
        )

    def questions(self, examples: Sequence[Example], rng: np.random.Generator) -> Sequences:
        """Packs the general questions about each video, in the prompt style "question"."""
        encode = self.tokenizer.encode
        asked = [
            [
                Exchange(
                    prompt=encode(f"<|vision_end|>{question.query}{_RESPOND}"),
                    response=[*encode(question.answer), *self.eos],
                )
                for question in general_questions(example.scene, rng)
            ]
            for example in examples
        ]
        return self._exchanges(examples, asked, self.plain_head)

    def thinking(
        self, examples: Sequence[Example], rng: np.random.Generator, per_video: int, looseness: float = 0.0
    ) -> Sequences:
        """Packs ``per_video`` queries of each video with responses that think first.

        The thought says when the object is on screen at all, which is where its event must lie.
        """
        asked = []
        for example in examples:
            scene = example.scene
            exchanges = []
            for index in _chosen(example, rng, per_video):
                question = scene.questions[index]
                spell = spell_of(scene, question)
                there, span = (
                    blur(found, scene.duration_s, looseness, rng) if looseness else found
                    for found in ((spell.start_s, spell.end_s), question.span)
                )
                actor = scene.actors[question.actor]
                thought = f"<think>{noun(actor.colour, actor.shape)}: {format_span(there)}</think>"
                exchanges.append(
                    Exchange(
                        prompt=[
                            *self.before,
                            *self.tokenizer.encode(reword(scene, question, rng)),
                            *self.think,
                        ],
                        response=[*self.tokenizer.encode(thought + format_span(span)), *self.eos],
                    )
                )
            asked.append(exchanges)
        return self._exchanges(examples, asked, self.head)

    def _exchanges(
        self, examples: Sequence[Example], asked: Sequence[Sequence[Exchange]], head: Sequence[int]
    ) -> Sequences:
        sequences = []
        for example, exchanges in zip(examples, asked, strict=True):
            row = _Row()
            self._video(row, example, head)
            after_video = row.cursor
            for number, exchange in enumerate(exchanges, start=1):
                row.cursor = after_video
                row.exchange(exchange, number)
            sequences.append(row)
        return Sequences(**self._inputs(examples, sequences))

    def _inputs(self, examples: Sequence[Example], sequences: Sequence[_Row]) -> dict[str, torch.Tensor]:
        height, width = examples[0].frames.shape[1:3]
        grids = [[len(e.times_s) // 2, height // 16, width // 16] for e in examples]
        return {
            "pixel_values": torch.cat([patches(example.frames) for example in examples]),
            "grid_thw": torch.tensor(grids),
            **_padded(sequences, self.tokenizer.pad_token_id),
        }

    def _video(self, row: _Row, example: Example, head: Sequence[int]) -> list[int]:
        """Appends what stands before the video, and the video.

        Returns the positions of the pairs' vision_end tokens.
        """
        height, width = example.frames.shape[1:3]
        rows, columns = height // 32, width // 32
        row.text(head)
        closing = []
        for first, second in example.times_s.reshape(-1, 2):
            stamp = self.tokenizer.encode(f"<{(first + second) / 2:.1f} seconds>")
            row.text([*stamp, self.vstart])
            row.picture(self.pad, rows, columns)
            row.text([self.vend])
            closing.append(len(row.ids) - 1)
        return closing

    def _question(
        self,
        row: _Row,
        b: int,
        number: int,
        example: Example,
        index: int,
        rng: np.random.Generator,
        per_video: int,
        jitter: float,
    ) -> Asked:
        question = example.scene.questions[index]
        query, span = question.query, question.span
        if per_video:
            query = reword(example.scene, question, rng)
            span = blur(span, example.scene.duration_s, jitter, rng) if jitter else span
        prompt = [*self.before, *self.tokenizer.encode(query), *self.after]
        answer = [*self.tokenizer.encode(format_span(span)), *self.eos]
        if not per_video:  # room for the longest response
            answer += self.eos * (ANSWER_TOKENS + 1 - len(answer))
        position = len(row.ids) + len(prompt)
        row.exchange(Exchange(prompt=prompt, response=answer), number)
        return Asked(row=b, position=position, digits=len(f"{span[0]:.2f}"), question=question)


def _chosen(example: Example, rng: np.random.Generator, per_video: int) -> list[int]:
    order = [int(i) for i in rng.permutation(len(example.scene.questions))]
    if not per_video or not order:
        return list(range(len(order)))
    return [order[i % len(order)] for i in range(per_video)]


def _pointers(
    asked: Asked, stop: int, example: Example, closing: Sequence[int]
) -> list[tuple[int, int, int, int]]:
    """The pairs to point at while the response's digits are written: (row, position, head, vision_end)."""
    times = example.times_s

    def pair(when: float) -> int:
        return min(int(np.searchsorted(times, when - 1e-6)), len(times) - 1) // 2

    start, end = asked.question.span
    found = []
    for k in range(stop - asked.position):
        at = asked.position - 1 + k
        if k < asked.digits:
            found.append((asked.row, at, START_HEAD, closing[pair(start)]))
        elif k >= asked.digits + 2:
            found.append((asked.row, at, END_HEAD, closing[pair(end)]))
    return found


def _about(example: Example, question: Question) -> tuple[int, int, int]:
    actor = example.scene.actors[question.actor]
    return (
        COLOUR_NAMES.index(actor.colour),
        SHAPES.index(actor.shape),
        FAMILIES.index(question.family),
    )


def _labels(parts: Any) -> torch.Tensor:
    return torch.from_numpy(np.concatenate(list(parts)))


def _padded(sequences: Sequence[_Row], pad_token_id: int) -> dict[str, torch.Tensor]:
    """Pads the sequences on the right, and lets a query see the video and itself alone."""
    count, length = len(sequences), max(len(row.ids) for row in sequences)
    input_ids = torch.full((count, length), pad_token_id)
    position_ids = torch.zeros(3, count, length, dtype=torch.long)
    targets = torch.full((count, length), -100)
    blocks = torch.full((count, length), -1)
    for b, row in enumerate(sequences):
        n = len(row.ids)
        input_ids[b, :n] = torch.tensor(row.ids)
        position_ids[:, b, :n] = torch.from_numpy(np.concatenate(row.positions, axis=1))
        targets[b, :n] = torch.tensor(row.targets)
        blocks[b, :n] = torch.tensor(row.blocks)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    visible = (blocks[:, :, None] == blocks[:, None, :]) | (blocks[:, None, :] == 0)
    return {
        "input_ids": input_ids,
        "position_ids": position_ids,
        "targets": targets,
        "mask": (causal & visible)[:, None],
    }
