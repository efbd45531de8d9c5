"""The foundations of the comparison with other trainers: the same work for all, and the sums."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from PIL import Image
from places import ROOT

from video_opd.config import PromptConfig
from video_opd.data.encode import PromptEncoder
from video_opd.data.video import load_clip
from video_opd.models.loading import load_model
from video_opd.world.shipped import shipped

PEERS = ROOT / "benchmarks" / "peers"


def _script(name: str) -> ModuleType:
    """A script of the room by its file: the room is no package."""
    known = f"peers_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, PEERS / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


run, measure, reward = (_script(name) for name in ("run", "measure", "reward"))
PLAN = run.Plan(pairs=3, side_px=64)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run.write_data(tmp_path_factory.mktemp("peers"), PLAN, videos=2)


@pytest.fixture(scope="module")
def student(data: Any) -> tuple[Any, Any]:
    return load_model(str(data.student), dtype="float32", device=torch.device("cpu"))


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_framework_is_shown_as_many_visual_tokens(data: Any, student: tuple[Any, Any]) -> None:
    _, processor = student
    for ours, trl, swift in zip(_rows(data.ours), _rows(data.trl), _rows(data.swift), strict=True):
        clip = load_clip(ours["video"], run.budget_of(PLAN))
        prompt = PromptEncoder(processor).encode(clip, ours["query"], ours["id"])
        images = [Image.open(path) for path in trl["images"]]
        text = "".join(["<|vision_start|><|image_pad|><|vision_end|>"] * len(images))
        seen = processor(text=[text], images=images, return_tensors="pt")["input_ids"]
        assert prompt.video_tokens == (seen == processor.image_token_id).sum() == PLAN.visual_tokens == 12
        assert swift["videos"] == [ours["video"]]


def test_every_framework_is_asked_in_the_same_words(data: Any, student: tuple[Any, Any]) -> None:
    _, processor = student
    encoder = PromptEncoder(processor, PromptConfig(video_form="nested"))  # the form of the tiny models
    for ours, trl, swift in zip(_rows(data.ours), _rows(data.trl), _rows(data.swift), strict=True):
        prompt = encoder.encode(load_clip(ours["video"], run.budget_of(PLAN)), ours["query"], ours["id"])
        placed = "<|vision_start|><|video_pad|><|vision_end|>"
        for messages in (trl["prompt"], swift["messages"]):
            texts = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
            assert prompt.text.replace(placed, "") == texts.replace("<video>", "") + "<|im_start|>assistant\n"
        assert swift["messages"][-1]["content"].startswith("<video>")


def test_videos_differ_and_are_kept(data: Any) -> None:
    first, second = (Path(row["video"]) for row in _rows(data.ours))
    assert first.read_bytes() != second.read_bytes()
    before = first.stat().st_mtime_ns
    run.write_data(data.ours.parents[1], PLAN, videos=2)
    assert first.stat().st_mtime_ns == before


def test_the_student_is_the_base_but_for_the_two_ends(student: tuple[Any, Any]) -> None:
    model, processor = student
    base, _ = load_model(str(shipped("tiny-base")), dtype="float32", device=torch.device("cpu"))
    never, *ends = processor.tokenizer.convert_tokens_to_ids([run.NEVER_SAID, *run.ENDS])
    for (name, mine), theirs in zip(model.state_dict().items(), base.state_dict().values(), strict=True):
        changed = (mine != theirs).flatten(1).any(-1).nonzero().flatten() if mine.dim() > 1 else ()
        assert list(changed) == (sorted(ends) if name == "lm_head.weight" else []), name
    assert torch.equal(model.lm_head.weight[ends], model.lm_head.weight[[never, never]])
    assert {model.config.text_config.eos_token_id, processor.tokenizer.pad_token_id} == set(ends)


def _turn(seconds: list[float], peak: int, loaded: int) -> dict[str, Any]:
    counted = {"patches_a_step": 8, "positions_a_step": 9, "visual_tokens": [12], "prompt_tokens": [40, 41]}
    return {
        **{"seconds": seconds, "peak_bytes": peak, "loaded_bytes": loaded, "framework": "F 1.0"},
        **{"answer_tokens": 16.0, **counted},
    }


def test_ratios_are_taken_within_a_turn() -> None:
    ours = [_turn([1.0, 1.2, 9.0], 300, 100), _turn([2.0], 320, 100), _turn([1.0], 310, 100)]
    peer = [_turn([6.0], 900, 200), _turn([8.0], 1000, 200), _turn([3.0], 1100, 200)]
    found = run.summarise(peer, ours)
    # ours: 1.2, 2, 1 s; ratios 5, 4, 3, though the medians alone would give 6 / 1.2 = 5
    assert found["seconds"] == 6.0 and found["times_ours"]["median"] == pytest.approx(4.0)
    assert found["peak_above_loaded"] == 800 and found["peak_bytes"] == 1000


def test_the_verdict_compares_fastest_and_smallest() -> None:
    mib = 2**20
    ways = {
        "video-opd, 16 at once": _turn([1.0], 700 * mib, 100 * mib),
        "video-opd, 8 at once": _turn([2.0], 300 * mib, 100 * mib),
        "TRL, 16 at once": _turn([9.0], 4100 * mib, 100 * mib),
        "TRL, 2 at once": _turn([12.0], 900 * mib, 100 * mib),
    }
    reference = [ways["video-opd, 16 at once"]]
    found = {name: run.summarise([turn], reference) for name, turn in ways.items()}
    (line,) = run.verdict(found)
    assert "TRL" in line and "9.0 times as long" in line and "4.0 times its memory" in line
    assert "| TRL, 2 at once | 12.00 | 12.0× [12.0, 12.0] | 900 MiB | 800 MiB | 40 to 41 (12) |" in run.table(
        found
    )


def test_the_first_way_of_every_job_is_ours_and_work_divides_evenly() -> None:
    for ways in run.jobs().values():
        assert ways[0].framework == run.OURS
        assert len({(way.prompts, way.rollouts) for way in ways}) == 1
        for way in ways:
            assert (way.prompts * way.rollouts) % way.at_once == 0
            assert (PEERS / way.script).is_file()
            assert way.environment is None or (PEERS / f"requirements-{way.environment}.txt").is_file()


@pytest.mark.parametrize("key", ["visual_tokens", "answer_tokens", "trained_weights", "threads"])
def test_less_work_is_refused(key: str) -> None:
    way = run.jobs()["GRPO: 2 prompts, 8 answers each"][2]
    same = {
        **{"visual_tokens": [12], "answer_tokens": 16.0, "threads": 2},
        **{"trained_weights": run.TRAINED_WEIGHTS, "trained_dtypes": ["torch.float32"]},
    }
    run.check_same_work(way, PLAN, same)
    less = [11] if key == "visual_tokens" else same[key] - 1
    with pytest.raises(RuntimeError, match=f"TRL, 16 at once .grpo.: {key} is"):
        run.check_same_work(way, PLAN, {**same, key: less})


@pytest.fixture
def watched(student: tuple[Any, Any]) -> Iterator[Any]:
    model, processor = student
    watch = measure.Measure(warmup=1)
    measure.Tokens(watch, model, processor.tokenizer.pad_token_id, (processor.video_token_id,))
    watch.loaded(model)
    yield watch
    watch.stop()


def test_what_a_step_was_given_is_counted(watched: Any, data: Any, student: tuple[Any, Any]) -> None:
    """Three steps: a prompt is sampled from, then trained on with an answer of four tokens, left-padded."""
    model, processor = student
    row = _rows(data.ours)[0]
    prompt = PromptEncoder(processor).encode(load_clip(row["video"], run.budget_of(PLAN)), row["query"], "a")
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    pad = torch.full((1, 2), processor.tokenizer.pad_token_id)
    whole = torch.cat([pad, prompt.input_ids, torch.full((1, 4), 7)], 1)
    types = torch.cat([torch.zeros(1, 2), prompt.tensors["mm_token_type_ids"], torch.zeros(1, 4)], 1).long()
    for _ in range(3):
        with torch.no_grad():
            model(input_ids=prompt.input_ids, **prompt.tensors)
        out = model(input_ids=whole, **{**prompt.tensors, "mm_token_type_ids": types})
        out.logits.sum().backward()
        optimizer.step()
    record = watched.record()
    assert len(record["seconds"]) == 2 and all(second > 0 for second in record["seconds"])
    assert record["prompt_tokens"] == [prompt.length] and record["visual_tokens"] == [12]
    assert record["answer_tokens"] == 4 and record["trained_weights"] == run.TRAINED_WEIGHTS
    assert record["patches_a_step"] == 2 * 12 * 4  # a visual token is 2 × 2 patches
    assert record["positions_a_step"] == prompt.length + (2 + prompt.length + 4)
    # Linux counts a process's pages in batches for each CPU, so that both figures may be off by some.
    assert record["peak_bytes"] >= record["loaded_bytes"] - 2**20 > 0


def test_rewards_are_the_same_however_they_are_asked_for() -> None:
    texts = ["1.00 to 2.00", "3.00 to 4.00"]
    talks = [[{"role": "assistant", "content": text}] for text in texts]
    assert reward.of_completions(texts) == reward.of_completions(talks, extra=1)
    assert reward.of_completions(texts) == [reward.of_sample(None, text) for text in texts]
    assert len(set(reward.of_completions(texts))) == 2
