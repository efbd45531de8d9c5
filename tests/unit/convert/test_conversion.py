"""Converting: sources of every kind, recognition, videos, durations, real files, and damaged ones."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
from annotation_cases import FLAT, MINIATURES, ROW, converted, released_row, time_r1_row, write
from places import REAL
from video_cases import write_video

from video_opd.cli import main
from video_opd.convert.conversion import ConvertSettings, convert
from video_opd.convert.formats import FORMATS
from video_opd.convert.formats.durations import Durations, read_durations
from video_opd.data.annotations import read_annotations
from video_opd.errors import UserError

# --- sources -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", json.dumps(ROW) + "\n\n"),
        ("a.json", json.dumps([ROW], indent=2)),
        ("a.json", json.dumps(ROW) + "\n" + json.dumps(ROW | {"qid": 2}) + "\n"),  # JSON Lines, misnamed
        ("a.json", "\ufeff" + json.dumps([ROW])),
        ("a.jsonl", "\ufeff" + json.dumps(ROW) + "\r\n"),
        ("annotations", json.dumps([ROW])),
    ],
)
def test_rows_are_found_in_every_container(tmp_path, name, content):
    path = tmp_path / name
    path.write_text(content, encoding="utf-8")
    rows, result = converted(path)
    assert result.format == "qvhighlights"
    assert rows[0]["id"] == "qvhighlights:1" and rows[0]["spans"] == [[1.0, 2.0]]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", r"a\.json:1: not JSON"),
        ("a.json", b"[]", "is empty"),
        ("a.json", b"3", "holds a int"),
        ("a.json", b'"text"', "holds a str"),
        ("a.json", b'[{"a": 1}', r"a\.json:1: not JSON"),
        ("a.json", b"\xff\xfe[]", "not UTF-8 at byte 0"),
        ("a.json", b'{"v": 1, "v": 2}', "the key 'v' is there twice"),
        ("a.json", b"[" * 100_000, "not JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": \n', r"a\.jsonl:2: not JSON"),
        ("a.jsonl", b'{"a": 1}\n\xff\n', r"a\.jsonl:2: not UTF-8"),
        ("a.json", b'[{"who": "knows"}]', "looks like none of the known formats"),
        ("a.txt", b"what is this\n", "looks like none"),
        ("a.csv", b"x,y\n1,2\n", "looks like none"),
        ("a.pkl", b"nonsense", "not a pickle of plain lists"),
        ("a.pkl", pickle.dumps({1: "x"}), "name videos by text"),
    ],
)
def test_sources_that_hold_nothing_are_one_line(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        convert(path, tmp_path / "out.jsonl")
    assert not (tmp_path / "out.jsonl").exists()


def test_a_pickle_runs_nothing(tmp_path):
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "made"),)

    path = tmp_path / "raw_captions.pkl"
    path.write_bytes(pickle.dumps({"video-abc": Evil()}))
    with pytest.raises(UserError, match=r"it holds a (posix|nt)\.mkdir"):
        convert(path, tmp_path / "out.jsonl", "queryd")
    assert not (tmp_path / "made").exists()


def test_a_damaged_pickle_reserves_no_memory(tmp_path):
    # PROTO 2, EMPTY_DICT, LONG_BINPUT 2**32 - 1: the fast unpickler makes room for that many
    path = tmp_path / "a.pkl"
    path.write_bytes(b"\x80\x02}r\xff\xff\xff\xff.")
    code = (
        "import resource, sys\n"
        "resource.setrlimit(resource.RLIMIT_AS, (2 << 30, 2 << 30))\n"
        "from video_opd.convert.conversion import convert\n"
        "from video_opd.errors import UserError\n"
        f"try: convert({str(path)!r}, {str(tmp_path / 'o')!r})\n"
        "except UserError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "is empty" in done.stdout


def test_a_missing_source_and_an_unknown_format_are_named(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        convert(tmp_path / "gone.json", tmp_path / "o")
    with pytest.raises(UserError, match=r"cannot be read|no such file"):
        convert(tmp_path / ("x" * 5000), tmp_path / "o")
    file = write(tmp_path / "a.json", [ROW])
    with pytest.raises(UserError, match="did you mean qvhighlights"):
        convert(file, tmp_path / "o", "qvhighlight")
    with pytest.raises(UserError, match="holds records, charades-sta needs lines or mapping"):
        convert(file, tmp_path / "o", "charades-sta")


def test_a_wrong_format_says_what_it_misses_and_keeps_the_old_file(tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("kept\n")
    file = write(tmp_path / "a.json", [ROW])
    with pytest.raises(UserError, match=r"nothing in it can be used as didemo \(first: .*\[0\]: missing key"):
        convert(file, out, "didemo")
    assert out.read_text() == "kept\n" and sorted(os.listdir(tmp_path)) == ["a.json", "out.jsonl"]


def test_rows_that_look_like_two_formats_name_both(tmp_path):
    file = write(tmp_path / "a.json", [FLAT | {"video": "v.mp4", "timestamp": [1, 2], "sentence": "s"}])
    with pytest.raises(UserError, match="time-r1 and videomind; say which: video-opd data convert time-r1"):
        convert(file, tmp_path / "o")


def test_each_kind_of_impossible_row_is_listed(tmp_path):
    bad: dict[str, dict[str, Any]] = {
        "reversed span": {"span": [2, 1]},
        "empty span": {"span": [1, 1]},
        "starts before 0": {"span": [-0.5, 1]},
        "past the end": {"span": [10, 11]},
        "not numbers": {"span": [1, "2,5"]},
        "not a span": {"span": [1, 2, 3]},
        "no span": {"span": None},
        "no query": {"query": " . "},
        "no video": {"vid": " "},
        "impossible duration": {"duration": 0},
        "broken text": {"query": "\ud800"},
        "no name": {"vid": None},
    }
    more: dict[str, list[dict[str, Any]]] = {
        "not numbers": [
            {"span": [1, float("nan")]},
            {"span": [True, 2]},
            {"span": [1, float("inf")]},
            {"span": [1, 2e9]},
        ],
        "impossible duration": [
            {"duration": "ten"},
            {"duration": 2e9},
            {"duration": -1},
            {"duration": float("inf")},
        ],
        "no query": [{"query": None}, {"query": ["a"]}],
    }
    changes = list(bad.items()) + [(reason, change) for reason, all in more.items() for change in all]
    rows, result = converted(write(tmp_path / "a.jsonl", [FLAT, *(FLAT | change for _, change in changes)]))
    assert len(rows) == 1
    assert [(p.reason, p.where.rpartition(":")[2]) for p in result.problems] == [
        (reason, str(line)) for line, (reason, _) in enumerate(changes, start=2)
    ]
    assert Counter(result.reasons) == Counter(reason for reason, _ in changes)
    record = result.to_json()
    assert (record["read"], record["written"], record["dropped"]) == (1 + len(changes), 1, len(changes))
    json.dumps(record)


def test_ids_do_not_change_with_what_is_left_out(tmp_path):
    good = [FLAT | {"query": name} for name in "abc"]
    before, _ = converted(write(tmp_path / "a.jsonl", good))
    after, _ = converted(write(tmp_path / "a.jsonl", [good[0], good[1] | {"span": [2, 1]}, good[2]]))
    assert [row["id"] for row in before] == ["videomind:abc", "videomind:abc#1", "videomind:abc#2"]
    assert [row["id"] for row in after] == ["videomind:abc", "videomind:abc#2"]
    clash = [FLAT, FLAT | {"vid": "abc#1"}, FLAT]
    rows, _ = converted(write(tmp_path / "a.jsonl", clash))
    assert len({row["id"] for row in rows}) == 3


# --- videos and durations ----------------------------------------------------------------------------


def test_videos_are_looked_up_under_the_root(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("v/abc.webm", "v/sub/xyz.mp4", "v/NU_210.0_360.0.mkv", "v/two.mov"):
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).touch()
    rows = [
        FLAT,
        FLAT | {"vid": "NU_210.0_360.0"},
        FLAT | {"vid": "sub/xyz"},
        FLAT | {"vid": "gone"},
    ]
    write(Path("a.jsonl"), rows)
    out = Path("data/deep/out.jsonl")
    result = convert("a.jsonl", out, settings=ConvertSettings(video_root="v"))
    samples = read_annotations(out).samples
    assert [os.path.relpath(sample.video) for sample in samples] == [
        "v/abc.webm",
        "v/NU_210.0_360.0.mkv",
        "v/sub/xyz.mp4",
        "v/gone.mp4",
    ]
    assert result.to_json()["videos_not_found"] == ["../../v/gone.mp4"]
    # a path of the source is found by its end, and under another ending
    paths = [time_r1_row(video=video) for video in ("./data/v/sub/xyz.mp4", "x/two.avi", "x/none.avi")]
    convert(write(Path("b.json"), paths), out, settings=ConvertSettings(video_root=tmp_path / "v"))
    found = [json.loads(line)["video"] for line in out.read_text().splitlines()]
    assert found == [f"{tmp_path}/v/sub/xyz.mp4", f"{tmp_path}/v/two.mov", f"{tmp_path}/v/x/none.avi"]


def test_a_root_that_is_not_there_is_an_error(tmp_path):
    with pytest.raises(UserError, match="--video-root names the folder"):
        converted(write(tmp_path / "a.jsonl", [FLAT]), video_root=tmp_path / "gone")


def test_durations_come_from_files(tmp_path):
    a = write(tmp_path / "a.json", {"abc": 12.5, "x.mp4": {"duration": 3}})
    b = write(tmp_path / "b.csv", "video_id,length\ndef,7.25\n")
    durations = read_durations([a, b])
    assert [durations.of(name) for name in ("abc", "v/abc.mkv", "x.mp4", "def.mp4", "gone")] == [
        12.5,
        12.5,
        3.0,
        7.25,
        None,
    ]
    rows, _ = converted(write(tmp_path / "r.jsonl", [FLAT | {"span": [1, 12.4]}]), durations=durations)
    assert rows[0]["duration"] == 12.5 and rows[0]["spans"] == [[1.0, 12.4]]  # they win over the row's


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("d.json", {"abc": "long"}),
        ("d.json", {"abc": -1}),
        ("d.json", {"abc": True}),
        ("d.json", {}),
        ("d.csv", "id,seconds\nabc,3\n"),
        ("d.txt", "abc 3"),
    ],
)
def test_what_is_no_duration_is_an_error(tmp_path, name, content):
    with pytest.raises(UserError, match=r"no duration|holds no durations"):
        read_durations([write(tmp_path / name, content)])


def test_probing_asks_the_videos(tmp_path):
    (tmp_path / "v").mkdir()
    write_video(tmp_path / "v" / "one.mp4", 40)
    rows = [
        {"annotation_id": i, "description": "q", "video": video, "times": [[0, 0]]}
        for i, video in enumerate(["one.mp4", "gone.mp4"])
    ]
    made, result = converted(write(tmp_path / "d.json", rows), video_root=tmp_path / "v", probe=True)
    assert [row["duration"] for row in made] == [4.0, None]
    assert [row["spans"] for row in made] == [[[0.0, 4.0]], [[0.0, 5.0]]]
    assert result.without_duration == 1 and result.read == 2


def test_one_video_of_two_durations_is_told(tmp_path):
    rows = [FLAT, FLAT | {"duration": 10.9}, FLAT | {"duration": 12.0}]
    _, result = converted(write(tmp_path / "a.jsonl", rows))
    assert result.to_json()["videos_of_two_lengths"] == ["abc.mp4"]


# --- Parquet -----------------------------------------------------------------------------------------


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=re.escape("install video-opd[parquet]")):
        convert(tmp_path / "a.parquet", tmp_path / "o")


def test_folders_that_are_no_data_sets_are_named(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="without Parquet files"):
        convert(tmp_path / "empty", tmp_path / "o")
    (tmp_path / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    for split, message in ((None, "several splits"), ("val", "no split 'val'")):
        with pytest.raises(UserError, match=f"{message}; give --split with one of: train, test"):
            convert(tmp_path, tmp_path / "o", settings=ConvertSettings(split=split))
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="names no data files"):
        convert(tmp_path, tmp_path / "o", settings=ConvertSettings(split="train"))


def test_parquet_and_saved_data_sets_hold_the_same_rows(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    ipc, parquet = pytest.importorskip("pyarrow.ipc"), pytest.importorskip("pyarrow.parquet")
    rows = [ROW, ROW | {"qid": 2, "relevant_windows": [[3, 4], [5, 11]]}]
    expected, _ = converted(write(tmp_path / "a.jsonl", rows))
    table = pyarrow.Table.from_pylist(rows)
    (tmp_path / "hub" / "data").mkdir(parents=True)
    parquet.write_table(table, tmp_path / "hub" / "data" / "train-00000-of-00001.parquet")
    (tmp_path / "saved" / "test").mkdir(parents=True)
    arrow = tmp_path / "saved" / "test" / "data-00000-of-00001.arrow"
    with ipc.new_stream(arrow, table.schema) as out:
        out.write_table(table)
    write(tmp_path / "saved" / "dataset_dict.json", {"splits": ["test"]})
    state = {"_data_files": [{"filename": "data-00000-of-00001.arrow"}], "_split": "test"}
    write(tmp_path / "saved" / "test" / "state.json", state)
    for source in ("hub/data/train-00000-of-00001.parquet", "hub", "saved", "saved/test"):
        assert converted(tmp_path / source)[0] == expected
    for damaged in ("hub/data/train-00000-of-00001.parquet", "saved/test/data-00000-of-00001.arrow"):
        (tmp_path / damaged).write_bytes((tmp_path / damaged).read_bytes()[:100])
    for source, message in (("hub", "cannot be read as Parquet"), ("saved", "cannot be read as Arrow")):
        with pytest.raises(UserError, match=message):
            converted(tmp_path / source)


def test_the_released_data_set_is_read_from_its_folder(tmp_path):
    """Parquet in the release's layout, in two files; durations from the videos; damaged cells."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    root = tmp_path / "set"
    for name, frames in (("didemo/abc.mp4", 40), ("queryd/abc.mkv", 80)):
        (root / "videos" / name).parent.mkdir(parents=True, exist_ok=True)
        write_video(root / "videos" / name, frames)
    good = [
        released_row("a dog barks", "1.20 to 3.00"),
        released_row("a cat", "0.5 to 99.00", "videos/queryd/abc.mkv"),
        released_row("a bird", "2.00 to 2.50", "videos/hirest/gone.mp4"),
    ]
    text = pyarrow.schema({key: pyarrow.string() for key in good[0]})
    (root / "data").mkdir()
    shards = [root / "data" / f"train-0000{i}-of-00002.parquet" for i in range(2)]
    parquet.write_table(pyarrow.Table.from_pylist(good[:2], text), shards[0])
    nulls = dict.fromkeys(text.names)
    parquet.write_table(pyarrow.Table.from_pylist([nulls, good[2]], text), shards[1])

    out = tmp_path / "out" / "train.jsonl"
    out.parent.mkdir()
    result = convert(root, out, settings=ConvertSettings(video_root=root, probe=True))
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    name = "video-opd-dataset"
    assert result.format == name and rows == [
        {
            "id": f"{name}:{key}",
            "video": f"{root}/videos/{video}",
            "query": query,
            "duration": duration_s,
            "spans": [span],
            "source": video.split("/")[0],
        }
        for key, video, query, duration_s, span in (
            ("abc", "didemo/abc.mp4", "a dog barks", 4.0, [1.2, 3.0]),
            ("abc#1", "queryd/abc.mkv", "a cat", 8.0, [0.5, 8.0]),  # cut to the video
            ("gone", "hirest/gone.mp4", "a bird", None, [2.0, 2.5]),
        )
    ]
    assert [problem.line() for problem in result.problems] == [f"{shards[1]} row 0: no video (None)"]
    assert (len(result.cut), result.without_duration, len(result.not_found)) == (1, 1, 1)
    assert [sample.id for sample in read_annotations(out).samples] == [row["id"] for row in rows]

    # the same rows by name and from one file, a column of bytes, and one of numbers
    parquet.write_table(pyarrow.Table.from_pylist(good, text), root / "data" / "train.parquet")
    for shard in shards:
        shard.unlink()
    convert(root / "data" / "train.parquet", out, name, ConvertSettings(video_root=root, probe=True))
    assert [json.loads(line) for line in out.read_text().splitlines()] == rows
    for key, kind, cell in (
        ("assistant_response", pyarrow.binary(), b"1.20 to 3.00"),
        ("user_query", pyarrow.binary(), b"\xff"),
        ("system_prompt", pyarrow.int64(), 3),
        ("messages", pyarrow.binary(), good[0]["messages"].encode()),
    ):
        schema = text.set(text.get_field_index(key), pyarrow.field(key, kind))
        file = root / "data" / "train.parquet"
        parquet.write_table(pyarrow.Table.from_pylist([good[0] | {key: cell}], schema), file)
        with pytest.raises(UserError, match=f"nothing in it can be used.*{key} is a"):
            convert(file, out)


