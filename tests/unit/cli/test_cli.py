"""The command: its manners (exit codes, streams, speed), and each command on real files."""

from __future__ import annotations

import argparse
import json
import os
import resource
import shlex
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from output_cases import parsers_of_commands

from video_opd.cli import main, report
from video_opd.cli.commands import build_parser, parse_words
from video_opd.cli.parser import Parser, split_overrides
from video_opd.errors import UserError
from video_opd.evaluation.resume import read_provenance, write_provenance

# Python as it is where torch is not installed.
WITHOUT_TORCH = (
    "import sys; sys.modules['torch'] = None; sys.argv[0] = 'video-opd'; "
    "from video_opd.cli import main; sys.exit(main())"
)


def run_without_torch(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, *map(str, words)], capture_output=True, text=True, check=False
    )


def parsers(parser: Parser) -> Iterator[Parser]:
    yield parser
    for child in parser.commands.values():
        yield from parsers(child)


def write_rows(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


# --- manners -----------------------------------------------------------------------------------------


def test_help_is_quick_and_imports_the_standard_library_only() -> None:
    code = (
        "import sys\n"
        "before = set(sys.modules)\n"
        "from video_opd.cli import main\n"
        "try: main(['--help'])\n"
        "except SystemExit as leave: assert not leave.code\n"
        "names = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = names - sys.stdlib_module_names - {'video_opd'}\n"
        "assert not heavy, heavy\n"
    )
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert "demo" in done.stdout
    # Processor time, not the clock: other tests run beside this one.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.5


def test_every_command_has_an_example_that_parses() -> None:
    every = list(parsers(build_parser()))
    assert len(every) >= 20
    for parser in every:
        assert parser.epilog is not None and parser.epilog.startswith("example: "), parser.prog
        program, *words = shlex.split(parser.epilog.removeprefix("example: "))
        assert program == "video-opd"
        assert callable(parse_words(words).command.run)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], "COMMAND"),
        (["fly"], "fly"),
        (["select", "--data", "d"], "--scores"),
        (["select", "--data=d", "--scores=s", "--strategy=best", "--k=1", "--out=o"], "best"),
        (["predict", "m", "d", "--out", "p", "--n", "0"], "at least 1"),
        (["report", "runs/a", "--out", "r.html", "--optim.lr", "1"], "--optim.lr"),
        (["train", "r.yaml", "--optim.lr"], "--optim.lr VALUE"),
        (["train", "no/such.yaml"], "no/such.yaml"),
        (["report", "no/such-run", "--out", "r.html"], "no/such-run"),
        (["evaluate", "--data", "no/such.jsonl", "--predictions", "p"], "no/such.jsonl"),
        (["select", "--data=d", "--scores=s", "--k=1"], "--out --explain"),
        (["select", "--data=d", "--scores=s", "--k=1", "--out=o"], "--strategy"),
        (["score", "--student", "a", "--out", "s"], "--teacher"),
        (["ground", "m", "no/such.mp4", "a cat"], "no/such.mp4"),
        (
            ["world", "make", "--out", "w", "--videos", "4"],
            "train=200; the splits are train, short, long, subtle",
        ),
        (["world", "make", "--out", "w", "--videos", "train"], "SPLIT=N"),
        (["world", "train", "--recipe", "r.yaml"], "tools/tiny_models"),
    ],
)
def test_wrong_arguments_are_one_line_and_exit_code_2(words, names, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1 and err.startswith("video-opd: ") and names in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "command", [name for name, parser in parsers_of_commands() if "--seed" in parser.flags]
)
def test_a_seed_is_one_that_every_generator_takes(command: str, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for wrong in ("-1", str(2**32)):
        assert main([*command.split(), "--seed", wrong]) == 2
        out, err = capsys.readouterr()
        assert out == "" and err.count("\n") == 1 and f"--seed: {wrong} is not between 0 and" in err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            "evaluate --data d --predictions p --basline b",
            "(did you mean --baseline?); see video-opd evaluate -",
        ),
        ("data check d.jsonl --decod", "--decod (did you mean --decode?); see video-opd data check --help"),
        ("demo --step 2", "--step 2 (did you mean --steps?); see video-opd demo --help"),
        ("train r.yaml --methd grpo", "(did you mean --method?); see video-opd train --help"),
        ("train r.yaml --sharding fsdp2", "(did you mean --model.sharding?); see video-opd train --help"),
        ("train r.yaml --learning-rate 1", "(did you mean --optim.lr?)"),
        (
            "evaluate --data d --model m --dtype bfloat16",
            "(did you mean --model.dtype?); see video-opd evaluate",
        ),
        ("data stats d.jsonl --fps 1", "(did you mean --video.fps?); see video-opd data stats"),
        # A flag that is missing because it was misspelt.
        ("predict m d --uot p", "unrecognized arguments: --uot (did you mean --out?); see video-opd predict"),
        # A command offers only the settings that it reads: predict has no optimiser, select no recipe.
        ("predict m d --out p --lr 1", "--lr 1; see video-opd predict --help"),
        ("select --data d --scores s --k 1 --out o --dtype x", "--dtype x; see video-opd select --help"),
        (
            "report a --out r --optim.lr 1",
            "--optim.lr: this command reads no recipe; see video-opd report --help",
        ),
        # Nor does it accept the others and leave them unread.
        ("serve-teacher m --teacher.dtype float32", "does not read that setting (did you mean --dtype?)"),
        (
            "serve-teacher m --vlm.memory 0.5",
            "--vlm.memory: this command does not read that setting (did you ",
        ),
        ("serve-teacher m --vlm.memory=0.5", "(did you mean --vllm.memory?); see video-opd serve-teacher --"),
        (
            "serve-teacher m --engine vllm --model.attn eager",
            "--model.attn: this command does not read that s",
        ),
        ("serve-teacher m --model.attn eager", "(it reads --vllm.*); see video-opd serve-teacher --help"),
        (
            "predict m d --out p --optim.lr 1",
            "--optim.lr: this command does not read that setting (it reads --",
        ),
        ("predict m d --out p --sampling.max_new_tokens 9", "(did you mean --max-new-tokens?)"),
        (
            "predict m d --out p --model.freeze vision",
            "--model.freeze: this command does not read that setting",
        ),
        ("ground m v q --vidio.fps 1", "(did you mean --video.fps?); see video-opd ground --help"),
        ("ground m v q --vllm.gpus 2", "--vllm.gpus: this command does not read that setting"),
        ("ground m v q --method grpo", "--method: this command does not read that setting"),
        ("evaluate --data d --model m --teacher.dtype bfloat16", "(did you mean --model.dtype?)"),
        ("suite m --prompt.style paper", "--prompt.style: this command does not read that setting"),
        ("suite --check --video.fps 1", "--video.fps changes how a model answers: leave out --check"),
        ("bench data --model.dtype bfloat16", "(it reads --video.*); see video-opd bench data --help"),
        ("data stats d --prompt.style paper", "(it reads --video.*); see video-opd data stats --help"),
        ("--debig demo", "--debig (did you mean --debug?)"),
        ("eval d p --json", "there is no command 'eval' (did you mean evaluate?); see video-opd --help"),
        ("data chek d --sise 3", "there is no command 'chek' (did you mean check?); see video-opd data -"),
        ("xyz", "there is no command 'xyz' (choose from demo, train, rounds, "),
        ("--out o train r.yaml", "unrecognized arguments: --out; see video-opd --help"),
        # Flags of a group in which one excludes the other are known, too.
        ("data stats d --sise 64x64", "--sise 64x64 (did you mean --size?); see video-opd data stats --help"),
        ("select --data d --scores s --k 1 --ouf o", "--ouf (did you mean --out?); see video-opd select"),
        ("data check a b", "unrecognized arguments: b; see video-opd data check --help"),
    ],
)
def test_a_flag_that_is_not_known_leads_to_the_commands_help(words: str, said: str, capsys) -> None:
    assert main(words.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and said in err


def test_keys_of_a_recipe_are_left_to_the_recipe() -> None:
    """A command that takes one reads every key, and the recipe's classes refuse the others."""
    for words in (["train", "r.yaml"], ["rounds", "r.yaml"], ["plan", "r.yaml", "--gpu-memory", "80"]):
        assert parse_words([*words, "--optim.lr", "1"]).overrides == ["--optim.lr", "1"]
    score = ["score", "r.yaml", "--out", "s"]
    assert parse_words([*score, "--optim.lr", "1", "--vllm.gpus", "2"]).overrides[::2] == [
        "--optim.lr",
        "--vllm.gpus",
    ]


def test_other_failures_are_one_line_and_exit_code_1(monkeypatch, capsys) -> None:
    def fail(arguments: argparse.Namespace) -> None:
        raise RuntimeError("the disk\ncaught fire")

    monkeypatch.setattr(report, "run", fail)
    words = ["report", "a", "--out", "b"]
    assert main(words) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "RuntimeError: the disk" in err and "--debug" in err
    for with_debug in (["--debug", *words], [*words, "--debug"]):
        assert main(with_debug) == 1
        assert "Traceback" in capsys.readouterr().err


def test_an_interrupt_says_that_the_command_continues(monkeypatch, capsys) -> None:
    def interrupt(arguments: argparse.Namespace) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(report, "run", interrupt)
    assert main(["report", "a", "--out", "b"]) == 130
    assert "continues" in capsys.readouterr().err


def test_a_reader_who_leaves_is_no_traceback(tmp_path) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"id": "a", "video": "v.mp4", "query": "q", "spans": [[0, 1]]}])
    predictions = write_rows(tmp_path / "p.jsonl", [{"id": "a", "span": [0, 1]}])
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(
        [sys.executable, "-m", "video_opd", "evaluate", "--data", data, "--predictions", predictions],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert done.returncode == 1 and done.stderr == ""


NAMES = st.from_regex(r"--[a-z]{1,5}\.[a-z_]{1,5}", fullmatch=True)
VALUES = st.from_regex(r"-?[a-z0-9.]{1,6}", fullmatch=True)
PLAIN = st.lists(st.from_regex(r"(--[a-z]{1,5})|[a-z0-9./]{1,6}", fullmatch=True), max_size=3)


@given(st.lists(st.tuples(PLAIN, NAMES, VALUES, st.booleans()), max_size=4), PLAIN)
def test_settings_are_taken_out_wherever_they_stand(parts, tail) -> None:
    words: list[str] = []
    for plain, name, value, joined in parts:
        words += [*plain, f"{name}={value}"] if joined else [*plain, name, value]
    left, overrides = split_overrides([*words, *tail])
    assert left == [word for plain, *_ in parts for word in plain] + tail
    assert overrides == [word for _, name, value, _ in parts for word in (name, value)]


def test_the_method_is_a_setting() -> None:
    assert parse_words(["train", "--method", "grpo", "r.yaml"]).overrides == ["--method", "grpo"]


# --- commands on files -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        ["--optim.lr", "3e-4", "--optim.lr", "1e-6"],
        ["--optim.lr=3e-4", "--run.seed", "1", "--optim.lr", "1e-6"],
        ["--optim.x", "{lr: 3e-4}", "--optim.x.lr", "1", "--optim.x", "{}"],
        ["--rounds.tvdf.k", "3", "--rounds.tvdf", "{seed: 1}"],
        ["--method", "grpo", "--method", "sft"],
    ],
)
def test_an_override_that_would_replace_another_is_refused(words: list[str]) -> None:
    with pytest.raises(UserError, match="keep one of the two"):
        parse_words(["train", "r.yaml", *words])
    assert parse_words(["train", "r.yaml", "--optim.a", "{}", "--optim.a.b", "1"]).overrides


