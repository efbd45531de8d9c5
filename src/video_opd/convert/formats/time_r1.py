"""Time-R1's training rows and TVGBench.

Shapes from Time-R1's loaders (github.com/xiaomi-research/time-r1, ``main.py`` and
``src/vllm_inference/data/data_loader.py``). Training lowers the query and takes a full stop off its end; the
evaluation of TVGBench asks it as it is. Times count from ``video_start`` (``start``) where that is given.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from video_opd.convert.formats.records import (
    Entry,
    Format,
    Raw,
    all_records,
    given,
    kept,
    lower_query,
    plain_query,
    record,
    stem_of,
)

_ANSWER = re.compile(r"\s*([0-9.]+)\s*-\s*([0-9.]+)\s*")


def read_training(entry: Entry) -> Iterator[Raw]:
    """``{"video", "duration", "timestamp": [s, e], "sentence", "qid", "video_start", "video_end", …}``."""
    value = record(entry.value, "video", "timestamp", "sentence")
    # "my|cosmo|QtWT8rxUuNk|A purple hanger …": the second field is the collection.
    collection = re.match(r"my\|([^|]+)\|", value["qid"]) if isinstance(value.get("qid"), str) else None
    yield Raw(
        where=entry.where,
        key=stem_of(value["video"]),
        video=value["video"],
        query=value["sentence"],
        spans=given(value["timestamp"]),
        duration_s=value.get("duration"),
        source=collection.group(1) if collection else None,
        clip=_clip(value, "video_start", "video_end"),
        extra=kept(value, "qid", "difficulty"),
    )


def read_bench(entry: Entry) -> Iterator[Raw]:
    """``{"path", "question", "answer": "13.4-28.1", "duration", "start", "end", "dataset_name", …}``."""
    value = record(entry.value, "path", "question", "answer")
    answer = value["answer"]
    match = _ANSWER.fullmatch(answer) if isinstance(answer, str) else None
    bins = value.get("bins")
    collection = value.get("dataset_name") or (bins.get("dataset") if isinstance(bins, Mapping) else None)
    yield Raw(
        where=entry.where,
        key=stem_of(value["path"]),
        video=value["path"],
        query=value["question"],
        spans=[_seconds(match.group(1)), _seconds(match.group(2))] if match else given(answer),
        duration_s=value.get("duration"),
        source=collection,
        clip=_clip(value, "start", "end"),
        extra=kept(value, "qsemtype"),
    )


def _clip(value: Mapping[str, Any], start: str, end: str) -> Any:
    return None if value.get(start) is None else [value[start], value.get(end)]


def _seconds(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:  # "1.2.3"
        return text


TRAINING = Format(
    name="time-r1",
    looks_like='rows {"video", "duration", "timestamp": [s, e], "sentence", "qid", "video_start", …}',
    kinds=("records",),
    matches=lambda head: all_records(head, "video", "timestamp", "sentence"),
    read=read_training,
    clean=lower_query,
)
TVGBENCH = Format(
    name="tvgbench",
    looks_like='rows {"path", "question", "answer": "13.4-28.1", "duration", …}',
    kinds=("records",),
    matches=lambda head: all_records(head, "path", "question", "answer"),
    read=read_bench,
    clean=plain_query,
)
