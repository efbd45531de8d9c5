"""Every public format: a file as small as it can be, and its rows computed by hand."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from annotation_cases import HIREST, converted, released_row, time_r1_row, vtimellm_row, write
from growth_cases import is_linear

from video_opd.convert.formats import FORMATS
from video_opd.convert.formats.durations import Durations
from video_opd.convert.outcome import Conversion
from video_opd.data.annotations import read_samples, write_rows
from video_opd.errors import UserError


def plain(row: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(row[key] for key in ("id", "video", "query", "duration", "spans", "source"))


def reasons(result: Conversion) -> dict[str, int]:
    return result.reasons


def test_timelens_bench(tmp_path):
    file = write(
        tmp_path / "charades-timelens.json",
        {
            "AAAAA": {
                "duration": 30.5,
                "spans": [[1, 4.5], [28.0, 31.0]],
                "queries": ["  a dog\n barks. ", "the end..."],
            },
            "BBBBB": {"duration": 10, "spans": [[2, 3]], "queries": ["one", "two"]},
        },
    )
    rows, result = converted(file)
    assert [plain(row) for row in rows] == [
        ("timelens-bench:AAAAA:0", "AAAAA.mp4", "a dog barks", 30.5, [[1.0, 4.5]], "timelens-bench"),
        ("timelens-bench:AAAAA:1", "AAAAA.mp4", "the end", 30.5, [[28.0, 30.5]], "timelens-bench"),
    ]
    assert reasons(result) == {"unequal lists": 1}
    assert "'BBBBB'" in result.problems[0].where and "1 and 2" in result.problems[0].detail
    (cut,) = result.cut
    assert (cut.id, cut.from_s, cut.to_s) == ("timelens-bench:AAAAA:1", 31.0, 30.5)


def test_timelens_100k(tmp_path):
    file = write(
        tmp_path / "timelens-100k.jsonl",
        [
            {
                "source": "cosmo_cap",
                "video_path": "cosmo/abc.mp4",
                "duration": 60.0,
                "events": [
                    {"query": "A man  runs.", "span": [[2.0, 9.5]]},
                    {"query": "flat", "span": [3, 4]},
                    {"query": "twice", "span": [[1, 2], [5, 7]]},
                    {"query": "no span"},
                ],
            },
            {"source": "didemo", "video_path": "x.mp4", "duration": 5, "events": "none"},
        ],
    )
    rows, result = converted(file)
    assert [plain(row) for row in rows] == [
        ("timelens-100k:abc:0", "cosmo/abc.mp4", "A man runs", 60.0, [[2.0, 9.5]], "cosmo_cap"),
        ("timelens-100k:abc:1", "cosmo/abc.mp4", "flat", 60.0, [[3.0, 4.0]], "cosmo_cap"),
        ("timelens-100k:abc:2", "cosmo/abc.mp4", "twice", 60.0, [[1.0, 2.0], [5.0, 7.0]], "cosmo_cap"),
    ]
    assert reasons(result) == {"no span": 1, "not a list": 1}
    assert result.problems[1].where.endswith(":2")  # the line


def test_time_r1(tmp_path):
    clip = {"video": "./dataset/v/xyz_00:00:39:000.mp4", "video_start": 39.0, "video_end": 89.0}
    file = write(
        tmp_path / "train_2k5.json",
        [
            time_r1_row(),
            time_r1_row(timestamp=[10.0, 70.0], sentence="Again", qid=None),
            time_r1_row(**clip),
            time_r1_row(timestamp=[60.0, 70.0]),
        ],
    )
    rows, result = converted(file)
    assert [plain(row) for row in rows] == [
        ("time-r1:abc", "dataset/v/abc.mp4", "a hanger", 50.0, [[1.0, 4.0]], "cosmo"),
        ("time-r1:abc#1", "dataset/v/abc.mp4", "again", 50.0, [[10.0, 50.0]], "time-r1"),
        (
            "time-r1:xyz_00:00:39:000",
            "dataset/v/xyz_00:00:39:000.mp4",
            "a hanger",
            50.0,
            [[1.0, 4.0]],
            "cosmo",
        ),
    ]
    assert rows[2]["clip"] == [39.0, 89.0] and rows[0]["difficulty"] == 50.0
    assert (len(result.cut), result.on_clips, reasons(result)) == (1, 1, {"past the end": 1})


def test_time_r1_whole_videos_move_the_times(tmp_path):
    clip = {"video_start": 39.0, "video_end": 89.0}
    file = write(tmp_path / "t.json", [time_r1_row(**clip), time_r1_row(timestamp=[49.9, 51.0], **clip)])
    rows, _ = converted(file, clips="whole")
    # the whole video's duration is not stated, so nothing can be cut to it
    assert [(row["spans"], row["duration"]) for row in rows] == [
        ([[40.0, 43.0]], None),
        ([[88.9, 90.0]], None),
    ]
    rows, result = converted(file, clips="whole", durations=Durations({"abc": 89.5}))
    assert [(row["spans"], row["duration"]) for row in rows] == [
        ([[40.0, 43.0]], 89.5),
        ([[88.9, 89.5]], 89.5),
    ]
    assert len(result.cut) == 1


def test_tvgbench(tmp_path):
    row = {
        "path": "./v/s1.avi",
        "question": "Where is it? ",
        "answer": "13.4-28.1",
        "start": None,
        "end": None,
        "duration": 30.0,
        "dataset_name": "tacos",
    }
    ego = {"start": 90.5, "end": 120.5, "bins": {"dataset": "egonlq"}, "dataset_name": None}
    file = write(
        tmp_path / "tvgbench.json",
        [row, row | ego, row | {"answer": "5.0-5.0"}, row | {"answer": "soon"}, row | {"answer": "1.2.3-4"}],
    )
    rows, result = converted(file)
    assert [plain(r) for r in rows] == [
        ("tvgbench:s1", "v/s1.avi", "Where is it?", 30.0, [[13.4, 28.1]], "tacos"),
        ("tvgbench:s1#1", "v/s1.avi", "Where is it?", 30.0, [[13.4, 28.1]], "egonlq"),
    ]
    assert rows[1]["clip"] == [90.5, 120.5]
    assert reasons(result) == {"empty span": 1, "not a span": 1, "not numbers": 1}


def test_charades_text_with_its_table_of_durations(tmp_path):
    file = write(
        tmp_path / "charades_sta_test.txt",
        "AAAAA 24.3 30.4##person turn a light on.\n\nAAAAA 0.0 2.5##a ## in it.\nBBBBB x 2##q\nBBBBB\n",
    )
    table = write(tmp_path / "Charades_v1_test.csv", 'id,subject,length\nAAAAA,"a, b",29.5\nBBBBB,c,9\n')
    from video_opd.convert.formats.durations import read_durations

    rows, result = converted(file, "charades-sta", durations=read_durations([table]))
    assert [plain(row) for row in rows] == [
        ("charades-sta:AAAAA", "AAAAA.mp4", "person turn a light on", 29.5, [[24.3, 29.5]], "charades-sta"),
        ("charades-sta:AAAAA#1", "AAAAA.mp4", "a ## in it", 29.5, [[0.0, 2.5]], "charades-sta"),
    ]
    assert reasons(result) == {"not numbers": 1, "not a line": 1}
    assert [problem.where.rpartition(":")[2] for problem in result.problems] == ["4", "5"]
    rows, result = converted(file, "charades-sta")
    assert rows[0]["duration"] is None and result.without_duration == 2 and not result.cut


CAPTIONS = {"duration": 82.7, "timestamps": [[0.8, 19.9], [60, 90]], "sentences": [" Two men talk. ", "End"]}


@pytest.mark.parametrize(
    ("vid", "format"), [("AAAAA", "charades-sta"), ("v_abcdefghijk", "activitynet-captions")]
)
def test_captions_are_told_apart_by_their_ids(tmp_path, vid, format):
    rows, result = converted(write(tmp_path / "test.json", {vid: CAPTIONS}))
    assert result.format == format
    assert [plain(row) for row in rows] == [
        (f"{format}:{vid}:0", f"{vid}.mp4", "Two men talk", 82.7, [[0.8, 19.9]], format),
        (f"{format}:{vid}:1", f"{vid}.mp4", "End", 82.7, [[60.0, 82.7]], format),
    ]


def test_captions_of_neither_set_must_be_named(tmp_path):
    file = write(tmp_path / "tacos.json", {"s13-d21": CAPTIONS})
    with pytest.raises(UserError, match="charades-sta and activitynet-captions; say which"):
        converted(file)
    rows, _ = converted(file, "activitynet-captions", name="tacos")
    assert plain(rows[0])[0] == "tacos:s13-d21:0" and rows[0]["source"] == "tacos"


def test_qvhighlights(tmp_path):
    row = {
        "qid": 2579,
        "query": "A girl  cooks. ",
        "duration": 150,
        "vid": "NUsG9BgSes0_210.0_360.0",
        "relevant_clip_ids": [41],
        "saliency_scores": [[1, 1, 2]],
        "relevant_windows": [[82, 150], [0, 4], [90, 80]],
    }
    test_split = {key: row[key] for key in ("query", "duration", "vid")} | {"qid": 7}
    file = write(tmp_path / "val.jsonl", [row, test_split, row | {"qid": 8, "relevant_windows": []}])
    rows, result = converted(file)
    assert [plain(r) for r in rows] == [
        (
            "qvhighlights:2579",
            "NUsG9BgSes0_210.0_360.0.mp4",
            "A girl  cooks.",
            150.0,
            [[82.0, 150.0], [0.0, 4.0]],
            "qvhighlights",
        ),
        ("qvhighlights:7", "NUsG9BgSes0_210.0_360.0.mp4", "A girl  cooks.", 150.0, [], "qvhighlights"),
    ]
    assert (result.unannotated, reasons(result)) == (1, {"no span": 1})
    (span,) = [problem for problem in result.problems if problem.what == "span"]
    assert span.reason == "reversed span" and result.to_json()["dropped_spans"] == 1


def test_didemo_segments_become_seconds_and_annotators_spans(tmp_path):
    row = {
        "annotation_id": 5,
        "description": "the cat goes.",
        "video": "1@N00_2.mov",
        "times": [[3, 3], [1, 4], [5, 5], [1, 4]],
        "num_segments": 6,
    }
    file = write(tmp_path / "val_data.json", [row, row | {"annotation_id": 6, "times": [[4, 2]]}])
    rows, result = converted(file, durations=Durations({"1@N00_2": 28.2}))
    assert [plain(r) for r in rows] == [
        (
            "didemo:5",
            "1@N00_2.mov",
            "the cat goes",
            28.2,
            [[5.0, 25.0], [15.0, 20.0], [25.0, 28.2]],
            "didemo",
        )
    ]
    assert rows[0]["times"] == row["times"]
    assert reasons(result) == {"reversed span": 1} and not result.cut  # the end is where the format puts it
    rows, _ = converted(file)
    assert rows[0]["spans"] == [[5.0, 25.0], [15.0, 20.0], [25.0, 30.0]] and rows[0]["duration"] is None


def test_hirest(tmp_path):
    file = write(tmp_path / "all_data_val.json", HIREST)
    with pytest.raises(UserError, match="hirest and hirest-steps"):
        converted(file)
    rows, result = converted(file, "hirest")
    assert [plain(row) for row in rows] == [
        ("hirest:abc", "abc.mp4", "Make a Cake", 207.1, [[50.0, 121.0]], "hirest")
    ]
    assert reasons(result) == {"no moment": 2}
    rows, result = converted(file, "hirest-steps")
    assert [plain(row) for row in rows] == [
        ("hirest-steps:abc:0", "abc.mp4", "take flour", 207.1, [[50.0, 58.0]], "hirest-steps")
    ]
    assert rows[0]["prompt"] == "Make a Cake"
    assert reasons(result) == {"no moment": 2, "no query": 1}


@pytest.mark.parametrize("suffix", [".pkl", ".json"])
def test_queryd(tmp_path, suffix):
    captions = {"video-abc": [["a", "man"], ["he", "runs", "."]], "video-def": [["x"]], "video-ghi": [["y"]]}
    times = {"video-abc": [[0.5, 2.0], [3, 4]], "video-def": [[-1.0, 2.0]]}
    file = write(tmp_path / f"raw_captions_combined_filtered-v2{suffix}", captions)
    with pytest.raises(UserError, match="times_captions_combined_filtered-v2"):
        converted(file)
    write(tmp_path / f"times_captions_combined_filtered-v2{suffix}", times)
    rows, result = converted(file, durations=Durations({"abc": 3.5}))
    assert [plain(row) for row in rows] == [
        ("queryd:abc:0", "abc.mp4", "a man", 3.5, [[0.5, 2.0]], "queryd"),
        ("queryd:abc:1", "abc.mp4", "he runs", 3.5, [[3.0, 3.5]], "queryd"),
    ]
    assert reasons(result) == {"starts before 0": 1, "unequal lists": 1}
    (tmp_path / "train_list.txt").write_text("video-abc\n")
    rows, result = converted(file, split="train")
    assert len(rows) == result.read == 2
    with pytest.raises(UserError, match=r"val_list\.txt"):
        converted(file, split="val")


def test_vtimellm(tmp_path):
    dense = "From <s0> to <e0>, Woman is counting money. From <s1> to <e1>, two people, shaking hands."
    file = write(
        tmp_path / "stage2.json",
        [
            vtimellm_row("<video>\nWhat happened?", dense),
            vtimellm_row(
                "<video>\nDuring which frames can we see a dog?",
                "From <s0> to <e0>.",
                "What happens from <s1> to <e1>?",
                "A cat sits down.",
                id="two",
            ),
            vtimellm_row("<video>\nIs there a cat from <s0> to <e0>?", "Yes.", id="no"),
            {"source": "videochatgpt", "id": "v_1", "conversations": []},
        ],
    )
    rows, result = converted(file)
    name = "129.8-184.0"
    assert [plain(row) for row in rows] == [
        (f"vtimellm:abc:{name}:0", "abc.mp4", "woman is counting money", 54.2, [[0.0, 9.4]], "internvid"),
        (f"vtimellm:abc:{name}:1", "abc.mp4", "two people, shaking hands", 54.2, [[49.4, 54.2]], "internvid"),
        (f"vtimellm:two:{name}:0", "two.mp4", "a dog", 54.2, [[0.0, 9.4]], "internvid"),
        (f"vtimellm:two:{name}:1", "two.mp4", "a cat sits down", 54.2, [[49.4, 54.2]], "internvid"),
    ]
    assert rows[0]["clip"] == [129.8, 184.0] and result.on_clips == 4
    assert reasons(result) == {"no event": 1, "no times": 1}
    rows, _ = converted(file, clips="whole")
    assert [row["spans"] for row in rows[:2]] == [[[129.8, 139.2]], [[179.2, 189.8]]]


def test_long_answers_of_vtimellm_take_linear_time(tmp_path):
    """With a search from every space, 100,000 of them took 90 seconds."""

    def file(answer: str) -> Path:
        return write(tmp_path / f"{len(answer)}.json", [vtimellm_row("What?", answer)])

    def convert_one(file: Path) -> None:
        assert len(converted(file)[0]) == 1

    assert is_linear(lambda n: file("From <s0> to <e0>, x" + " " * n + "y"), convert_one, 20_000)
    assert is_linear(lambda n: file("From <s0> to <e0>, a. " * (n // 22)), convert_one, 20_000)


def test_howto_interlink(tmp_path):
    clips = [
        {"clip_id": "0", "clip": "0:00:05 - 0:00:11", "caption": 'He says "hi".'},
        {"clip_id": "3", "clip": "1:02:03 - 1:02:04", "caption": "two"},
        {"clip_id": "4", "clip": "later", "caption": "three"},
    ]
    cell = '"' + json.dumps(clips).replace('"', '""') + '"'
    file = write(
        tmp_path / "Howto-Interlink7M_val.tsv", f"video\tclips\tx\na/abc.mp4\t{cell}\t1\na/d.mp4\tnope\t\n"
    )
    rows, result = converted(file)
    assert [plain(row) for row in rows] == [
        ("howto-interlink7m:abc:0", "a/abc.mp4", 'He says "hi"', None, [[5.0, 11.0]], "howto-interlink7m"),
        ("howto-interlink7m:abc:3", "a/abc.mp4", "two", None, [[3723.0, 3724.0]], "howto-interlink7m"),
    ]
    assert reasons(result) == {"not a span": 1, "not JSON": 1}
    assert result.without_duration == 2


def test_videomind(tmp_path):
    row = {"vid": "a.b", "duration": 12.5, "query": "A  cat.", "span": [1, 2]}
    rows, _ = converted(write(tmp_path / "anno.jsonl", [row, row | {"span": [[3, 4]], "query": "dog"}]))
    assert [plain(r) for r in rows] == [
        ("videomind:a.b", "a.b.mp4", "A cat", 12.5, [[1.0, 2.0]], "videomind"),
        ("videomind:a.b#1", "a.b.mp4", "dog", 12.5, [[3.0, 4.0]], "videomind"),
    ]


def test_our_own_rows_keep_their_ids_and_keys(tmp_path):
    row = {"id": "k:1", "video": "v/a.mp4", "query": "q.", "duration": 9.0, "spans": [[1, 20]], "more": [1]}
    rows, result = converted(write(tmp_path / "list.json", [row, row, row | {"id": "u", "spans": None}]))
    assert [plain(r) for r in rows] == [
        ("k:1", "v/a.mp4", "q.", 9.0, [[1.0, 9.0]], "video-opd"),
        ("k:1#1", "v/a.mp4", "q.", 9.0, [[1.0, 9.0]], "video-opd"),
        ("u", "v/a.mp4", "q.", 9.0, [], "video-opd"),
    ]
    assert rows[0]["more"] == [1] and result.unannotated == 1


def test_our_own_rows_without_spans_are_read_as_they_are_written(tmp_path):
    """The writer of data files writes an empty list."""
    row = {"id": "a", "video": "v.mp4", "query": "q", "spans": [[1, 2]]}
    others = ({"id": "b", "spans": []}, {"id": "c", "spans": None})
    samples = read_samples(write(tmp_path / "d.jsonl", [row, *(row | other for other in others)]))
    write_rows(tmp_path / "written.jsonl", samples)
    assert '"spans": []' in (tmp_path / "written.jsonl").read_text()
    (tmp_path / "table.csv").write_text(
        'id,video,query,spans\na,v.mp4,q,"[[1, 2]]"\nb,v.mp4,q,[]\nc,v.mp4,q,\n'
    )
    for name in ("written.jsonl", "table.csv"):
        rows, result = converted(tmp_path / name)
        assert [(r["id"], r["spans"]) for r in rows] == [("a", [[1.0, 2.0]]), ("b", []), ("c", [])]
        assert (result.unannotated, result.problems) == (2, [])


# The turns of the released data set, typed here: figure 7 with its query, as the data set holds it.
def turn(query: str, quotes: str = "“”") -> str:
    a, b = quotes[0], quotes[1]
    return (
        f"To accurately pinpoint the event {a}{query}{b} in the video, determine the precise time "
        f"period of the event. Provide the start and end times (in seconds, precise to two decimal places) "
        f"in the format {a}start time to end time{b}. For example: {a}12.54 to 17.83{b}."
    )


def test_video_opd_dataset(tmp_path):
    twice = "the sign “in the video, determine” is read."
    rows, result = converted(
        write(
            tmp_path / "train.jsonl",
            [
                released_row("a dog barks.", "12.54 to 17.83", user_query=turn("a dog barks.")),
                released_row("", "3.00 to 9.50", user_query=f"<video>\n{turn(twice)}"),
                released_row(
                    "", "0 to 2", "videos/hirest/x.y.mkv", user_query=turn("it's", '""').replace(". ", ".\n")
                ),
            ],
        )
    )
    name = "video-opd-dataset"
    assert [plain(row) for row in rows] == [
        (f"{name}:abc", "videos/didemo/abc.mp4", "a dog barks.", None, [[12.54, 17.83]], "didemo"),
        (f"{name}:abc#1", "videos/didemo/abc.mp4", twice, None, [[3.0, 9.5]], "didemo"),
        (f"{name}:x.y", "videos/hirest/x.y.mkv", "it's", None, [[0.0, 2.0]], "hirest"),
    ]
    assert all(list(row) == ["id", "video", "query", "duration", "spans", "source"] for row in rows)
    assert result.format == name and result.without_duration == 3
    ((note, count),) = result.notes.items()  # straight quotation marks: the trained prompt has curly ones
    assert count == 1 and "another typography" in note and result.to_json()["notes"] == {note: 1}


def said(*turns: tuple[Any, Any]) -> str:
    return json.dumps([{"role": role, "content": content} for role, content in turns])


SYSTEM = ("system", "You are a video analysis expert.")
USER, ANSWER = ("user", turn("a dog barks")), ("assistant", "12.54 to 17.83")
FILM = {"type": "video", "video": "videos/didemo/abc.mp4"}


@pytest.mark.parametrize(
    "messages",
    [
        said(SYSTEM, USER, ANSWER),
        said(USER, ANSWER),
        said(SYSTEM, ("user", [FILM, {"type": "text", "text": USER[1]}]), ANSWER),
        said(
            SYSTEM, ("user", [{"text": "<video>"}, {"text": USER[1]}]), ("assistant", [{"text": ANSWER[1]}])
        ),
        json.loads(said(SYSTEM, USER, ANSWER)),  # a list of objects, no text
        {"role": ["system", "user", "assistant"], "content": [SYSTEM[1], USER[1], ANSWER[1]]},
    ],
)
def test_messages_that_say_what_the_columns_say(tmp_path, messages):
    (row,), _ = converted(write(tmp_path / "train.jsonl", [released_row(messages=messages)]))
    assert (row["query"], row["spans"]) == ("a dog barks", [[12.54, 17.83]])


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        # another instruction
        ({"user_query": "When does a dog bark?"}, "another instruction (user_query 'When does a dog bark?')"),
        ({"user_query": turn("a dog barks") + " Think first."}, "another instruction"),
        ({"user_query": turn("a dog barks").replace("two decimal", "three decimal")}, "another instruction"),
        ({"user_query": turn("  ")}, "no query"),
        (
            {"system_prompt": "You are a helpful assistant."},
            "another instruction (system_prompt 'You are a h",
        ),
        ({"system_prompt": None}, "not text (system_prompt is a NoneType)"),
        ({"user_query": None}, "not text (user_query is a NoneType)"),
        ({"user_query": ["To"]}, "not text (user_query is a list)"),
        # answers
        ({"assistant_response": "I do not know."}, "unreadable answer ('I do not know.')"),
        ({"assistant_response": "frames 12 to 17"}, "unreadable answer"),
        ({"assistant_response": "17.83 to 12.54"}, "unreadable answer ('17.83 to 12.54')"),
        ({"assistant_response": ""}, "unreadable answer"),
        ({"assistant_response": 12.54}, "not text (assistant_response is a float)"),
        # videos
        ({"video": None}, "no video (None)"),
        ({"video": ""}, "no video"),
        ({"video": "videos/didemo/"}, "two videos"),
        ({"video": 7}, "no video (7)"),
        ({"video_filename": "def.mp4"}, "two videos ('videos/didemo/abc.mp4', video_filename 'def.mp4')"),
        # messages
        ({"messages": None}, "not a list (messages is a NoneType)"),
        ({"messages": "[{"}, "not a list"),
        ({"messages": json.dumps(said(SYSTEM, USER, ANSWER))}, "not a list"),  # JSON in JSON
        ({"messages": "[" * 10_000}, "not a list"),
        ({"messages": "[[[]]]"}, "messages differ (a turn of None that no column holds)"),
        ({"messages": "[]"}, "messages differ (no user turn)"),
        ({"messages": said(SYSTEM, USER)}, "messages differ (no assistant turn)"),
        ({"messages": said(SYSTEM, USER, ANSWER, ANSWER)}, "messages differ (a turn of 'assistant' that"),
        ({"messages": said(USER, ("tool", "x"), ANSWER)}, "messages differ (a turn of 'tool' that"),
        ({"messages": said(("system", "Be brief."), USER, ANSWER)}, "messages differ (system_prompt "),
        (
            {"messages": said(SYSTEM, ("user", turn("a cat barks")), ANSWER)},
            "messages differ (user_query '… event “a dog barks” in the video, determine the prec",
        ),
        (
            {"messages": said(SYSTEM, USER, ("assistant", "12.54 to 17.84"))},
            "messages differ (assistant_response '…54 to 17.83', in messages '…54 to 17.84')",
        ),
        ({"messages": said(SYSTEM, USER, ("assistant", [12.54, 17.83]))}, "messages differ"),
        (
            {"messages": said(SYSTEM, USER, ("assistant", {"text": "x"}))},
            "not text (the assistant turn in mess",
        ),
        (
            {"messages": said(SYSTEM, ("user", [{"video": "d.mp4"}, {"text": USER[1]}]), ANSWER)},
            "messages differ (the video 'videos/didemo/abc.mp4', 'd.mp4')",
        ),
        ({"messages": said(SYSTEM, ("user", "\ud800"), ANSWER)}, "messages differ"),
    ],
)
def test_released_rows_that_do_not_fit_are_named(tmp_path, changes, problem):
    row = released_row()
    wrong = released_row(**changes) if "video" not in changes else row | changes
    _, result = converted(write(tmp_path / "train.jsonl", [row, wrong, row]), "video-opd-dataset")
    (found,) = result.problems
    assert (result.written, found.where, found.what) == (2, f"{tmp_path / 'train.jsonl'}:2", "question")
    assert found.line().partition(":2: ")[2].startswith(problem)


def test_every_format_is_tried_here() -> None:
    """A format that is added needs a miniature file."""
    text = Path(__file__).read_text(encoding="utf-8").partition("def test_every_format")[0]
    assert [name for name in FORMATS if f'"{name}' not in text] == []


# --- back again --------------------------------------------------------------------------------------


def test_qvhighlights_comes_back_as_it_was(tmp_path):
    rows = [
        {"qid": i, "query": f"query {i}", "duration": 150, "vid": f"v{i}_0.0", "relevant_windows": windows}
        for i, windows in enumerate([[[0, 150]], [[2, 4], [10, 22]], [[148, 150]]])
    ]
    made, _ = converted(write(tmp_path / "val.jsonl", rows))
    back = [
        {
            "qid": row["qid"],
            "query": row["query"],
            "duration": row["duration"],
            "vid": row["vid"],
            "relevant_windows": row["spans"],
        }
        for row in made
    ]
    assert back == rows


def test_timelens_bench_comes_back_as_it_was(tmp_path):
    source = {
        "AAAAA": {"duration": 30.5, "spans": [[1.0, 4.5], [2.0, 3.0]], "queries": ["a dog", "a cat"]},
        "BBBBB": {"duration": 10.0, "spans": [[0.0, 10.0]], "queries": ["all of it"]},
    }
    made, _ = converted(write(tmp_path / "b.json", source))
    back: dict[str, Any] = {}
    for row in made:
        video = back.setdefault(
            Path(row["video"]).stem, {"duration": row["duration"], "spans": [], "queries": []}
        )
        video["spans"] += row["spans"]
        video["queries"].append(row["query"])
    assert back == source
