"""The paper's recipe and the sizes of its models, for tests of plans."""

from __future__ import annotations

from typing import Any

from video_opd.config import Recipe, recipe_from_dict
from video_opd.planning.plan import RecipeSizes
from video_opd.planning.sizes import read_sizes

PAIR = RecipeSizes(student=read_sizes("Qwen3-VL-8B"), teachers=(read_sizes("Qwen3-VL-32B"),))


def paper(method: str = "video-opd", **sections: Any) -> Recipe:
    """The recipe of the paper, on one prompt at a time."""
    tree: dict[str, Any] = {
        "method": method,
        "model": {"path": "Qwen/Qwen3-VL-8B-Instruct", "dtype": "bfloat16", "sharding": "fsdp2"},
        "teacher": {"path": "williamljz/Video-opd-teacher-Qwen3-VL-32B-GRPO", "dtype": "bfloat16"},
        "data": {"train": "train.jsonl"},
    }
    for name, keys in sections.items():
        tree[name] = {**tree.get(name, {}), **keys}
    return recipe_from_dict(tree)


ADAPTERS: dict[str, Any] = {
    "lora": {"parts": ["vision", "merger", "language"]},
    "model": {"freeze": ["lm_head"]},
}
