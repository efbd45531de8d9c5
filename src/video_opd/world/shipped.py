"""The tiny models that the package holds."""

from __future__ import annotations

from importlib import resources
from pathlib import Path


def shipped(name: str) -> Path:
    """The folder of a shipped model, such as ``"tiny-base"``. docs/world.md says what each of them is."""
    return Path(str(resources.files("video_opd.world") / "checkpoints" / name))
