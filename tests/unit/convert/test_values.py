"""Cells and fields: the same rows come out of every container, and text that is no value is refused."""

from __future__ import annotations

import csv
import datetime
import decimal
import io
import json
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotation_cases import FLAT, MINIATURES, converted, write

from video_opd.convert.conversion import convert
from video_opd.convert.formats import FORMATS, values
from video_opd.errors import UserError

ROW_FORMATS = [name for name, format in FORMATS.items() if format.kinds == ("records",)]
CHECKED = ("id", "video", "query", "duration", "spans", "source", "clip")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (3, 3.0),
        (2.5, 2.5),
        ("12.5", 12.5),
        (" 12.5\n", 12.5),
        ("12.", 12.0),
        (".5", 0.5),
        ("-0.5", -0.5),
        ("1e3", 1000.0),
        ("1.5E-2", 0.015),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7.0),
        (decimal.Decimal("12.50"), 12.5),
        (Fraction(1, 4), 0.25),
        *(
            (text, None)
            for text in ("", " ", "12,5", "1_000", "٣", "12.5 s", "0x10", "1e999", "nan", "inf", "1.2.3")
        ),
        *(
            (value, None)
            for value in (None, True, np.bool_(True), math.nan, math.inf, 10**400, [1], b"1", 1j)
        ),
        ("9" * 400, None),
        (decimal.Decimal("sNaN"), None),
    ],
)
def test_numbers(value: Any, expected: float | None) -> None:
    assert values.number(value) == expected


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("0:12", 12.0),
        ("00:01:02.5", 62.5),
        ("75:10", 4510.0),
        (" 1:02:03 ", 3723.0),
        ("12.5", 12.5),
        (datetime.timedelta(minutes=1, milliseconds=500), 60.5),
        *(
            (text, None)
            for text in ("0:75", "1:75:00", "00:01:02:15", "0:12,5", "1:2", "-0:12", "0:12 s", "PT12S")
        ),
    ],
)
def test_times(value: Any, expected: float | None) -> None:
    assert values.seconds(value) == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[12.5, 17.8]", [12.5, 17.8]),
        (' {"a": [1]} ', {"a": [1]}),
        ("[[1, 2], [3, 4]]", [[1, 2], [3, 4]]),
        ("(1, 2)", (1, 2)),  # as Python prints it
        ("[{'query': \"it's\", 'span': None}]", [{"query": "it's", "span": None}]),
        *(
            (text, text)
            for text in ("", "[laughs]", "[1 2]", "(he) runs", "{", "[nan]", "12", '"a"', "[" * 9999)
        ),
    ],
)
def test_structures(text: str, expected: Any) -> None:
    assert values.structure(text) == expected


# --- containers --------------------------------------------------------------------------------------


def as_text(value: Any, *, nested: bool) -> Any:
    """Numbers as text; ``nested`` lists and objects as one text each, as they lie in the cell of a table."""
    if isinstance(value, dict | list):
        if nested:
            return json.dumps(value)
        if isinstance(value, dict):
            return {key: as_text(item, nested=False) for key, item in value.items()}
        return [as_text(item, nested=False) for item in value]
    return str(value) if isinstance(value, int | float) else value


def cells(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: as_text(item, nested=True) for key, item in row.items()} for row in rows]


def table(rows: list[dict[str, Any]], delimiter: str) -> str:
    text = io.StringIO()
    names = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, names, delimiter=delimiter)
    writer.writeheader()
    writer.writerows(cells(rows))  # null is an empty cell
    return text.getvalue()


def write_parquet(path: Path, rows: list[dict[str, Any]]) -> Path:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def write_saved(path: Path, rows: list[dict[str, Any]]) -> Path:
    """A folder as ``datasets`` saves it."""
    pyarrow, ipc = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.ipc")
    path.mkdir()
    content = pyarrow.Table.from_pylist(rows)
    with ipc.new_stream(path / "data.arrow", content.schema) as out:
        out.write_table(content)
    write(path / "state.json", {"_data_files": [{"filename": "data.arrow"}]})
    return path


