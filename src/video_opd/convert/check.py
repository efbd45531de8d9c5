"""Opens the videos of a data file, and finds the rows that cannot be used.

Every video is opened once, in a separate process, so that a video that brings its decoder down is found and
named. The facts of each video are appended to the check file. A repeated check opens only videos that are
new, have changed, or could not be read.
"""

from __future__ import annotations

import os
from collections import Counter, deque
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from video_opd.config import VideoConfig
from video_opd.data.annotations import Annotations, misspelt_keys, read_annotations, write_rows
from video_opd.data.prompts import CONTROL_TOKEN
from video_opd.errors import UserError
from video_opd.files import need_another_file
from video_opd.jsonl import append_jsonl, read_jsonl, repair_jsonl
from video_opd.locks import locked_file
from video_opd.pools import worker_pool
from video_opd.progress import track
from video_opd.types import Sample

MISSING, UNDECODABLE, DURATION, SPAN, ROW = "missing", "undecodable", "duration", "span", "row"
QUERY, KEY, EMPTY = "query", "key", "empty"
_CRASHED = "it brings the decoder down"


@dataclass(frozen=True, kw_only=True)
class CheckedVideo:
    """The facts of one video, or the error that kept it from being read. A row of the check file.

    ``bytes`` and ``mtime_ns`` are those of the file that was opened; ``size_px`` is (height, width).
    """

    video: str
    bytes: int = 0
    mtime_ns: int = 0
    decoded: bool = False  # its frames were decoded, too
    error: str | None = None
    missing: bool = False
    duration_s: float | None = None
    fps: float | None = None
    frames: int | None = None
    size_px: tuple[int, int] | None = None
    codec: str | None = None
    late_s: float | None = None  # how much later than the file its pictures begin; None: not looked at

    def to_json(self) -> dict[str, Any]:
        return {
            "video": self.video,
            "error": self.error,
            "duration": self.duration_s,
            "fps": self.fps,
            "frames": self.frames,
            "size": None if self.size_px is None else list(self.size_px),
            "codec": self.codec,
            "late": self.late_s,
            "decoded": self.decoded,
            "bytes": self.bytes,
            "mtime_ns": self.mtime_ns,
        }


@dataclass(frozen=True, kw_only=True)
class CheckSettings:
    tolerance_s: float = 1.0  # containers round durations; some leave the last frame out
    decode: VideoConfig | None = None  # decode the frames that this budget chooses, too
    workers: int = 4

    def __post_init__(self) -> None:
        if not self.tolerance_s >= 0:
            raise UserError(f"the tolerance is {self.tolerance_s:g}; it must be 0 seconds or more")


def check(
    data: str | Path,
    out: str | Path,
    *,
    video_root: str | Path | None = None,
    settings: CheckSettings | None = None,
    good: str | Path | None = None,
) -> dict[str, Any]:
    """Opens the videos of ``data`` and returns the record that ``data check --json`` prints.

    Appends a row for each video to ``out`` (:class:`CheckedVideo`). The rows without a problem are written to
    ``good``. Raises UserError if ``data`` is no data file, if ``out`` is another kind of file, and if
    ``good`` is one of the two.
    """
    settings = settings or CheckSettings()
    if good is not None:
        need_another_file("good", good, [("data", data), ("out", out)])
    annotations = read_annotations(data, video_root, keep_faults=True)
    checked = check_videos(annotations.samples, out, settings)
    problems = find_problems(annotations, checked, settings.tolerance_s)
    if not annotations.samples and not annotations.faults:
        empty = f"{data}: no rows in it; check the path"
        problems = [{"id": None, "line": None, "video": None, "kinds": [EMPTY], "problem": empty}]
    too_long = {problem["id"] for problem in problems if SPAN in problem["kinds"]}
    written = 0
    if good is not None:
        bad = {problem["id"] for problem in problems if problem["video"] is not None}
        rows = [sample for sample in annotations.samples if sample.id not in bad]
        write_rows(good, rows)
        written = len(rows)
    return {
        "rows": len(annotations.samples) + len(annotations.faults),
        "videos": len(checked),
        "unannotated": annotations.unannotated,
        "clamped": sum(identity not in too_long for _, identity in annotations.clamped),
        "late": [
            {"video": str(video), "late_s": facts.late_s}
            for video, facts in checked.items()
            if facts.late_s is not None and facts.late_s > settings.tolerance_s
        ],
        "tolerance_s": settings.tolerance_s,
        "checked": str(out),
        "good": None if good is None else str(good),
        "written": written,
        "by_kind": dict(Counter(kind for problem in problems for kind in problem["kinds"]).most_common()),
        "problems": problems,
    }


