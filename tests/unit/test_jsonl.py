"""Line-wise files: what was written stays, whatever happens to the writer."""

import errno
import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from video_opd import jsonl
from video_opd.errors import UserError
from video_opd.jsonl import append_jsonl, read_jsonl, repair_jsonl, write_jsonl

NUMBERS = st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
ROWS = st.lists(st.dictionaries(st.text(max_size=8), VALUES, max_size=4), max_size=6)


@settings(max_examples=60)
@given(first=ROWS, second=ROWS)
def test_what_is_written_is_read_with_its_line_numbers(tmp_path_factory, first, second):
    path = tmp_path_factory.mktemp("rows") / "deep" / "rows.jsonl"
    write_jsonl(path, first)
    append_jsonl(path, second)
    assert [row for _, row in read_jsonl(path)] == first + second
    assert [number for number, _ in read_jsonl(path)] == list(range(1, len(first + second) + 1))


@pytest.mark.parametrize(
    ("content", "line", "word"),
    [
        (b'{"a": 1}\n{"a": \n{"a": 3}\n', 2, "not JSON"),
        (b'{"a": 1}\n\n[1, 2]\n', 3, "list"),
        (b'{"a": 1}\n{"a": "\xff"}\n', 2, "UTF-8"),
        (b'{"a": 1}{"a": 2}\n', 1, "not JSON"),
        (b'{"a": ' + b"[" * 100_000 + b"\n", 1, "not JSON"),
        (b'{"a": 1}\n{"a": 1, "a": 2}\n', 2, "'a' is there twice"),
        (b'{"a": [{"b": 1, "b": 1}]}\n', 1, "'b' is there twice"),
    ],
)
def test_a_broken_line_is_named(tmp_path, content, line, word):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"rows\.jsonl:{line}: .*{word}"):
        list(read_jsonl(path))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl: cannot be read"):
        list(read_jsonl(tmp_path / "none.jsonl"))


def test_a_byte_order_mark_is_not_part_of_the_first_row(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"a": 1}\r\n{"a": 2}\r\n')
    assert [row["a"] for _, row in read_jsonl(path)] == [1, 2]


@given(cut=st.integers(0, 200))
@settings(max_examples=60)
def test_cut_anywhere_then_appended_to_keeps_every_whole_row(tmp_path_factory, cut):
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    rows = [{"id": str(i), "text": "é" * i} for i in range(6)]
    append_jsonl(path, rows)
    whole = path.read_bytes()
    path.write_bytes(whole[:cut])
    append_jsonl(path, [{"id": "new"}])
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    complete = sum(end <= cut for end in ends)  # a row that lacks only its newline is whole
    assert [row["id"] for _, row in read_jsonl(path)] == [r["id"] for r in rows[:complete]] + ["new"]


def test_a_half_line_of_thousands_of_brackets_is_repaired(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": ' + b"[" * 100_000)
    append_jsonl(path, [{"a": 2}])
    assert [row for _, row in read_jsonl(path)] == [{"a": 1}, {"a": 2}]


def test_a_long_half_line_is_repaired(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n{"a": "' + b"x" * 200_000)
    assert repair_jsonl(path)
    assert path.read_bytes() == b'{"a": 1}\n'
    assert not repair_jsonl(path)
    assert not repair_jsonl(tmp_path / "none.jsonl")


def test_a_line_without_end_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"id": 1}\n')
    with path.open("r+b") as file:
        file.truncate(100 << 20)
    with pytest.raises(UserError, match=r"a\.jsonl:2: a line of more than 64 MiB"):
        list(read_jsonl(path))
    assert repair_jsonl(path)
    assert [row for _, row in read_jsonl(path)] == [{"id": 1}]


def test_not_finite_numbers_become_null_and_scalars_numbers(tmp_path):
    path = tmp_path / "rows.jsonl"
    rows = [
        {"a": float("nan"), "b": [float("inf"), 1.5], "c": np.float32(0.5), "d": np.arange(2), "e": tmp_path}
    ]
    append_jsonl(path, rows)
    assert json.loads(path.read_text(), parse_constant=pytest.fail) == {
        "a": None, "b": [None, 1.5], "c": 0.5, "d": [0, 1], "e": str(tmp_path)
    }  # fmt: skip


def test_a_full_disk_names_the_file_and_keeps_what_was_there(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    append_jsonl(path, [{"id": "old"}])
    before = path.read_bytes()
    real = os.write

    def full(descriptor, data):
        if len(data) > 4:
            return real(descriptor, bytes(data[:4]))  # a part goes through, as on a real disk
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(jsonl.os, "write", full)
    with pytest.raises(UserError, match=r"rows\.jsonl: .*No space left"):
        append_jsonl(path, [{"id": "new"}])
    assert path.read_bytes() == before


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_device_is_a_user_error():
    with pytest.raises(UserError, match="/dev/full"):
        append_jsonl("/dev/full", [{"id": "new"}])


def test_a_failed_rewrite_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"id": "old"}])

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(jsonl.os, "fsync", full)
    with pytest.raises(UserError, match=r"rows\.jsonl: .*No space left"):
        write_jsonl(path, [{"id": "new"}])
    assert [row["id"] for _, row in read_jsonl(path)] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_generator_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, [{"id": "old"}])

    def rows():
        yield {"id": "new"}
        raise KeyError("broken")

    with pytest.raises(KeyError):
        write_jsonl(path, rows())
    assert [row["id"] for _, row in read_jsonl(path)] == ["old"]
    assert [p.name for p in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_killed_writer_loses_nothing_that_it_reported(tmp_path):
    path = tmp_path / "rows.jsonl"
    program = (
        "import sys\nfrom video_opd.jsonl import append_jsonl\n"
        "for i in range(10**6):\n"
        "    append_jsonl(sys.argv[1], [{'i': i, 'pad': 'x' * 5000}]); print(i, flush=True)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", program, str(path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    for _ in range(40):
        process.stdout.readline()
    process.send_signal(signal.SIGKILL)
    reported = 40 + len(process.stdout.read().split("\n")) - 1
    process.wait()
    repair_jsonl(path)
    numbers = [row["i"] for _, row in read_jsonl(path)]
    assert numbers == list(range(len(numbers))) and len(numbers) >= reported
