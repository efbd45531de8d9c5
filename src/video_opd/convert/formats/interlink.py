"""HowTo-Interlink7M: a table with a row a video, whose column ``clips`` is JSON.

``[{"clip_id": "0", "clip": "0:00:05 - 0:00:11", "caption": "…"}, …]``, tab-separated, beside the video's path
in ``video`` (or ``path``). Shapes from its authors' loader (github.com/showlab/cosmo,
``src/data/interleave_video_text_dataset.py``). It is captions, nobody's evaluation of grounding: queries are
cleaned as VideoMind does it for this family. Durations are in no column.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from video_opd.convert.formats.records import (
    Entry,
    Format,
    Raw,
    Unusable,
    all_records,
    listed,
    name_of,
    record,
    stem_of,
    timelens_query,
)

_CLOCK = re.compile(r"(?:(\d{1,4}):)?(\d{1,2}):(\d{1,2}(?:\.\d+)?)")


def read(entry: Entry) -> Iterator[Raw]:
    value = record(entry.value, "clips")
    video = value.get("video", value.get("path"))
    clips = value["clips"]
    if isinstance(clips, str):
        try:
            clips = json.loads(clips)
        except (ValueError, RecursionError) as error:
            raise Unusable("not JSON", f"column clips: {error}") from None
    for i, clip in enumerate(listed(clips, "clips")):
        fields = clip if isinstance(clip, dict) else {}
        number = name_of(fields.get("clip_id", i), "clip_id")
        yield Raw(
            where=f"{entry.where} clip {number}",
            key=f"{stem_of(video)}:{number}",
            video=video,
            query=fields.get("caption"),
            spans=_span(fields.get("clip")),
        )


def _span(text: Any) -> Any:
    """``"0:00:05 - 0:00:11"`` → ``[5.0, 11.0]``; anything else as it is."""
    if not isinstance(text, str):
        return ()
    ends = [_CLOCK.fullmatch(part.strip()) for part in text.split(" - ")]
    seconds = [
        int(match.group(1) or 0) * 3600 + int(match.group(2)) * 60 + float(match.group(3))
        for match in ends
        if match
    ]
    return seconds if len(seconds) == len(ends) == 2 else text


INTERLINK = Format(
    name="howto-interlink7m",
    looks_like='table (.tsv): video, clips as JSON [{"clip": "0:00:05 - 0:00:11", "caption"}, …]',
    kinds=("records",),
    matches=lambda head: all_records(head, "clips") and all({"video", "path"} & set(e.value) for e in head),
    read=read,
    clean=timelens_query,
)
