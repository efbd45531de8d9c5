"""Charades-STA and ActivityNet Captions.

Both are published as ``{vid: {"duration", "timestamps": [[s, e], …], "sentences": […]}}``. Charades-STA's
original is text, ``VID start end##sentence``, with the durations in the column ``length`` of Charades' own
CSV. Shapes are those of Time-R1's loader (github.com/xiaomi-research/time-r1,
``src/vllm_inference/data/data_loader.py``); queries are cleaned as VideoMind and TimeLens clean these sets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from video_opd.convert.formats import fields
from video_opd.convert.formats.cleaning import timelens_query
from video_opd.convert.formats.format import Entry, Format, Question, Unusable, all_records

_LINE = re.compile(r"(\S+)\s+(\S+)\s+(\S+?)\s*##(.*)")
_CHARADES_ID = re.compile(r"[A-Z0-9]{5}")
_ACTIVITYNET_ID = re.compile(r"v_[\w-]{11}")


def read_captions(entry: Entry) -> Iterator[Question]:
    value = fields.record(entry.value, "timestamps", "sentences")
    spans, queries, duration_s = value["timestamps"], value["sentences"], value.get("duration")
    yield from fields.paired_questions(
        entry, spans, queries, "timestamps and sentences", video=entry.key, duration_s=duration_s
    )


def read_charades(entry: Entry) -> Iterator[Question]:
    if not isinstance(entry.value, str):
        yield from read_captions(entry)
        return
    match = _LINE.fullmatch(entry.value.strip())
    if match is None:
        raise Unusable("not a line", "it should be: VID start end##sentence")
    video_id, start, end, query = match.groups()
    yield Question(where=entry.where, key=video_id, video=video_id, query=query, spans=[start, end])


def _is_charades(head: Sequence[Entry]) -> bool:
    if all(isinstance(entry.value, str) for entry in head):
        return all(_LINE.fullmatch(entry.value.strip()) for entry in head)
    return _has_captions(head) and not _named(head, _ACTIVITYNET_ID)


def _is_activitynet(head: Sequence[Entry]) -> bool:
    return _has_captions(head) and not _named(head, _CHARADES_ID)


def _has_captions(head: Sequence[Entry]) -> bool:
    return all(e.key is not None for e in head) and all_records(head, "timestamps", "sentences")


def _named(head: Sequence[Entry], pattern: re.Pattern[str]) -> bool:
    return all(pattern.fullmatch(entry.key or "") for entry in head)


CHARADES = Format(
    name="charades-sta",
    layout='lines "VID start end##sentence" (durations: Charades\' CSV), or JSON as activitynet-captions',
    kinds=("lines", "mapping"),
    matches=_is_charades,
    read=read_charades,
    clean=timelens_query,
)
ACTIVITYNET = Format(
    name="activitynet-captions",
    layout='JSON {vid: {"duration", "timestamps": [[s, e], …], "sentences": […]}}',
    kinds=("mapping",),
    matches=_is_activitynet,
    read=read_captions,
    clean=timelens_query,
)
