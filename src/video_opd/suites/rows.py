"""The rows of a task and the places of their videos, from a local folder or from the hub's copies here.

A local folder (``--data-root DIR``) holds each benchmark under its name: rows in the benchmark's own schema,
and videos in the folders that lmms-eval uses::

    DIR/tempcompass/yes_no.jsonl            DIR/tempcompass/videos/<video_id>.mp4
    DIR/mvbench/action_count.jsonl          DIR/mvbench/perception/videos/<video>
    DIR/videomme/test.jsonl                 DIR/videomme/data/<videoID>.mp4

``.json`` (a list of rows, as MVBench publishes them) is read as well. Without a folder, rows come from the
benchmark's data set on the hub and videos from the folders of lmms-eval under ``HF_HOME``.
"""

from __future__ import annotations

import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from video_opd.errors import UserError
from video_opd.jsonl import read_jsonl
from video_opd.suites.benchmarks import Task, check_row, keys_of

VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm")


@dataclass(frozen=True, kw_only=True)
class Row:
    """``doc`` holds the keys of the benchmark's schema; ``video`` is where its video is, or should be."""

    doc: Mapping[str, Any]
    video: Path


def stock_folder() -> Path | None:
    """lmms-eval's folder of tasks, or None if it is not installed. Nothing of lmms-eval is imported."""
    spec = importlib.util.find_spec("lmms_eval")
    locations = spec.submodule_search_locations if spec is not None else None
    return Path(locations[0]) / "tasks" if locations else None


def stock_file(task: Task) -> Path:
    folder = stock_folder()
    assert folder is not None, "requirements.py found lmms-eval"
    return folder / task.stock


def stock_config(task: Task) -> dict[str, Any]:
    """lmms-eval's task file together with the files that it includes. A function is given by its name."""
    return _read_task_file(stock_file(task))


def hub_home() -> Path:
    return Path(os.path.expanduser(os.environ.get("HF_HOME", "~/.cache/huggingface")))


def read_rows(task: Task, data_root: Path | None, limit: int | None = None) -> list[Row]:
    """The first ``limit`` rows of a task, or all of them.

    Raises :class:`UserError` if there are none, and for a row that does not fit the schema.
    """
    if data_root is None:
        base = hub_home() / stock_config(task)["dataset_kwargs"]["cache_dir"]
        found = _hub_rows(task)
    else:
        base = data_root / task.benchmark
        found = _local_rows(annotation_file(task, data_root))
    rows: list[Row] = []
    for where, doc in found:
        if limit is not None and len(rows) == limit:
            break
        keys = keys_of(task)
        check_row(doc, keys, where)
        if "candidates" in keys and doc["answer"] not in doc["candidates"]:
            raise UserError(f'{where}: "answer" {doc["answer"]!r} is none of the "candidates"')
        kept = {key: doc[key] for key in keys}
        if task.judged:  # the stock task file shows an answer beside each caption
            kept["answer"] = doc["mc_answer"]
        rows.append(Row(doc=kept, video=_video(task, doc, base)))
    if not rows:
        raise UserError(f"{task.name}: no rows; leave it out with --skip {task.name}")
    return rows


def annotation_file(task: Task, data_root: Path) -> Path:
    """The file of the task's rows: the first that is there, else the place where it should be."""
    folder = data_root / task.benchmark
    names = (f"{task.subset}.jsonl", f"{task.subset}.json", f"json/{task.subset}.json")
    return next((folder / name for name in names if (folder / name).is_file()), folder / names[0])


def _local_rows(file: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    if file.suffix == ".jsonl":
        for number, row in read_jsonl(file):
            yield f"{file}:{number}", row
        return
    try:
        rows = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read ({error}); it must be a JSON list of rows") from None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{file}: it must be a JSON list of rows")
    for number, row in enumerate(rows):
        yield f"{file}, row {number}", row


def _hub_rows(task: Task) -> Iterator[tuple[str, Mapping[str, Any]]]:
    import datasets

    stock = stock_config(task)
    options = {key: stock["dataset_kwargs"][key] for key in ("revision",) if key in stock["dataset_kwargs"]}
    if int(datasets.__version__.split(".")[0]) < 4:  # these would run a data set's own script, or ask
        options["trust_remote_code"] = False
    try:
        rows = datasets.load_dataset(
            stock["dataset_path"], stock.get("dataset_name"), split=stock["test_split"], **options
        )
    except Exception as error:  # many kinds: no network, no access, no such data set
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"{stock['dataset_path']}: its rows cannot be loaded ({reason})") from error
    for number, row in enumerate(rows):
        yield f"{stock['dataset_path']} {task.subset}, row {number}", row


def _video(task: Task, doc: Mapping[str, Any], base: Path) -> Path:
    """The first of lmms-eval's places that has the video, else the first place of all."""
    places = list(_places(task, doc, base))
    return next((place for place in places if place.is_file()), places[0])


def _places(task: Task, doc: Mapping[str, Any], base: Path) -> Iterator[Path]:
    if task.benchmark == "mvbench":
        folder = _mvbench_folders()[task.subset]
        for root in (base, base / "data0613", base / "video"):
            yield root / folder / doc["video"]
            if not Path(
                doc["video"]
            ).suffix:  # published as a folder of frames; somebody may have made a video
                yield from (root / folder / f"{doc['video']}{suffix}" for suffix in VIDEO_SUFFIXES)
        return
    key, folder = {"tempcompass": ("video_id", "videos"), "videomme": ("videoID", "data")}[task.benchmark]
    yield from (base / folder / f"{doc[key]}{suffix}" for suffix in VIDEO_SUFFIXES)


@lru_cache(maxsize=1)
def _mvbench_folders() -> Mapping[str, str]:
    """The folder of each subset's videos, from lmms-eval's utils.py, without importing lmms-eval."""
    folder = stock_folder()
    assert folder is not None, "requirements.py found lmms-eval"
    spec = importlib.util.spec_from_file_location("vopd_mvbench_utils", folder / "mvbench" / "utils.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.DATA_LIST


class _TaskLoader(yaml.SafeLoader):
    """Loads lmms-eval's YAML. ``!function`` becomes the name of the function."""


_TaskLoader.add_constructor("!function", lambda loader, node: str(node.value))


def _read_task_file(file: Path) -> dict[str, Any]:
    config = yaml.load(file.read_text(encoding="utf-8"), Loader=_TaskLoader)
    included = config.pop("include", None)
    return config if included is None else {**_read_task_file(file.parent / included), **config}
