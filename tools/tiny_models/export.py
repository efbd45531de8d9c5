"""Writes a pretrained tiny model as a model folder."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import torch

from video_opd.models.inference import SETTINGS_FILE
from video_opd.models.loading import no_library_bars

# The video budget of pretraining: frames of 64×64 to 64×96 pixels, with four to six tokens a frame pair.
TINY_VIDEO = {
    "fps": 2.0,
    "min_frames": 4,
    "max_frames": 768,
    "min_frame_tokens": 4,
    "max_frame_tokens": 8,
    "max_video_tokens": 8192,
}


def export(model: Any, processor: Any, path: Path) -> None:
    """Writes the weights in bf16, the processor, and the settings with which videos are shown."""
    whole = copy.deepcopy(model).to(torch.bfloat16)
    with no_library_bars():
        whole.save_pretrained(path)
    processor.save_pretrained(path)
    shown = {"video": TINY_VIDEO, "prompt": {"style": "paper", "thinking": False, "video_form": "nested"}}
    (path / SETTINGS_FILE).write_text(json.dumps(shown, indent=2) + "\n", encoding="utf-8")