# --- real files --------------------------------------------------------------------------------------

# File, format, rows read, written, spans cut, rows on parts of videos, and some rows as they must be.
REAL_FILES: tuple[tuple[str, str, int, int, int, int, dict[str, tuple[list[list[float]], float]]], ...] = (
    (
        "charades_sta_test.json",
        "charades-sta",
        3720,
        3720,
        562,
        0,
        {
            "charades-sta:3MSZA:0": ([[24.3, 30.4]], 30.96),
            "charades-sta:AKO6M:1": ([[12.7, 18.58]], 18.58),
        },
    ),
    (
        "qvhighlights_val.jsonl",
        "qvhighlights",
        1550,
        1550,
        0,
        0,
        {
            "qvhighlights:2579": ([[82.0, 150.0]], 150.0),
            "qvhighlights:5342": ([[56.0, 76.0], [96.0, 150.0]], 150.0),
        },
    ),
    (
        "time_r1_train_2k5.json",
        "time-r1",
        2500,
        2500,
        48,
        479,
        {
            "time-r1:QtWT8rxUuNk": ([[1.0, 4.0]], 93.2932),
            "time-r1:gw3ppXUO0B4": ([[120.0, 157.79096666666666]], 157.79096666666666),
        },
    ),
    ("tvgbench.json", "tvgbench", 800, 789, 27, 214, {"tvgbench:KWZSA": ([[13.4, 28.1]], 30.12)}),
)


