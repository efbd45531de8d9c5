"""Names of videos: dots, endings, folders, URLs and accents; and durations that are stated by name."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from annotation_cases import FLAT, converted, time_r1_row, write

from video_opd.convert.formats.durations import Durations, read_durations
from video_opd.convert.formats.format import Unusable
from video_opd.convert.formats.video_names import bare_name, ending_of, stem_of, video_path
from video_opd.convert.videos import Videos
from video_opd.errors import UserError

DOTTED = "bP5KfdFJzC4_660.0_810.0"  # a name of QVHighlights, without an ending
NFC, NFD = (unicodedata.normalize(form, "café") for form in ("NFC", "NFD"))


def rows_about(name: str) -> dict[str, dict[str, Any]]:
    """A row of each format that states a video in another way."""
    return {
        "own": {"id": "1", "video": name, "query": "a dog", "duration": 150, "spans": [[1, 2]]},
        "qvhighlights": {
            "qid": 1,
            "query": "a dog",
            "vid": name,
            "duration": 150,
            "relevant_windows": [[1, 2]],
        },
        "time-r1": time_r1_row(video=name, duration=150),
        "videomind": FLAT | {"vid": name},
        "timelens-100k": {
            "source": "s",
            "video_path": name,
            "duration": 150,
            "events": [{"query": "a dog", "span": [1, 2]}],
        },
    }


@pytest.mark.parametrize("format", list(rows_about("")))
@pytest.mark.parametrize(
    ("name", "file"),
    [
        (DOTTED, f"{DOTTED}.mp4"),
        (DOTTED, f"{DOTTED}.MP4"),
        (f"{DOTTED}.mp4", f"{DOTTED}.mp4"),  # no second ending
        (f"{DOTTED}.mp4", f"{DOTTED}.mkv"),
        ("abc", "abc"),  # a file without an ending
        ("abc.MOV", "abc.mov"),
        ("abc.mov", "abc.mov.mp4"),  # converted, the old ending kept
        ("a.b.c", "a.b.c.webm"),
        (NFC, f"{NFD}.mp4"),
        (f"{NFD}.mp4", f"{NFC}.MP4"),
        (f"{NFD}/a.mp4", f"{NFC}/a.mp4"),
        ("data/v/abc.mp4", "v/abc.mp4"),
        ("/data/v/abc.mp4", "abc.mp4"),
        ("C:\\data\\v\\abc.avi", "v/abc.mp4"),
        (" abc.mp4 ", "abc.mp4"),
        ("https://host/v/abc%20d.mp4?key=1", "abc d.mp4"),
        ("s3://bucket/v/abc.mp4", "v/abc.mp4"),
    ],
)
def test_videos_are_found(tmp_path, format, name, file):
    (tmp_path / "root" / file).parent.mkdir(parents=True)
    (tmp_path / "root" / file).touch()
    source = write(tmp_path / "a.jsonl", [rows_about(name)[format]])
    (row,), result = converted(source, video_root=tmp_path / "root")
    assert row["video"] == (tmp_path / "root" / file).as_posix() and not result.not_found
    (tmp_path / "root" / file).unlink()
    (tmp_path / "root" / file).mkdir()  # a folder of that name is no video
    _, result = converted(source, video_root=tmp_path / "root")
    assert len(result.not_found) == 1


@pytest.mark.parametrize("format", list(rows_about("")))
@pytest.mark.parametrize(
    ("name", "path"),
    [
        (DOTTED, f"{DOTTED}.mp4"),
        (f"v/{DOTTED}", f"v/{DOTTED}.mp4"),
        ("abc", "abc.mp4"),
        ("abc.mp4", "abc.mp4"),
        ("abc.MPEG", "abc.MPEG"),
        ("./v/abc.webm", "v/abc.webm"),
        ("v\\abc.mp4", "v/abc.mp4"),
        ("file:///data/a%23b.mp4", "/data/a#b.mp4"),
        ("https://host/v/abc.mp4", "v/abc.mp4"),
        ("https://youtu.be/abc", "abc.mp4"),
        (f"{NFD}.mp4", f"{NFD}.mp4"),
    ],
)
def test_without_a_root_names_get_an_ending_where_they_have_none(tmp_path, format, name, path):
    (row,), _ = converted(write(tmp_path / "a.jsonl", [rows_about(name)[format]]))
    assert row["video"] == path


def test_the_exact_name_wins(tmp_path):
    for name in ("a.mkv", "a.mp4", "a", "A.mp4", f"{NFC}.mp4", f"{NFD}.mp4"):
        (tmp_path / name).touch()
    videos = Videos(tmp_path, tmp_path)
    for name in ("a.mkv", "a.mp4", "a", "A", f"{NFC}.mp4", f"{NFD}.mp4"):
        expected = tmp_path / ("A.mp4" if name == "A" else name)
        assert videos.find(name) == expected.as_posix()
    assert videos.find("B") == (tmp_path / "B.mp4").as_posix()  # only an ending may differ in case
    assert videos.missing == {(tmp_path / "B.mp4").as_posix()}


@pytest.mark.parametrize(
    "name",
    ["", "  ", "/", ".", "a\0.mp4", "https://youtube.com/watch?v=abc", "https://host/", "http://[x/a.mp4"],
)
def test_names_of_no_file_are_listed(tmp_path, name):
    with pytest.raises(Unusable, match="no video"):
        video_path(name)
    row = rows_about("a.mp4")["own"]
    (_,), result = converted(write(tmp_path / "a.jsonl", [row, row | {"id": "2", "video": name}]))
    assert result.reasons == {"no video": 1}


def test_the_home_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert video_path("~/v/a.mp4") == "/home/me/v/a.mp4"
    assert video_path("v/~/a.mp4") == "v/~/a.mp4"


def test_endings():
    assert [ending_of(name) for name in ("a.mp4", "a.MP4", "a", DOTTED, ".mp4", "a.", "a.b", "v.mp4/a")] == [
        *(".mp4", ".MP4"),
        *("" for _ in range(6)),
    ]
    assert [stem_of(name) for name in ("v/a.mp4", DOTTED, "a.mov.mp4")] == ["a", DOTTED, "a.mov"]
    assert [bare_name(name) for name in ("v/a.mov.MP4", DOTTED, ".mp4")] == ["a", DOTTED, ".mp4"]


def test_ids_keep_dotted_names_apart(tmp_path):
    names = ("x_660.0", "x_660.5")
    made, _ = converted(write(tmp_path / "a.jsonl", [time_r1_row(video=name) for name in names]))
    assert [row["id"] for row in made] == ["time-r1:x_660.0", "time-r1:x_660.5"]


def test_durations_of_dotted_names_are_their_own():
    durations = Durations(
        {"a": 1.0, "a.b": 2.0, f"{DOTTED}.mp4": 3.0, "v/c.avi": 4.0, "d.mp4": 5, "d.avi": 9}
    )
    assert [
        durations.of(name) for name in ("a.mp4", "a.b", "a.b.mkv", "a.x", DOTTED, f"v/{DOTTED}.webm")
    ] == [
        *(1.0, 2.0, 2.0),
        None,  # not those of "a"
        *(3.0, 3.0),
    ]
    assert [durations.of(name) for name in ("c", "c.mp4", "d.mp4", "d", "a.mov.mp4")] == [4, 4, 5, None, 1]
    assert Durations({f"{NFC}.mp4": 6.0}).of(f"v/{NFD}.mp4") == 6.0


@pytest.mark.parametrize(
    "text", ["id,length\na,3.5\nb,0:12\n7,1e1\n", 'vid,duration,x\na,"3.5",\nb," 12",\n7,10,\n']
)
def test_durations_are_read_from_cells(tmp_path, text):
    durations = read_durations([write(tmp_path / "d.csv", text)])
    assert [durations.of(name) for name in ("a", "b", "7")] == [3.5, 12.0, 10.0]


@pytest.mark.parametrize("cell", ["", "nan", "inf", "-1", "0", '"12,5"', "1_0", "12 s", "x"])
def test_a_cell_without_a_duration_is_an_error(tmp_path, cell):
    with pytest.raises(UserError, match=r"d\.csv:3: no duration"):
        read_durations([write(tmp_path / "d.csv", f"id,length\na,3.5\nb,{cell}\n")])


def test_two_durations_of_one_video_are_an_error(tmp_path):
    first = write(tmp_path / "a.csv", "id,length\na,3.5\nb,4\n")
    assert read_durations([first, write(tmp_path / "b.json", {"a": 4.0})]).of("a") == 3.5
    with pytest.raises(UserError, match=r"b\.json: 'b': 'b' lasts 40 s here, 4 s before"):
        read_durations([first, write(tmp_path / "b.json", {"b": 40})])
    with pytest.raises(UserError, match=r"c\.csv:3"):
        read_durations([write(tmp_path / "c.csv", "id,length\na,3.5\na,12\n")])


def test_a_folder_is_listed_once(tmp_path, monkeypatch):
    """A million rows must not look for a million videos times a dozen endings on the disk."""
    listed: list[Path] = []
    real = os.listdir

    def list_folder(path: Path) -> list[str]:
        listed.append(path)
        return real(path)

    monkeypatch.setattr(os, "listdir", list_folder)
    monkeypatch.setattr(Path, "is_file", lambda _: pytest.fail("a file was looked for"))
    videos = Videos(tmp_path, tmp_path)
    for i in range(100):
        videos.find(f"v{i}")
    assert len(listed) == 1 and len(videos.missing) == 100
