"""Results as JSON: on stdout, or in a file."""

from __future__ import annotations

import json
from typing import Any

from video_opd.files import write_text


def print_json(record: Any) -> None:
    print(as_json(record))


def write_json(path: str, record: Any) -> None:
    """Replaces ``path``. Raises :class:`video_opd.errors.UserError` when it cannot be written."""
    write_text(path, as_json(record) + "\n")


def as_json(record: Any) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False, default=str)
