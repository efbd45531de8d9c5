"""Keeps a report up to date while its runs go on, and tells the page to load itself again.

The run folders are only read: no lock of theirs is taken. A change of a file is seen by its time and size.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from video_opd.errors import UserError
from video_opd.files import read_text, write_text
from video_opd.locks import is_being_written
from video_opd.progress import log
from video_opd.reports.html import Reload, read_runs, render
from video_opd.reports.runs import Run

# A page that was not written again for so many looks, and at least so many seconds, stops loading itself.
MISSED_LOOKS, LEAST_S = 4, 60.0
_READ = (".json", ".jsonl", ".yaml")
_State = dict[str, tuple[int, int, int]]  # path → (inode, size, time of change in ns)


def watch_report(
    run_dirs: Sequence[str | Path],
    out: str | Path,
    every_s: float,
    *,
    sleep: Callable[[float], object] = time.sleep,
    now_s: Callable[[], float] = time.time,
) -> Path:
    """Writes the report, and again whenever a run folder changed, until all runs have ended.

    It looks at the folders every ``every_s`` seconds. While it watches, the page loads itself as often. It
    returns when every run is finished and nobody is writing in its folder, or on Ctrl-C; the page that it
    leaves does not load itself any more. ``sleep`` and ``now_s`` are the clock. Raises UserError as
    :func:`~video_opd.reports.html.write_report` does.
    """
    runs = read_runs(run_dirs)
    lasts_s = max(MISSED_LOOKS * every_s, LEAST_S)
    seen: _State | None = None
    ours: _State = {}
    until_s = 0.0
    try:
        while True:
            ended = all(has_ended(Path(folder)) for folder in run_dirs)  # before the files are read
            if (state := _state(run_dirs)) != seen:
                runs, seen, until_s = _read_again(run_dirs, runs), state, 0.0
            if ended:
                break
            # Also while nothing changes, so that the page sees that it is watched, and when the run itself
            # wrote its report there.
            if until_s - now_s() < lasts_s / 2 or _file_state(out) != ours:
                until_s = now_s() + lasts_s
                write_text(out, render(runs, reload=Reload(every_s=every_s, until_s=until_s)))
                ours = _file_state(out)
            sleep(every_s)
    except KeyboardInterrupt:
        log("interrupted: the page stays as it is")
    written = write_text(out, render(runs))
    log(f"wrote {written}")
    return written


def _read_again(run_dirs: Sequence[str | Path], runs: list[Run]) -> list[Run]:
    """The runs as they are now, or as they were if a folder cannot be read at this moment."""
    try:
        return read_runs(run_dirs, tell=False)
    except UserError as error:
        log(str(error))
        return runs


def has_ended(folder: Path) -> bool:
    """Whether a run is finished, and no living process says that it is writing in its folder.

    The demo, for example, goes on to evaluate when its training is finished.
    """
    return (os.path.isfile(folder / "done.json") or _rounds_finished(folder)) and not is_being_written(folder)


def _rounds_finished(folder: Path) -> bool:
    try:
        record = json.loads(read_text(folder / "rounds.json"))
    except (OSError, ValueError, RecursionError):  # a UserError is a ValueError
        return False
    return isinstance(record, dict) and record.get("finished") is True


def _state(run_dirs: Sequence[str | Path]) -> _State:
    """The files that a report reads, as far as they can be listed."""
    found: _State = {}
    for folder in map(Path, run_dirs):
        for place in (folder, *_round_folders(folder)):
            for files in (place, place / "eval"):
                for entry in _entries(files):
                    if entry.name.endswith(_READ) and not entry.name.startswith("."):
                        found |= _file_state(entry.path)
    return found


def _file_state(path: str | Path) -> _State:
    try:
        stat = os.stat(path)
    except OSError:
        return {}
    return {str(path): (stat.st_ino, stat.st_size, stat.st_mtime_ns)}


def _round_folders(folder: Path) -> list[Path]:
    return [folder / entry.name for entry in _entries(folder) if entry.name.startswith("round-")]


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda entry: entry.name)
    except OSError:
        return []
