"""Data files: rows become samples, and what is wrong is named with its line."""

import json
import logging
import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from video_opd.data.annotations import read_annotations, read_samples, write_rows
from video_opd.errors import UserError

ROW = {"id": "a", "video": "v/a.mp4", "query": "the cup falls", "duration": 30.0, "spans": [[3.0, 5.5]]}


def data_file(folder: Path, *rows: dict) -> Path:
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_row_becomes_a_sample(tmp_path):
    (sample,) = read_samples(data_file(tmp_path, ROW | {"source": "charades", "extra": [1]}))
    assert (sample.id, sample.query, sample.duration_s) == ("a", "the cup falls", 30.0)
    assert sample.video == tmp_path / "v/a.mp4"
    assert sample.spans == ((3.0, 5.5),)
    assert sample.source == "charades" and sample.row["extra"] == [1]


def test_videos_are_relative_to_the_root_or_absolute(tmp_path):
    path = data_file(tmp_path, ROW, ROW | {"id": "b", "video": "/data/b.mp4"})
    a, b = read_samples(path, video_root="/videos")
    assert a.video == Path("/videos/v/a.mp4") and b.video == Path("/data/b.mp4")


def test_rows_that_are_written_behind_a_link_keep_their_videos(tmp_path):
    (tmp_path / "v").mkdir()
    (tmp_path / "v/a.mp4").write_bytes(b"v")
    (tmp_path / "disk/far/away").mkdir(parents=True)
    (tmp_path / "run").symlink_to(tmp_path / "disk/far/away")
    write_rows(tmp_path / "run/out.jsonl", read_samples(data_file(tmp_path, ROW)))
    (sample,) = read_samples(tmp_path / "run/out.jsonl")
    assert sample.video.samefile(tmp_path / "v/a.mp4")


def test_rows_without_spans_or_duration_are_questions(tmp_path):
    bare = {"id": "a", "video": "a.mp4", "query": "q"}
    annotations = read_annotations(
        data_file(tmp_path, bare, bare | {"id": "b", "spans": [], "duration": None}, ROW | {"id": "c"})
    )
    assert [s.spans for s in annotations.samples[:2]] == [(), ()]
    assert annotations.samples[0].duration_s is None
    assert annotations.unannotated == 2


def test_several_spans_and_whole_numbers(tmp_path):
    (sample,) = read_samples(data_file(tmp_path, ROW | {"duration": 30, "spans": [[1, 2], [4, 8]]}))
    assert sample.spans == ((1.0, 2.0), (4.0, 8.0))


def test_a_span_past_the_end_is_cut_and_counted(tmp_path, caplog):
    path = data_file(tmp_path, ROW, ROW | {"id": "b", "spans": [[1, 2], [28.0, 31.2]]})
    annotations = read_annotations(path)
    assert annotations.samples[1].spans == ((1.0, 2.0), (28.0, 30.0))
    assert annotations.clamped == ((2, "b"),)
    with caplog.at_level(logging.WARNING):
        read_samples(path)
    assert "1 of 2 rows" in caplog.text and "line 2" in caplog.text


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"spans": [[5.5, 3.0]]}, "does not end after"),
        ({"spans": [[3.0, 3.0]]}, "does not end after"),
        ({"spans": [[-1.0, 3.0]]}, "before 0"),
        ({"spans": [[31.0, 32.0]]}, "past the duration"),
        ({"spans": [[1.0, float("nan")]]}, "must be a number"),
        ({"spans": [[1.0, float("inf")]]}, "must be a number"),
        ({"spans": [[1, 10**400]]}, "must be a number"),
        ({"spans": [["1", 3.0]]}, "must be a number"),
        ({"spans": [[True, 3.0]]}, "must be a number"),
        ({"spans": [3.0, 5.5]}, "list of pairs"),
        ({"spans": [[3.0, 5.5, 6.0]]}, "list of pairs"),
        ({"spans": "3-5"}, "list of pairs"),
        ({"duration": 0}, "more than 0"),
        ({"duration": "30"}, "must be a number"),
        ({"duration": 10**400}, "must be a number"),
        ({"query": "  "}, "query"),
        ({"query": "a \ud800 dog"}, "half a surrogate pair"),
        ({"id": "\udfff"}, "half a surrogate pair"),
        ({"id": 7}, "'id' is 7"),
        ({"video": None}, "video"),
        ({"source": 3}, "source"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path, change, word):
    path = data_file(tmp_path, ROW, ROW | {"id": "b"} | change)
    with pytest.raises(UserError, match=rf"data\.jsonl:2: .*{word}"):
        read_samples(path)


@pytest.mark.parametrize("key", ["id", "video", "query"])
def test_a_missing_key_is_named(tmp_path, key):
    row = {name: value for name, value in ROW.items() if name != key}
    with pytest.raises(UserError, match=rf"data\.jsonl:1: no '{key}'"):
        read_samples(data_file(tmp_path, row))


def test_a_broken_line_is_named(tmp_path):
    path = data_file(tmp_path, ROW)
    path.write_text(path.read_text() + '{"id": "b", \n')
    with pytest.raises(UserError, match=r"data\.jsonl:2: not JSON"):
        read_samples(path)


def test_a_repeated_id_names_both_lines(tmp_path):
    path = data_file(tmp_path, ROW, ROW | {"id": "b"}, ROW)
    with pytest.raises(UserError, match=r"data\.jsonl:3: id 'a' is already used on line 1"):
        read_samples(path)


def test_a_missing_video_is_not_this_files_error(tmp_path):
    assert not (tmp_path / "v/a.mp4").exists()
    assert len(read_samples(data_file(tmp_path, ROW))) == 1


SPANS = st.lists(
    st.tuples(st.floats(0, 40), st.floats(0.01, 20)).map(lambda p: [p[0], p[0] + p[1]]), max_size=3
)


@given(spans=SPANS)
@settings(max_examples=50)
def test_written_samples_read_the_same_from_another_folder(tmp_path_factory, spans):
    folder = tmp_path_factory.mktemp("data")
    (sample,) = read_samples(data_file(folder, ROW | {"spans": spans, "duration": 80.0, "extra": "kept"}))
    elsewhere = folder / "deep" / "er" / "out.jsonl"
    write_rows(elsewhere, [sample])
    (again,) = read_samples(elsewhere)
    assert os.path.normpath(again.video) == os.path.normpath(sample.video)
    assert (again.id, again.query, again.spans, again.row["extra"]) == (
        "a",
        sample.query,
        sample.spans,
        "kept",
    )


def test_mappings_are_written_as_they_are(tmp_path):
    write_rows(tmp_path / "out.jsonl", [ROW | {"tvdf": {"rank": 1}}])
    (sample,) = read_samples(tmp_path / "out.jsonl")
    assert sample.row == ROW | {"tvdf": {"rank": 1}}
