"""The files of an output that is continued after a kill. No torch.

Rows are appended to ``OUT`` as they are finished. ``OUT.meta.json`` holds their provenance, which says what
made them, so that the rows of two models never end up in one file. Each of several processes appends to a
file of its own (``OUT.part-0``, …) until these are merged.
"""

from __future__ import annotations

import glob
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from video_opd.config.tree import flatten
from video_opd.errors import UserError
from video_opd.jsonl import read_jsonl, repair_jsonl, write_jsonl


def provenance_path(out: str | Path) -> Path:
    """Returns the file of an output's provenance: ``p.jsonl`` → ``p.jsonl.meta.json``."""
    return Path(f"{out}.meta.json")


def process_file_path(out: str | Path, rank: int) -> Path:
    """Returns the file to which process ``rank`` of several appends: ``p.jsonl`` → ``p.jsonl.part-1``."""
    return Path(f"{out}.part-{rank}")


def process_file_paths(out: str | Path) -> list[Path]:
    """Returns the process files of ``out`` that are there."""
    return [Path(path) for path in sorted(glob.glob(f"{glob.escape(str(out))}.part-*"))]


def open_output(
    out: str | Path, provenance: Mapping[str, Any], *, overwrite: bool = False
) -> dict[str, dict[str, Any]]:
    """Returns the rows that ``out`` already holds, by id, those of a killed run's process files included.

    ``provenance`` is a tree of plain values: everything that the rows depend on. It is written beside an
    output without rows. Raises :class:`UserError` if something else made the rows that are there, or if their
    provenance is not known. ``overwrite`` removes these rows.
    """
    out, written = Path(out), provenance_path(out)
    if overwrite:
        out.unlink(missing_ok=True)
        written.unlink(missing_ok=True)
        for path in process_file_paths(out):
            path.unlink()
    rows = _all_rows(out)
    provenance = json.loads(json.dumps(provenance))
    if rows and not written.exists():
        raise UserError(
            f"{out} has rows but no {written.name}: choose another --out, or repeat with --overwrite"
        )
    if rows:
        _check_same(out, read_provenance(out), provenance)
    else:
        write_jsonl(written, [provenance])
    if process_file_paths(out):
        merge_process_files(out, list(rows))
    return rows


def merge_process_files(out: str | Path, order: Sequence[str]) -> None:
    """Writes ``out`` anew with its rows and those of its process files: the ids of ``order`` first.

    The file is replaced in one step. A kill before the process files are removed costs nothing: their rows
    are in both places then.
    """
    paths, rows = process_file_paths(out), _all_rows(out)
    first = dict.fromkeys(name for name in order if name in rows)
    write_jsonl(out, [rows[name] for name in first | dict.fromkeys(rows)])
    for path in paths:
        path.unlink()


def read_rows(out: str | Path) -> dict[str, dict[str, Any]]:
    """Returns the rows of ``out`` by id, none if there is no file.

    Raises :class:`UserError` for a row without id.
    """
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
    for path in [Path(out), *process_file_paths(out)]:
        repair_jsonl(path)
        rows |= read_rows(path)
    return rows


def read_provenance(out: str | Path) -> dict[str, Any]:
    """Returns the provenance of ``out``. Raises :class:`UserError` if its file cannot be read.

    Rows without ``prompt.video_form`` were made when ``nested`` was the only form.
    """
    path = provenance_path(out)
    for _, row in read_jsonl(path):
        if isinstance(shown := row.get("input"), dict) and isinstance(prompt := shown.get("prompt"), dict):
            prompt.setdefault("video_form", "nested")
        return row
    raise UserError(f"{path} is empty: repeat with --overwrite")


def _check_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    old, new = dict(flatten(before)), dict(flatten(now))
    for key in [*new, *(key for key in old if key not in new)]:
        if old.get(key) != new.get(key):
            raise UserError(
                f"{out} was made with {key} = {old.get(key)!r}, this is {new.get(key)!r}: "
                "choose another --out, or repeat with --overwrite to begin again"
            )
