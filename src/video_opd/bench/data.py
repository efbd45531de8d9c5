"""Compares decoding and encoding with qwen-vl-utils and the processor, on the same files."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import av
import numpy as np
import torch

from video_opd.bench.timing import Work, summary, take_turns
from video_opd.config import VideoConfig
from video_opd.data.budget import CELL_PX
from video_opd.data.encode import PromptEncoder
from video_opd.data.loader import PromptLoader
from video_opd.data.prompts import build_messages
from video_opd.data.video import load_clip, probe
from video_opd.errors import UserError
from video_opd.files import replacing_file
from video_opd.progress import log
from video_opd.types import EncodedPrompt, Sample

QUERY = "the dog jumps into the lake"
LIBRARY = "qwen-vl-utils"
CPU = torch.device("cpu")


def make_videos(folder: Path, seconds: Sequence[int], size_px: tuple[int, int], fps: int = 30) -> list[Path]:
    """Writes an H.264 file of a moving texture for each of ``seconds``; ``size_px`` is (height, width)."""
    folder.mkdir(parents=True, exist_ok=True)
    height, width = size_px
    texture = np.random.default_rng(0).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    texture = texture.repeat(8, axis=0).repeat(8, axis=1)
    paths = []
    for length_s in seconds:
        path = folder / f"{width}x{height}-{length_s}s.mp4"
        paths.append(path)
        if path.exists():
            continue
        with replacing_file(path) as temporary, av.open(str(temporary), "w", format="mp4") as container:
            stream = container.add_stream("libx264", rate=fps)
            assert isinstance(stream, av.VideoStream)
            stream.height, stream.width, stream.pix_fmt = texture.shape[0], texture.shape[1], "yuv420p"
            for i in range(length_s * fps):
                frame = av.VideoFrame.from_ndarray(np.roll(texture, (i, 3 * i), axis=(0, 1)), format="rgb24")
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    return paths


def bench_data(
    processor: Any, videos: Sequence[Path], *, budget: VideoConfig, repeats: int = 5, workers: int = 2
) -> list[dict[str, Any]]:
    """Measures the way from a file to a prompt: by qwen-vl-utils and the processor, and by this package.

    Returns a record for each video, and one for all of them with ``workers`` in the background. Raises
    :class:`UserError` if qwen-vl-utils, or a decoder for it, is not installed.
    """
    backend = library_backend()
    records: list[dict[str, Any]] = []
    for path in videos:
        ways: dict[str, Work] = {
            LIBRARY: partial(by_library, processor, path, budget),
            "video-opd": partial(by_ours, processor, path, budget),
        }
        results, seconds = take_turns(ways, repeats, CPU)
        info = probe(path)
        height, width = info.size_px
        records.append(
            {
                "video": f"{width}x{height}, {info.duration_s:.0f} s, {info.fps:.0f} fps",
                "backend": backend,
                "frames": int(2 * results["video-opd"].tensors["video_grid_thw"][:, 0].sum()),
                "ways": summary(seconds, LIBRARY),
                "differences": differences(results[LIBRARY], results["video-opd"]),
            }
        )
        log(f"{path.name}: " + ", ".join(f"{n} {w['seconds']:.2f} s" for n, w in records[-1]["ways"].items()))
    samples = [
        Sample(id=str(path), video=path, query=QUERY, duration_s=None, spans=()) for path in videos
    ] * workers

    def loaded(count: int) -> Work:
        return lambda: sum(1 for _ in PromptLoader(samples, PromptEncoder(processor), budget, workers=count))

    ways = {"no worker": loaded(0), f"{workers} workers": loaded(workers)}
    _, seconds = take_turns(ways, repeats, CPU)
    frames = sum(record["frames"] for record in records)
    everything = {"video": f"all, {workers} times", "backend": "pyav", "frames": workers * frames}
    records.append({**everything, "ways": summary(seconds, "no worker"), "differences": {}})
    return records


def library_backend() -> str:
    """The decoder that qwen-vl-utils will use."""
    try:
        from qwen_vl_utils.vision_process import get_video_reader_backend
    except ImportError as error:
        raise UserError("the comparison needs qwen-vl-utils: pip install qwen-vl-utils decord") from error
    backend = get_video_reader_backend()
    if backend == "torchvision":  # torchvision no longer reads videos
        raise UserError("qwen-vl-utils has no decoder here: pip install decord, or torchcodec")
    return backend


def by_library(processor: Any, path: Path, budget: VideoConfig) -> dict[str, torch.Tensor]:
    """Makes a prompt as the documentation of Qwen3-VL says."""
    from qwen_vl_utils import process_vision_info

    shown = {
        "type": "video",
        "video": str(path),
        "fps": budget.fps,
        "max_frames": budget.max_frames,
        "total_pixels": budget.max_video_tokens * CELL_PX**2,
        "min_pixels": budget.min_frame_tokens * CELL_PX**2,
    }
    messages = build_messages(QUERY)
    for part in messages[-1]["content"]:
        if part["type"] == "video":
            part.update(shown)
    text = processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    _, videos, settings = process_vision_info(
        messages, return_video_kwargs=True, return_video_metadata=True, image_patch_size=16
    )
    return processor(
        text=[text],
        videos=[video for video, _ in videos],
        video_metadata=[metadata for _, metadata in videos],
        do_resize=False,
        return_tensors="pt",
        **settings,
    )


def by_ours(processor: Any, path: Path, budget: VideoConfig) -> EncodedPrompt:
    return PromptEncoder(processor).encode(load_clip(path, budget), QUERY, "q")


def differences(theirs: Any, ours: EncodedPrompt) -> dict[str, float]:
    """The video tokens of both prompts and, if these are equal, the mean difference of pixels in [-1, 1]."""
    grids = [
        int(grid.prod(dim=1).sum()) // 4
        for grid in (theirs["video_grid_thw"], ours.tensors["video_grid_thw"])
    ]
    found = {"video_tokens": float(grids[1]), "video_tokens_library": float(grids[0])}
    if grids[0] == grids[1]:
        apart = (theirs["pixel_values_videos"] - ours.tensors["pixel_values_videos"]).abs()
        found["pixels"] = apart.mean().item()
    return found


def table(records: Sequence[dict[str, Any]]) -> str:
    """The records as a Markdown table."""
    lines = ["| video | frames | way | seconds | frames a second | faster |", "|---|---|---|---|---|---|"]
    for record in records:
        for name, way in record["ways"].items():
            speed = way["speedup"]
            lines.append(
                f"| {record['video']} | {record['frames']} | {name} | {way['seconds']:.3f} "
                f"| {record['frames'] / way['seconds']:.0f} "
                f"| {speed['median']:.2f}× [{speed['low']:.2f}, {speed['high']:.2f}] |"
            )
    return "\n".join(lines)