def find_problems(
    annotations: Annotations, checked: Mapping[Path, CheckedVideo], tolerance_s: float
) -> list[dict[str, Any]]:
    """``{"id", "line", "video", "kinds", "problem"}`` for each row with a problem, wrong rows first."""
    rows: list[dict[str, Any]] = [
        {"id": fault.id, "line": fault.line, "video": None, "kinds": [ROW], "problem": fault.message}
        for fault in annotations.faults
    ]
    for sample in annotations.samples:
        found = list(_problems(sample, checked[sample.video], tolerance_s))
        if found:
            rows.append(
                {
                    "id": sample.id,
                    "line": None,
                    "video": str(sample.video),
                    "kinds": list(dict.fromkeys(kind for kind, _ in found)),
                    "problem": "; ".join(text for _, text in found),
                }
            )
    return rows


def _problems(sample: Sample, facts: CheckedVideo, tolerance_s: float) -> Iterator[tuple[str, str]]:
    end_s = facts.duration_s
    if end_s is None:
        yield (MISSING if facts.missing else UNDECODABLE), facts.error or "unknown"
    if text := _past_the_end(sample, end_s, tolerance_s):
        yield SPAN, text
    if end_s is not None and sample.duration_s is not None and abs(sample.duration_s - end_s) > tolerance_s:
        clip = " (the row is about a clip of the video)" if sample.row.get("clip") else ""
        yield DURATION, f"duration {sample.duration_s:g} s, but the video lasts {end_s:.2f} s{clip}"
    if token := CONTROL_TOKEN.search(sample.query):
        yield QUERY, f"its query holds the control token {token.group()}; remove it"
    for key, name in misspelt_keys(sample.row).items():
        yield KEY, f"key {key!r} is not known; did you mean {name!r}?"


def _past_the_end(sample: Sample, end_s: float | None, tolerance_s: float) -> str | None:
    """The problem of a span that ends too late, if there is one."""
    # The spans as they stand in the file: reading has cut those of the sample to the stated duration.
    spans = sample.row.get("spans") or sample.spans
    last_s = max((end for _, end in spans), default=0.0)
    if end_s is not None and any(start_s >= end_s for start_s, _ in spans):
        return f"a span begins after the video's end at {end_s:.2f} s"
    if end_s is not None and last_s > end_s + tolerance_s:
        return f"a span ends at {last_s:g} s, the video at {end_s:.2f} s"
    if sample.duration_s is not None and last_s > sample.duration_s + tolerance_s:
        return f"a span ends at {last_s:g} s, past the duration, {sample.duration_s:g} s"
    return None


# --- opening -----------------------------------------------------------------------------------------


def default_out(data: str | Path) -> Path:
    """``train.jsonl`` → ``train.check.jsonl``."""
    return Path(data).with_suffix(".check.jsonl")


def known_videos(
    samples: Sequence[Sample], out: str | Path, *, decoded: bool = False
) -> dict[Path, CheckedVideo]:
    """The facts in the check file ``out`` about videos that could be read and have not changed since.

    An error is not among them: a disk that fails and a permission that is missing are errors, too, and a file
    does not change when they are mended. Without a file there are none.
    """
    before = _read(Path(out))
    found = {}
    for video in dict.fromkeys(sample.video for sample in samples):
        facts = before.get(os.path.abspath(video))
        if facts is None or facts.error is not None or (decoded and not facts.decoded):
            continue
        if _stat(video) == (facts.bytes, facts.mtime_ns):
            found[video] = facts
    return found


def check_videos(
    samples: Sequence[Sample], out: str | Path, settings: CheckSettings
) -> dict[Path, CheckedVideo]:
    """The facts of each video of ``samples``. Those in ``out`` are reused; the others are appended to it.

    Raises :class:`UserError` if another command is appending to ``out``.
    """
    with locked_file(out):
        return _check_videos(samples, Path(out), settings)


