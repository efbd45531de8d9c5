"""Takes the pictures of chosen frames from torchcodec instead of PyAV.

torchcodec numbers the frames of a file by itself. So the number of frames and the time of each chosen frame
are compared with our index, and a file on which the two disagree is refused.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from video_opd.data.demux import VideoError
from video_opd.data.index import PacketIndex
from video_opd.errors import UserError

MAX_TIME_GAP_S = 2e-3  # containers round times to milliseconds


def check_torchcodec() -> None:
    """Raises UserError if torchcodec is not installed or finds no FFmpeg libraries that it can load."""
    if importlib.util.find_spec("torchcodec") is None:
        raise UserError("the video backend torchcodec is not installed; install torchcodec, or choose pyav")
    try:
        import torchcodec.decoders  # noqa: F401
    except (ImportError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"the video backend torchcodec cannot be loaded ({reason}); install FFmpeg's shared libraries, "
            "or choose pyav"
        ) from None


def torchcodec_frames(path: Path, index: PacketIndex, wanted: np.ndarray) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (number, uint8 [H, W, 3] as shown) of each wanted frame.

    Raises VideoError if torchcodec cannot decode the file, or counts or times its frames otherwise than
    ``index`` does.
    """
    from torchcodec.decoders import VideoDecoder

    if index.orientation.mirrored:
        raise VideoError(path, "torchcodec does not mirror pictures as this file asks for; choose pyav")
    try:
        decoder = VideoDecoder(
            str(path),
            stream_index=index.stream_index,
            num_ffmpeg_threads=1,
            seek_mode="exact",
            dimension_order="NHWC",
        )
        if len(decoder) != len(index.frame_times_s_T):
            raise VideoError(
                path,
                f"torchcodec counts {len(decoder)} frames, not {len(index.frame_times_s_T)}; choose pyav",
            )
        first_s = decoder.get_frame_at(0).pts_seconds
        for number in wanted:
            frame = decoder.get_frame_at(int(number))
            time_s = float(index.frame_times_s_T[number])
            if abs(frame.pts_seconds - first_s - time_s) > MAX_TIME_GAP_S:
                raise VideoError(
                    path,
                    f"torchcodec shows frame {number} at {frame.pts_seconds - first_s:.3f} s, not at "
                    f"{time_s:.3f} s; choose pyav",
                )
            yield int(number), frame.data.numpy()
    except VideoError:
        raise
    except (RuntimeError, ValueError, IndexError) as error:
        reason = str(error).strip().splitlines()[0]
        raise VideoError(path, f"torchcodec cannot decode it ({reason}); choose pyav") from None
