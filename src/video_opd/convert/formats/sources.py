"""Containers of annotations: JSON, JSON Lines, tables, text, Parquet, ``datasets`` folders and pickles.

A source is one of three kinds: ``records`` (a list of objects), ``mapping`` (objects by name) or ``lines``
(of text). Rows of a table are objects whose values are text.
"""

from __future__ import annotations

import csv
import io
import json
import pickle
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from video_opd.errors import UserError
from video_opd.jsonl import no_key_twice

Kind = Literal["records", "mapping", "lines"]

HEAD = 20  # a format is recognised by so many entries
_MOST_FIELD = 1 << 26  # most characters of a table's field: a column of JSON is long
_TABLES = {".csv": ",", ".tsv": "\t"}
_PICKLES = (".pkl", ".pickle")


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One entry of a source: a row of a list, a key of a mapping, or a line of text.

    Example: ``Entry(where="charades.json: 'OHOFG'", key="OHOFG", value={"duration": 35.0, …})``.
    """

    where: str  # for people: the file, and the line, index or key
    value: Any
    key: str | None = None  # the key of an entry of a mapping


@dataclass(frozen=True, kw_only=True)
class Source:
    """An opened source. ``split`` names the split to read, if the source has several."""

    path: Path
    split: str | None = None

    @cached_property
    def kind(self) -> Kind:
        return self._content[0]

    def entries(self) -> Iterator[Entry]:
        """Every entry, in the order of the file. Raises UserError if the file breaks off."""
        kind, content = self._content
        if callable(content):
            yield from content()
        elif kind == "mapping":
            for key, value in content.items():
                yield Entry(where=f"{self.path}: {key!r}", key=key, value=value)
        else:
            for i, value in enumerate(content):
                yield Entry(where=f"{self.path}[{i}]", value=value)

    def head(self) -> list[Entry]:
        return list(islice(self.entries(), HEAD))

    @cached_property
    def _content(self) -> tuple[Kind, Any]:
        """(kind, the content or a function that yields its entries)."""
        if self.path.is_dir():
            return "records", lambda: _folder(self.path, self.split)
        suffix = self.path.suffix.lower()
        start = _read(self.path, 4)
        if start == b"PAR1" or suffix == ".parquet":
            return "records", lambda: _parquet([self.path])
        if suffix == ".arrow":
            return "records", lambda: _arrow([self.path])
        if suffix in _PICKLES:
            return _held(_pickle(self.path), self.path)
        if suffix in _TABLES:
            return "records", lambda: _table(self.path, _TABLES[suffix])
        if suffix == ".txt":
            return "lines", lambda: _lines(self.path)
        if suffix in (".jsonl", ".ndjson"):
            return "records", lambda: _json_lines(self.path)
        return self._json()

    def _json(self) -> tuple[Kind, Any]:
        text = _text(self.path)
        try:
            return _held(_loads(text), self.path)
        except json.JSONDecodeError as error:
            first, _, rest = text.lstrip().partition("\n")
            if rest.strip() and _is_object(first):  # JSON Lines under another name
                return "records", lambda: _json_lines(self.path)
            raise UserError(
                f"{self.path}:{error.lineno}: not JSON ({error.msg}); mend it, or name .txt, .csv or .tsv so"
            ) from None
        except (ValueError, RecursionError) as error:
            raise UserError(f"{self.path}: not JSON ({error}); mend the file") from None


def open_source(path: str | Path, split: str | None = None) -> Source:
    """Raises UserError for a path that is not there."""
    path = Path(path)
    try:
        found = path.exists()
    except OSError as error:  # a name that is too long, a loop of links
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None
    if not found:
        raise UserError(f"{path}: no such file; check the path")
    return Source(path=path, split=split)


# --- text --------------------------------------------------------------------------------------------


def _read(path: Path, count: int = -1) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(count)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _text(path: Path) -> str:
    return _decoded(_read(path), path)


def _decoded(raw: bytes, where: str | Path) -> str:
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{where}: not UTF-8 at byte {error.start}; save it as UTF-8") from None


def _lines(path: Path) -> Iterator[Entry]:
    """The lines that are not blank."""
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield Entry(where=f"{path}:{number}", value=line)


def _table(path: Path, delimiter: str) -> Iterator[Entry]:
    """Rows as objects, by the names in the first row."""
    csv.field_size_limit(_MOST_FIELD)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file, delimiter=delimiter, strict=True)
            names = _column_names(next(reader, []), path)
            for row in reader:
                where = f"{path}:{reader.line_num}"
                while len(row) > len(names) and not row[-1].strip():
                    row.pop()
                if not row:
                    continue
                if len(row) != len(names):
                    raise UserError(
                        f"{where}: {len(row)} fields, but {len(names)} columns; "
                        f"quote a field that holds {delimiter!r}, or mend the row"
                    )
                yield Entry(where=where, value=dict(zip(names, row, strict=True)))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 ({error.reason}); save it as UTF-8") from None
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: not a table ({error}); mend the row") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _column_names(row: Sequence[str], path: Path) -> list[str]:
    """The names in the first row. Raises UserError for one that is there twice: a row would lose a value."""
    names = [name.strip() for name in row]
    if twice := [name for name, count in Counter(names).items() if count > 1 and name]:
        raise UserError(f"{path}: the column {twice[0]!r} is there twice; delete or rename one")
    if len(names) == 1 and ";" in names[0]:
        raise UserError(f"{path}: its columns are separated by semicolons; save it with commas, or as .tsv")
    return names


# --- JSON --------------------------------------------------------------------------------------------


def _loads(text: str) -> Any:
    return json.loads(text, object_pairs_hook=no_key_twice)


def _is_object(line: str) -> bool:
    try:
        return isinstance(_loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(path: Path) -> Iterator[Entry]:
    try:
        with path.open("rb") as file:
            for number, raw in enumerate(file, start=1):
                if not raw.strip():
                    continue
                where = f"{path}:{number}"
                try:
                    value = _loads(_decoded(raw, where))
                except UserError:
                    raise
                except (ValueError, RecursionError) as error:
                    raise UserError(f"{where}: not JSON ({error}); mend or delete the line") from None
                yield Entry(where=where, value=value)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path") from None


def _held(value: Any, path: Path) -> tuple[Kind, Any]:
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise UserError(f"{path}: names things by what is no text; name videos by text")
        return "mapping", value
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return "records", value
    raise UserError(f"{path}: holds a {type(value).__name__}; annotations are a list or an object")


# --- Parquet and folders of the datasets library --------------------------------------------------------


def _folder(path: Path, split: str | None) -> Iterator[Entry]:
    """Rows of a folder that ``datasets`` saved, or that holds Parquet files."""
    splits = _saved_splits(path)
    if splits is not None:
        path = path / _chosen(splits, split, path)
    if (path / "state.json").exists():
        yield from _arrow(_saved_files(path))
        return
    files = sorted(path.rglob("*.parquet"))
    if not files:
        raise UserError(f"{path}: a folder without Parquet files or datasets' state.json; name a file")
    splits_of = _parquet_splits(files, path)
    yield from _parquet(splits_of[_chosen(sorted(splits_of), split, path)])


def _parquet_splits(files: Sequence[Path], root: Path) -> dict[str, list[Path]]:
    """The files of each split: ``train-00000-of-00002.parquet``, or ``train/0000.parquet``.

    A split is called by its short name, or by its path if another folder has a split of that name.
    """
    groups: dict[tuple[str, str], list[Path]] = {}
    for file in files:
        folder = file.parent.relative_to(root)
        name = re.split(r"[-.]", file.name)[0]
        if re.fullmatch(r"[0-9]+|part|shard|chunk|data", name):  # a number in its folder
            folder, name = folder.parent, folder.name or root.name
        groups.setdefault((folder.as_posix(), name), []).append(file)
    names = Counter(name for _, name in groups)
    return {
        name if names[name] == 1 else f"{folder}/{name}": found for (folder, name), found in groups.items()
    }


def _saved_splits(path: Path) -> list[str] | None:
    file = path / "dataset_dict.json"
    if not file.exists():
        return None
    value = _saved_json(file)
    splits = value.get("splits")
    if not isinstance(splits, list) or not splits or not all(isinstance(name, str) for name in splits):
        raise UserError(f"{file}: names no splits; save the data set again")
    return splits


def _saved_files(path: Path) -> list[Path]:
    """The Arrow files of a saved data set, in order."""
    files = _saved_json(path / "state.json").get("_data_files")
    entries = files if isinstance(files, list) else []
    names = [file.get("filename") for file in entries if isinstance(file, dict)]
    if not names or not all(isinstance(name, str) for name in names):
        raise UserError(f"{path / 'state.json'}: names no data files; save the data set again")
    return [path / Path(str(name)).name for name in names]


def _saved_json(file: Path) -> Mapping[str, Any]:
    try:
        value = json.loads(_text(file))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file}: not JSON ({error}); save the data set again") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: not an object; save the data set again")
    return value


def _chosen(names: Sequence[str], split: str | None, path: Path) -> str:
    if split is None and len(names) == 1:
        return names[0]
    if split is None or split not in names:
        what = "has several splits" if split is None else f"has no split {split!r}"
        raise UserError(f"{path}: {what}; give --split with one of: {', '.join(names)}")
    return split


def _parquet(files: Sequence[Path]) -> Iterator[Entry]:
    _need_pyarrow(files[0])
    import pyarrow
    import pyarrow.parquet

    for path in files:
        try:
            with pyarrow.parquet.ParquetFile(path) as file:
                yield from _rows(file.iter_batches(), path)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as Parquet ({_first_line(error)})") from None


def _arrow(files: Sequence[Path]) -> Iterator[Entry]:
    _need_pyarrow(files[0])
    import pyarrow
    import pyarrow.ipc

    for path in files:
        try:
            with pyarrow.OSFile(str(path)) as file, pyarrow.ipc.open_stream(file) as reader:
                yield from _rows(reader, path)
        except (pyarrow.ArrowException, OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read as Arrow ({_first_line(error)})") from None


def _rows(batches: Any, path: Path) -> Iterator[Entry]:
    number = 0
    for batch in batches:
        for row in batch.to_pylist():
            yield Entry(where=f"{path} row {number}", value=row)
            number += 1


def _need_pyarrow(path: Path) -> None:
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise UserError(
            f"{path}: Parquet and datasets folders need pyarrow; install video-opd[parquet]"
        ) from None


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


# --- pickles -----------------------------------------------------------------------------------------


class _PlainUnpickler(pickle._Unpickler):
    """Reads lists, dicts, text and numbers, and runs nothing: a pickle may otherwise do anything at all.

    It is the slower of Python's two unpicklers: the fast one reserves as much memory as a damaged file asks
    for.
    """

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        raise pickle.UnpicklingError(f"it holds a {module}.{name}")


def _pickle(path: Path) -> Any:
    try:
        return _PlainUnpickler(io.BytesIO(_read(path))).load()
    except UserError:
        raise
    except Exception as error:  # a damaged pickle may raise anything
        what = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(
            f"{path}: not a pickle of plain lists and objects ({what}); save it as JSON"
        ) from None
