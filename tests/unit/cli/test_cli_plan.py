"""``video-opd plan``: what it prints, and what it refuses."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from places import ROOT, SRC

from video_opd.cli import main
from video_opd.planning.memory import PARTS
from video_opd.planning.sizes import known_models

TEACHER = ["--teacher.path", "williamljz/Video-opd-teacher-Qwen3-VL-32B-GRPO"]
PAPER = [str(ROOT / "recipes/qwen3-vl-8b/video-opd.yaml"), *TEACHER]
TINY = str(ROOT / "recipes/tiny/video-opd.yaml")


def plan(capsys, *words: str) -> tuple[int, str]:
    code = main(["plan", *words])
    return code, capsys.readouterr().out


def test_a_plan_is_a_table_and_a_record(capsys) -> None:
    code, text = plan(capsys, *PAPER, "--gpus", "8", "--gpu-memory", "60")
    assert code == 1 and "does not fit" in text and "8.77 billion weights" in text
    assert "GiB of the host's memory, beside Python's own and 78.5 of files' pages:" in text
    assert "more in the first process while it writes a checkpoint" in text
    code, printed = plan(capsys, *PAPER, "--gpus", "8", "--gpu-memory", "400", "--json")
    record = json.loads(printed)
    assert code == 0 and record["fits"] and set(record["parts"]) <= set(PARTS)
    assert record["peak_bytes"] == sum(record["parts"].values())
    assert record["host"]["each_process_bytes"] == sum(record["host"]["parts"].values()) > 0
    assert record["gpu_memory_bytes"] - record["peak_bytes"] == record["spare_bytes"]
    assert record["teachers"] == [{"model": "Qwen3-VL-32B", "weights": 33_357_390_064}]
    for part, size in record["parts"].items():
        assert size > 0 and PARTS[part]


def test_the_suggestion_is_yaml_that_makes_the_recipe_fit(capsys, tmp_path: Path) -> None:
    words = ["--gpus", "8", "--gpu-memory", "80", "--model.dtype", "float32"]
    code, text = plan(capsys, *PAPER, *words, "--suggest")
    assert code == 1
    lines = text[text.index("# it fits with") :]
    assert yaml.safe_load(lines)["model"]["dtype"] == "bfloat16"
    (said,) = [line for line in lines.splitlines() if line.startswith("# or: ")]
    overrides = shlex.split(said.removeprefix("# or: "))
    merged = [word for word in words if word not in ("--model.dtype", "float32")]
    code, text = plan(capsys, *PAPER, *merged, *overrides)
    assert code == 0 and "fits" in text


def test_a_data_file_that_is_here_bounds_the_prompts(capsys, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text('{"id": "a", "video": "a.mp4", "query": "q", "duration": 4}\n')
    _, printed = plan(capsys, TINY, "--gpu-memory", "4", "--data.train", str(tmp_path / "d.jsonl"), "--json")
    record = json.loads(printed)
    assert record["rows"] == 1 and not record["rows_assumed"]
    assert 4 * 8 <= record["video_tokens"] <= 4 * 9  # four pairs
    _, printed = plan(capsys, TINY, "--gpu-memory", "4", "--data.train", str(tmp_path / "no.jsonl"), "--json")
    assert json.loads(printed)["rows_assumed"]


def test_a_plan_says_that_rounds_do_more_than_train(capsys) -> None:
    for recipe, said in ((TINY, False), (str(ROOT / "recipes/tiny/rounds.yaml"), True)):
        _, text = plan(capsys, recipe, "--gpu-memory", "16")
        _, printed = plan(capsys, recipe, "--gpu-memory", "16", "--json")
        assert ("rounds trains on tvdf.k" in text) is said
        assert ("rounds trains on tvdf.k" in json.loads(printed).get("note", "")) is said


def test_the_rate_also_goes_by_its_former_names(capsys) -> None:
    def record(*words: str) -> dict[str, float]:
        assert main(["plan", TINY, "--gpu-memory", "16", "--json", *words]) == 0
        return json.loads(capsys.readouterr().out)

    default, half = record(), record("--rate", "100")
    assert (default["rate_tflops"], half["rate_tflops"]) == (200, 100)
    assert half["run_s"] == pytest.approx(2 * default["run_s"])
    assert half["matrix_rate_tflops"] == 100
    assert main(["plan", TINY, "--gpu-memory", "16", "--json", "--matrix-rate", "100"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == half and "--matrix-rate is called --rate now" in printed.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "0", "--gpu-memory", "80"], "--gpus"),
        (["--gpus", "-8", "--gpu-memory", "80"], "--gpus"),
        (["--gpus", "1000000", "--gpu-memory", "80"], "--gpus"),
        (["--gpus", "8"], "--gpu-memory"),
        (["--gpu-memory", "0"], "--gpu-memory"),
        (["--gpu-memory", "-80"], "--gpu-memory"),
        (["--gpu-memory", "nan"], "--gpu-memory"),
        (["--gpu-memory", "inf"], "--gpu-memory"),
        (["--gpu-memory", "80GB"], "--gpu-memory"),
        (["--gpu-memory", "80", "--rate", "0"], "--rate"),
        (["--gpu-memory", "80", "--rate", "fast"], "--rate"),
        (["--gpus", "8", "--gpu-memory", "80", "--model.path", "nobody/nothing"], "nobody/nothing"),
        (["--gpus", "8", "--gpu-memory", "80", "--model.path", "."], "config.json"),
        (["--gpus", "1", "--gpu-memory", "80"], "teacher.placement is sharded"),
        (["--gpu-memory", "80", "--model.sharding", "fsdp3"], "model.sharding"),
    ],
)
def test_nonsense_is_one_line_and_exit_code_2(words, said, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plan", *PAPER, *words]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert said in line


def test_a_model_is_read_by_its_config_and_nothing_else(capsys, tmp_path: Path) -> None:
    (tmp_path / "student").mkdir()
    (tmp_path / "student/config.json").write_text(json.dumps(known_models()["Qwen3-VL-4B"]))
    words = ["--model.path", str(tmp_path / "student"), "--gpus", "8", "--gpu-memory", "100", "--json"]
    _, printed = plan(capsys, *PAPER, *words)
    assert json.loads(printed)["student"]["weights"] == 4_437_815_808


def test_it_needs_no_torch(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from video_opd.cli import main\n"
        f"assert main(['plan', {TINY!r}, '--gpu-memory', '8', '--suggest']) == 0\n"
        "assert not {'torch', 'transformers', 'numpy', 'accelerate'} & set(sys.modules)\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={"PYTHONPATH": str(SRC), "PATH": ""},
    )
    assert run.returncode == 0, run.stderr
