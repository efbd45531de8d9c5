"""Video-OPD: post-training of video MLLMs for temporal grounding by on-policy distillation.

``load``, ``ground``, ``evaluate`` and ``train`` are those of :mod:`video_opd.api`, which is imported when one
of them is first used. Importing the package alone therefore costs nothing.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from video_opd.api import evaluate, ground, load, train

__version__ = "0.1.0"
__all__ = ["__version__", "evaluate", "ground", "load", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    return getattr(importlib.import_module("video_opd.api"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
