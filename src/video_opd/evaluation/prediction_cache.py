"""The cache of ``evaluate --model``, by which it goes on after a kill. No torch."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from video_opd.types import Sample


def cached_predictions_path(provenance: Mapping[str, Any], samples: Iterable[Sample]) -> Path:
    """Returns a file of the user's cache folder, named by model, settings and queries.

    The same model on the same queries finds its predictions wherever the command is run, and whatever the
    spans of the annotation are. Anything else gets another file, a video that was replaced included.
    """
    digest = hashlib.blake2b(json.dumps(provenance, sort_keys=True).encode(), digest_size=16)
    for sample in samples:
        question = [sample.id, str(sample.video.absolute()), sample.query, _version(sample.video)]
        digest.update(json.dumps(question).encode())
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "video-opd" / "answers" / f"{digest.hexdigest()}.jsonl"


def _version(video: Path) -> tuple[int, int] | None:
    """(bytes, time of change in nanoseconds) of a video; None if it is not here."""
    try:
        status = video.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
