"""HiREST: a moment for a prompt, and the steps in it.

``{prompt: {"<vid>.mp4": {"relevant", "clip", "v_duration", "bounds": [s, e], "steps": [{"index", "heading",
"absolute_bounds": [s, e]}]}}}`` (github.com/j-min/HiREST, ``data/splits``). A file holds two sets of
questions, so it has two formats: ``hirest`` asks for the prompt, ``hirest-steps`` for each heading, as
VideoMind's two loaders do. Videos that are not relevant, or that have ``clip: false``, have no moment.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from video_opd.convert.formats import fields
from video_opd.convert.formats.cleaning import timelens_query
from video_opd.convert.formats.format import Entry, Format, Question, Source, Unusable, is_record

_NO_MOMENT = "no moment"  # the data set has such videos by design; it is not a fault


def videos(source: Source) -> Iterator[Entry]:
    """One entry for each pair of a prompt and a video."""
    for entry in source.entries():
        if not isinstance(entry.value, Mapping):
            yield entry
            continue
        for name, value in entry.value.items():
            yield Entry(where=f"{entry.where}, {name!r}", key=entry.key, value={"name": name, "facts": value})


def read_moments(entry: Entry) -> Iterator[Question]:
    name, facts = _facts(entry)
    if not _has_moment(facts):
        raise Unusable(_NO_MOMENT)
    yield Question(
        where=entry.where,
        key=fields.stem_of(name),
        video=name,
        query=entry.key,
        spans=fields.given(facts["bounds"]),
        duration_s=facts.get("v_duration"),
    )


def read_steps(entry: Entry) -> Iterator[Question]:
    name, facts = _facts(entry)
    steps = fields.listed(facts["steps"], "steps") if _has_moment(facts) else ()
    if not steps:
        raise Unusable(_NO_MOMENT)
    for i, step in enumerate(steps):
        stated = fields.mapping_or_empty(step)
        yield Question(
            where=f"{entry.where} step {i}",
            key=f"{fields.stem_of(name)}:{i}",
            video=name,
            query=stated.get("heading"),
            spans=fields.given(stated.get("absolute_bounds")),
            duration_s=facts.get("v_duration"),
            extra={"prompt": entry.key},
        )


def _facts(entry: Entry) -> tuple[str, Mapping[str, Any]]:
    value = fields.record(entry.value, "name", "facts")
    return value["name"], fields.record(value["facts"], "relevant", "clip", "bounds", "steps")


def _has_moment(facts: Mapping[str, Any]) -> bool:
    return fields.is_true(facts["relevant"]) and fields.is_true(facts["clip"])


def _matches(head: Sequence[Entry]) -> bool:
    return all(
        isinstance(entry.value, Mapping)
        and len(entry.value) > 0
        and all(is_record(facts, "relevant", "clip", "bounds") for facts in entry.value.values())
        for entry in head
    )


def _format(name: str, layout: str, read: Callable[[Entry], Iterator[Question]]) -> Format:
    return Format(
        name=name,
        layout=layout,
        kinds=("mapping",),
        matches=_matches,
        read=read,
        clean=timelens_query,
        entries=videos,
    )


MOMENTS = _format(
    "hirest",
    'JSON {prompt: {"<vid>.mp4": {"relevant", "clip", "v_duration", "bounds", "steps"}}}: prompts',
    read_moments,
)
STEPS = _format("hirest-steps", "the same file: headings of the steps", read_steps)
