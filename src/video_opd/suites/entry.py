"""The entry point ``lmms_eval.models``, by which lmms-eval finds our model. Imports nothing by itself."""

from __future__ import annotations

from typing import Any

MODEL_ID = "video_opd"


def manifest() -> Any:
    """The ``ModelManifest`` of ``--model video_opd``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, chat_class_path="video_opd.suites.lmms_model.VideoOPD")