def test_select_needs_no_torch(tmp_path) -> None:
    rows = [{"id": i, "video": f"{i}.mp4", "query": i, "spans": [[0, 1]]} for i in "abcd"]
    data = write_rows(tmp_path / "d.jsonl", rows)
    scores = write_rows(
        tmp_path / "s.jsonl",
        [
            {"id": i, "teacher_iou": t, "student_iou": s}
            for i, t, s in (("a", 0.9, 0.8), ("b", 0.9, 0.1), ("c", 0.4, 0.0), ("d", 0.7, 0.2))
        ],
    )
    out = tmp_path / "o.jsonl"
    words = ("select", "--data", data, "--scores", scores, "--strategy", "topk", "--k", 2, "--out", out)
    done = run_without_torch(*words, "--json")
    assert done.returncode == 0, done.stderr
    assert [json.loads(line)["id"] for line in out.read_text().splitlines()] == ["b", "d"]
    summary = json.loads(done.stdout)
    assert (summary["selected"], summary["failed_gate"]) == (2, 1)
    shown = run_without_torch(*words).stdout
    assert "4 rows → 3 candidates" in shown and "+0.8 to +0.9        1       1" in shown
    none = run_without_torch(*words, "--min-teacher-iou", 1)
    assert none.returncode == 0 and out.read_text() == ""
    assert "nothing is selected: of 4 rows of the pool, 4 where the teacher failed the gate" in none.stderr


