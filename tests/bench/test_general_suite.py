"""The general suite through the real lmms-eval, on generated videos: what it asks, counts, keeps and refuses.

Run by ``make test-bench``.
"""

from __future__ import annotations

import collections
import http.server
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
from suite_cases import TASKS, gold, make_data, save_model, write_rows

from video_opd.cli import main

pytestmark = pytest.mark.bench

CHOSEN = "tempcompass,mvbench_action_count,mvbench_moving_direction,videomme"


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def run_suite(model: Path, data: Path, out: Path, *words: str, tasks: str = CHOSEN) -> int:
    return main(
        ["suite", str(model), "--data-root", str(data), "--out", str(out),
         "--tasks", tasks, "--max-new-tokens", "1", "--device", "cpu", *words]
    )  # fmt: skip


@pytest.fixture(scope="session")
def finished(model: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("finished")
    assert run_suite(model, data, out, "--json", str(out / "copy.json")) == 0
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "results.json").read_text())


def rows_of(data: Path, task: str) -> list[dict[str, Any]]:
    """The rows that this file's data were written as, whatever the suite makes of them."""
    benchmark, _, subset = task.partition("_")
    name = {"tempcompass_multi_choice": "multi-choice", "videomme": "test"}.get(task, subset)
    plain = data / benchmark / f"{name}.jsonl"
    return lines(plain) if plain.exists() else json.loads((data / f"mvbench/json/{name}.json").read_text())


def right_answers(data: Path, out: Path) -> dict[str, list[bool]]:
    """Counted by hand: for each row whether the one word that was written is the right one."""
    written = {row["id"].rsplit("/", 1)[0]: row["responses"] for row in lines(out / "answers.jsonl")}
    return {
        task: [
            written.get(f"vopd_{task}/{number}", [None])[0] == gold(task, row)
            for number, row in enumerate(rows_of(data, task))
        ]
        for task in TASKS
    }


# --- what is counted ---------------------------------------------------------------------------------


def test_accuracies_are_those_of_a_count_by_hand(data: Path, finished: Path) -> None:
    right = right_answers(data, finished)
    assert sum(map(sum, right.values())) >= 3 and not all(map(all, right.values())), "a case that tells"
    texts = {row["responses"][0] for row in lines(finished / "answers.jsonl")}
    assert len(texts) >= 4, "a model that answers by what it is asked"

    record = results(finished)
    assert record == json.loads((finished / "copy.json").read_text())
    percent = {task: 100 * sum(values) / len(values) for task, values in right.items()}
    found = {
        task: part["accuracy"]
        for score in record["benchmarks"].values()
        for task, part in score["tasks"].items()
    }
    assert found == pytest.approx(percent)
    assert all(part["n"] == 8 for score in record["benchmarks"].values() for part in score["tasks"].values())

    def mean(prefix: str) -> float:
        of = [value for task, value in percent.items() if task.startswith(prefix)]
        return sum(of) / len(of)

    overall = {name: score["accuracy"] for name, score in record["benchmarks"].items()}
    assert overall == pytest.approx({name: mean(name) for name in ("tempcompass", "mvbench", "videomme")})
    assert record["mean"] == pytest.approx(sum(overall.values()) / 3)

    short = [
        hit for hit, row in zip(right["videomme"], rows_of(data, "videomme"), strict=True)
        if row["duration"] == "short"
    ]  # fmt: skip
    assert record["benchmarks"]["videomme"]["by"]["short"]["accuracy"] == pytest.approx(
        100 * sum(short) / len(short)
    )
    letters = [row["responses"][0] for row in lines(finished / "answers.jsonl") if "yes_no" in row["id"]]
    unread = sum(text not in ("yes", "no") for text in letters)
    assert record["benchmarks"]["tempcompass"]["tasks"]["tempcompass_yes_no"]["unparsed"] == unread > 0


def test_the_record_says_what_made_it(finished: Path, data: Path) -> None:
    record = results(finished)
    assert record["versions"]["lmms-eval"] == "0.7.3" and record["versions"]["torch"]
    protocol = record["protocol"]
    assert protocol["video"]["max_video_tokens"] == 8192 and protocol["answers"]["max_new_tokens"] == 1
    assert protocol["judge"] is None and set(protocol["rows"]) == set(TASKS)
    assert record["benchmarks"]["tempcompass"]["left_out"] == ["tempcompass_captioning"]
    assert len(record["benchmarks"]["mvbench"]["left_out"]) == 18


