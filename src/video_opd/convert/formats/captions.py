"""Charades-STA and ActivityNet Captions.

Both come as ``{vid: {"duration", "timestamps": [[s, e], …], "sentences": […]}}``. Charades-STA's original is
text, ``VID start end##sentence``, with the durations in the column ``length`` of Charades' own CSV. Shapes
from Time-R1's loader (github.com/xiaomi-research/time-r1, ``src/vllm_inference/data/data_loader.py``);
queries are cleaned as VideoMind and TimeLens do it on these sets.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from video_opd.convert.formats.records import (
    Entry,
    Format,
    Raw,
    Unusable,
    all_records,
    given,
    paired,
    record,
    timelens_query,
)

_LINE = re.compile(r"(\S+)\s+(\S+)\s+(\S+?)\s*##(.*)")
_CHARADES_ID = re.compile(r"[A-Z0-9]{5}")
_ACTIVITYNET_ID = re.compile(r"v_[\w-]{11}")


def read_captions(entry: Entry) -> Iterator[Raw]:
    value = record(entry.value, "timestamps", "sentences")
    pairs = paired(value["timestamps"], value["sentences"], "timestamps and sentences")
    for i, (span, query) in enumerate(pairs):
        yield Raw(
            where=f"{entry.where} no. {i}",
            key=f"{entry.key}:{i}",
            video_id=entry.key,
            query=query,
            spans=given(span),
            duration_s=value.get("duration"),
        )


def read_charades(entry: Entry) -> Iterator[Raw]:
    if not isinstance(entry.value, str):
        yield from read_captions(entry)
        return
    match = _LINE.fullmatch(entry.value.strip())
    if match is None:
        raise Unusable("not a line", "it should be: VID start end##sentence")
    video_id, start, end, query = match.groups()
    try:
        span = [float(start), float(end)]
    except ValueError:
        raise Unusable("not numbers", f"{start} {end}") from None
    yield Raw(where=entry.where, key=video_id, video_id=video_id, query=query, spans=span)


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
    looks_like='lines "VID start end##sentence" (durations: Charades\' CSV), or JSON as activitynet-captions',
    kinds=("lines", "mapping"),
    matches=_is_charades,
    read=read_charades,
    clean=timelens_query,
)
ACTIVITYNET = Format(
    name="activitynet-captions",
    looks_like='JSON {vid: {"duration", "timestamps": [[s, e], …], "sentences": […]}}',
    kinds=("mapping",),
    matches=_is_activitynet,
    read=read_captions,
    clean=timelens_query,
)
