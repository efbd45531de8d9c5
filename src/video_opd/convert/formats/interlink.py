"""HowTo-Interlink7M: a table with a row a video, whose column ``clips`` is JSON.

``[{"clip_id": "0", "clip": "0:00:05 - 0:00:11", "caption": "…"}, …]``, tab-separated, beside the video's path
in ``video`` (or ``path``). Shapes are those of its authors' loader (github.com/showlab/cosmo,
``src/data/interleave_video_text_dataset.py``). The set holds captions and has no evaluation of grounding:
queries are cleaned as in VideoMind. No column states a duration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from video_opd.answer_numbers import clock_time_s
from video_opd.convert.formats import fields, values
from video_opd.convert.formats.cleaning import timelens_query
from video_opd.convert.formats.format import Entry, Format, Question, Unusable, all_records


def read(entry: Entry) -> Iterator[Question]:
    value = fields.record(entry.value, "clips")
    video = value.get("video", value.get("path"))
    clips = values.structure(value["clips"])
    if isinstance(clips, str):
        raise Unusable("not JSON", f"column clips: {values.shown(clips)}")
    for i, clip in enumerate(fields.listed(clips, "clips")):
        stated = fields.mapping_or_empty(clip)
        number = fields.name_of(stated.get("clip_id", i), "clip_id")
        yield Question(
            where=f"{entry.where} clip {number}",
            key=f"{fields.stem_of(video)}:{number}",
            video=video,
            query=stated.get("caption"),
            spans=_span(stated.get("clip")),
        )


def _span(text: Any) -> Any:
    """``"0:00:05 - 0:00:11"`` → ``[5.0, 11.0]``; other text is left unchanged."""
    if not isinstance(text, str):
        return ()
    ends = [clock_time_s(part.strip()) for part in text.split(" - ")]
    return ends if len(ends) == 2 and None not in ends else text


def _matches(head: Sequence[Entry]) -> bool:
    return all_records(head, "clips") and all({"video", "path"} & set(entry.value) for entry in head)


INTERLINK = Format(
    name="howto-interlink7m",
    layout='table (.tsv): video, clips as JSON [{"clip": "0:00:05 - 0:00:11", "caption"}, …]',
    kinds=("records",),
    matches=_matches,
    read=read,
    clean=timelens_query,
)