def test_questions_are_worded_as_lmms_eval_words_them_for_qwen(data: Path, finished: Path) -> None:
    asked = {row["id"].rsplit("/", 1)[0]: row["query"] for row in lines(finished / "answers.jsonl")}
    row = rows_of(data, "videomme")[3]
    assert asked["vopd_videomme/3"] == (
        f"Question: {row['question']}\nOptions:\n" + "\n".join(row["options"])
        + "\nAnswer with the option letter only."
    )  # fmt: skip
    row = rows_of(data, "mvbench_action_count")[1]
    options = "".join(f"({a}) {text}\n" for a, text in zip("ABCD", row["candidates"], strict=False))
    assert asked["vopd_mvbench_action_count/1"] == (
        f"Question:{row['question']}\nOption:\n{options}Only give the best option.\n"
    )
    row = rows_of(data, "tempcompass_yes_no")[0]
    assert asked["vopd_tempcompass_yes_no/0"] == f"{row['question']}\nPlease answer yes or no:"


def test_answers_are_those_of_the_clip_and_prompt_of_training(model: Path, finished: Path) -> None:
    from video_opd.config import PromptConfig, VideoConfig
    from video_opd.data.encode import PromptEncoder
    from video_opd.data.video import load_clip
    from video_opd.models.inference import choose_video_form
    from video_opd.models.loading import load_model
    from video_opd.models.policy import HFPolicy

    loaded, processor = load_model(model, dtype="float32")
    form = choose_video_form(PromptConfig(), model)
    encoder = PromptEncoder(processor, PromptConfig(style="question", video_form=form))
    policy = HFPolicy(loaded, processor, engine="plain")
    for row in lines(finished / "answers.jsonl")[::7]:
        clip = load_clip(Path(row["video"]), VideoConfig())
        prompt = encoder.encode(clip, row["query"], row["id"])
        assert "system\n" not in prompt.text and prompt.text.count(row["query"]) == 1
        [[rollout]] = policy.sample([prompt], n=1, max_new_tokens=1, temperature=0.0)
        assert [rollout.text] == row["responses"]


# --- what is kept ------------------------------------------------------------------------------------