def _check_videos(samples: Sequence[Sample], out: Path, settings: CheckSettings) -> dict[Path, CheckedVideo]:
    repair_jsonl(out)
    known = known_videos(samples, out, decoded=settings.decode is not None)
    checked = {video: facts for video, facts in known.items() if facts.late_s is not None}
    wanted = []
    for video in dict.fromkeys(sample.video for sample in samples):
        if video in checked:
            continue
        if (stat := _stat(video)) is None:
            checked[video] = CheckedVideo(video=os.path.abspath(video), error="no such file", missing=True)
        else:
            wanted.append((video, stat))
    if not wanted:
        return checked
    results = _opened([video for video, _ in wanted], settings)
    stats = dict(wanted)
    for video, facts in track(results, "checking videos", len(wanted)):
        count, mtime_ns = stats[video]
        checked[video] = CheckedVideo(
            video=os.path.abspath(video),
            bytes=count,
            mtime_ns=mtime_ns,
            decoded=settings.decode is not None,
            **facts,
        )
        append_jsonl(out, [checked[video].to_json()])
    return checked


def open_video(video: Path, decode: VideoConfig | None) -> dict[str, Any]:
    """The facts of one video, or ``{"error": reason}`` if it cannot be read."""
    from video_opd.data.video import VideoError, load_clip, probe

    try:
        info = probe(video)
        if decode is not None:
            load_clip(video, decode)
    except VideoError as error:
        return {"error": error.reason}
    except OSError as error:
        return {"error": f"cannot be read ({error.strerror or error})"}
    return {
        "duration_s": info.duration_s,
        "fps": info.fps,
        "frames": info.frame_count,
        "size_px": info.size_px,
        "codec": info.codec,
        "late_s": round(info.late_s, 3),
    }


def _opened(videos: Sequence[Path], settings: CheckSettings) -> Iterator[tuple[Path, dict[str, Any]]]:
    """(video, facts) in the order of completion. After a crash each video that was open is tried alone."""
    waiting = deque(videos)
    while waiting:
        suspects: list[Path] = []
        with worker_pool(settings.workers) as pool:
            running: dict[Future[dict[str, Any]], Path] = {}
            try:
                while waiting or running:
                    while waiting and len(running) < 2 * settings.workers:
                        running[pool.submit(open_video, waiting[0], settings.decode)] = waiting[0]
                        waiting.popleft()
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        facts = future.result()
                        yield running.pop(future), facts
            except BrokenProcessPool:
                suspects = list(running.values())
        yield from _one_by_one(suspects, settings)


def _one_by_one(videos: Sequence[Path], settings: CheckSettings) -> Iterator[tuple[Path, dict[str, Any]]]:
    waiting = deque(videos)
    while waiting:
        with worker_pool(1) as pool:
            try:
                while waiting:
                    facts = pool.submit(open_video, waiting[0], settings.decode).result()
                    yield waiting.popleft(), facts
            except BrokenProcessPool:
                yield waiting.popleft(), {"error": _CRASHED}


def _stat(video: Path) -> tuple[int, int] | None:
    try:
        stat = os.stat(video)
    except (OSError, ValueError):
        return None
    return stat.st_size, stat.st_mtime_ns


def _read(out: Path) -> dict[str, CheckedVideo]:
    if not out.exists():
        return {}
    found = {}
    for line, row in read_jsonl(out):
        try:
            size = row["size"]
            facts = CheckedVideo(
                video=row["video"],
                bytes=row["bytes"],
                mtime_ns=row["mtime_ns"],
                decoded=row["decoded"],
                error=row["error"],
                duration_s=row["duration"],
                fps=row["fps"],
                frames=row["frames"],
                size_px=None if size is None else (size[0], size[1]),
                codec=row["codec"],
                late_s=row.get("late"),  # an earlier version did not look
            )
        except (KeyError, TypeError, IndexError):
            raise UserError(
                f"{out}:{line}: not a row of a check; choose another --out, or delete the file"
            ) from None
        found[facts.video] = facts
    return found
