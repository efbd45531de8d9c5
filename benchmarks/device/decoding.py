"""How many frames a second this machine's CPUs decode, so that the need of several cards' loaders is known.

Each process makes prompts' clips of the same H.264 file, from the file to resized frames, as the loader does.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path

import torch
from section import Report, run

from video_opd.bench.data import make_videos
from video_opd.config import VideoConfig
from video_opd.data.video import load_clip, probe
from video_opd.pools import worker_pool

PROCESSES = (1, 4, 8, 16)
SIZE_PX, SECONDS = (360, 640), 20
MEASURED_S, TINY_MEASURED_S = 2.5, 0.5
CARDS = 8


def measure(report: Report, tiny: bool) -> None:
    report.note(summary="nothing decoded yet")
    with tempfile.TemporaryDirectory() as folder:
        seconds = 2 if tiny else SECONDS
        [video] = make_videos(Path(folder), [seconds], (96, 128) if tiny else SIZE_PX)
        info = probe(video)
        name = f"{info.size_px[1]}x{info.size_px[0]}, {info.duration_s:.0f} s, {info.fps:.0f} fps"
        report.note(video=name, cpus=os.cpu_count())
        for count in PROCESSES:
            report.attempt(f"{count} processes", lambda: add(report, count, video, info.frame_count, tiny))  # noqa: B023


def add(report: Report, processes: int, video: Path, frames_of_file: int, tiny: bool) -> None:
    videos_a_second, chosen = rate(processes, video, TINY_MEASURED_S if tiny else MEASURED_S)
    report.add(
        f"{processes} processes",
        f"{videos_a_second * chosen:.0f} frames a second into clips ({videos_a_second:.2f} videos; "
        f"{videos_a_second * frames_of_file:.0f} frames of the file)",
        True,
        processes=processes,
        videos_a_second=videos_a_second,
        frames_a_second=videos_a_second * chosen,
    )
    report.note(
        summary=f"{report.record['video']}: {videos_a_second:.1f} videos a second in {processes} processes, "
        f"{os.cpu_count()} CPUs; {CARDS} cards wait for data if each takes less than "
        f"{CARDS / videos_a_second:.1f} s for a video"
    )


def rate(processes: int, video: Path, seconds: float) -> tuple[float, int]:
    """(videos a second of all processes together, frames of a clip)."""
    # Forked from a server that has imported everything and run nothing: a fork of a process that has
    # decoded, whose threads are not in it, may wait for them for ever.
    multiprocessing.set_forkserver_preload(["torchvision.transforms.functional", "video_opd.data.video"])
    with worker_pool(processes, "forkserver") as pool:
        list(pool.map(decode_for, [video] * processes, [0.0] * processes))  # starts them, and warms up
        began_s = time.perf_counter()
        done = list(pool.map(decode_for, [video] * processes, [seconds] * processes))
        took_s = time.perf_counter() - began_s
    return sum(count for count, _ in done) / took_s, done[0][1]


def decode_for(video: Path, seconds: float) -> tuple[int, int]:
    """(clips made in that time, at least one; frames of a clip)."""
    torch.set_num_threads(1)
    ends_s, count = time.perf_counter() + seconds, 0
    while True:
        clip = load_clip(video, VideoConfig())
        count += 1
        if time.perf_counter() >= ends_s:
            return count, len(clip.frames)


if __name__ == "__main__":
    sys.exit(run(measure, __doc__))
