"""The requirements of a run of the suite on this machine, and how to meet those that are missing.

No model is loaded.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_opd.errors import UserError
from video_opd.suites.benchmarks import LMMS_EVAL, Task
from video_opd.suites.rows import Row, annotation_file, read_rows, stock_folder

INSTALL = 'make bench, or pip install "video-opd[bench]"'
JUDGE_KEY, JUDGE_URL = "OPENAI_API_KEY", "OPENAI_API_URL"  # lmms-eval's own


@dataclass(frozen=True, kw_only=True)
class Need:
    """``missing`` is None if the thing is there; ``get`` is the remedy if it is not.

    Example: ``Need(what="videomme", missing="3 of 900 videos, first videomme/data/x.mp4",
    get="video-opd suite --download --tasks videomme", videos_only=True)``.
    """

    what: str
    found: str = ""
    missing: str | None = None
    get: str = ""
    videos_only: bool = False  # --allow-missing can count the rows of these videos as wrong

    def to_json(self) -> dict[str, Any]:
        return {"what": self.what, "found": self.found, "missing": self.missing, "get": self.get}


@dataclass(frozen=True, kw_only=True)
class Survey:
    needs: tuple[Need, ...]
    rows: dict[Task, list[Row]]  # only the tasks whose rows were found

    @property
    def missing(self) -> list[Need]:
        return [need for need in self.needs if need.missing is not None]


def survey(
    tasks: Sequence[Task], data_root: Path | None, *, judge: bool = False, limit: int | None = None
) -> Survey:
    """Looks for the package, the judge's key, the rows of each task and their videos."""
    needs = [_package()]
    if judge:
        needs.append(_judge())
    rows: dict[Task, list[Row]] = {}
    failed: set[str] = set()  # benchmarks whose data set cannot be loaded: one try is enough for all tasks
    if needs[0].missing is None:
        for task in tasks:
            if data_root is None and task.benchmark in failed:
                continue
            need, found = _data(task, data_root, limit)
            needs.append(need)
            if found is None:
                failed.add(task.benchmark)
            else:
                rows[task] = found
    return Survey(needs=tuple(needs), rows=rows)


def require(found: Survey, *, allow_missing: bool = False) -> None:
    """Raises :class:`UserError` for the first missing thing; ``allow_missing`` lets videos be missing."""
    missing = [need for need in found.missing if not (allow_missing and need.videos_only)]
    if not missing:
        return
    first = missing[0]
    more = f" (and {len(missing) - 1} more: see --check)" if len(missing) > 1 else ""
    hint = "; or --allow-missing counts those rows as wrong" if first.videos_only else ""
    raise UserError(f"{first.what}: {first.missing}{more}; {first.get}{hint}")


def require_package() -> None:
    """Raises :class:`UserError` unless the right lmms-eval is installed."""
    require(Survey(needs=(_package(),), rows={}))


def installed_version() -> str | None:
    try:
        return importlib.metadata.version("lmms-eval")
    except importlib.metadata.PackageNotFoundError:
        return None


def _package() -> Need:
    version = installed_version()
    if version is None or stock_folder() is None:
        return Need(what=f"lmms-eval {LMMS_EVAL}", missing="not installed", get=INSTALL)
    if version != LMMS_EVAL:
        missing = f"{version} is installed, whose prompts and scoring may differ"
        return Need(what=f"lmms-eval {LMMS_EVAL}", missing=missing, get=INSTALL)
    return Need(what=f"lmms-eval {LMMS_EVAL}", found="installed")


def _judge() -> Need:
    if os.environ.get(JUDGE_KEY):
        return Need(what="judge", found=f"{JUDGE_KEY} is set")
    get = f"export {JUDGE_KEY}=… (and {JUDGE_URL}=… for a server of your own), or leave out --judge"
    return Need(what="judge", missing=f"{JUDGE_KEY} is not set", get=get)


def _data(task: Task, data_root: Path | None, limit: int | None) -> tuple[Need, list[Row] | None]:
    download = f"video-opd suite --download --tasks {task.benchmark}"
    if data_root is not None and not (file := annotation_file(task, data_root)).is_file():
        get = "put its rows there (schemas: docs/evaluation.md), or leave it out with --skip"
        return Need(what=task.name, missing=f"no {file}", get=get), None
    try:
        rows = read_rows(task, data_root, limit)
    except UserError as error:
        get = download if data_root is None else "mend the file"
        return Need(what=task.name, missing=str(error), get=get), None
    videos = dict.fromkeys(row.video for row in rows)
    lost = [video for video in videos if not video.is_file()]
    found = f"{len(rows)} rows, {len(videos)} videos"
    if not lost:
        return Need(what=task.name, found=found), rows
    missing = f"{len(lost)} of {len(videos)} videos are missing, first {lost[0]}"
    if lost[0].is_dir():
        missing += " (a folder of frames: make a video of it, ffmpeg -framerate 3 …, under the same name)"
    get = download if data_root is None else "put them there"
    return Need(what=task.name, found=found, missing=missing, get=get, videos_only=True), rows
