"""How a stored picture is turned and mirrored before it is shown."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import av
import numpy as np
from av.sidedata.sidedata import Type


@dataclass(frozen=True, kw_only=True)
class Orientation:
    """One of the eight ways to show a stored picture: it is transposed first, then flipped.

    Example: a quarter turn clockwise is ``Orientation(transpose=True, flip_x=True)``.
    """

    transpose: bool = False
    flip_x: bool = False  # left and right change sides
    flip_y: bool = False

    @property
    def mirrored(self) -> bool:
        """Whether writing in the picture would be shown in mirror writing."""
        return self.transpose ^ self.flip_x ^ self.flip_y

    def size_px(self, height: int, width: int) -> tuple[int, int]:
        """(height, width) as shown."""
        return (width, height) if self.transpose else (height, width)

    def apply(self, rgb: np.ndarray) -> np.ndarray:
        """Turns a picture, [H, W, 3], as it is to be shown. Returns a view."""
        if self.transpose:
            rgb = rgb.transpose(1, 0, 2)
        return rgb[:: -1 if self.flip_y else 1, :: -1 if self.flip_x else 1]

    def matrix(self, height: int, width: int) -> list[int]:
        """The display matrix (nine integers, ISO/IEC 14496-12) of a stored picture of this size."""
        shown_height, shown_width = self.size_px(height, width)
        x, y = (-1 if self.flip_x else 1), (-1 if self.flip_y else 1)
        a, b, c, d = (0, y, x, 0) if self.transpose else (x, 0, 0, y)
        one, origin = 1 << 16, (shown_width * self.flip_x << 16, shown_height * self.flip_y << 16)
        return [a * one, b * one, 0, c * one, d * one, 0, *origin, 1 << 30]


def orientation_of(frame: av.VideoFrame) -> Orientation:
    """Reads the display matrix of a frame; angles between quarter turns go to the nearest of them.

    The matrix maps a stored point (x, y) to (ax + cy, bx + dy): ISO/IEC 14496-12, 8.3.2 and 6.2.2.
    """
    side_data: Any = frame.side_data  # its stub names other keys than it takes
    if (data := side_data.get(Type.DISPLAYMATRIX)) is None:
        return Orientation()
    a, b, _, c, d = np.frombuffer(bytes(data), dtype=np.int32)[:5].astype(np.int64)
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Orientation(flip_x=bool(a < 0), flip_y=bool(d < 0))
    return Orientation(transpose=True, flip_x=bool(c < 0), flip_y=bool(b < 0))
