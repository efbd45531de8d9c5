"""The data set that the authors of Video-OPD released: ``williamljz/Video-opd-Dataset``, 2,500 rows.

A row of its Parquet file is a conversation: ``video`` ("videos/<subset>/<file>", seen from the data set's
folder), ``video_filename``, ``subset``, ``system_prompt``, ``user_query`` (the whole user turn: figure 7's
instruction with the query in it), ``assistant_response`` (the answer), and ``messages``, the same
conversation as JSON. There are no durations. The query is what stands in place of ``{query}`` in the prompt
style ``paper``; the span is what the parser of responses reads in the answer. A row that states something
twice in two ways is left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from video_opd.convert.formats import fields, values
from video_opd.convert.formats.cleaning import plain_query
from video_opd.convert.formats.format import Entry, Question, Unusable, row_format
from video_opd.data.prompts import STYLES
from video_opd.temporal import parse_answer

_KEYS = ("video", "system_prompt", "user_query", "assistant_response", "messages")
_COLUMNS = {"system": "system_prompt", "user": "user_query", "assistant": "assistant_response"}
_PLACEHOLDER = "<video>"  # ms-swift's sign for the video in a turn
_FIGURE_7 = STYLES["paper"]
_BEFORE_DIFFERENCE = 10  # characters that are shown before the first that differs

OTHER_TYPOGRAPHY = (
    "rows ask in another typography (quotation marks, white space) than the prompt style paper, "
    "in which they will be asked"
)


def read(entry: Entry) -> Iterator[Question]:
    """One question a row. Raises Unusable for a row that is not such a conversation."""
    value = fields.record(entry.value, *_KEYS)
    video = _video(value)
    turns = {role: _turn(value[column], column) for role, column in _COLUMNS.items()}
    _check_messages(fields.listed(value["messages"], "messages"), turns, video)
    if turns["system"] != _FIGURE_7.system:
        raise Unusable("another instruction", f"system_prompt {values.shown(turns['system'])}")
    query = _FIGURE_7.query_of(turns["user"])
    if query is None:
        raise Unusable("another instruction", f"user_query {values.shown(turns['user'])}")
    span = parse_answer(turns["assistant"]).span
    if span is None:
        raise Unusable("unreadable answer", values.shown(turns["assistant"]))
    yield Question(
        where=entry.where,
        key=fields.stem_of(video),
        video=video,
        query=query,
        spans=[list(span)],
        source=value.get("subset"),
        note="" if _FIGURE_7.ask(query) == turns["user"] else OTHER_TYPOGRAPHY,
    )


def _video(value: Mapping[str, Any]) -> str:
    """The path of the video. Raises Unusable if there is none, or if its file name is another."""
    video, file = value["video"], value.get("video_filename")
    if values.is_absent(video) or not isinstance(video, str):
        raise Unusable("no video", values.shown(video))
    if not values.is_absent(file) and fields.stem_of(file) != fields.stem_of(video):
        raise Unusable("two videos", f"{values.shown(video)}, video_filename {values.shown(file)}")
    return video


def _turn(text: Any, what: str) -> str:
    """The text of a turn without the sign for the video. Raises Unusable if it is no text."""
    if not isinstance(text, str):
        raise Unusable("not text", f"{what} is a {type(text).__name__}")
    return text.strip().removeprefix(_PLACEHOLDER).strip()


def _check_messages(messages: Any, turns: Mapping[str, str], video: str) -> None:
    """Raises Unusable unless ``messages`` is the conversation of the columns.

    A system turn may be missing there, as ms-swift allows, and so may the name of the video.
    """
    found: dict[str, str] = {}
    for message in messages:
        stated = fields.mapping_or_empty(message)
        role = stated.get("role")
        if not isinstance(role, str) or role not in turns or role in found:
            raise Unusable("messages differ", f"a turn of {values.shown(role)} that no column holds")
        found[role] = _turn(_text(stated.get("content"), video), f"the {role} turn in messages")
    found.setdefault("system", turns["system"])
    for role, text in turns.items():
        if role not in found:
            raise Unusable("messages differ", f"no {role} turn")
        if found[role] != text:
            raise Unusable("messages differ", f"{_COLUMNS[role]} {_difference(text, found[role])}")


def _text(content: Any, video: str) -> Any:
    """The text of a turn's content, which may be a list of parts: texts, and the video."""
    if not isinstance(content, list | tuple):
        return content
    texts = []
    for part in content:
        stated = fields.mapping_or_empty(part)
        named = stated.get("video")
        if isinstance(named, str) and fields.stem_of(named) != fields.stem_of(video):
            raise Unusable("messages differ", f"the video {values.shown(video)}, {values.shown(named)}")
        if isinstance(stated.get("text"), str):
            texts.append(stated["text"])
    return "".join(texts)


def _difference(a: str, b: str) -> str:
    """``'…12.5 to 17' and '…12.5 to 18'``: two texts, from shortly before they part."""
    same = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
    start = max(same - _BEFORE_DIFFERENCE, 0)
    cut = "…" if start else ""
    return f"{values.shown(cut + a[start:])}, in messages {values.shown(cut + b[start:])}"


VIDEO_OPD_DATASET = row_format(
    "video-opd-dataset",
    'rows {"video", "subset", "system_prompt", "user_query", "assistant_response", "messages"}',
    _KEYS,
    read,
    plain_query,
)
