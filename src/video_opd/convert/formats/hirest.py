"""HiREST: a moment for a prompt, and the steps in it.

``{prompt: {"<vid>.mp4": {"relevant", "clip", "v_duration", "bounds": [s, e], "steps": [{"index", "heading",
"absolute_bounds": [s, e]}]}}}`` (github.com/j-min/HiREST, ``data/splits``). A file holds two sets of
questions, so they are two formats: ``hirest`` asks for the prompt, ``hirest-steps`` for each heading, as
VideoMind's two loaders do. Videos that are not relevant, or with ``clip: false``, have no moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from video_opd.convert.formats.records import (
    Entry,
    Format,
    Raw,
    Unusable,
    given,
    is_record,
    listed,
    record,
    stem_of,
    timelens_query,
)
from video_opd.convert.formats.sources import Source

_NO_MOMENT = "no moment"  # by design of the data set, not a fault of it


def videos(source: Source) -> Iterator[Entry]:
    """One entry a prompt and video."""
    for entry in source.entries():
        if not isinstance(entry.value, Mapping):
            yield entry
            continue
        for name, value in entry.value.items():
            yield Entry(where=f"{entry.where}, {name!r}", key=entry.key, value={"name": name, "facts": value})


def read_moments(entry: Entry) -> Iterator[Raw]:
    name, facts = _facts(entry)
    if not (facts["relevant"] and facts["clip"]):
        raise Unusable(_NO_MOMENT)
    yield Raw(
        where=entry.where,
        key=stem_of(name),
        video=name,
        query=entry.key,
        spans=given(facts["bounds"]),
        duration_s=facts.get("v_duration"),
    )


def read_steps(entry: Entry) -> Iterator[Raw]:
    name, facts = _facts(entry)
    steps = listed(facts["steps"], "steps") if facts["relevant"] and facts["clip"] else ()
    if not steps:
        raise Unusable(_NO_MOMENT)
    for i, step in enumerate(steps):
        fields = step if isinstance(step, dict) else {}
        yield Raw(
            where=f"{entry.where} step {i}",
            key=f"{stem_of(name)}:{i}",
            video=name,
            query=fields.get("heading"),
            spans=given(fields.get("absolute_bounds")),
            duration_s=facts.get("v_duration"),
            extra={"prompt": entry.key},
        )


def _facts(entry: Entry) -> tuple[str, Mapping[str, Any]]:
    value = record(entry.value, "name", "facts")
    return value["name"], record(value["facts"], "relevant", "clip", "bounds", "steps")


def _matches(head: Sequence[Entry]) -> bool:
    return all(
        isinstance(entry.value, Mapping)
        and len(entry.value) > 0
        and all(is_record(facts, "relevant", "clip", "bounds") for facts in entry.value.values())
        for entry in head
    )


MOMENTS = Format(
    name="hirest",
    looks_like='JSON {prompt: {"<vid>.mp4": {"relevant", "clip", "v_duration", "bounds", "steps"}}}: prompts',
    kinds=("mapping",),
    matches=_matches,
    read=read_moments,
    clean=timelens_query,
    entries=videos,
)
STEPS = Format(
    name="hirest-steps",
    looks_like="the same file: headings of the steps",
    kinds=("mapping",),
    matches=_matches,
    read=read_steps,
    clean=timelens_query,
    entries=videos,
)