@pytest.mark.parametrize(("name", "format", "read", "written", "cut", "clips", "spots"), REAL_FILES)
def test_real_files(tmp_path, name, format, read, written, cut, clips, spots):
    source = REAL / "annotations" / name
    if not source.exists():
        pytest.skip("no real annotations beside the checkout")
    out = tmp_path / "out.jsonl"
    result = convert(source, out)
    assert (result.format, result.read, result.written, len(result.cut), result.on_clips) == (
        format,
        read,
        written,
        cut,
        clips,
    )
    annotations = read_annotations(out)
    assert len(annotations.samples) == written and not annotations.clamped and not annotations.unannotated
    rows = {sample.id: sample for sample in annotations.samples}
    for identity, (spans, duration_s) in spots.items():
        assert [list(span) for span in rows[identity].spans] == spans
        assert rows[identity].duration_s == duration_s
    again = tmp_path / "again.jsonl"
    convert(source, again, format)
    assert again.read_bytes() == out.read_bytes()


def test_anomalies_of_the_real_files_are_those_counted_by_hand(tmp_path):
    """Counted again from the raw files, without the converter."""
    folder = REAL / "annotations"
    if not folder.exists():
        pytest.skip("no real annotations beside the checkout")
    bench = json.loads((folder / "tvgbench.json").read_text())
    ends = [(*map(float, row["answer"].split("-")), row["duration"]) for row in bench]
    empty = [i for i, (start, end, _) in enumerate(ends) if start == end]
    past = sum(end > duration for start, end, duration in ends if start < end)
    result = convert(folder / "tvgbench.json", tmp_path / "o")
    assert [problem.where.rpartition("[")[2] for problem in result.problems] == [f"{i}]" for i in empty]
    assert result.reasons == {"empty span": len(empty)} and len(result.cut) == past
    two = {
        row["path"]
        for row in bench
        for other in bench
        if row["path"] == other["path"] and row["duration"] - other["duration"] > 1
    }
    assert 0 < len(result.of_two_lengths) <= len(two) + len(empty)
    lines = (folder / "qvhighlights_val.jsonl").read_text().splitlines()
    windows = Counter(len(json.loads(line)["relevant_windows"]) for line in lines)
    convert(folder / "qvhighlights_val.jsonl", tmp_path / "o")
    made = Counter(len(sample.spans) for sample in read_annotations(tmp_path / "o").samples)
    assert made == windows and made[25] == 1


