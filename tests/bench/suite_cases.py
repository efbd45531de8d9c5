"""Rows in the schemas of the three benchmarks on small videos, and a tiny model that answers in one token."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

import torch
from video_cases import write_video

from video_opd.world.tiny import build_model, build_processor

WORDS = ("A", "B", "C", "D", "1", "2", "yes", "no")
SCALE = 8.0  # of the attention weights
MVBENCH = {"action_count": "perception/videos", "moving_direction": "clevrer/video_validation"}
TASKS = (
    "tempcompass_multi_choice",
    "tempcompass_yes_no",
    "tempcompass_caption_matching",
    "mvbench_action_count",
    "mvbench_moving_direction",
    "videomme",
)


def save_model(folder: Path, seed: int = 5) -> Path:
    """A random model whose first token is always one of WORDS, which one depends on all that it was shown."""
    processor, model = build_processor(), build_model("test", seed=seed)
    processor.tokenizer.add_tokens(["yes", "no"])
    assert len(processor.tokenizer) <= model.config.text_config.vocab_size, "room in the padded vocabulary"
    ids = processor.tokenizer.convert_tokens_to_ids(list(WORDS))
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in model.model.language_model.layers:  # or the last token alone would decide
            for weights in layer.self_attn.parameters():
                weights.mul_(SCALE)
        model.lm_head.weight.zero_()
        model.lm_head.weight[ids] = torch.randn(len(ids), model.lm_head.weight.shape[1], generator=noise)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_data(root: Path, seed: int = 0, rows: int = 8) -> Path:
    """``rows`` rows for each task on half as many videos, in the layout of ``--data-root``."""
    draw = random.Random(seed)
    videos = rows // 2

    def video(path: Path, number: int) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_video(path, 12 + 4 * number, size=(64, 96 + 32 * (number % 3)))

    for number in range(videos):
        video(root / f"tempcompass/videos/tc{number}.mp4", number)
        video(root / f"videomme/data/vm{number}.mp4", number + 2)
        for folder in MVBENCH.values():
            video(root / f"mvbench/{folder}/mv{number}.mp4", number + 1)

    def common(number: int) -> dict[str, str]:
        return {"video_id": f"tc{number % videos}", "dim": draw.choice(["speed", "direction", "order"])}

    def options(number: int) -> list[str]:
        return [f"thing {number} {word}" for word in ("up", "down", "left", "right")]

    multi, yes_no, captions = [], [], []
    for number in range(rows):
        lines = [f"{letter}. {text}" for letter, text in zip("ABCD", options(number), strict=True)]
        multi.append(
            {**common(number), "question": "\n".join(["What?", *lines]), "answer": draw.choice(lines)}
        )
        yes_no.append(
            {**common(number), "question": f"Is it {number}?", "answer": draw.choice(["yes", "no"])}
        )
        labels = ("Caption A", "Caption B") if number % 2 else ("Option 1", "Option 2")
        lines = [f"{label}: {text}." for label, text in zip(labels, options(number), strict=False)]
        captions.append(
            {**common(number), "question": "\n".join(["Which?", *lines]), "answer": draw.choice(lines)}
        )
    write_rows(root / "tempcompass/multi-choice.jsonl", multi)
    write_rows(root / "tempcompass/yes_no.jsonl", yes_no)
    write_rows(root / "tempcompass/caption_matching.jsonl", captions)

    for subset in MVBENCH:
        rows_of = [
            {
                "video": f"mv{number % videos}.mp4",
                "question": f"How many, {subset}?",
                "candidates": options(number)[: 3 + number % 2],
                "answer": draw.choice(options(number)[:3]),
            }
            for number in range(rows)
        ]
        if subset == "action_count":
            write_rows(root / f"mvbench/{subset}.jsonl", rows_of)
        else:  # as MVBench publishes it
            (root / "mvbench/json").mkdir(exist_ok=True)
            (root / f"mvbench/json/{subset}.json").write_text(json.dumps(rows_of))

    write_rows(
        root / "videomme/test.jsonl",
        [
            {
                "video_id": f"{number:03d}",
                "videoID": f"vm{number % videos}",
                "question_id": f"{number:03d}-1",
                "question": f"Which of these, {number}?",
                "options": [
                    f"{a}. {t}." for a, t in zip(string.ascii_uppercase, options(number), strict=False)
                ],
                "answer": draw.choice("ABCD"),
                "duration": ("short", "medium", "long")[number % 3],
                "domain": "Knowledge",
                "sub_category": "Geography",
                "task_type": "Counting Problem",
            }
            for number in range(rows)
        ],
    )
    return root


def gold(task: str, row: dict[str, Any]) -> str:
    """The one word of WORDS that is right."""
    answer = row["answer"]
    if task == "tempcompass_caption_matching":
        return answer.split(":")[0].split()[1]
    if task.startswith("mvbench"):
        return "ABCD"[row["candidates"].index(answer)]
    return answer[0] if task == "tempcompass_multi_choice" else answer