def test_a_killed_run_continues_and_ends_the_same(
    model: Path, data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from video_opd.evaluation import output

    append = output.append_jsonl
    calls: list[list[dict[str, Any]]] = []

    def killed(path: Path, rows: list[dict[str, Any]]) -> None:
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(rows)
        append(path, rows)

    monkeypatch.setattr(output, "append_jsonl", killed)
    assert run_suite(model, data, tmp_path) == 130
    kept = lines(tmp_path / "answers.jsonl")
    assert [row for rows in calls for row in rows] == kept and 0 < len(kept) < 48
    monkeypatch.undo()
    assert run_suite(model, data, tmp_path) == 0
    again = lines(tmp_path / "answers.jsonl")
    by_id = {row["id"]: row for row in again}  # the finished file is in the order of the questions
    assert [by_id[row["id"]] for row in kept] == kept and len(by_id) == len(again) == 48
    assert results(tmp_path)["benchmarks"] == results(finished)["benchmarks"]


def test_answers_of_another_model_are_refused(
    data: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = shutil.copytree(finished, tmp_path / "out")
    other = save_model(tmp_path / "other", seed=7)
    assert run_suite(other, data, out, tasks="videomme") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run_suite(other, data, out, "--overwrite", tasks="videomme") == 0
    assert len(lines(out / "answers.jsonl")) == 8


# --- what goes wrong ---------------------------------------------------------------------------------


def test_missing_videos_are_told_before_a_model_is_loaded(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    less = shutil.copytree(data, tmp_path / "data")
    (less / "videomme/data/vm1.mp4").unlink()
    (less / "mvbench/clevrer/video_validation/mv0.mp4").unlink()
    assert run_suite(Path("no/such/model"), less, tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert "1 of 4 videos are missing" in err and "mv0.mp4" in err and "--allow-missing" in err
    assert not (tmp_path / "out").exists()

    assert run_suite(model, less, tmp_path / "out", "--check") == 1
    out = capsys.readouterr().out
    assert "videomme: 8 rows, 4 videos, 1 of 4 videos are missing" in out
    assert "mvbench_action_count: 8 rows, 4 videos, ok" in out

    assert run_suite(model, less, tmp_path / "out", "--allow-missing") == 0
    part = results(tmp_path / "out")["benchmarks"]["videomme"]
    hits = right_answers(less, tmp_path / "out")["videomme"]
    assert (part["n"], part["missing"]) == (8, 2)
    assert part["accuracy"] == pytest.approx(100 * sum(hits) / 8)


def test_a_video_that_cannot_be_decoded_is_wrong_and_said(data: Path, model: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(data, tmp_path / "data")
    (broken / "mvbench/perception/videos/mv2.mp4").write_bytes(b"not a video")
    assert run_suite(model, broken, tmp_path / "out", tasks="mvbench_action_count") == 0
    part = results(tmp_path / "out")["benchmarks"]["mvbench"]["tasks"]["mvbench_action_count"]
    hits = right_answers(broken, tmp_path / "out")["mvbench_action_count"]
    # MVBench's own sum would have left these two rows out of the denominator.
    assert (part["n"], part["missing"], part["accuracy"]) == (8, 2, pytest.approx(100 * sum(hits) / 8))


def test_a_task_without_any_answer_has_failed(
    data: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = shutil.copytree(data, tmp_path / "data")
    for video in (broken / "videomme/data").glob("*.mp4"):
        video.write_bytes(b"not a video")
    assert run_suite(model, broken, tmp_path / "out", tasks="videomme") == 1
    assert "not one of its 8 rows was answered" in capsys.readouterr().err
    assert not (tmp_path / "out/results.json").exists()


def test_what_fails_inside_lmms_eval_fails(
    data: Path,
    model: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from video_opd.models.policy import HFPolicy

    def fail(*arguments: object, **options: object) -> None:
        raise RuntimeError("the GPU fell off the bus")

    monkeypatch.setattr(HFPolicy, "sample", fail)
    assert run_suite(model, data, tmp_path / "out", tasks="videomme") == 1
    assert "the GPU fell off the bus" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"domain": "Cooking"}, "\"domain\" is 'Cooking'"),
        ({"options": "A. x"}, '"options" is'),
        ({"answer": None}, '"answer" is None'),
    ],
)
def test_rows_that_cannot_be_scored_are_found_first(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], change: dict[str, Any], says: str
) -> None:
    bad = shutil.copytree(data, tmp_path / "data")
    rows = rows_of(data, "videomme")
    write_rows(bad / "videomme/test.jsonl", [*rows[:5], {**rows[5], **change}, *rows[6:]])
    model = save_model(tmp_path / "model")
    assert run_suite(model, bad, tmp_path / "out", tasks="videomme") == 2
    assert says in capsys.readouterr().err
    assert not (tmp_path / "out/answers.jsonl").exists()


# --- the judge ---------------------------------------------------------------------------------------


class Judge(http.server.BaseHTTPRequestHandler):
    """Says that every answer is right, and that a caption means option A."""

    seen: ClassVar[collections.Counter[str]] = collections.Counter()

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["messages"][-1]["content"]
        caption = "Video Description:" in asked
        self.seen["caption" if caption else "answer"] += 1
        text = "Reasoning: so it is\nAnswer: A. up" if caption else "Correct"
        body = json.dumps({"choices": [{"message": {"content": text}}], "usage": {}}).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def judge() -> Iterator[str]:
    Judge.seen.clear()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Judge)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()


def with_captions(data: Path, folder: Path) -> Path:
    rows = [
        {"video_id": f"tc{n}", "question": "Describe the video.", "mc_question": "Which way?\nA. up\nB. down",
         "mc_answer": answer, "dim": "direction"}
        for n, answer in enumerate(["A. up", "B. down", "A. up"])
    ]  # fmt: skip
    copy = shutil.copytree(data, folder)
    write_rows(copy / "tempcompass/captioning.jsonl", rows)
    return copy


def command(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, words)],
        capture_output=True, text=True, check=False, env=os.environ | environment,
    )  # fmt: skip