def checked(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{key: row.get(key) for key in CHECKED} for row in rows]


@pytest.mark.parametrize("format", ROW_FORMATS)
def test_every_container_gives_the_same_rows(tmp_path, format):
    _, content = MINIATURES[format]
    if isinstance(content, str):  # the table of HowTo-Interlink7M
        rows = list(csv.DictReader(io.StringIO(content), delimiter="\t"))
        rows = [row | {"clips": json.loads(row["clips"])} for row in rows]
    else:
        rows = content
    expected = checked(converted(write(tmp_path / "rows.json", rows), format)[0])
    assert len(expected) >= 1 and all(row["spans"] for row in expected)
    sources = [
        write(tmp_path / "text.json", as_text(rows, nested=False)),
        write(tmp_path / "cells.jsonl", cells(rows)),
        write(tmp_path / "rows.pkl", rows),
        write(tmp_path / "rows.csv", table(rows, ",")),
        write(tmp_path / "rows.tsv", table(rows, "\t")),
    ]
    for source in sources:
        assert checked(converted(source)[0]) == expected, source  # the format is recognised, too
    for write_source in (write_parquet, write_saved):
        for kind, held in (("rows", rows), ("cells", cells(rows))):
            source = write_source(tmp_path / f"{kind}-{write_source.__name__}", held)
            assert checked(converted(source)[0]) == expected, source


def test_mappings_hold_numbers_and_lists_as_text_too(tmp_path):
    for format in ("timelens-bench", "activitynet-captions", "hirest", "hirest-steps"):
        name, content = MINIATURES[format]
        expected = checked(converted(write(tmp_path / name, content), format)[0])
        for nested in (False, True):
            text = {
                key: {name: as_text(item, nested=nested) for name, item in value.items()}
                for key, value in content.items()
            }
            assert checked(converted(write(tmp_path / name, text), format)[0]) == expected


def test_lists_of_objects_that_datasets_turned_into_columns(tmp_path):
    events = {"query": ["q", "r"], "span": [[1.0, 2.0], [3.0, 4.0]]}
    row = {"source": "s", "video_path": "v.mp4", "duration": 9.0, "events": events}
    rows, _ = converted(write_parquet(tmp_path / "a.parquet", [row]))
    assert [(row["query"], row["spans"]) for row in rows] == [("q", [[1.0, 2.0]]), ("r", [[3.0, 4.0]])]
    uneven = row | {"events": {"query": ["q", "r"], "span": [[1.0, 2.0]]}}
    _, result = converted(write(tmp_path / "a.jsonl", [row, uneven]))
    assert result.reasons == {"not a list": 1}


def test_parquet_holds_types_that_json_lacks(tmp_path):
    row = {
        "id": "a",
        "video": "a.mp4",
        "query": "q",
        "duration": decimal.Decimal("30.00"),
        "spans": [[datetime.timedelta(seconds=12.5), datetime.timedelta(seconds=17.8)]],
        "day": datetime.date(2024, 1, 2),
        "digest": b"\x00",
        "price": decimal.Decimal("1.5"),
    }
    (made,), _ = converted(write_parquet(tmp_path / "a.parquet", [row]))
    assert (made["duration"], made["spans"]) == (30.0, [[12.5, 17.8]])
    assert (made["day"], made["price"]) == ("2024-01-02", 1.5)


