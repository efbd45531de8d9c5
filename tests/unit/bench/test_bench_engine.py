"""The engine benchmark on random tiny models: that it measures what it says, not how fast anything is."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
import torch
from model_cases import model, processor

from video_opd.bench import data as bench
from video_opd.bench.engine import bench_engine, same_answers, same_step, table
from video_opd.bench.timing import peak_bytes, quartiles, summary, take_turns
from video_opd.bench.work import QUERIES, Steps, prompts_of
from video_opd.cli import main
from video_opd.data.budget import VideoBudget
from video_opd.errors import UserError
from video_opd.types import Rollout

CPU = torch.device("cpu")


def test_ways_take_turns_and_the_first_round_does_not_count() -> None:
    order: list[str] = []

    def way(name: str, seconds: float) -> object:
        order.append(name)
        time.sleep(seconds)
        return f"{name} {len(order)}"

    ways = {"slow": lambda: way("slow", 0.05), "fast": lambda: way("fast", 0.01)}
    results, seconds = take_turns(ways, 3, CPU)
    assert order == ["slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]
    assert results == {"slow": "slow 1", "fast": "fast 2"}
    assert all(len(values) == 3 for values in seconds.values())
    found = summary(seconds, "slow")
    assert found["slow"]["speedup"]["median"] == 1 and found["fast"]["speedup"]["median"] > 2
    assert quartiles([1.0, 2.0, 3.0]) == {"low": 1.0, "median": 2.0, "high": 3.0}


def test_peak_memory_is_what_the_work_takes() -> None:
    peak = peak_bytes(lambda: torch.ones(2**24).sum(), CPU)  # 64 MiB
    assert peak is not None and 60 * 2**20 < peak < 80 * 2**20


@pytest.mark.parametrize("tokens", [60, 200, 3000])
def test_prompts_have_the_length_that_was_asked_for(tokens: int) -> None:
    prompts = prompts_of(processor(), tokens, queries=3, videos=2)
    assert len(prompts) == 6 and len({p.clip_digest for p in prompts}) == 2
    assert len({p.text for p in prompts}) == 3 and len(QUERIES) >= 3
    one_pair = 20
    assert all(tokens <= p.length < tokens + one_pair for p in prompts[::3])


def test_a_bench_compares_equal_work() -> None:
    records = bench_engine(
        model(sharpness=8),
        processor(),
        model(1, sharpness=8),
        lengths=[60],
        rollouts=(2, 3),
        repeats=2,
        tokens=4,
    )
    assert [r["job"] for r in records] == [
        "video-opd", "grpo, 2 rollouts", "grpo, 3 rollouts", "score, 8 answers", "5 queries on a video",
    ]  # fmt: skip
    for record in records:
        assert record["ways"]["plain"]["speedup"]["median"] == 1
        assert all(way["seconds"] > 0 and way["peak_bytes"] > 0 for way in record["ways"].values())
        assert max(record["differences"].values()) < 1e-4
    assert "| video-opd |" in table(records)
    json.dumps(records)


def test_long_prompts_are_not_sampled_without_a_cache() -> None:
    records = bench_engine(
        model(sharpness=8), processor(), model(1, sharpness=8), lengths=[60], rollouts=(2,), repeats=1,
        tokens=3, memory=False, plain_up_to=50,
    )  # fmt: skip
    assert [record["reference"] for record in records] == [
        "plain update", "plain update", "cached, one by one", "cached, one by one",
    ]  # fmt: skip
    for record in records:
        assert "plain" not in record["ways"]
        assert record["ways"][record["reference"]]["speedup"]["median"] == 1


def test_other_results_are_an_error() -> None:
    def answered(logprob: float, token: int = 3) -> list[list[Rollout]]:
        return [[Rollout(token_ids=(token,), logprobs=(logprob,), text="", truncated=True)]]

    same_answers({"plain": answered(-1.0), "prefix": answered(-1.00001)}, "float32")
    with pytest.raises(AssertionError, match=r"differ by 0\.01 nats"):
        same_answers({"plain": answered(-1.0), "prefix": answered(-1.01)}, "float32")
    with pytest.raises(AssertionError, match="other answers"):
        same_answers({"plain": answered(-1.0), "prefix": answered(-1.0, token=4)}, "float32")
    shown = prompts_of(processor(), 60)
    settings: dict[str, Any] = {"method": "video-opd", "tokens": 4}
    step = Steps(model(sharpness=8), processor(), model(1), shown, engine="plain", **settings)()
    other = Steps(model(sharpness=8), processor(), model(2), shown, engine="prefix", **settings)()
    with pytest.raises(AssertionError, match="gradient norm"):
        same_step({"plain": step, "prefix": other}, "float32")


def test_the_command_writes_what_it_prints(tmp_path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "engine.json"
    words = ["--lengths", "60", "--repeats", "1", "--rollouts", "2", "--max-new-tokens", "2", "--no-memory"]
    assert main(["bench", "engine", *words, "--device", "cpu", "--json", str(out)]) == 0
    record = json.loads(out.read_text())
    printed = capsys.readouterr().out
    assert table(record["results"]) in printed
    opd, grpo, *_ = (r["ways"] for r in record["results"])
    share = 100 * opd["plain"]["seconds"] / grpo["plain"]["seconds"]
    assert f"a step of video-opd against one of grpo, 2 rollouts: {share:.0f}% (plain)" in printed
    assert record["machine"]["torch"] == torch.__version__


def library_reads(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives qwen-vl-utils a decoder, which it brings none of: PyAV, all frames."""
    library = pytest.importorskip("qwen_vl_utils.vision_process")

    def read(ele: dict[str, Any]) -> Any:
        with av.open(ele["video"]) as container:
            frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
        count = library.smart_nframes(ele, total_frames=len(frames), video_fps=30.0)
        index = torch.linspace(0, len(frames) - 1, count).round().long()
        facts = {"fps": 30.0, "frames_indices": index.tolist(), "total_num_frames": len(frames)}
        return torch.from_numpy(frames).permute(0, 3, 1, 2)[index], facts, 2.0

    monkeypatch.setitem(library.VIDEO_READER_BACKENDS, "decord", read)
    monkeypatch.setattr(library, "get_video_reader_backend", lambda: "decord")


def test_the_data_path_is_compared_on_what_is_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = bench.make_videos(tmp_path, [3], (64, 96))
    library_reads(path, monkeypatch)
    one, all_of_them = bench.bench_data(processor(), [path], budget=VideoBudget(), repeats=2)
    assert one["video"] == "96x64, 3 s, 30 fps" and one["frames"] == 6
    same = one["differences"]
    assert same["video_tokens"] == same["video_tokens_library"] > 0 and same["pixels"] < 0.02
    assert one["ways"]["qwen-vl-utils"]["speedup"]["median"] == 1
    assert all_of_them["frames"] == 12 and "| all, 2 times |" in bench.table([one, all_of_them])
    # Once more, what is shown is not the same: another budget.
    theirs = bench.by_library(processor(), path, VideoBudget(max_frames=4))
    ours = bench.by_ours(processor(), path, VideoBudget())
    found = bench.differences(theirs, ours)
    assert found["video_tokens"] > found["video_tokens_library"] and "pixels" not in found


def test_without_a_decoder_the_library_cannot_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("qwen_vl_utils.vision_process")
    monkeypatch.setattr(library, "get_video_reader_backend", lambda: "torchvision")
    with pytest.raises(UserError, match="pip install decord"):
        bench.library_backend()
