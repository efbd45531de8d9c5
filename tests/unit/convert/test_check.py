"""Checking a data file: what is wrong with its videos, each opened once, and what a kill leaves."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from annotation_cases import write
from process_cases import descendants, is_alive, needs_proc, wait_until
from video_cases import write_video, write_with_sound

from video_opd.cli import main
from video_opd.config import VideoConfig
from video_opd.convert import check as module
from video_opd.convert.check import CheckSettings, check, check_videos, default_out
from video_opd.data.annotations import read_annotations, read_samples
from video_opd.errors import UserError

ROW = {"query": "q", "duration": 4.0, "spans": [[1, 2]]}
HERE = CheckSettings(workers=1)
PRIMING_S = 0.07  # AAC begins with a frame of 64 ms that nobody hears; MPEG-TS does not say so


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """v.mp4 of 4 s, w.mp4 of 2 s, and a file that is no video."""
    write_video(tmp_path / "v.mp4", 40)
    write_video(tmp_path / "w.mp4", 20)
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    return tmp_path


def rows(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"id": f"r{i}", "video": "v.mp4", **ROW, **change} for i, change in enumerate(changes)]


def test_each_problem_is_named_with_its_kind(videos):
    data = write(
        videos / "d.jsonl",
        rows(
            {},
            {"video": "gone.mp4"},
            {"video": "broken.mp4"},
            {"duration": 9.0, "spans": [[6, 8]]},
            {"duration": 5.5},
            {"duration": 5.0, "spans": [[3, 5.0]]},  # both within the tolerance
            {"duration": None, "spans": [[3, 5.5]]},
            {"spans": [[3, 2]]},
            {"id": "r0"},
            {"duration": None, "spans": []},
        ),
    )
    record = check(data, videos / "c.jsonl", settings=HERE, good=videos / "good" / "g.jsonl")
    found = {problem["id"]: problem for problem in record["problems"] if problem["video"]}
    assert {key: problem["kinds"] for key, problem in found.items()} == {
        "r1": ["missing"],
        "r2": ["undecodable"],
        "r3": ["span", "duration"],
        "r4": ["duration"],
        "r6": ["span"],
    }
    assert found["r3"]["problem"] == (
        "a span begins after the video's end at 4.00 s; duration 9 s, but the video lasts 4.00 s"
    )
    assert found["r6"]["problem"] == "a span ends at 5.5 s, the video at 4.00 s"
    wrong = [(p["line"], p["id"], p["kinds"]) for p in record["problems"] if p["video"] is None]
    assert wrong == [(8, "r7", ["row"]), (9, "r0", ["row"])]
    assert record["by_kind"] == {"row": 2, "span": 2, "duration": 2, "missing": 1, "undecodable": 1}
    assert (record["rows"], record["videos"], record["unannotated"]) == (10, 3, 1)
    good = read_samples(videos / "good" / "g.jsonl")
    assert [sample.id for sample in good] == ["r0", "r5", "r9"] and record["written"] == 3
    assert all(sample.video.exists() for sample in good)


def test_the_tolerance_is_the_users(videos):
    data = write(videos / "d.jsonl", rows({"duration": 5.5}, {"duration": 4.2}))
    for tolerance_s, ids in ((0.1, ["r0", "r1"]), (1.0, ["r0"]), (2.0, [])):
        record = check(data, videos / "c.jsonl", settings=CheckSettings(tolerance_s=tolerance_s, workers=1))
        assert [problem["id"] for problem in record["problems"]] == ids
        assert record["tolerance_s"] == tolerance_s
    with pytest.raises(UserError, match="0 seconds or more"):
        CheckSettings(tolerance_s=-1.0)
    with pytest.raises(UserError, match="0 seconds or more"):
        CheckSettings(tolerance_s=float("nan"))


def test_a_row_about_a_part_of_a_whole_video_is_told(videos):
    data = write(videos / "d.jsonl", rows({"video": "v.mp4", "duration": 2.5, "clip": [1.0, 3.5]}))
    (problem,) = check(data, videos / "c.jsonl", settings=HERE)["problems"]
    assert "about a clip of the video" in problem["problem"]


def opened(videos: Path, monkeypatch: pytest.MonkeyPatch, settings: CheckSettings = HERE) -> list[str]:
    """The videos that a check of d.jsonl opens."""
    seen: list[str] = []

    def count(paths: Any, settings: CheckSettings) -> Any:
        for path in paths:
            seen.append(path.name)
            yield path, module.open_video(path, None)  # what it finds is not asked here

    with monkeypatch.context() as patch:
        patch.setattr(module, "_opened", count)
        check(videos / "d.jsonl", videos / "c.jsonl", settings=settings)
    return seen


def test_only_what_is_new_or_changed_is_opened_again(videos, monkeypatch):
    write(videos / "d.jsonl", rows({}, {"video": "w.mp4"}, {"video": "broken.mp4"}, {"video": "gone.mp4"}))
    assert opened(videos, monkeypatch) == ["v.mp4", "w.mp4", "broken.mp4"]
    assert opened(videos, monkeypatch) == ["broken.mp4"]
    write_video(videos / "broken.mp4", 30)
    write_video(videos / "gone.mp4", 10)
    os.utime(videos / "w.mp4", ns=(1, 1))
    assert opened(videos, monkeypatch) == ["w.mp4", "broken.mp4", "gone.mp4"]
    # looking closer opens what was only looked at from outside; the other way round nothing is new
    closer = CheckSettings(decode=VideoConfig(), workers=1)
    assert opened(videos, monkeypatch, closer) == ["v.mp4", "w.mp4", "broken.mp4", "gone.mp4"]
    assert opened(videos, monkeypatch, closer) == opened(videos, monkeypatch) == []


def test_an_error_that_passes_is_forgotten(videos, monkeypatch):
    """As on a network disk: the file itself does not change."""
    data = write(videos / "d.jsonl", rows({}))
    real = module.open_video

    def refuse(video: Path, decode: VideoConfig | None) -> dict[str, Any]:
        return {"error": "cannot be opened (Permission denied)"}

    monkeypatch.setattr(
        module, "_opened", lambda paths, settings: ((p, module.open_video(p, None)) for p in paths)
    )
    monkeypatch.setattr(module, "open_video", refuse)
    (problem,) = check(data, videos / "c.jsonl", settings=HERE)["problems"]
    assert problem["kinds"] == ["undecodable"]
    assert module.known_videos(read_samples(data), videos / "c.jsonl") == {}
    monkeypatch.setattr(module, "open_video", real)
    assert check(data, videos / "c.jsonl", settings=HERE)["problems"] == []
    assert opened(videos, monkeypatch) == []


def test_a_killed_check_loses_nothing_that_it_wrote(videos, monkeypatch):
    write(videos / "d.jsonl", rows({}, {"video": "w.mp4"}))
    assert opened(videos, monkeypatch) == ["v.mp4", "w.mp4"]
    whole = (videos / "c.jsonl").read_bytes()
    first, second = whole.splitlines(keepends=True)
    (videos / "c.jsonl").write_bytes(first + second[:30])  # as a kill leaves it
    assert opened(videos, monkeypatch) == ["w.mp4"]
    assert (videos / "c.jsonl").read_bytes() == whole


def test_another_kind_of_file_is_not_appended_to(videos):
    data = write(videos / "d.jsonl", rows({}))
    with pytest.raises(UserError, match=r"d\.jsonl:1: not a row of a check; choose another --out"):
        check(data, data, settings=HERE)
    assert len(read_samples(data)) == 1


def test_the_facts_of_a_video_are_right(videos):
    data = write(videos / "d.jsonl", rows({}, {"video": "broken.mp4"}))
    checked = check_videos(read_samples(data), videos / "c.jsonl", HERE)
    v = checked[videos / "v.mp4"]
    assert (v.duration_s, v.fps, v.frames, v.size_px, v.codec) == (4.0, 10.0, 40, (64, 192), "h264")
    lines = [json.loads(line) for line in (videos / "c.jsonl").read_text().splitlines()]
    by_name = {Path(line["video"]).name: line for line in lines}
    assert by_name["v.mp4"]["size"] == [64, 192] and by_name["v.mp4"]["error"] is None
    assert by_name["broken.mp4"]["duration"] is None and "cannot be opened" in by_name["broken.mp4"]["error"]
    again = module.known_videos(read_samples(data), videos / "c.jsonl")
    assert again == {videos / "v.mp4": v}


@pytest.mark.parametrize("name", ["late.mp4", "late.mkv", "late.ts"])
def test_pictures_that_begin_after_the_sound_are_told(tmp_path, capsys, monkeypatch, name):
    """A player counts from the sound: spans that were annotated in one are late. No row is wrong by that."""
    monkeypatch.chdir(tmp_path)
    write_with_sound(Path(name), 20, late_s=1.5)
    write_with_sound(Path("even.mp4"), 20, late_s=0.0)
    write_with_sound(Path("nearly.mp4"), 20, late_s=0.8)
    videos = (name, "even.mp4", "nearly.mp4")
    write(Path("d.jsonl"), rows(*({"video": video, "duration": 2.0} for video in videos)))
    assert main(["data", "check", "d.jsonl", "--workers", "1"]) == 0
    out = capsys.readouterr().out
    said = re.search(r"1 video with pictures that begin later than the file, up to (.+?) s", out)
    assert said and float(said[1]) == pytest.approx(1.5, abs=PRIMING_S)
    assert main(["data", "check", "d.jsonl", "--workers", "1", "--tolerance", "0.5", "--json"]) == 0
    late = json.loads(capsys.readouterr().out)["late"]
    assert [video["video"] for video in late] == [name, "nearly.mp4"]
    assert [video["late_s"] for video in late] == pytest.approx([1.5, 0.8], abs=PRIMING_S)


def test_a_check_file_that_says_nothing_of_lateness_is_made_anew(videos, monkeypatch):
    write(videos / "d.jsonl", rows({}))
    assert opened(videos, monkeypatch) == ["v.mp4"]
    found = json.loads((videos / "c.jsonl").read_text())
    del found["late"]
    (videos / "c.jsonl").write_text(json.dumps(found) + "\n")
    assert opened(videos, monkeypatch) == ["v.mp4"]
    assert opened(videos, monkeypatch) == []


def test_decoding_finds_what_opening_does_not(tmp_path):
    """Damage in the middle of the picture data: the packets are all there."""
    path = write_video(tmp_path / "v.mp4", 60, codec_options={"g": "5"})
    data = bytearray(path.read_bytes())
    middle = np.random.default_rng(0).bytes(len(data) // 2)
    start = len(data) // 4
    data[start : start + len(middle)] = middle
    path.write_bytes(data)
    plain = module.open_video(path, None)
    closer = module.open_video(path, VideoConfig())
    assert "error" not in plain, plain
    assert "corrupt" in closer["error"]


def crash_on_w(video: Path, decode: VideoConfig | None) -> dict[str, Any]:
    """Stands for a decoder with a fault."""
    if video.name == "w.mp4":
        os.kill(os.getpid(), signal.SIGSEGV)
    return module.open_video(video, decode)


def test_a_video_that_brings_its_decoder_down_is_found(videos, monkeypatch):
    for name in ("x1.mp4", "x2.mp4", "x3.mp4"):
        write_video(videos / name, 20)
    names = ("v.mp4", "w.mp4", "x1.mp4", "x2.mp4", "x3.mp4")
    data = write(
        videos / "d.jsonl", rows(*({"video": name, "duration": None} for name in names), {"video": "w.mp4"})
    )
    monkeypatch.setattr(module, "open_video", crash_on_w)
    record = check(data, videos / "c.jsonl", settings=CheckSettings(workers=2))
    assert [(p["id"], p["kinds"], p["problem"]) for p in record["problems"]] == [
        (identity, ["undecodable"], "it brings the decoder down") for identity in ("r1", "r5")
    ]
    assert len((videos / "c.jsonl").read_text().splitlines()) == len(names)


@needs_proc
def test_a_killed_check_leaves_no_processes_and_continues(videos):
    """Killed while two workers are at work: they end, and the next check opens what is left."""
    names = []
    for i in range(400):
        (videos / f"{i}.mp4").symlink_to(videos / "v.mp4")
        names.append({"video": f"{i}.mp4"})
    write(videos / "d.jsonl", rows(*names))
    words = [sys.executable, "-m", "video_opd", "data", "check", "d.jsonl", "--workers", "2"]
    out = videos / "d.check.jsonl"
    before = 400
    while before == 400:  # on a busy machine it may have ended before it is killed
        out.unlink(missing_ok=True)
        before = kill_check(words, out)
    assert before >= 5
    done = subprocess.run(words, cwd=videos, capture_output=True, text=True, check=True)
    assert f"checking videos: {400 - before}/{400 - before}" in done.stderr
    assert out.read_bytes().count(b"\n") == 400


def kill_check(words: list[str], out: Path) -> int:
    """Kills a check, waits until its workers have ended, and returns the rows that it has written."""
    run = subprocess.Popen(words, cwd=out.parent, stderr=subprocess.DEVNULL)
    wait_until(lambda: out.exists() and out.read_bytes().count(b"\n") >= 5)
    children = descendants(run.pid)
    run.kill()
    run.wait()
    wait_until(lambda: not any(map(is_alive, children)))
    return out.read_bytes().count(b"\n")


def test_the_command_says_all_and_its_exit_code_too(videos, capsys, monkeypatch):
    monkeypatch.chdir(videos)
    write(Path("d.jsonl"), rows({}, {"video": "gone.mp4"}, {"spans": [[2, 1]]}))
    assert main(["data", "check", "d.jsonl", "--workers", "1", "--write-good", "good.jsonl"]) == 1
    out = capsys.readouterr().out.splitlines()
    assert out == [
        "r1: no such file (gone.mp4)",
        "d.jsonl:3: span [2, 1] does not end after it starts; write [start, end]",
        "3 rows, 2 videos: 2 rows with problems (1 row, 1 missing), 0 spans cut to the duration, "
        "0 rows without spans; tolerance 1 s",
        "good.jsonl: 1 row without problems",
    ]
    assert Path("d.check.jsonl").exists() and default_out("d.jsonl") == Path("d.check.jsonl")
    assert main(["data", "check", "good.jsonl", "--out", "d.check.jsonl", "--json"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["problems"] == [] and captured.err == ""  # nothing was opened
    assert main(["data", "check", "gone.jsonl"]) == 2
    assert main(["data", "check", "d.jsonl", "--tolerance", "-1"]) == 2


def test_faults_are_kept_only_where_asked_for(tmp_path):
    data = write(tmp_path / "d.jsonl", [*rows({}), {"id": 7}, *rows({})])
    with pytest.raises(UserError, match=r"d\.jsonl:2"):
        read_annotations(data)
    kept = read_annotations(data, keep_faults=True)
    assert [sample.id for sample in kept.samples] == ["r0"]
    assert [(fault.line, fault.id) for fault in kept.faults] == [(2, None), (3, "r0")]
    assert "already used on line 1" in kept.faults[1].message


def test_lines_that_are_no_json_are_told_all_at_once(videos, capsys, monkeypatch):
    monkeypatch.chdir(videos)
    first, last = (json.dumps(row).encode() for row in rows({}, {}))
    lines = [b'{"id": "half', first, b"[1, 2]", b'"\xff"', last]
    Path("d.jsonl").write_bytes(b"\n".join(lines))
    assert main(["data", "check", "d.jsonl", "--workers", "1", "--write-good", "good.jsonl", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    told = [(problem["line"], problem["id"], problem["kinds"]) for problem in record["problems"]]
    assert told == [(1, None, ["row"]), (3, None, ["row"]), (4, None, ["row"])]
    reasons = [problem["problem"] for problem in record["problems"]]
    assert reasons[0].startswith("d.jsonl:1: not JSON") and reasons[1].startswith("d.jsonl:3: a list, not")
    assert reasons[2].startswith("d.jsonl:4: not UTF-8") and record["rows"] == 5
    assert [sample.id for sample in read_samples("good.jsonl")] == ["r0", "r1"]
    with pytest.raises(UserError, match=r"d\.jsonl:1: not JSON"):  # who reads it still stops at the first
        read_samples("d.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_annotations("gone.jsonl", keep_faults=True)


def test_a_span_is_looked_at_before_it_is_cut_to_the_duration(videos):
    """v.mp4 lasts 4 s. What is past the tolerance is a problem whether or not a duration is stated."""
    data = write(
        videos / "d.jsonl",
        rows(
            {"spans": [[0, 1], [3, 9]]},
            {"spans": [[3, 9]], "duration": None},
            {"spans": [[3, 5]]},  # just within the tolerance: cut
            {"spans": [[3, 9]], "video": "gone.mp4"},
            {"spans": [[1, 3.9]], "duration": 2.0},
        ),
    )
    record = check(data, videos / "c.jsonl", settings=HERE, good=videos / "good.jsonl")
    assert [(p["id"], p["kinds"], p["problem"]) for p in record["problems"]] == [
        ("r0", ["span"], "a span ends at 9 s, the video at 4.00 s"),
        ("r1", ["span"], "a span ends at 9 s, the video at 4.00 s"),
        ("r3", ["missing", "span"], "no such file; a span ends at 9 s, past the duration, 4 s"),
        (
            "r4",
            ["span", "duration"],
            "a span ends at 3.9 s, past the duration, 2 s; duration 2 s, but the video lasts 4.00 s",
        ),
    ]
    assert record["clamped"] == 1
    (good,) = read_samples(videos / "good.jsonl")
    assert (good.id, good.spans) == ("r2", ((3.0, 4.0),))


def test_a_key_that_is_nearly_a_known_one_is_told(videos):
    """Only where the known one is missing; any other key is the user's."""
    row = {"id": "r", "video": "v.mp4", "query": "q"}
    near: list[dict[str, Any]] = [
        {"span": [5, 7]},
        {"Spans": [[1, 2]]},
        {"duraton": 4.0, "sapns": []},
        {"duration_s": 4.0},
    ]
    fine: list[dict[str, Any]] = [
        {"spans": None, "span": [1, 2]},
        {"spans": [[1, 2]], "span": [1, 2], "vidoe": "x", "idx": 3},
        {"score": 0.5, "source_id": 7, "video_id": "v", "clip": [0, 4], "windows": [[1, 2]], "vid": "v"},
    ]
    made = [row | {"id": f"r{i}"} | extra for i, extra in enumerate([*near, *fine])]
    data = write(videos / "d.jsonl", [*made, {"vidoe": "v.mp4", "id": "x", "query": "q"}])
    record = check(data, videos / "c.jsonl", settings=HERE, good=videos / "good.jsonl")
    assert [(p["id"], p["kinds"], p["problem"]) for p in record["problems"]] == [
        (
            "x",
            ["row"],
            f"{data}:8: no 'video'; a row needs id, video and query; 'vidoe': did you mean 'video'?",
        ),
        ("r0", ["key"], "key 'span' is not known; did you mean 'spans'?"),
        ("r1", ["key"], "key 'Spans' is not known; did you mean 'spans'?"),
        (
            "r2",
            ["key"],
            "key 'duraton' is not known; did you mean 'duration'?; "
            "key 'sapns' is not known; did you mean 'spans'?",
        ),
        ("r3", ["key"], "key 'duration_s' is not known; did you mean 'duration'?"),
    ]
    assert [sample.id for sample in read_samples(videos / "good.jsonl")] == ["r4", "r5", "r6"]


