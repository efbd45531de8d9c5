"""Task files for lmms-eval, written for one run. Each includes a stock task file and replaces a few settings.

The wording of the questions and the scoring stay stock. We set the rows (a copy beside the task file, with
the path of each video), the prompt for Qwen3-VL whatever the model is called, greedy responses of one length,
and the hooks. lmms-eval's own command can use the folder, too::

    lmms-eval --model video_opd --model_args pretrained=MODEL --include_path DIR --tasks vopd_videomme
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from video_opd.files import write_text
from video_opd.jsonl import write_jsonl
from video_opd.suites.benchmarks import PREFIX, Task
from video_opd.suites.hooks import VIDEO_KEY
from video_opd.suites.rows import Row, stock_config, stock_file

QWEN = "qwen3_vl"  # lmms-eval's name for the family whose prompts are used
HOOKS = "video_opd.suites.hooks"
SPLIT = "test"
CACHE = "cache"  # the folder in which the datasets library keeps its copy of the rows


def write_task_files(
    folder: Path, rows: Mapping[Task, Sequence[Row]], *, max_new_tokens: int, judge: bool
) -> dict[Task, str]:
    """Writes a ``.yaml`` and a ``.jsonl`` for each task; the files of an earlier run are removed.

    Returns a digest of each task's rows, which does not depend on the folder of the videos.
    """
    folder = folder.absolute()
    for file in folder.glob(f"{PREFIX}*"):
        file.unlink()
    shutil.rmtree(folder / CACHE, ignore_errors=True)
    digests = {}
    for task, found in rows.items():
        docs = folder / f"{task.prefixed}.jsonl"
        write_jsonl(docs, [{**row.doc, VIDEO_KEY: str(row.video.absolute())} for row in found])
        settings = {
            "include": str(stock_file(task)),
            "task": task.prefixed,
            "dataset_path": "json",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {SPLIT: str(docs)},
                "cache_dir": str(folder / CACHE),
            },
            "test_split": SPLIT,
            "lmms_eval_specific_kwargs": {"default": prompt_settings(task)},
            "generation_kwargs": {"max_new_tokens": max_new_tokens, "do_sample": False, "temperature": 0},
        }
        functions = {
            "doc_to_visual": f"{HOOKS}.doc_to_visual",
            "process_results": f"{HOOKS}.{hook_name(task, judge)}",
        }
        tagged = "".join(f"{key}: !function {name}\n" for key, name in functions.items())
        write_text(folder / f"{task.prefixed}.yaml", yaml.safe_dump(settings, sort_keys=False) + tagged)
        digests[task] = _digest(found)
    return digests


def prompt_settings(task: Task) -> dict[str, Any]:
    """The settings of the task's prompt for Qwen3-VL. lmms-eval would choose them by the model's name."""
    stock = stock_config(task)["lmms_eval_specific_kwargs"]
    return stock.get(QWEN, stock["default"])


def hook_name(task: Task, judge: bool) -> str:
    return f"{task.hook}_judged" if judge and task.benchmark == "tempcompass" else task.hook


def _digest(rows: Sequence[Row]) -> str:
    lines = "\n".join(json.dumps([row.doc, row.video.name], sort_keys=True) for row in rows)
    return hashlib.blake2b(lines.encode(), digest_size=8).hexdigest()