# --- the command -------------------------------------------------------------------------------------


def test_the_command_prints_a_summary_and_lists_what_it_left_out(tmp_path, capsys):
    rows = [FLAT, *(FLAT | {"span": [2, 1]} for _ in range(12)), FLAT | {"span": [1, 99]}]
    source, out = write(tmp_path / "a.jsonl", rows), tmp_path / "o.jsonl"
    assert main(["data", "convert", str(source), "--out", str(out)]) == 0
    text = capsys.readouterr().out
    assert f"{out}: 2 of 14 questions written, on 1 video (videomind)" in text
    assert text.count("reversed span (2 to 1)") == 10 and "and 2 more like this" in text
    assert "12 left out: 12 reversed span" in text and "1 span past the end of the video" in text
    words = ["data", "convert", "videomind", str(source), "--out", str(out), "--source", "mine", "--json"]
    assert main(words) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["dropped_by_reason"] == {"reversed span": 12} and len(record["problems"]) == 12
    assert record["clamped_spans"] == [
        {"where": f"{source}:14", "id": "mine:abc#13", "from_s": 99.0, "to_s": 10.0}
    ]


def test_videos_that_are_not_found_are_named_the_first_few(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("root").mkdir()
    for count, said in ((1, "1 video"), (3, "3 videos"), (5, "5 videos")):
        write(Path("a.jsonl"), [FLAT | {"vid": f"v{i}"} for i in range(count)])
        assert main(["data", "convert", "a.jsonl", "--video-root", "root", "--out", "o.jsonl"]) == 0
        names = ", ".join(f"root/v{i}.mp4" for i in range(min(count, 3)))
        rest = ", …; --json lists all" if count > 3 else ""
        lines = capsys.readouterr().out.splitlines()
        assert f"  {said} not found under the video root: {names}{rest}" in lines


def test_formats_are_listed(capsys):
    assert main(["data", "convert", "--list-formats"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == list(FORMATS)
    assert main(["data", "convert", "--list-formats", "--json"]) == 0
    assert list(json.loads(capsys.readouterr().out)) == list(FORMATS)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "INPUT, or FORMAT and INPUT"),
        (["a", "b", "c"], "INPUT, or FORMAT and INPUT"),
        (["a.json"], "--out"),
        (["gone.json", "--out", "o"], "no such file"),
        (["gone.json", "--out", "o", "--durations", "d.json"], "d.json: no such file"),
        (["gone.json", "--out", "o", "--clips", "half"], "invalid choice"),
    ],
)
def test_wrong_words_are_one_line(words, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["data", "convert", *words]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and message in err


def test_only_a_plain_file_is_replaced(tmp_path, capsys):
    source = write(tmp_path / "a.jsonl", [FLAT])
    assert main(["data", "convert", str(source), "--out", os.devnull]) == 2
    assert "not a plain file" in capsys.readouterr().err
    assert not Path(os.devnull).is_file()
    (tmp_path / "there.jsonl").symlink_to(tmp_path / "real.jsonl")
    assert main(["data", "convert", str(source), "--out", str(tmp_path / "there.jsonl")]) == 0
    assert (tmp_path / "there.jsonl").is_symlink() and (tmp_path / "real.jsonl").is_file()


# --- damaged files -----------------------------------------------------------------------------------

SCRAP = ("", "x", "\ud800", "a\0b", "../..", ".", -1, 0, 10**400, 1.5, float("nan"), float("inf"), None, True)


def test_there_is_a_miniature_of_every_format():
    assert list(MINIATURES) == list(FORMATS)


_LIKELY = b'0123456789.,-+eE"{}[]:#\t\n ' * 4 + bytes(range(256))  # what a syntax may stumble over


def flipped(data: bytes, rng: random.Random) -> bytes:
    """A few bytes changed, lost, repeated or added."""
    bytes_ = bytearray(data)
    for _ in range(rng.randint(1, 6)):
        at = rng.randrange(len(bytes_) + 1)
        match rng.randrange(4):
            case 0 if at < len(bytes_):
                bytes_[at] = rng.choice(_LIKELY)
            case 1:
                del bytes_[at : at + rng.randint(1, 20)]
            case 2:
                bytes_[at:at] = bytes_[max(0, at - rng.randint(1, 30)) : at]
            case _:
                bytes_[at:at] = bytes(rng.choices(_LIKELY, k=rng.randint(1, 8)))
    return bytes(bytes_)


def damaged(value: Any, rng: random.Random) -> Any:
    """The same tree with one part replaced, lost, or wrapped."""
    if isinstance(value, dict | list) and value and rng.random() < 0.75:
        keys = list(value) if isinstance(value, dict) else list(range(len(value)))
        key = rng.choice(keys)
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        if rng.random() < 0.15:
            del copy[key]
        else:
            copy[key] = damaged(value[key], rng)
        return copy
    return rng.choice([*SCRAP, [value], {"x": value}, [], {}, [value, value], [[value]]])


@pytest.fixture
def processor_seconds() -> Callable[[int], None]:
    """Ends the test when what follows takes more than so many seconds of the processor."""

    def out_of_time(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("it does not end")

    def start(seconds: int) -> None:
        signal.signal(signal.SIGVTALRM, out_of_time)
        signal.setitimer(signal.ITIMER_VIRTUAL, seconds)

    return start


@pytest.mark.parametrize("format", MINIATURES)
def test_damaged_files_are_converted_or_refused(tmp_path, format, processor_seconds):
    """60 seeded cases a format: bytes changed, parts of the tree replaced, noise; named and not."""
    name, content = MINIATURES[format]
    content = content * 4 if isinstance(content, list) else content  # so that something is left
    path = tmp_path / name
    rng = random.Random(f"damage {format}")
    ends: Counter[str] = Counter()
    for case in range(60):
        write(tmp_path / "times_captions.pkl", {"video-a": [[1, 2]], "video-b": [[3, 4]]})
        write(path, content)
        if case % 3 == 0 and not isinstance(content, str):
            tree = content
            for _ in range(rng.randint(1, 3)):
                tree = damaged(tree, rng)
            if path.suffix == ".jsonl" and not isinstance(tree, list):
                tree = [tree]
            write(path, tree if not isinstance(tree, str) else [tree])
        elif case % 10 == 1:
            path.write_bytes(rng.randbytes(rng.randrange(300)))
        else:
            path.write_bytes(flipped(path.read_bytes(), rng))
        processor_seconds(10)
        settings = ConvertSettings(
            clips=rng.choice(("cut", "whole")),
            durations=Durations({"v": 4.0} if case % 4 == 0 else {}),
            video_root=tmp_path if case % 5 == 0 else None,
        )
        try:
            result = convert(path, tmp_path / "o.jsonl", rng.choice((format, None)), settings)
        except UserError:
            ends["refused"] += 1
            continue
        finally:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        ends["converted"] += 1
        assert result.read == result.written + result.dropped > 0
        samples = read_annotations(tmp_path / "o.jsonl").samples  # what is written can be read, as it is
        assert len(samples) == result.written
        json.dumps(result.to_json())
    assert ends["refused"] and ends["converted"], ends
