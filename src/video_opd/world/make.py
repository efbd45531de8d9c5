"""Writes the splits of the world: H.264 files, and one JSONL file of rows for each split.

A video depends on (split, seed, index) alone, so any range of a split can be made at any time: a larger
number adds videos to those that exist, and a run that was killed continues where it stopped. Annotations are
exact, or have the errors of :mod:`video_opd.world.annotation_noise`; the pictures are the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path

import numpy as np

from video_opd.errors import UserError
from video_opd.files import discard_unfinished, replacing_file
from video_opd.jsonl import write_jsonl
from video_opd.locks import locked_folder
from video_opd.pools import worker_map
from video_opd.world import DEFAULT_VIDEOS
from video_opd.world.annotation_noise import annotate, check_level
from video_opd.world.scene import STYLES, Scene, compose, scene_rng

TEST_SPLITS = tuple(STYLES)
SPLITS = ("train", *TEST_SPLITS)
CLOCK_HZ = 1000


def frame_times(scene: Scene) -> np.ndarray:
    """The presentation times of the frames in seconds: float64 [N], in whole milliseconds, starting at 0.

    The intervals of a variable-rate file are 0.5 to 1.5 times their mean.
    """
    count = round(scene.duration_s * scene.fps)
    if not scene.variable_rate:
        times = np.arange(count) / scene.fps
    else:
        gaps = scene_rng(scene.split, scene.seed, scene.index, "clock").uniform(0.5, 1.5, size=count - 1)
        # The last frame lasts one mean interval, as in a constant-rate file.
        times = np.concatenate([[0.0], np.cumsum(gaps / gaps.sum() * (count - 1) / scene.fps)])
    return np.round(times * CLOCK_HZ) / CLOCK_HZ


def write_video(scene: Scene, path: Path) -> None:
    """Renders a scene and encodes it (H.264, yuv420p). ``path`` appears only when the file is complete."""
    import av

    from video_opd.world.render import Renderer

    renderer = Renderer(scene)
    with replacing_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=Fraction(scene.fps).limit_denominator(1000))
        stream.height, stream.width = scene.size_px
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, CLOCK_HZ)
        stream.codec_context.time_base = Fraction(1, CLOCK_HZ)
        # One thread writes the same bytes on every machine.
        stream.options = {"preset": "superfast", "crf": "24", "threads": "1", "g": "48"}
        for t in frame_times(scene):
            frame = av.VideoFrame.from_ndarray(renderer.frame(float(t)), format="rgb24")
            frame.pts, frame.time_base = round(float(t) * CLOCK_HZ), Fraction(1, CLOCK_HZ)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def rows(scene: Scene, folder: str = "videos", *, annotation_noise: float = 0.0) -> list[dict]:
    """The data rows of a scene's queries. The ``source`` of a row is the family of its event.

    ``spans`` has the annotated span, ``annotation`` says which error it has, and ``true_spans`` has the span
    of the event.
    """
    annotations = annotate(scene, annotation_noise)
    return [
        {
            "id": f"{scene.name}-q{k}",
            "video": f"{folder}/{scene.name}.mp4",
            "query": q.query,
            "duration": scene.duration_s,
            "spans": [list(annotation.span)],
            "true_spans": [list(q.span)],
            "annotation": annotation.kind,
            "source": q.family,
        }
        for k, (q, annotation) in enumerate(zip(scene.questions, annotations, strict=True))
    ]


def _make_one(task: tuple[str, int, int, str, float]) -> list[dict]:
    split, seed, index, videos, annotation_noise = task
    scene = compose(split, seed, index)
    path = Path(videos) / f"{scene.name}.mp4"
    if not path.exists():
        write_video(scene, path)
    return rows(scene, annotation_noise=annotation_noise)


def make_world(
    out: Path | str,
    *,
    videos: Mapping[str, int] | None = None,
    seed: int = 0,
    annotation_noise: float = 0.0,
    workers: int | None = None,
    track: Callable[[Iterable, str, int], Iterable] | None = None,
) -> dict[str, Path]:
    """Makes ``videos[split]`` videos of each split in the folder ``out``.

    Args:
        out: the folder, in which ``<split>.jsonl`` and ``videos/*.mp4`` are written.
        videos: the number of videos of each split; ``DEFAULT_VIDEOS`` if None.
        seed: of the whole world; another seed gives other videos, in the test splits, too.
        annotation_noise: from 0 (exact) to 1, how wrong the annotations of the split "train" are; those of
            the test splits are exact.
        workers: the number of rendering processes; the number of cores if None. One renders in this process.
        track: shows progress by wrapping the iteration: ``track(iterable, description, total)``.

    Returns:
        The data file of each split.

    Raises:
        UserError: for an unknown split or a noise outside 0 to 1, and if ``out`` cannot be written, the disk
            is full, or another command is writing there.
    """
    out = Path(out)
    wanted = dict(DEFAULT_VIDEOS if videos is None else videos)
    unknown = sorted(set(wanted) - set(SPLITS))
    if unknown:
        raise UserError(f"world has no split {unknown[0]!r}; choose from {', '.join(SPLITS)}")
    check_level(annotation_noise)
    noise = {split: annotation_noise if split == "train" else 0.0 for split in wanted}
    tasks = [
        (split, seed, i, str(out / "videos"), noise[split]) for split, n in wanted.items() for i in range(n)
    ]
    made: dict[str, list[dict]] = {split: [] for split in wanted}
    try:
        with locked_folder(out):
            (out / "videos").mkdir(parents=True, exist_ok=True)
            discard_unfinished(out / "videos")
            for split in wanted:
                discard_unfinished(out, f"{split}.jsonl")
            with worker_map(workers, chunksize=4) as map_tasks:
                results: Iterable = map_tasks(_make_one, tasks)
                if track is not None:
                    results = track(results, f"render {len(tasks)} videos", len(tasks))
                for (split, *_), found in zip(tasks, results, strict=True):
                    made[split].extend(found)
            paths = {}
            for split, found in made.items():
                paths[split] = out / f"{split}.jsonl"
                write_jsonl(paths[split], found)
    except OSError as error:
        raise UserError(
            f"cannot write the world under {out}: {error.strerror or error}; free space or use --out"
        ) from error
    return paths
