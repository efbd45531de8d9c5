"""The containers that are opened, and the limits within which a file from anybody may ask for memory.

FFmpeg recognises a file by its content, whatever its name is. Some of its formats are lists of other files
(HLS and DASH playlists, ffconcat, SDP, image sequences), so a text file that is named ``v.mp4`` could make it
read other files, or itself again without end. Only the formats below are opened, and no format may open a
second file.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

# FFmpeg's names of demuxers that hold frames and open no other file. A format of several names has one here.
FORMATS = (
    *("mov", "matroska", "avi", "flv", "asf", "asf_o", "mpeg", "mpegts", "mpegtsraw", "ogg", "nut", "mxf"),
    *("mxf_opatom", "gxf", "wtv", "rm", "swf", "dv", "nsv", "nuv", "pva", "dhav", "kux", "live_flv", "ivf"),
    *("yuv4mpegpipe", "gif", "apng", "flic"),
    # raw streams
    *("h261", "h263", "h264", "hevc", "vvc", "evc", "mpegvideo", "m4v", "vc1", "vc1test", "obu", "av1"),
    *("mjpeg", "mjpeg_2000", "dirac", "dnxhd", "cavsvideo", "avs2", "avs3"),
)
MAX_FRAME_PX = 1 << 26  # 8192 × 8192, 201 MB as RGB: a frame that claims more is refused before it is decoded
MAX_GAP_BYTES = 1 << 28  # 256 MiB that are read without a packet are not a video's; a parser would keep them


class WatchedFile(io.FileIO):
    """A file for ``av.open``. It seems to end, and ``gave_up`` says so, when many bytes hold no packet."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "rb")
        self.watching = True
        self.gave_up = False
        self._since_packet = 0  # bytes

    def read(self, size: int | None = -1) -> bytes:
        if self.watching and self._since_packet > MAX_GAP_BYTES:
            self.gave_up = True  # an exception would not pass through FFmpeg's parsers
            return b""
        content = super().read(-1 if size is None else size) or b""
        self._since_packet += len(content)
        return content

    def found_packet(self) -> None:
        self._since_packet = 0

    @property
    def gap(self) -> str:
        return f"{MAX_GAP_BYTES >> 20} MiB of it hold no picture"


def open_options(guess_times: bool) -> dict[str, Any]:
    """The arguments of ``av.open`` that keep a file to itself."""
    return {
        "options": {"max_pixels": str(MAX_FRAME_PX)},  # for the decoders that look for the streams' sizes
        "container_options": {
            "format_whitelist": ",".join(FORMATS),
            "protocol_whitelist": "none",  # the file itself is given as an object that is open
            **({} if guess_times else {"fflags": "nofillin"}),
        },
        "buffer_size": 1 << 16,
    }
