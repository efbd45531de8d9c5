"""The engine benchmark on random tiny models: that it measures what it says, not how fast anything is."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch
from model_cases import mixture, model, processor
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from video_opd.bench import data as bench
from video_opd.bench import engine, timing
from video_opd.bench.engine import bench_engine, same_responses, same_step, table
from video_opd.bench.operations import (
    _formulas,
    attention_operations,
    count_operations,
    forward_prompts,
    least_operations,
    operations,
)
from video_opd.bench.operations import table as operations_table
from video_opd.bench.timing import peak_bytes, quartiles, summary, take_turns
from video_opd.bench.work import QUERIES, Steps, prompts_of
from video_opd.cli import main
from video_opd.config import VideoConfig
from video_opd.errors import UserError
from video_opd.training.step import StepResult
from video_opd.types import EncodedPrompt, Rollout
from video_opd.world.tiny import SIZES

CPU = torch.device("cpu")


def test_ways_take_turns_and_the_first_round_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    now_s = 0.0
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=lambda: now_s))

    def way(name: str, seconds: float) -> object:
        nonlocal now_s
        order.append(name)
        now_s += seconds
        return f"{name} {len(order)}"

    ways = {"slow": lambda: way("slow", 0.05), "fast": lambda: way("fast", 0.01)}
    results, seconds = take_turns(ways, 3, CPU)
    assert order == ["slow", "fast", "fast", "slow", "slow", "fast", "fast", "slow"]
    assert results == {"slow": "slow 1", "fast": "fast 2"}
    assert all(len(values) == 3 for values in seconds.values())
    found = summary(seconds, "slow")
    assert found["slow"]["speedup"]["median"] == 1
    assert found["fast"]["speedup"]["median"] == pytest.approx(5)
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
        repeats=1,
        tokens=3,
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
    def responses(logprob: float, token: int = 3) -> list[list[Rollout]]:
        return [[Rollout(token_ids=(token,), logprobs=(logprob,), text="", truncated=True)]]

    same_responses({"plain": responses(-1.0), "prefix": responses(-1.00001)}, "float32")
    with pytest.raises(AssertionError, match=r"differ by 0\.01 nats"):
        same_responses({"plain": responses(-1.0), "prefix": responses(-1.01)}, "float32")
    with pytest.raises(AssertionError, match="other responses"):
        same_responses({"plain": responses(-1.0), "prefix": responses(-1.0, token=4)}, "float32")
    # In bfloat16 a response is compared up to the token where rounding made it another one.
    one, two = (
        [[Rollout(token_ids=ids, logprobs=logprobs, text="", truncated=True)]]
        for ids, logprobs in (((3, 4, 5), (-1.0, -2.0, -1.0)), ((3, 4, 6), (-1.1, -2.0, -9.0)))
    )
    assert same_responses({"plain": one, "prefix": two}, "bfloat16") == {"logprob": pytest.approx(0.1)}
    with pytest.raises(AssertionError, match=r"differ by 0\.3 nats"):
        same_responses({"plain": responses(-1.0), "prefix": responses(-1.3)}, "bfloat16")
    unlike = same_responses({"plain": responses(-1.0), "prefix": responses(-1.0, token=4)}, "bfloat16")
    assert unlike == {"logprob": None}
    shown = prompts_of(processor(), 60)
    settings: dict[str, Any] = {"method": "video-opd", "tokens": 4}
    step = Steps(model(sharpness=8), processor(), model(1), shown, engine="plain", **settings)()
    other = Steps(model(sharpness=8), processor(), model(2), shown, engine="prefix", **settings)()
    with pytest.raises(AssertionError, match="gradient norm"):
        same_step({"plain": step, "prefix": other}, "float32")


@dataclass(frozen=True, kw_only=True)
class Command:
    """A run of ``bench engine``."""

    words: list[str]
    record: dict[str, Any]
    printed: str


def run_command(words: list[str], out: Path) -> Command:
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        assert main([*words, "--device", "cpu", "--json", str(out)]) == 0
    return Command(words=words, record=json.loads(out.read_text()), printed=printed.getvalue())


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """On models that are smaller than the shipped ones."""
    folder = tmp_path_factory.mktemp("command")
    words = ["bench", "engine", "--lengths", "60", "--repeats", "1", "--rollouts", "2", "--no-memory"]
    words += ["--max-new-tokens", "2"]
    for seed, name in enumerate(("model", "teacher")):
        model(seed, sharpness=8).save_pretrained(folder / name)
        processor().save_pretrained(folder / name)
        words += [f"--{name}", str(folder / name)]
    return run_command(words, folder / "engine.json")


def test_the_command_writes_what_it_prints(command: Command) -> None:
    record = command.record
    assert table(record["results"]) in command.printed
    assert operations_table(record["operations"]) in command.printed
    opd, grpo, *_ = (r["ways"] for r in record["results"])
    share = 100 * opd["plain"]["seconds"] / grpo["plain"]["seconds"]
    assert f"a step of video-opd against one of grpo, 2 rollouts: {share:.0f}% (plain)" in command.printed
    assert record["machine"]["torch"] == torch.__version__


def test_the_models_are_the_shipped_ones_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    layers: list[int] = []

    def count(student: Any, _: Any, teacher: Any, **__: Any) -> list[Any]:
        layers.extend(each.config.text_config.num_hidden_layers for each in (student, teacher))
        return []

    monkeypatch.setattr("video_opd.bench.operations.count_operations", count)
    assert main(["bench", "engine", "--operations-only", "--device", "cpu"]) == 0
    assert layers == [SIZES["tiny"].layers, SIZES["small"].layers]


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
    one, all_of_them = bench.bench_data(processor(), [path], budget=VideoConfig(), repeats=2)
    assert one["video"] == "96x64, 3 s, 30 fps" and one["frames"] == 6
    same = one["differences"]
    assert same["video_tokens"] == same["video_tokens_library"] > 0 and same["pixels"] < 0.02
    assert one["ways"]["qwen-vl-utils"]["speedup"]["median"] == 1
    assert all_of_them["frames"] == 12 and "| all, 2 times |" in bench.table([one, all_of_them])
    # Once more, what is shown is not the same: another budget.
    theirs = bench.by_library(processor(), path, VideoConfig(max_frames=4))
    ours = bench.by_ours(processor(), path, VideoConfig())
    found = bench.differences(theirs, ours)
    assert found["video_tokens"] > found["video_tokens_library"] and "pixels" not in found


def test_without_a_decoder_the_library_cannot_be_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    library = pytest.importorskip("qwen_vl_utils.vision_process")
    monkeypatch.setattr(library, "get_video_reader_backend", lambda: "torchvision")
    with pytest.raises(UserError, match="pip install decord"):
        bench.library_backend()


# ---------------------------------------------------------------------------------------------- operations


def decoder_by_hand(config: Any, tokens: int, before: int = 0) -> tuple[int, int]:
    """(linear layers, attention) of ``tokens`` on top of ``before`` others: 2·m·n·k for each product."""
    text = config.text_config
    queries = text.num_attention_heads * text.head_dim
    keys = text.num_key_value_heads * text.head_dim
    weights = text.hidden_size * (2 * queries + 2 * keys + 3 * text.intermediate_size)
    attention = 2 * 2 * tokens * (before + tokens) * queries
    return text.num_hidden_layers * 2 * tokens * weights, text.num_hidden_layers * attention


def vision_by_hand(config: Any, grid: Sequence[int]) -> tuple[int, int, int]:
    """(patch embedding, other linear layers, attention) of a video of time × height × width patches."""
    vision = config.vision_config
    time_, height, width = grid
    patches, cells, wide = time_ * height * width, time_ * height * width // 4, 4 * vision.hidden_size
    pixels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    layer = vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)
    mergers = (1 + len(vision.deepstack_visual_indexes)) * (wide * wide + wide * vision.out_hidden_size)
    return (
        2 * patches * pixels * vision.hidden_size,
        2 * patches * vision.depth * layer + 2 * cells * mergers,
        vision.depth * 2 * 2 * patches * height * width * vision.hidden_size,
    )


def grid_of(prompt: EncodedPrompt) -> list[int]:
    (grid,) = prompt.tensors["video_grid_thw"].tolist()
    return grid


@pytest.mark.parametrize("heads", [(4, 4), (4, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_attention_on_a_cpu_is_counted(
    heads: tuple[int, int], masked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("flash_attention_for_cpu", "flash_attention_for_cpu_backward"):  # as in older releases
        operation = getattr(torch.ops.aten, f"_scaled_dot_product_{name}")
        monkeypatch.delitem(flop_registry, operation, raising=False)
    queries, keys, batch, q, k, size = *heads, 3, 5, 7, 16
    query = torch.randn(batch, queries, q, size, requires_grad=True)
    key, value = (torch.randn(batch, keys, k, size, requires_grad=True) for _ in "kv")
    mask = torch.ones(q, k, dtype=torch.bool) if masked else None

    def attend() -> torch.Tensor:
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, enable_gqa=queries != keys
        )

    product = 2 * batch * queries * q * k * size
    assert operations(attend) == 2 * product
    whole = operations(lambda: attend().sum().backward())
    # The backward has four products, and a fifth where it computes the scores again.
    assert whole in (6 * product, 7 * product)
    assert attention_operations(query.shape, key.shape, value.shape) == 2 * product


@pytest.mark.parametrize("recompute", [False, True])
def test_a_count_is_the_librarys(recompute: bool) -> None:
    """Of a step, with a backward in it, and of operations that only inference mode leaves in one piece."""
    step = Steps(
        mixture(), processor(), model(1), prompts_of(processor(), 60), method="video-opd", engine="prefix",
        tokens=2, recompute=recompute,
    )  # fmt: skip

    def in_inference_mode() -> None:
        with torch.inference_mode():
            torch.nn.functional.linear(torch.ones(2, 3, 5), torch.ones(7, 5), torch.ones(7))

    for work in (step, in_inference_mode):
        with FlopCounterMode(display=False, custom_mapping=_formulas()) as counter:
            work()
        assert operations(work) == counter.get_total_flops() > 0


def test_the_count_of_a_forward_is_the_count_by_hand() -> None:
    student = model()
    (prompt,) = prompts_of(processor(), 300, side_px=128)
    patches, linear, attention = vision_by_hand(student.config, grid_of(prompt))
    expected = patches + linear + attention + sum(decoder_by_hand(student.config, prompt.length))
    assert operations(lambda: forward_prompts(student, [prompt])) == pytest.approx(expected, rel=0.01)
    assert operations(lambda: forward_prompts(student, [prompt, prompt])) == pytest.approx(
        2 * expected, rel=0.01
    )


def test_experts_are_counted() -> None:
    student = mixture()
    (prompt,) = prompts_of(processor(), 300)
    text = student.config.text_config
    linear, attention = decoder_by_hand(student.config, prompt.length)
    dense = text.num_hidden_layers * 2 * prompt.length * 3 * text.hidden_size * text.intermediate_size
    routed = 3 * text.moe_intermediate_size * text.num_experts_per_tok + text.num_experts
    experts = text.num_hidden_layers * 2 * prompt.length * text.hidden_size * routed
    vision = sum(vision_by_hand(student.config, grid_of(prompt)))
    expected = vision + linear - dense + experts + attention
    assert operations(lambda: forward_prompts(student, [prompt])) == pytest.approx(expected, rel=0.01)


def test_the_count_of_a_step_is_the_count_by_hand() -> None:
    """The backward, the responses on top of the prompt, ``lm_head`` and layers that run again are seen."""
    student = model()
    shown = prompts_of(processor(), 300)
    settings: dict[str, Any] = {"method": "sft", "engine": "prefix"}
    step = Steps(student, processor(), model(1), shown, **settings)
    alone = step()
    tokens_written = len(alone.responses[0])
    grid = grid_of(shown[0])
    embedding, vision_linear, attention = vision_by_hand(student.config, grid)
    prompt_linear, prompt_attention = decoder_by_hand(student.config, shown[0].length)
    # The last token of a response predicts nothing.
    more_linear, more_attention = decoder_by_hand(student.config, tokens_written - 1, shown[0].length)
    policy: Any = step.stepper.components.policy
    head = 2 * tokens_written * student.config.text_config.hidden_size * policy.vocabulary.size
    decoder_linear, decoder_attention = prompt_linear + more_linear, prompt_attention + more_attention
    expected = (
        2 * embedding  # pixels have no gradient
        + 3 * (vision_linear + decoder_linear + head)
        + 3.5 * (attention + decoder_attention)
    )
    results: list[StepResult] = []
    counted = operations(lambda: results.append(step()))
    assert results[0].loss == alone.loss, "the counter changed what was computed"
    assert counted == pytest.approx(expected, rel=0.01)
    again = operations(Steps(student, processor(), model(1), shown, recompute=True, **settings)) - counted
    # A layer that is run again stops before its last product: the backward needs its factors only. Neither
    # the patch embedding nor the mergers are checkpointed.
    text, vision = student.config.text_config, student.config.vision_config
    patches, cells, wide = math.prod(grid), math.prod(grid) // 4, 4 * vision.hidden_size
    mergers = 2 * cells * (1 + len(vision.deepstack_visual_indexes)) * wide * (wide + vision.out_hidden_size)
    tokens = shown[0].length + tokens_written - 1
    last = 2 * patches * vision.depth * vision.hidden_size * vision.intermediate_size
    last += 2 * tokens * text.num_hidden_layers * text.hidden_size * text.intermediate_size
    repeated = vision_linear - mergers + attention + decoder_linear + decoder_attention - last
    assert again == pytest.approx(repeated, rel=0.01)


def counted_at(tokens: int) -> dict[str, dict[str, Any]]:
    found = count_operations(
        model(sharpness=8), processor(), model(1, sharpness=8), lengths=[tokens], rollouts=(8,), tokens=4
    )
    return {record["job"]: record for record in found}


def test_the_prefix_engine_stays_near_the_least() -> None:
    records = counted_at(300)
    assert list(records) == ["video-opd", "grpo, 8 rollouts", "op-rkd", "op-fkd", "sft"]
    for job, record in records.items():
        ways = record["ways"]
        assert {way["ratio"] for way in ways.values()} == {
            way["counted"] / record["least"] for way in ways.values()
        }
        assert 1 < ways["prefix"]["ratio"] < (1.2 if job.startswith("grpo") else 1.12), job
        assert ways["prefix"]["ratio"] < ways["prefix, recompute"]["ratio"] < ways["prefix"]["ratio"] + 0.5
    assert records["grpo, 8 rollouts"]["ways"]["plain update"]["ratio"] > 8  # a prompt for each response
    assert records["video-opd"]["ways"]["plain update"]["ratio"] > 1.2  # sampled and differentiated apart


def test_the_least_is_forwards_of_the_prompts() -> None:
    student = model()
    shown = prompts_of(processor(), 300, videos=2)
    forward = sum(operations(lambda p=p: forward_prompts(student, [p])) for p in shown)  # type: ignore[misc]
    pixels = sum(vision_by_hand(student.config, grid_of(prompt))[0] for prompt in shown)
    assert least_operations(student, None, shown) == 3 * forward - pixels
    assert least_operations(student, model(1), shown) == 4 * forward - pixels


def test_an_engine_that_samples_from_a_forward_of_its_own_is_noticed() -> None:
    """The bound above is below what one more forward of the prompt costs."""
    student, teacher, shown = model(sharpness=8), model(1), prompts_of(processor(), 300)
    step = Steps(student, processor(), teacher, shown, method="video-opd", engine="prefix", tokens=4)
    step.stepper.settings = replace(step.stepper.settings, sampling_micro_batch_size=1)
    step.stepper._ahead = 1
    assert operations(step) > 1.2 * least_operations(student, teacher, shown)


def test_operations_alone_time_nothing(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "take_turns", lambda *_: pytest.fail("something was timed"))
    alone = run_command([*command.words, "--operations-only"], tmp_path / "operations.json")
    assert alone.record["results"] == []
    assert [r["job"] for r in alone.record["operations"]] == [
        "video-opd", "grpo, 2 rollouts", "op-rkd", "op-fkd", "sft",
    ]  # fmt: skip
    assert operations_table(alone.record["operations"]) in alone.printed
    assert alone.record["operations"] == command.record["operations"]  # a second count is the same