@pytest.mark.parametrize("empty", [None, "", "  ", "nan", "NaN", "None", "null", math.nan])
def test_empty_fields_hold_nothing(tmp_path, empty):
    row = {"id": "a", "video": "a.mp4", "query": "q", "duration": empty, "spans": empty}
    (made,), result = converted(write(tmp_path / "a.jsonl", [row]))
    assert made["duration"] is None and made["spans"] == []
    assert (result.unannotated, result.without_duration) == (1, 1)
    timed = {"video": "a.mp4", "timestamp": [1, 2], "sentence": "s", "video_start": empty, "video_end": empty}
    (made,), _ = converted(write(tmp_path / "a.jsonl", [timed]))
    assert "clip" not in made
    (made,), _ = converted(write(tmp_path / "a.jsonl", [timed | {"video_start": "3.0"}]))
    assert made["clip"] == [3.0, None]
    (_,), result = converted(write(tmp_path / "a.jsonl", [FLAT, FLAT | {"span": empty}]))
    assert result.reasons == {"no span": 1}  # this format annotates every row


@pytest.mark.parametrize(
    ("span", "reason"),
    [
        ("12,5 - 17,8", "not a span"),
        ("[12,5, 17,8]", "not a span"),  # four numbers
        (["12,5", "17,8"], "not numbers"),
        (["1 s", "2 s"], "not numbers"),
        ("1 2", "not a span"),
        ("[1 2]", "not a span"),
        ('["nan", 2]', "not numbers"),
        ("[2, 1]", "reversed span"),
        ('["1", "1.0"]', "empty span"),
        ("[-1, 2]", "starts before 0"),
        ('["0:11", "0:12"]', "past the end"),
    ],
)
def test_text_that_is_no_span_is_listed(tmp_path, span, reason):
    _, result = converted(write(tmp_path / "a.jsonl", [FLAT, FLAT | {"span": span}]))
    assert result.reasons == {reason: 1}


def test_decimal_commas_are_refused(tmp_path):
    source = write(tmp_path / "a.csv", 'vid,duration,query,span\na,"30,5",q,"[1, 2]"\nb,30.5,q,"[1, 2]"\n')
    (row,), result = converted(source)
    assert row["id"] == "videomind:b" and result.reasons == {"impossible duration": 1}
    write(source, 'vid;duration;query;span\na;30,5;q;"[1, 2]"\n')
    with pytest.raises(UserError, match="semicolons"):
        convert(source, tmp_path / "o.jsonl")


