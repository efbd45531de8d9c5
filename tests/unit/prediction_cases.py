"""Queries, settings and rows for tests of predictions for data files."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from video_opd.evaluation.predict import GenerationSettings
from video_opd.types import Sample

PROVENANCE = {"model": "abc", "input": {"video": {"fps": 2.0}}}


SAMPLED = GenerationSettings(n=3, temperature=1.0, seed=4)


def seeded(sample_id: str, seed: int | None) -> str:
    return f"{(seed or 0) % 10}.00 to 10.00"


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def queries_of(counts: Sequence[int]) -> list[Sample]:
    """``counts[v]`` queries on video v."""
    return [
        Sample(id=f"s{v}{q}", video=Path(f"{v}.mp4"), query=f"query {q}", spans=((5.0, 10.0),))
        for v, count in enumerate(counts)
        for q in range(count)
    ]


COUNTS = (5, 1, 2, 5, 3, 7, 1, 1, 4, 2, 5, 5, 9, 3, 2)
