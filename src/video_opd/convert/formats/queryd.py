"""QuerYD: two files side by side, what was said and when.

``raw_captions_combined_filtered*`` is ``{"video-<id>": [[word, …], …]}``, ``times_captions_…`` beside it
``{"video-<id>": [[s, e], …]}`` in the same order, pickled (github.com/oncescuandreea/QuerYD_downloader,
``README.md``) or as JSON; a split is a list of names, ``train_list.txt``. Joined and cleaned as VideoMind
does it (``videomind/dataset/sub_classes/queryd.py``). Durations are in no file of the set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from video_opd.convert.formats.records import Entry, Format, Raw, given, paired, record, timelens_query
from video_opd.convert.formats.sources import Source, open_source
from video_opd.errors import UserError


def joined(source: Source) -> Iterator[Entry]:
    """The captions, each video with its times. Raises UserError where the other file is not there."""
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


def read(entry: Entry) -> Iterator[Raw]:
    value = record(entry.value, "captions", "times")
    video_id = str(entry.key).removeprefix("video-")
    for i, (words, span) in enumerate(paired(value["captions"], value["times"], "captions and times")):
        text = isinstance(words, Sequence) and all(isinstance(word, str) for word in words)
        yield Raw(
            where=f"{entry.where} no. {i}",
            key=f"{video_id}:{i}",
            video_id=video_id,
            query=words if isinstance(words, str) else " ".join(words) if text else None,
            spans=given(span),
        )


def _split(source: Source) -> set[str] | None:
    """The names of a split, where one is asked for."""
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
    looks_like='raw_captions_….pkl or .json {"video-<id>": [[word, …], …]}, times_captions_… beside it',
    kinds=("mapping",),
    matches=_matches,
    read=read,
    clean=timelens_query,
    entries=joined,
)
