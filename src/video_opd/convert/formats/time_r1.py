"""Time-R1's training rows and TVGBench.

Shapes are those of Time-R1's loaders (github.com/xiaomi-research/time-r1, ``main.py`` and
``src/vllm_inference/data/data_loader.py``). Training lowers the query and takes a full stop off its end; the
evaluation of TVGBench asks it as it is. If ``video_start`` (``start``) is given, times count from there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from video_opd.convert.formats import fields, values
from video_opd.convert.formats.cleaning import lower_query, plain_query
from video_opd.convert.formats.format import Entry, Question, row_format

_TRAINING_KEYS = ("video", "timestamp", "sentence")
_BENCH_KEYS = ("path", "question", "answer")
_ANSWER = re.compile(r"\s*([0-9.]+)\s*-\s*([0-9.]+)\s*")


def read_training(entry: Entry) -> Iterator[Question]:
    """``{"video", "duration", "timestamp": [s, e], "sentence", "qid", "video_start", "video_end", …}``."""
    value = fields.record(entry.value, *_TRAINING_KEYS)
    # "my|cosmo|QtWT8rxUuNk|A purple hanger …": the second field is the collection.
    collection = re.match(r"my\|([^|]+)\|", value["qid"]) if isinstance(value.get("qid"), str) else None
    yield fields.row_question(
        entry,
        value,
        key=fields.stem_of(value["video"]),
        query="sentence",
        spans=fields.given(value["timestamp"]),
        video=value["video"],
        source=collection.group(1) if collection else None,
        clip=_clip(value, "video_start", "video_end"),
        extra=fields.kept(value, "qid", "difficulty"),
    )


def read_bench(entry: Entry) -> Iterator[Question]:
    """``{"path", "question", "answer": "13.4-28.1", "duration", "start", "end", "dataset_name", …}``."""
    value = fields.record(entry.value, *_BENCH_KEYS)
    collection = value.get("dataset_name") or fields.mapping_or_empty(value.get("bins")).get("dataset")
    yield fields.row_question(
        entry,
        value,
        key=fields.stem_of(value["path"]),
        query="question",
        spans=_span(value["answer"]),
        video=value["path"],
        source=collection,
        clip=_clip(value, "start", "end"),
        extra=fields.kept(value, "qsemtype"),
    )


def _span(answer: Any) -> Any:
    """``"13.4-28.1"`` → ``("13.4", "28.1")``; anything else is left unchanged."""
    match = _ANSWER.fullmatch(answer) if isinstance(answer, str) else None
    return match.groups() if match else fields.given(answer)


def _clip(value: Mapping[str, Any], start: str, end: str) -> Any:
    return None if values.is_absent(value.get(start)) else [value[start], value.get(end)]


TRAINING = row_format(
    "time-r1",
    'rows {"video", "duration", "timestamp": [s, e], "sentence", "qid", "video_start", …}',
    _TRAINING_KEYS,
    read_training,
    lower_query,
)
TVGBENCH = row_format(
    "tvgbench",
    'rows {"path", "question", "answer": "13.4-28.1", "duration", …}',
    _BENCH_KEYS,
    read_bench,
    plain_query,
)
