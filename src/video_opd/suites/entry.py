"""The entry point of the group ``lmms_eval.models``, through which lmms-eval finds our model.

It imports lmms-eval only when it is called, so that the package installs without it.
"""

from __future__ import annotations

from typing import Any

MODEL_ID = "video_opd"


def manifest() -> Any:
    """The ``ModelManifest`` behind ``lmms-eval --model video_opd``."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id=MODEL_ID, chat_class_path="video_opd.suites.lmms_model.VideoOPD")