def test_a_judge_scores_captions_and_what_could_not_be_read(
    data: Path, model: Path, finished: Path, tmp_path: Path, judge: str
) -> None:
    copy = with_captions(data, tmp_path / "data")
    done = command(
        "-m", "video_opd", "suite", model, "--data-root", copy, "--judge",
        "--tasks", "tempcompass", "--out", tmp_path / "out", "--max-new-tokens", 1, "--device", "cpu",
        OPENAI_API_KEY="none", OPENAI_API_URL=judge,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    before = results(finished)["benchmarks"]["tempcompass"]
    after = results(tmp_path / "out")["benchmarks"]["tempcompass"]
    assert after["tasks"]["tempcompass_captioning"]["accuracy"] == pytest.approx(100 * 2 / 3)
    # Every answer that no rule reads is now right: the judge says so of all.
    for name, part in before["tasks"].items():
        expected = part["accuracy"] + 100 * part["unparsed"] / part["n"]
        assert after["tasks"][name]["accuracy"] == pytest.approx(expected) and part["unparsed"] > 0
    assert Judge.seen == {"caption": 3, "answer": before["unparsed"]}
    assert after["left_out"] == [] and after["unparsed"] == 0


def test_a_judge_that_does_not_answer_fails_the_run(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval.tasks.tempcompass import utils

    from video_opd.suites import hooks

    monkeypatch.setattr(utils, "get_eval_result", lambda prompt: (None, 0))
    monkeypatch.setattr(
        utils,
        "get_eval_result_for_captioning",
        lambda prompt, mc_answer: {"rating": -1, "chatgpt-reasoning": None, "chatgpt-answer": None},
    )
    doc = rows_of(data, "tempcompass_yes_no")[0]
    with pytest.raises(hooks.JudgeError):
        hooks.tempcompass_yes_no_judged(doc, ["perhaps"])
    with pytest.raises(hooks.JudgeError):
        hooks.tempcompass_captioning_judged({**doc, "mc_question": "q", "mc_answer": "A. x"}, ["a cat"])


def test_without_a_judge_nobody_is_asked(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import requests

    from video_opd.suites import hooks

    monkeypatch.setattr(requests, "post", lambda *a, **k: pytest.fail("a request went out"))
    for task in ("tempcompass_multi_choice", "tempcompass_yes_no", "tempcompass_caption_matching"):
        for row in rows_of(data, task):
            for text in ("", "perhaps", "E", "none of these", hooks.NO_VIDEO):
                assert getattr(hooks, task)(row, [text])[hooks.ROW_KEY]["score"] == 0


# --- beside lmms-eval --------------------------------------------------------------------------------


STOCK = {
    "tempcompass_multi_choice": ("tempcompass", "tempcompass_process_results_multi_choice"),
    "tempcompass_yes_no": ("tempcompass", "tempcompass_process_results_yes_no"),
    "tempcompass_caption_matching": ("tempcompass", "tempcompass_process_results_caption_matching"),
    "mvbench_action_count": ("mvbench", "mvbench_process_results"),
    "videomme": ("videomme", "videomme_process_results"),
}


def plain_answers(task: str, row: dict[str, Any]) -> str | tuple[str, ...]:
    if task.endswith("yes_no"):
        return "yes", "no"
    if task.endswith("caption_matching"):
        return "12" if "Option 1" in row["question"] else "AB"
    return "ABC"


@pytest.mark.parametrize("task", STOCK)
def test_an_answer_scores_as_its_plain_form_in_the_stock_code(data: Path, task: str) -> None:
    import importlib

    from video_opd.suites import hooks

    def scores(scored: dict[str, Any]) -> dict[str, Any]:
        return {
            metric: {key: value for key, value in part.items() if key != "video-llm-prediction"}
            for metric, part in scored.items()
            if metric != hooks.ROW_KEY
        }

    benchmark, name = STOCK[task]
    stock = getattr(importlib.import_module(f"lmms_eval.tasks.{benchmark}.utils"), name)
    hook = getattr(hooks, "mvbench" if benchmark == "mvbench" else task)
    seen = set()
    for row in rows_of(data, task):
        for word in plain_answers(task, row):
            theirs = scores(stock(row, [word]))
            for form in ("{}", "({})", "**{}**", "{}.", "The answer is {}."):
                ours = hook(row, [form.format(word)])
                assert ours[hooks.ROW_KEY]["read"] == word and scores(ours) == theirs
                seen.add(ours[hooks.ROW_KEY]["score"])
    assert seen == {0.0, 1.0}


def test_the_tasks_are_all_of_lmms_evals(tmp_path: Path) -> None:
    import yaml

    from video_opd.suites.benchmarks import BENCHMARKS, LMMS_EVAL, PREFIX
    from video_opd.suites.rows import stock_config, stock_file, stock_folder
    from video_opd.suites.task_files import prompt_settings

    folder = stock_folder()
    assert folder is not None
    groups = {
        "mvbench": yaml.safe_load((folder / "mvbench/mvbench.yaml").read_text())["task"],
        "tempcompass": yaml.safe_load((folder / "tempcompass/_tempcompass.yaml").read_text())["task"],
        "videomme": ["videomme"],
    }
    for name, benchmark in BENCHMARKS.items():
        assert {task.name for task in benchmark.tasks} == set(groups[name])
        for task in benchmark.tasks:
            config = stock_config(task)
            assert config["task"] == task.name and stock_file(task).is_file()
            assert config["metric_list"][0]["metric"] == benchmark.metric
            if name != "videomme":
                assert config["dataset_name"] == task.subset
    every = [line for file in folder.rglob("*.yaml") for line in file.read_text().splitlines()]
    assert not any(line.startswith(f"task: {PREFIX}") for line in every)
    videomme = BENCHMARKS["videomme"].tasks[0]
    assert prompt_settings(videomme)["format"] == "qwen3_vl"
    root = Path(__file__).parents[2]
    assert f'"lmms-eval=={LMMS_EVAL}"' in (root / "pyproject.toml").read_text()
    assert f"\nlmms-eval=={LMMS_EVAL} " in (root / "requirements/bench.txt").read_text()


def test_lmms_evals_own_command_finds_the_model_and_the_task_files(
    model: Path, data: Path, finished: Path, tmp_path: Path
) -> None:
    done = command(
        "-m", "lmms_eval", "--model", "video_opd", "--model_args",
        f"pretrained={model},answers={tmp_path / 'a.jsonl'},max_new_tokens=1,device=cpu",
        "--include_path", finished / "lmms-eval", "--tasks", "vopd_videomme", "--batch_size", 2,
        "--output_path", tmp_path / "out",
    )  # fmt: skip
    [file] = (tmp_path / "out").rglob("*results.json")
    accuracy = json.loads(file.read_text())["results"]["vopd_videomme"]["videomme_perception_score,none"]
    assert accuracy == pytest.approx(results(finished)["benchmarks"]["videomme"]["accuracy"]), done.stderr


# --- the hub's copies --------------------------------------------------------------------------------


def test_rows_of_the_hub_and_videos_that_lmms_eval_unpacked(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``--download`` is lmms-eval's own code, with a hub that is a folder: rows, and videos in an archive."""
    import datasets
    from lmms_eval.api import task as stock

    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    shutil.make_archive(str(snapshot / "videos_1"), "zip", data / "videomme", "data")
    rows = [{**row, "url": "x"} for row in rows_of(data, "videomme")]
    asked = set()

    def load_dataset(path: str, name: str | None = None, split: str | None = None, **options: Any) -> Any:
        asked.add((path, name))
        made = datasets.DatasetDict({"test": datasets.Dataset.from_list(rows)})
        return made[split] if split else made

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setattr(stock, "snapshot_download", lambda **options: str(snapshot))
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    words = ["suite", "--tasks", "videomme"]
    assert main([*words, "--check"]) == 1
    out = capsys.readouterr().out
    assert "4 of 4 videos are missing" in out and "--download --tasks videomme" in out
    assert main([*words, "--download"]) == 0
    assert "videomme: 8 rows, 4 videos, ok" in capsys.readouterr().out
    assert (tmp_path / "hub/videomme/data/vm0.mp4").is_file()
    assert asked == {("lmms-eval/Video-MME", None)}
