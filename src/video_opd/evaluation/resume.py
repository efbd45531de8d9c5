"""The files of an output that is continued after a kill. No torch.

Rows are appended to ``OUT`` as they are finished. ``OUT.meta.json`` holds their provenance, which says what
made them, so that the rows of two models never end up in one file, and the seal of the rows
(:mod:`video_opd.seals`), so that no row changes or gets lost unnoticed. Each of several processes appends to
a file of its own (``OUT.part-0``, …), without a seal, until these are merged.
"""

from __future__ import annotations

import glob
import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from video_opd.config.tree import flatten
from video_opd.errors import UserError
from video_opd.files import read_text
from video_opd.jsonl import read_jsonl, repair_jsonl, write_jsonl
from video_opd.progress import log
from video_opd.seals import Seal, Sealer

_SEAL = "written"  # the key of the seal beside the keys of the provenance


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
    out: str | Path, provenance: Mapping[str, Any], *, overwrite: bool = False, repeatable: bool = False
) -> dict[str, dict[str, Any]]:
    """Returns the rows that ``out`` already holds, by id, those of a killed run's process files included.

    ``provenance`` is a tree of plain values: everything that the rows depend on. It is written beside an
    output without rows. ``overwrite`` removes the rows that are there. A ``repeatable`` output is cut to what
    was sealed last, and begun anew if that has changed.

    Raises :class:`UserError` if something else made the rows that are there, if their provenance is not
    known, or if they have changed since they were written. The files are as they were then.
    """
    for path in (Path(out), provenance_path(out), *process_file_paths(out)):
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: not a plain file; remove it, or choose another --out")
    if overwrite:
        remove_output(out)
    rows = known_rows(out, provenance, repeatable=repeatable)
    if process_file_paths(out):
        merge_process_files(out, list(rows), provenance)
    else:
        write_provenance(out, provenance, Sealer(out).seal())
    return rows


def remove_output(out: str | Path) -> None:
    """Removes an output, its provenance and its process files."""
    for path in (Path(out), provenance_path(out), *process_file_paths(out)):
        path.unlink(missing_ok=True)


def known_rows(
    out: str | Path,
    provenance: Mapping[str, Any],
    *,
    repeatable: bool = False,
    ignored: Collection[str] = (),
) -> dict[str, dict[str, Any]]:
    """The same as :func:`open_output`, but nothing is written beside the rows.

    The sections ``ignored`` of the provenance may differ.
    """
    out, written = Path(out), provenance_path(out)
    if not any(path.exists() and path.stat().st_size for path in [out, *process_file_paths(out)]):
        return {}
    # The commands that make repeatable outputs name them by themselves.
    remedy = f"delete it and {written.name} to make it again" if repeatable else _BEGIN_AGAIN
    if not written.exists():
        raise UserError(f"{out} has rows but no {written.name}: {remedy}")
    trees = read_provenance(out), json.loads(json.dumps(provenance))
    before, now = ({key: tree[key] for key in tree if key not in ignored} for tree in trees)
    _check_same(out, before, now, remedy)
    _check_seal(out, repeatable)
    return _all_rows(out)


def write_provenance(out: str | Path, provenance: Mapping[str, Any], seal: Seal | None) -> None:
    """Writes ``OUT.meta.json``: the provenance, and the seal of the rows that are in ``out`` now."""
    sealed = {} if seal is None else {_SEAL: seal.to_json()}
    write_jsonl(provenance_path(out), [{**provenance, **sealed}])


def merge_process_files(out: str | Path, order: Sequence[str], provenance: Mapping[str, Any]) -> None:
    """Writes ``out`` anew with its rows and those of its process files: the ids of ``order`` first.

    The file is replaced in one step, unless it holds these rows already. A kill before the process files are
    removed costs nothing: their rows are in both places then.
    """
    paths, rows = process_file_paths(out), _all_rows(out)
    ids = list(dict.fromkeys(name for name in order if name in rows) | dict.fromkeys(rows))
    if not paths and Path(out).exists() and ids == list(rows):
        return
    write_provenance(out, provenance, None)  # after a kill, neither the old file nor the new one is damaged
    write_jsonl(out, [rows[name] for name in ids])
    write_provenance(out, provenance, Sealer(out).seal())
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
        row.pop(_SEAL, None)
        if isinstance(shown := row.get("input"), dict) and isinstance(prompt := shown.get("prompt"), dict):
            prompt.setdefault("video_form", "nested")
        return row
    raise UserError(f"{path} is empty: repeat with --overwrite")


def changed_since_written(out: str | Path) -> bool:
    """Whether rows of ``out`` are lost or not as they were written. False if there is no seal to tell it."""
    seal = _read_seal(Path(out))
    return seal is not None and not seal.holds(out)


def note_changes(out: str | Path) -> None:
    """Logs that rows of a file changed or got lost since a command of this project wrote them."""
    if changed_since_written(out):
        log(f"{out}: rows were changed or lost since they were written; they are used as they are")


def _read_seal(out: Path) -> Seal | None:
    """The seal of the rows; None for an output of an earlier version, and while process files are merged."""
    path = provenance_path(out)
    return next((Seal.read(row.get(_SEAL)) for _, row in read_jsonl(path)), None) if path.exists() else None


def _check_seal(out: Path, repeatable: bool) -> None:
    """Finds rows that changed or got lost, and cuts a repeatable output to what was sealed."""
    seal, block = _read_seal(out), Path(f"{out}.window")  # where earlier versions wrote the size of a block
    if seal is not None and out.exists() and not seal.holds(out):
        if not repeatable:
            raise UserError(
                f"{out}: rows were changed or lost since they were written: restore the file, or repeat with "
                f'--overwrite; to go on with the rows as they are, delete "{_SEAL}" in '
                f"{provenance_path(out).name}"
            )
        log(f"{out}: rows were changed or lost since they were written; they are made again")
        out.unlink()
    elif repeatable and out.exists():
        size = seal.size if seal is not None else block_size(block)
        if size is not None and size < out.stat().st_size:
            os.truncate(out, size)
    block.unlink(missing_ok=True)


def block_size(window: Path) -> int | None:
    """The size that a file had at the end of a block, which the file ``window`` holds; None if it cannot be
    read: what stands after the block stays then."""
    try:
        return max(0, int(read_text(window)))
    except (OSError, ValueError):
        return None


_BEGIN_AGAIN = "choose another --out, or repeat with --overwrite to begin again"


def _check_same(out: Path, before: Mapping[str, Any], now: Mapping[str, Any], remedy: str) -> None:
    old, new = dict(flatten(before)), dict(flatten(now))
    for key in [*new, *(key for key in old if key not in new)]:
        if old.get(key) != new.get(key):
            raise UserError(
                f"{out} was made with {key} = {old.get(key)!r}, this is {new.get(key)!r}: {remedy}"
            )
