"""VTimeLLM's instruction data: its conversations tie events to times.

``{"source", "id", "conversations": [{"from", "value"}, …], "meta": {"split": [a, b], "duration", "token":
{"<s0>": 0, "<e0>": 9.4}}}`` (github.com/huangb23/VTimeLLM, ``docs/data.md``). Times count from the start of
the clip ``split``. An event is one of

* dense: the answer says "From <s0> to <e0>, an event. From <s1> to <e1>, another one.";
* grounding: "During which frames can we see an event?" is answered "From <s0> to <e0>.";
* captioning: the question asks what happens from <s0> to <e0>, and the answer is the event.

Other conversations hold no event (questions of VideoChatGPT have no times at all). Queries are cleaned as in
VTimeLLM's evaluation (``vtimellm/eval/eval.py``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import Any

from video_opd.convert.formats import fields, values
from video_opd.convert.formats.cleaning import lower_query
from video_opd.convert.formats.format import Entry, Question, Unusable, row_format

_SPAN = r"from\s+<s(\d{1,6})>\s+to\s+<e(\d{1,6})>"
_DENSE = re.compile(rf"{_SPAN}\s*,\s*", re.I)
_NEXT = re.compile(r"\bfrom\s+<s\d{1,6}>\s+to\s|\Z", re.I)
_ONLY_SPAN = re.compile(rf"\s*{_SPAN}\s*\.?\s*", re.I)
_ASKS_WHEN = re.compile(r"(?:<video>)?\s*during which frames can we see (.+)", re.I | re.S)
_ASKS_WHAT = re.compile(r"\b(?:what|describe|description|happen\w*|explain|elaborate|details?|tell)\b", re.I)
_IN_QUESTION = re.compile(r"<s(\d{1,6})>\s+(?:to|and)\s+<e(\d{1,6})>", re.I)
_LEAST_WORDS = 3  # a captioning answer has at least so many: "Yes." is no event


def read(entry: Entry) -> Iterator[Question]:
    value = fields.record(entry.value, "id", "conversations")
    meta = fields.mapping_or_empty(value.get("meta"))
    times_s = fields.mapping_or_empty(meta.get("token"))
    if not times_s:
        raise Unusable("no times", "a conversation without meta.token")
    conversations = fields.listed(value["conversations"], "conversations")
    turns = [turn for turn in conversations if isinstance(turn, Mapping)]
    events = list(dict.fromkeys(_events(turns)))
    if not events:
        raise Unusable("no event", "no answer that ties an event to its times")
    seen = set()
    split = meta.get("split")
    name = fields.name_of(value["id"], "id")
    if not values.is_absent(split):
        name += ":" + "-".join(str(s) for s in fields.listed(split, "split") if values.number(s) is not None)
    for start, end, text in events:
        if (start, end) in seen:  # the same event asked for in another way
            continue
        seen.add((start, end))
        yield Question(
            where=f"{entry.where} <s{start}>",
            key=f"{name}:{start}",
            video=value["id"],
            query=text,
            spans=[times_s.get(f"<s{start}>"), times_s.get(f"<e{end}>")],
            duration_s=meta.get("duration"),
            source=value.get("source"),
            clip=split,
        )


def _events(turns: list[Mapping[str, Any]]) -> Iterator[tuple[str, str, str]]:
    """(number of its start, number of its end, what happens) of each event that an answer states."""
    for question, answer in pairwise(turns):
        asked, said = question.get("value"), answer.get("value")
        if answer.get("from") != "gpt" or not isinstance(asked, str) or not isinstance(said, str):
            continue
        if only := _ONLY_SPAN.fullmatch(said):
            if when := _ASKS_WHEN.fullmatch(asked.strip()):
                yield only.group(1), only.group(2), when.group(1).rstrip("? \n")
            continue
        dense = list(_dense_events(said))
        yield from dense
        span = _IN_QUESTION.search(asked)
        if not dense and span and _ASKS_WHAT.search(asked) and len(said.split()) >= _LEAST_WORDS:
            yield span.group(1), span.group(2), said


def _dense_events(said: str) -> Iterator[tuple[str, str, str]]:
    """The events of "From <s0> to <e0>, an event. From <s1> to <e1>, another one."."""
    for match in _DENSE.finditer(said):
        following = _NEXT.search(said, match.end())
        assert following is not None  # the end of the text
        if text := said[match.end() : following.start()].rstrip():
            yield match.group(1), match.group(2), text


VTIMELLM = row_format(
    "vtimellm",
    'rows {"source", "id", "conversations": […], "meta": {"split", "duration", "token"}}',
    ("id", "conversations", "source"),
    read,
    lower_query,
)
