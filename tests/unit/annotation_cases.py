"""Rows of public formats, and their conversion."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

from video_opd.convert.conversion import ConvertSettings, convert
from video_opd.convert.outcome import Conversion
from video_opd.data.annotations import read_samples
from video_opd.data.prompts import STYLES


def write(path: Path, content: Any) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    elif path.suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def converted(
    path: Path, format: str | None = None, **settings: Any
) -> tuple[list[dict[str, Any]], Conversion]:
    """The rows of ``path`` as a data file, which must read as one."""
    out = path.parent / "out.jsonl"
    result = convert(path, out, format, ConvertSettings(**settings))
    assert result.read == result.written + result.dropped
    rows = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    assert [sample.id for sample in read_samples(out)] == [row["id"] for row in rows]
    assert len(rows) == result.written
    return rows, result


def time_r1_row(**changes: Any) -> dict[str, Any]:
    row = {
        "video": "./dataset/v/abc.mp4",
        "duration": 50.0,
        "timestamp": [1.0, 4.0],
        "sentence": " A Hanger. ",
        "qid": "my|cosmo|abc| A Hanger. ",
        "video_start": None,
        "video_end": None,
        "difficulty": 50.0,
        "pred": [0.0, 3.0],
    }
    return row | changes


HIREST = {
    "Make a Cake": {
        "abc.mp4": {
            "relevant": True,
            "clip": True,
            "v_duration": 207.1,
            "bounds": [50, 121],
            "steps": [
                {"index": 0, "heading": "take flour ", "absolute_bounds": [50, 58]},
                {"index": 1, "heading": "", "absolute_bounds": [58, 60]},
            ],
        },
        "def.mp4": {"relevant": True, "clip": False, "v_duration": 9.0, "bounds": [0, 0], "steps": []},
    },
    "Fly": {"abc.mp4": {"relevant": False, "clip": False, "v_duration": 9.0, "bounds": [0, 0], "steps": []}},
}


def vtimellm_row(*turns: str, **changes: Any) -> dict[str, Any]:
    speakers = ("human", "gpt")
    return {
        "source": "internvid",
        "id": "abc",
        "conversations": [{"from": speakers[i % 2], "value": text} for i, text in enumerate(turns)],
        "meta": {
            "split": [129.8, 184.0],
            "duration": 54.2,
            "token": {"<s0>": 0, "<e0>": 9.4, "<s1>": 49.4, "<e1>": 60},
        },
    } | changes


def released_row(
    query: str = "a dog barks",
    answer: str = "12.54 to 17.83",
    video: str = "videos/didemo/abc.mp4",
    **changes: Any,
) -> dict[str, Any]:
    """A row of the released data set of Video-OPD; its ``messages`` hold what its columns do."""
    _, subset, file = video.split("/")
    row = {
        "video": video,
        "video_filename": file,
        "subset": subset,
        "system_prompt": STYLES["paper"].system,
        "user_query": STYLES["paper"].ask(query),
        "assistant_response": answer,
    } | changes
    turns = {"system": "system_prompt", "user": "user_query", "assistant": "assistant_response"}
    messages = [{"role": role, "content": row[column]} for role, column in turns.items()]
    if isinstance(row["user_query"], str) and not row["user_query"].startswith("<video>"):
        messages[1]["content"] = f"<video>{row['user_query']}"
    return {**row, "messages": changes.get("messages", json.dumps(messages, default=str))}


ROW: dict[str, Any] = {
    "qid": 1,
    "query": "a dog",
    "duration": 10.0,
    "vid": "abc",
    "relevant_windows": [[1, 2]],
}
FLAT: dict[str, Any] = {"vid": "abc", "duration": 10.0, "query": "a dog", "span": [1, 2]}

# A file as small as it can be of every format: its name, and its content.
MINIATURES: dict[str, tuple[str, Any]] = {
    "timelens-bench": (
        "a.json",
        {video: {"duration": 9, "spans": [[1, 2]], "queries": ["q"]} for video in "ABC"},
    ),
    "timelens-100k": (
        "a.jsonl",
        [{"source": "s", "video_path": "v.mp4", "duration": 9, "events": [{"query": "q", "span": [[1, 2]]}]}],
    ),
    "time-r1": ("a.json", [time_r1_row(video_start=3.0, video_end=53.0)]),
    "tvgbench": ("a.json", [{"path": "v.mp4", "question": "q", "answer": "1-2", "duration": 9, "start": 1}]),
    "charades-sta": ("a.txt", "ABCDE 1.0 2.0##q\nABCDE 3 4##r\n"),
    "activitynet-captions": (
        "a.json",
        {f"v_abcdefghij{end}": {"duration": 9, "timestamps": [[1, 2]], "sentences": ["q"]} for end in "xyz"},
    ),
    "qvhighlights": ("a.jsonl", [ROW, ROW | {"qid": 2}]),
    "didemo": ("a.json", [{"annotation_id": 1, "description": "q", "video": "v.avi", "times": [[0, 1]]}]),
    "hirest": ("a.json", HIREST),
    "hirest-steps": ("a.json", HIREST),
    "queryd": ("raw_captions.pkl", {"video-a": [["q"]], "video-b": [["r", "s"]]}),
    "vtimellm": ("a.json", [vtimellm_row("What?", "From <s0> to <e0>, a. From <s1> to <e1>, b.")]),
    "howto-interlink7m": (
        "a.tsv",
        'video\tclips\nv.mp4\t"[{""clip"": ""0:00 - 0:05"", ""caption"": ""q""}]"\n',
    ),
    "videomind": ("a.jsonl", [FLAT]),
    "video-opd-dataset": ("a.jsonl", [released_row()]),
    "video-opd": ("a.jsonl", [{"id": "i", "video": "v.mp4", "query": "q", "spans": [[1, 2]], "duration": 9}]),
}