def test_select_explains_what_each_gate_would_leave_and_writes_nothing(tmp_path) -> None:
    names = [f"r{i}" for i in range(12)]
    rows = [{"id": i, "video": "v.mp4", "query": i, "spans": [[0, 1]]} for i in names]
    teacher = [0.05, 0.15, 0.25, 0.35, 0.45, 0.5, 0.55, 0.65, 0.75, 0.85, 0.95, 1.0]
    scored = [{"id": i, "teacher_iou": t, "student_iou": 0.6} for i, t in zip(names, teacher, strict=True)]
    data = write_rows(tmp_path / "d.jsonl", rows)
    # Rows of another data set do not count.
    other = {"id": "other", "teacher_iou": 1.0, "student_iou": 0.0}
    scores = write_rows(tmp_path / "s.jsonl", [*scored, other])
    words = ("select", "--data", data, "--scores", scores, "--k", 4)
    before = sorted(tmp_path.iterdir())
    done = run_without_torch(*words, "--explain", "--json")
    assert done.returncode == 0, done.stderr
    assert sorted(tmp_path.iterdir()) == before
    table = {round(row["min_teacher_iou"], 1): row for row in json.loads(done.stdout)}
    assert [row["passed"] for row in table.values()] == [12, 11, 10, 9, 8, 7, 5, 4, 3, 2]
    assert table[0.5]["positive"] == 5 and table[0.7]["kth_delta"] == pytest.approx(0.75 - 0.6)
    assert table[0.8]["kth_delta"] is None
    chosen = run_without_torch(
        *words, "--strategy", "topk", "--min-teacher-iou", 0.5, "--out", tmp_path / "o.jsonl", "--json"
    )
    assert json.loads(chosen.stdout)["candidates"] == table[0.5]["passed"]
    shown = run_without_torch(*words, "--explain").stdout.splitlines()
    assert shown[0].split()[:2] == ["gate", "passed"] and shown[6].split()[:2] == ["0.5", "7"]