def test_a_query_stays_text(tmp_path):
    rows = 'vid,duration,query,span\n007,30,"[1, 2]","[1, 2]"\n008,30,12.50,"[1, 2]"\n'
    made, _ = converted(write(tmp_path / "a.csv", rows))
    assert [(row["id"], row["query"]) for row in made] == [
        ("videomind:007", "[1, 2]"),
        ("videomind:008", "12.50"),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("vid,duration,span,query\na,30,[],the cup, falls\n", r"a\.csv:2: 5 fields, but 4 columns"),
        ("vid,duration,span,query\na,30\n", r"a\.csv:2: 2 fields, but 4 columns"),
        ("vid,query,vid,span\na,q,b,[]\n", "the column 'vid' is there twice"),
        ('vid,query,span\na,"the cup,"[1, 2]"\nb,q,"[1, 2]"\n', r"a\.csv:2: not a table"),
        ('vid,query,span\na,"the cup,[1\nb,q,[2\n', r"not a table"),  # swallows the rest of the file
    ],
)
def test_a_row_that_lost_its_columns_is_an_error(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        convert(write(tmp_path / "a.csv", text), tmp_path / "o.jsonl")


def test_tables_may_have_empty_columns_and_lines(tmp_path):
    text = ' vid , duration,query,span\na,30,q,"[1, 2]",,\n\n ,,,\nb,30,r,"[1, 2]"\n'
    made, result = converted(write(tmp_path / "a.csv", text))
    assert [row["query"] for row in made] == ["q", "r"] and result.reasons == {"no query": 1}


def test_whole_numbers_are_names(tmp_path):
    rows = [FLAT | {"vid": 7}, FLAT | {"vid": 8.0}, FLAT | {"vid": 8.5}, FLAT | {"vid": True}]
    made, result = converted(write(tmp_path / "a.jsonl", rows))
    assert [(row["id"], row["video"]) for row in made] == [("videomind:7", "7.mp4"), ("videomind:8", "8.mp4")]
    assert result.reasons == {"no name": 2}


@pytest.mark.parametrize(
    ("identity", "reason"), [("", "no name"), (" ", "no name"), ("\ud800", "broken text")]
)
def test_ids_that_no_data_file_may_hold_are_listed(tmp_path, identity, reason):
    row = {"id": "a", "video": "a.mp4", "query": "q"}
    _, result = converted(write(tmp_path / "a.json", [row, row | {"id": identity}]))
    assert result.reasons == {reason: 1}


def test_didemos_segments_are_never_read_as_seconds(tmp_path):
    row = {"annotation_id": 1, "description": "q", "video": "v.avi", "times": [[0, 1]]}
    times = ([[0.0, 1.0]], '[["0", "1"]]', [[0, 1], [0.5, 1]], [[0, 1], [2]], [[0, 1], "x"], [[0, True]])
    made, result = converted(write(tmp_path / "a.json", [row, *(row | {"times": time} for time in times)]))
    assert [row["spans"] for row in made] == [[[0.0, 10.0]]] * 3
    assert result.reasons == {"not segments": 4}


def test_truth_as_text(tmp_path):
    facts = {"relevant": "True", "clip": "true", "v_duration": "9", "bounds": ["1", "2"], "steps": "[]"}
    source = {"p": {"a.mp4": facts, "b.mp4": facts | {"clip": "False"}}}
    made, result = converted(write(tmp_path / "a.json", source), "hirest")
    assert [row["video"] for row in made] == ["a.mp4"] and result.reasons == {"no moment": 1}


@pytest.mark.parametrize(
    ("files", "splits"),
    [
        (("data/train-00000-of-00002", "data/train-00001-of-00002", "data/test-0"), "test, train"),
        (("default/train/0000", "default/train/0001", "default/test/0000"), "test, train"),
        (("train/part-0", "test/part-0"), "test, train"),
        (("en/train-0", "fr/train-0"), "en/train, fr/train"),
        (("a/train/0", "b/train/0"), "a/train, b/train"),
        (("0000", "0001"), ""),
        (("train",), ""),
    ],
)
def test_splits_in_a_folder_are_never_mixed(tmp_path, files, splits):
    for i, file in enumerate(files):
        write_parquet(tmp_path / "set" / f"{file}.parquet", [FLAT | {"query": f"q{i}"}])
    if not splits:
        rows, _ = converted(tmp_path / "set")
        assert [row["query"] for row in rows] == [f"q{i}" for i in range(len(files))]
        return
    with pytest.raises(UserError, match=f"give --split with one of: {splits}$"):
        converted(tmp_path / "set")
    read = [converted(tmp_path / "set", split=split)[0] for split in splits.split(", ")]
    queries = [[row["query"] for row in rows] for rows in read]
    assert sorted(query for some in queries for query in some) == [f"q{i}" for i in range(len(files))]
    assert queries[0] == [f"q{len(files) - 1}"] or len(files) == 2


def test_mixed_up_units_are_noticed(tmp_path, capsys):
    from video_opd.convert.terminal import conversion_lines

    note = "are durations in milliseconds, or spans in minutes?"
    milliseconds = [FLAT | {"duration": 30_000, "span": [1, 2 + i]} for i in range(20)]
    minutes = [FLAT | {"duration": 120, "span": [0.1, 0.2 + i / 20]} for i in range(20)]
    early = [FLAT | {"duration": 120, "span": [0, 1]}] * 19 + [FLAT | {"duration": 120, "span": [9, 12]}]
    for rows, told in ((milliseconds, True), (minutes, True), (early, False), (milliseconds[:5], False)):
        _, result = converted(write(tmp_path / "a.jsonl", rows))
        assert any(note in line for line in conversion_lines(result)) == told
        assert result.latest_end == pytest.approx(max(row["span"][1] / row["duration"] for row in rows))
