"""QuerYD: two files side by side, the captions and their times.

``raw_captions_combined_filtered*`` is ``{"video-<id>": [[word, …], …]}``. ``times_captions_…`` beside it is
``{"video-<id>": [[s, e], …]}`` in the same order. Both are pickled (github.com/oncescuandreea/
QuerYD_downloader, ``README.md``) or JSON; a split is a list of names, ``train_list.txt``. Words are joined
and cleaned as in VideoMind (``videomind/dataset/sub_classes/queryd.py``). No file states a duration.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from video_opd.convert.formats import fields
from video_opd.convert.formats.cleaning import timelens_query
from video_opd.convert.formats.format import Entry, Format, Question
from video_opd.convert.formats.sources import Source, open_source
from video_opd.errors import UserError


def joined(source: Source) -> Iterator[Entry]:
    """The captions of each video, with its times. Raises UserError if the file of times is not there."""
    path = source.path
    beside = path.with_name(path.name.replace("raw_captions", "times_captions", 1))
    if beside == path or not beside.exists():
        name = "times_captions…" if beside == path else beside.name
        raise UserError(f"{path}: QuerYD's times are in a second file, {name}; put it beside this one")
    times = {entry.key: entry.value for entry in open_source(beside).entries()}
    wanted = _split(source)
    for entry in source.entries():
        if wanted is None or entry.key in wanted:
            yield Entry(
                where=entry.where,
                key=entry.key,
                value={"captions": entry.value, "times": times.get(entry.key, ())},
            )


def read(entry: Entry) -> Iterator[Question]:
    value = fields.record(entry.value, "captions", "times")
    captions = fields.listed(value["captions"], "captions and times")
    yield from fields.paired_questions(
        entry,
        value["times"],
        [_joined_words(words) for words in captions],
        "times and captions",
        video=str(entry.key).removeprefix("video-"),
    )


def _joined_words(words: Any) -> str | None:
    """The words of a caption as one text; None if they are not words."""
    if isinstance(words, str):
        return words
    text = isinstance(words, Sequence) and all(isinstance(word, str) for word in words)
    return " ".join(words) if text else None


def _split(source: Source) -> set[str] | None:
    """The names of the split that was asked for; None if none was."""
    if source.split is None:
        return None
    names = (f"{source.split}_list.txt", f"exists_{source.split}_list.txt")
    for path in (source.path.with_name(name) for name in names):
        if path.exists():
            return {str(entry.value) for entry in open_source(path).entries()}
    raise UserError(f"{source.path}: no {names[0]} beside it for --split {source.split}; leave --split out")


def _matches(head: Sequence[Entry]) -> bool:
    return all(
        entry.key is not None
        and entry.key.startswith("video-")
        and not isinstance(entry.value, Mapping | str)
        and isinstance(entry.value, Sequence)
        for entry in head
    )


QUERYD = Format(
    name="queryd",
    layout='raw_captions_….pkl or .json {"video-<id>": [[word, …], …]}, times_captions_… beside it',
    kinds=("mapping",),
    matches=_matches,
    read=read,
    clean=timelens_query,
    entries=joined,
)