def test_evaluate_needs_no_torch(tmp_path) -> None:
    data = write_rows(
        tmp_path / "d.jsonl",
        [{"id": i, "video": f"{i}.mp4", "query": i, "duration": 10, "spans": [[2, 6]]} for i in "abcd"],
    )
    predictions = write_rows(
        tmp_path / "p.jsonl",
        [
            {"id": "a", "response": "2.00 to 6.00"},
            {"id": "b", "responses": ["from 4.0 to 8.0"]},  # IoU 2/6
            {"id": "c", "response": "I do not know."},
        ],
    )
    record_path = tmp_path / "deep" / "m.json"
    words = ("evaluate", "--data", data, "--predictions", predictions)
    done = run_without_torch(*words, "--json", record_path)
    assert done.returncode == 0, done.stderr
    record = json.loads(record_path.read_text())
    assert record["mIoU"] == pytest.approx(100 * (1 + 1 / 3) / 4)
    assert (record["n"], record["unparsed"], record["missing"]) == (4, 1, 1)
    assert record["best_constant"]["mIoU"] == pytest.approx(100)
    assert "mIoU 33.3 [" in done.stdout and "best constant (20% to 60%)" in done.stdout
    assert json.loads(run_without_torch(*words, "--json", "-").stdout) == record


def test_evaluate_refuses_settings_that_have_no_effect(tmp_path, capsys) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"id": "a", "video": "v", "query": "q", "spans": [[0, 1]]}])
    words = ["evaluate", "--data", str(data), "--predictions", "p.jsonl", "--video.fps", "1"]
    assert main(words) == 2
    assert "--video.fps" in capsys.readouterr().err


def test_data_check_names_what_cannot_be_used(tmp_path, capsys) -> None:
    video(tmp_path / "v.mp4", seconds=4)
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    row = {"query": "q", "duration": 4.0, "spans": [[1, 2]]}
    good = [{"id": "a", "video": "v.mp4", **row}]
    bad = [
        {"id": "b", "video": "gone.mp4", **row},
        {"id": "c", "video": "broken.mp4", **row},
        {"id": "d", "video": "v.mp4", **row, "duration": 9.0, "spans": [[6, 8]]},
        {"id": "e", "video": "v.mp4", **row, "duration": 9.0},
    ]
    assert main(["data", "check", str(write_rows(tmp_path / "good.jsonl", good))]) == 0
    assert "1 row, 1 video: 0 rows with problems" in capsys.readouterr().out
    assert main(["data", "check", str(write_rows(tmp_path / "bad.jsonl", good + bad)), "--json"]) == 1
    record = json.loads(capsys.readouterr().out)
    assert [problem["id"] for problem in record["problems"]] == ["b", "c", "d", "e"]
    assert "begins after" in record["problems"][2]["problem"] and record["videos"] == 3


