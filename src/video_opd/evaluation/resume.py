"""Outputs of models that are continued after a kill: rows appended as they are finished, beside a note of
what made them (``OUT.meta.json``), so that answers of two models never end up in one file. Of several
processes each appends to a part (``OUT.part-0``, …) until they are merged. No torch.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from video_opd.errors import UserError
from video_opd.jsonl import read_jsonl, repair_jsonl, write_jsonl
from video_opd.strict import flatten


def meta_path(out: str | Path) -> Path:
    """Where the note of an output lies: ``p.jsonl`` → ``p.jsonl.meta.json``."""
    return Path(f"{out}.meta.json")


def part_path(out: str | Path, rank: int) -> Path:
    """Where process ``rank`` of several appends its rows: ``p.jsonl`` → ``p.jsonl.part-1``."""
    return Path(f"{out}.part-{rank}")


def part_paths(out: str | Path) -> list[Path]:
    """The parts of ``out`` that are there."""
    return [Path(path) for path in sorted(glob.glob(f"{glob.escape(str(out))}.part-*"))]


def open_output(
    out: str | Path, made_by: Mapping[str, Any], *, overwrite: bool = False
) -> dict[str, dict[str, Any]]:
    """The rows that ``out`` already holds, by id, parts of a killed run included; a new one gets its note.

    ``made_by`` is a tree of plain values, everything that the rows depend on. Raises :class:`UserError`
    where the rows there were made by something else, or nobody knows by what. ``overwrite`` removes them.
    """
    out, note = Path(out), meta_path(out)
    if overwrite:
        out.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        for part in part_paths(out):
            part.unlink()
    rows = _all_rows(out)
    made_by = json.loads(json.dumps(made_by))
    if rows and not note.exists():
        raise UserError(
            f"{out} has rows but no {note.name}: choose another --out, or repeat with --overwrite"
        )
    if rows:
        _check_same(out, read_note(out), made_by)
    else:
        write_jsonl(note, [made_by])
    if part_paths(out):
        merge_parts(out, list(rows))
    return rows


def merge_parts(out: str | Path, order: Sequence[str]) -> None:
    """Writes ``out`` anew, with its rows and those of its parts: first the ids of ``order``, then the others.

    At once or not at all. A kill before the parts are removed costs nothing: their rows are then in both.
    """
    parts, rows = part_paths(out), _all_rows(out)
    first = dict.fromkeys(name for name in order if name in rows)
    write_jsonl(out, [rows[name] for name in first | dict.fromkeys(rows)])
    for part in parts:
        part.unlink()


def read_rows(out: str | Path) -> dict[str, dict[str, Any]]:
    """The rows of ``out`` by id, none where it is not there. Raises :class:`UserError` for one without id."""
    rows: dict[str, dict[str, Any]] = {}
    for number, row in read_jsonl(out) if Path(out).exists() else ():
        if not isinstance(row.get("id"), str):
            raise UserError(
                f'{out}:{number}: a row without "id": this is another kind of file, choose another --out'
            )
        rows[row["id"]] = row
    return rows


def _all_rows(out: str | Path) -> dict[str, dict[str, Any]]:
    rows: dict[str, dict[str, Any]] = {}
    for path in [Path(out), *part_paths(out)]:
        repair_jsonl(path)
        rows |= read_rows(path)
    return rows


def read_note(out: str | Path) -> dict[str, Any]:
    """What made the rows of ``out``. Raises :class:`UserError` where there is no readable note."""
    note = meta_path(out)
    for _, row in read_jsonl(note):
        return row
    raise UserError(f"{note} is empty: repeat with --overwrite")


def _check_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = dict(flatten(before)), dict(flatten(now))
    for key in [*new, *(key for key in old if key not in new)]:
        if old.get(key) != new.get(key):
            raise UserError(
                f"{out} was made with {key} = {old.get(key)!r}, this is {new.get(key)!r}: "
                "choose another --out, or repeat with --overwrite to begin again"
            )