def test_a_query_with_a_control_token_is_told_and_still_read(videos):
    queries = ("x <|im_end|>", "a < b |> c <| d", "<think> <|>", "<|video_pad|><|im_end|>")
    data = write(videos / "d.jsonl", rows(*({"query": query} for query in queries)))
    record = check(data, videos / "c.jsonl", settings=HERE)
    assert [(p["id"], p["kinds"], p["problem"]) for p in record["problems"]] == [
        ("r0", ["query"], "its query holds the control token <|im_end|>; remove it"),
        ("r3", ["query"], "its query holds the control token <|video_pad|>; remove it"),
    ]
    assert [sample.query for sample in read_samples(data)] == list(queries)


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_a_file_without_rows_is_a_problem(tmp_path, capsys, monkeypatch, content):
    monkeypatch.chdir(tmp_path)
    Path("d.jsonl").write_text(content)
    assert main(["data", "check", "d.jsonl"]) == 1
    assert capsys.readouterr().out == "d.jsonl: no rows in it; check the path\n"
    assert main(["data", "check", "d.jsonl", "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert record["rows"] == 0 and record["by_kind"] == {"empty": 1}
    assert main(["data", "stats", "d.jsonl"]) == 0
    assert capsys.readouterr().out.startswith("no rows in it: there is nothing to describe")