def test_world_make_prints_the_files_that_it_wrote(tmp_path, capsys) -> None:
    words = ["world", "make", "--out", str(tmp_path / "w"), "--videos", "short=1", "--workers", "1"]
    assert main([*words, "--json"]) == 0
    files = json.loads(capsys.readouterr().out)
    rows = [json.loads(line) for line in Path(files["short"]).read_text().splitlines()]
    assert rows and all((tmp_path / "w" / row["video"]).exists() for row in rows)
    assert main(["world", "make", "--out", str(tmp_path / "w"), "--videos", "shrt=1"]) == 2
    assert "shrt" in capsys.readouterr().err


def test_world_train_says_where_the_tool_is(capsys) -> None:
    assert main(["world", "train", "--out", "made"]) == 2
    assert "PYTHONPATH=tools python -m tiny_models" in capsys.readouterr().err


# --- commands with a model ---------------------------------------------------------------------------


def video(path: Path, seconds: int, fps: int = 4) -> Path:
    import av
    import numpy as np

    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for i in range(seconds * fps):
            pixels = np.full((64, 64, 3), (20 * i) % 256, dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def model_and_data(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A random tiny model's folder, and a data file of two videos and three rows."""
    from video_opd.world.tiny import build_model, build_processor

    folder = tmp_path_factory.mktemp("cli")
    build_model("test", seed=0).save_pretrained(folder / "model")
    build_processor().save_pretrained(folder / "model")
    facts = {"method": "video-opd", "video": {"max_video_tokens": 64, "min_frame_tokens": 4}, "prompt": {}}
    (folder / "model" / "video_opd.json").write_text(json.dumps(facts))
    for name, seconds in (("a", 4), ("b", 6)):
        video(folder / f"{name}.mp4", seconds)
    rows = [
        {"id": f"{v}{i}", "video": f"{v}.mp4", "query": f"the red circle {i}", "spans": [[1, 3]]}
        for v, i in (("a", 0), ("a", 1), ("b", 0))
    ]
    return folder / "model", write_rows(folder / "data.jsonl", rows)


def test_predict_continues_what_was_killed(model_and_data, tmp_path, capsys) -> None:
    model, data = model_and_data
    out = tmp_path / "p.jsonl"
    words = [
        "predict",
        str(model),
        str(data),
        "--out",
        str(out),
        "--max-new-tokens",
        "6",
        "--batch-size",
        "2",
    ]
    assert main([*words, "--json"]) == 0
    first = out.read_text()
    assert json.loads(capsys.readouterr().out)["answered"] == 3
    # Killed within the third row:
    out.write_text(first[: first.index("\n", first.index("\n") + 1) + 20])
    write_provenance(out, read_provenance(out), None)  # rows are sealed at the end
    assert main([*words, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["kept"], result["answered"]) == (2, 1)
    assert sorted(out.read_text().splitlines()) == sorted(first.splitlines())
    # Another video budget is another experiment.
    assert main([*words, "--video.fps", "1"]) == 2
    assert "video.fps" in capsys.readouterr().err


def test_evaluate_a_model_is_predict_then_evaluate(model_and_data, tmp_path, capsys) -> None:
    model, data = model_and_data
    kept = tmp_path / "kept.jsonl"
    short = ["--max-new-tokens", "6"]
    assert main(["predict", str(model), str(data), "--out", str(tmp_path / "p.jsonl"), *short]) == 0
    capsys.readouterr()
    words = ["evaluate", "--data", str(data), "--json", "-"]
    assert main([*words, "--predictions", str(tmp_path / "p.jsonl")]) == 0
    apart = json.loads(capsys.readouterr().out)
    assert main([*words, "--model", str(model), "--out", str(kept), *short]) == 0
    at_once = json.loads(capsys.readouterr().out)
    assert kept.read_text() == (tmp_path / "p.jsonl").read_text()
    assert {**at_once, "answers": None} == {**apart, "answers": None}


def test_ground_uses_what_the_model_folder_says_about_its_videos(model_and_data, capsys) -> None:
    model, data = model_and_data
    words = ["ground", str(model), str(data.parent / "b.mp4"), "a cat", "a dog", "--json"]
    words += ["--max-new-tokens", "4"]
    assert main(words) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert [answer["query"] for answer in answers] == ["a cat", "a dog"]
    assert {answer["frames"] for answer in answers} == {12}  # 6 s at 2 fps
    assert main([*words, "--video.max_frames", "4"]) == 0
    answers = json.loads(capsys.readouterr().out)["answers"]
    assert {answer["frames"] for answer in answers} == {4} and answers[0]["thinned"]


def test_score_by_options_and_by_recipe_agree(model_and_data, tmp_path, capsys) -> None:
    model, data = model_and_data
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{path: {model}}}\nteacher: {{path: {model}}}\ndata: {{train: {data}}}\n"
        "video: {max_video_tokens: 64, min_frame_tokens: 4}\n"
    )
    common = ["--k", "2", "--max-new-tokens", "4", "--reverse-kl"]
    named = ["--student", str(model), "--teacher", str(model), "--data", str(data)]
    assert main(["score", *named, "--out", str(tmp_path / "s.jsonl"), *common]) == 0
    assert "3 of 3 rows scored" in capsys.readouterr().out
    assert main(["score", str(recipe), "--out", str(tmp_path / "r.jsonl"), *common]) == 0
    rows = [json.loads(line) for line in (tmp_path / "s.jsonl").read_text().splitlines()]
    assert rows == [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    # The teacher is the student: no distance between them.
    assert all(abs(row["reverse_kl"]) < 1e-4 for row in rows)
    assert main(["score", str(recipe), *named, "--out", str(tmp_path / "t.jsonl")]) == 2


def test_score_for_topk(model_and_data, tmp_path, capsys, monkeypatch) -> None:
    from video_opd.curriculum import pool

    load_student, load_teacher, students = pool.load_inference_model, pool.load_teacher, []

    def student(*arguments):
        loaded = load_student(*arguments)
        students.append(weakref.ref(loaded.policy.model))
        return loaded

    def teacher(*arguments, **settings):
        assert [model() for model in students] == [None], "one model in memory at a time"
        return load_teacher(*arguments, **settings)

    monkeypatch.setattr(pool, "load_inference_model", student)
    monkeypatch.setattr(pool, "load_teacher", teacher)
    model, data = model_and_data
    words = ["score", "--student", str(model), "--teacher", str(model), "--data", str(data)]
    words += ["--out", str(tmp_path / "s.jsonl"), "--k", "2", "--max-new-tokens", "4"]
    assert main([*words, "--for-topk", "1", "--min-teacher-iou", "0", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["scored"] == 3 and 1 <= record["needed"] <= record["answered"] <= 3
    assert main([*words, "--for-topk", "1", "--min-teacher-iou", "0"]) == 0
    assert f"3 of 3 rows scored, {record['answered']} by the teacher" in capsys.readouterr().out
    selection = ["select", "--data", str(data), "--scores", str(tmp_path / "s.jsonl"), "--k", "1"]
    selection += ["--strategy", "topk", "--min-teacher-iou", "0", "--out", str(tmp_path / "t.jsonl")]
    assert main(selection) == 0 and len((tmp_path / "t.jsonl").read_text().splitlines()) == 1
    for more, said in (
        (["--min-teacher-iou", "0.5"], "belongs to --for-topk"),
        (["--for-topk", "1", "--reverse-kl"], "leave out either"),
        (["--for-topk", "1", "--min-teacher-iou", "50"], "at most 1"),
        (["--for-topk", "0"], "at least 1"),
    ):
        capsys.readouterr()
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err


@pytest.fixture
def asked_of(monkeypatch) -> list:
    """Records the configurations of student and teacher that ``score`` is called with; loads no model."""
    from video_opd.curriculum import pool
    from video_opd.curriculum.scores import ScoreResult

    calls: list = []

    def noted(student, teacher, *_, **__) -> ScoreResult:
        calls.append((student, teacher))
        return ScoreResult(kept=0, scored=0, failed=0, unannotated=0, reused=0)

    monkeypatch.setattr(pool, "score_pool", noted)
    return calls


def test_the_teacher_of_score_has_a_type_of_its_own(tmp_path, asked_of, capsys) -> None:
    data = write_rows(tmp_path / "d.jsonl", [{"id": "a", "video": "v", "query": "q", "spans": [[0, 1]]}])
    words = ["score", "--student", "s", "--data", str(data), "--out", str(tmp_path / "o.jsonl")]
    assert main([*words, "--teacher", "t", "--teacher.dtype", "bfloat16", "--video.fps", "1"]) == 0
    student, teacher = asked_of.pop()
    assert (student.model.path, student.model.dtype) == ("s", "float32")
    assert (teacher.model.path, teacher.model.dtype) == ("t", "bfloat16")
    assert teacher.video == student.video and student.video.fps == 1
    # Left out, it is the student's.
    assert teacher.quantization is None
    assert main([*words, "--teacher", "t", "--teacher.quantization", "int8"]) == 0
    assert asked_of.pop()[1].quantization == "int8"
    assert main([*words, "--teacher", "t", "--teacher.placement", "sharded"]) == 0
    assert asked_of.pop()[1].sharded
    assert main([*words, "--teacher", "t", "--model.dtype", "bfloat16"]) == 0
    assert {config.model.dtype for config in asked_of.pop()} == {"bfloat16"}
    for more, said in (
        (["--teacher.dtype", "bfloat16"], "--teacher M"),
        (["--teacher", "t", "--teacher.dtype", "float16"], "teacher.dtype is 'float16'"),
        (["--teacher", "t", "--teacher.dtyp", "float32"], "did you mean teacher.dtype"),
        (
            ["--teacher", "t", "--teacher.quantization", "int8", "--teacher.placement", "sharded"],
            "quantised weights are neither sharded nor moved",
        ),
        (["--teacher.path", "t"], "--teacher M"),
    ):
        capsys.readouterr()
        assert main([*words, *more]) == 2 and not asked_of
        assert said in capsys.readouterr().err


def test_score_does_what_a_recipe_says(tmp_path, monkeypatch, capsys) -> None:
    """A flag is stronger than the recipe; nothing that the recipe says of answers is dropped."""
    from video_opd.curriculum import pool
    from video_opd.curriculum.scores import ScoreResult, ScoreSettings
    from video_opd.types import ForTopK

    calls: list = []

    def noted(student, teacher, samples, out, **given) -> ScoreResult:
        calls.append((student, teacher, [sample.id for sample in samples], given))
        return ScoreResult(kept=0, scored=0, failed=0, unannotated=0, reused=0)

    monkeypatch.setattr(pool, "score_pool", noted)
    rows = [{"id": name, "video": "v", "query": "q", "spans": [[0, 1]]} for name in "abc"]
    data = write_rows(tmp_path / "d.jsonl", rows)
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"model: {{path: s}}\nteacher: {{path: t}}\ndata: {{train: {data}, limit: 2, cache_dir: clips}}\n"
        "prompt: {thinking: true}\nsampling: {max_new_tokens: 1024}\nrun: {seed: 7}\n"
        "tvdf: {teacher_k: 8, student_k: 2, temperature: 0.7, batch_size: 32, rank_by: reverse_kl, "
        "min_teacher_iou: 0.3}\n"
    )
    words = ["score", str(recipe), "--out", str(tmp_path / "o.jsonl")]
    assert main(words) == 0
    student, teacher, ids, given = calls.pop()
    assert (student.model.path, teacher.model.path, ids) == ("s", "t", ["a", "b"])
    assert (given["batch_size"], given["cache_dir"], given["for_topk"]) == (32, "clips", None)
    of_recipe = ScoreSettings(
        k=8, student_k=2, temperature=0.7, max_new_tokens=1024, seed=7, thinking=True, reverse_kl=True
    )
    assert given["settings"] == of_recipe
    assert main([*words, "--k", "3", "--seed", "0", "--batch-size", "4", "--tvdf.temperature", "0.9"]) == 0
    _, _, _, given = calls.pop()
    assert given["settings"] == replace(of_recipe, k=3, student_k=None, seed=0, temperature=0.9)
    assert given["batch_size"] == 4
    assert main([*words, "--for-topk", "5", "--data.limit", "1"]) == 0
    _, _, ids, given = calls.pop()
    assert given["for_topk"] == ForTopK(k=5, min_teacher_iou=0.3) and ids == ["a"]
    assert not given["settings"].reverse_kl
    for more, said in (
        (["--teacher.by_source", "{web: w}"], "one teacher scores a pool"),
        (["--for-topk", "5", "--reverse-kl"], "leave out either"),
        (["--optim.lr", "1"], "--optim.lr changes no score"),
        (["--tvdf.k", "5"], "--tvdf.k changes no score: leave it out; --for-topk K is for a selection"),
        (["--tvdf.min_teacher_iou", "0.1"], "--min-teacher-iou X with --for-topk is for a selection"),
        (["--tvdf.buckets", "3"], "--tvdf.buckets changes no score: leave it out\n"),
        (["--tvdf.center", "0.5"], "--tvdf.center changes no score"),
        (["--tvdf.sigma", "0.5"], "--tvdf.sigma changes no score"),
        (["--tvdf.kk", "3"], "--tvdf.kk changes no score"),
    ):
        assert main([*words, *more]) == 2 and not calls
        assert said in capsys.readouterr().err
    assert main([*words, "--for-topk", "5", "--tvdf.min_teacher_iou", "0.1"]) == 0
    assert calls.pop()[3]["for_topk"] == ForTopK(k=5, min_teacher_iou=0.1)
    # GRPO's selection asks no teacher, unless it has a gate.
    by_difficulty = ["--tvdf.strategy", "gaussian", "--tvdf.rank_by", "iou_gap", "--tvdf.min_teacher_iou"]
    for more, teacher in ((["0"], None), (["0.3"], "t"), (["0", "--reverse-kl"], "t")):
        assert main([*words, *by_difficulty, *more]) == 0
        asked = calls.pop()[1]
        assert (asked and asked.model.path) == teacher
    named = ["score", "--student", "s", "--data", str(data), "--out", str(tmp_path / "o.jsonl")]
    for setting, instead in (
        ("tvdf.teacher_k", "without one, give --k"),
        ("run.seed", "without one, give --seed"),
        ("tvdf.min_teacher_iou", "without one, give --for-topk K with --min-teacher-iou"),
        ("data.limit", "without one, leave it out"),  # nothing stands for it
    ):
        assert main([*named, f"--{setting}", "3"]) == 2
        assert f"--{setting} is a setting of a RECIPE; {instead}\n" in capsys.readouterr().err
    assert main([*named, "--tvdf.buckets", "3"]) == 2
    assert "--tvdf.buckets changes no score: leave it out\n" in capsys.readouterr().err
    assert main([*named, "--prompt.thinking", "true"]) == 2
    assert "no natural end: give --max-new-tokens" in capsys.readouterr().err and not calls
    assert main([*named, "--prompt.thinking", "true", "--max-new-tokens", "512"]) == 0
    assert calls.pop()[3]["settings"] == ScoreSettings(max_new_tokens=512, thinking=True)


# What torchrun starts: ``python -m video_opd`` with the words of one command after another. Starting two
# processes, which import torch and transformers, takes longer than all that they do here.
EACH = (
    "import json, runpy, sys\n"
    "for words in json.loads(sys.argv[1]):\n"
    "    sys.argv[1:] = words\n"
    "    try: runpy.run_module('video_opd', run_name='__main__', alter_sys=True)\n"
    "    except SystemExit as leave: assert not leave.code, leave.code\n"
)
COMMANDS = ("predict", "score")


def words_of(command: str, model: Path, data: Path, out: Path) -> list[str]:
    words = [command, str(model), str(data)]
    if command == "score":
        words = ["score", "--student", str(model), "--teacher", str(model), "--data", str(data), "--k", "2"]
    words += ["--max-new-tokens", "4", "--batch-size", "2", "--device", "cpu", "--json"]
    return [*words, "--out", str(out)]


@pytest.fixture(scope="module")
def two_processes(model_and_data, tmp_path_factory) -> tuple[Path, list[dict]]:
    """The folder with what two processes wrote for each command, and what they printed."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "each.py").write_text(EACH)
    for command in COMMANDS:
        (folder / command).mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", str(folder / "each.py")]
    model, data = model_and_data
    each = json.dumps([words_of(command, model, data, folder / command / "two") for command in COMMANDS])
    ended = subprocess.run([sys.executable, *launcher, each], capture_output=True, text=True, check=True)
    return folder, json.loads("[" + ended.stdout.replace("}\n{", "},\n{") + "]")


@pytest.mark.parametrize("command", COMMANDS)
def test_two_processes_make_the_rows_of_one(command, model_and_data, two_processes, capsys) -> None:
    """Two started as users do; the second one is silent."""
    folder, printed = two_processes
    assert len(printed) == len(COMMANDS)
    (model, data), here = model_and_data, folder / command
    assert main(words_of(command, model, data, here / "one")) == 0
    told = {"one": json.loads(capsys.readouterr().out), "two": printed[COMMANDS.index(command)]}
    assert all(told[name].pop("out") == str(here / name) for name in told)
    assert told["one"] == told["two"]
    one, two = ({line for line in (here / name).read_text().splitlines()} for name in told)
    assert one == two and len(two) == len((here / "two").read_text().splitlines()) == 3
    assert {path.name for path in here.iterdir()} == {f"{n}{e}" for n in told for e in ("", ".meta.json")}


def test_evaluate_a_model_is_no_work_for_several(model_and_data, tmp_path, capsys, monkeypatch) -> None:
    model, data = model_and_data
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = tmp_path / "p.jsonl"
    assert main(["evaluate", "--data", str(data), "--model", str(model), "--out", str(out)]) == 2
    assert "--predictions" in capsys.readouterr().err and not out.exists()


def test_wrong_model_settings_are_refused_before_anything_is_loaded(model_and_data, capsys) -> None:
    model, data = model_and_data
    assert main(["predict", str(model), str(data), "--out", "unused", "--video.fsp", "2"]) == 2
    assert "video.fps" in capsys.readouterr().err
    with pytest.raises(UserError, match="VALUE"):
        split_overrides(["--video.fps"])
