"""The GPU check: its runner, and the sums that its figures rest on. Sections here are small commands."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_cases import processor
from process_cases import is_alive, wait_until
from torch.utils.flop_counter import FlopCounterMode

from video_opd.bench.work import Steps, checkpointed, prompts_of, seeds_of
from video_opd.config import LoraConfig
from video_opd.models.lora import add_adapters
from video_opd.models.policy import HFPolicy
from video_opd.models.teachers import LocalTeacher
from video_opd.planning.cost_model import StepWork

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"
CPU = torch.device("cpu")


def _script(name: str) -> Any:
    """A script of the check by its name, as the scripts import each other."""
    for folder in (BENCHMARKS / "device", BENCHMARKS):
        if str(folder) not in sys.path:
            sys.path.insert(0, str(folder))
    return importlib.import_module(name)


check, section, pins = (_script(name) for name in ("check", "section", "pins"))

WRITES = 'printf \'{"summary": "%s", "rows": [{"what": "w", "figure": "f", "ok": true}]}\' "$0" > "$2"; '


def command(name: str, script: str, limit_s: float = 600.0) -> Any:
    """A section in shell: $0 is its name, $2 its file, $3 is --tiny."""
    return check.Section(name=name, command=("sh", "-c", script, name), limit_s=limit_s)


def outcomes(out: Path) -> dict[str, str]:
    return {result["part"]: result["outcome"] for result in json.loads((out / "device.json").read_text())}


# ------------------------------------------------------------------------------------------------ the runner


def test_a_section_that_fails_leaves_the_others_whole(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    sections = [
        command("first", WRITES + 'echo "given $3"'),
        command("wrote, then failed", WRITES + "exit 1"),
        command("wrote nothing", "echo broken >&2; exit 3"),
        check.Section(name="not there", command=(sys.executable, "no-such-script.py"), limit_s=600),
        command("last", WRITES),
    ]
    assert check.run_sections(sections, tmp_path, 600, tiny=True) == 1
    assert outcomes(tmp_path) == {
        "first": "ok",
        "wrote, then failed": "failed",
        "wrote nothing": "failed",
        "not there": "failed",
        "last": "ok",
    }
    results = json.loads((tmp_path / "device.json").read_text())
    assert [bool(result["record"]) for result in results] == [True, True, False, False, True]
    table = (tmp_path / "device.md").read_text()
    assert "| first | ok | 0 of 600 s | first |" in table and "see device.log" in table
    assert table.count("| w | f | ok |") == 3 and table in capsys.readouterr().out
    log = (tmp_path / "device.log").read_text()
    assert "given --tiny" in log and "broken" in log
    assert sorted(path.name for path in tmp_path.iterdir()) == ["device.json", "device.log", "device.md"]


def test_all_is_well_where_every_section_is(tmp_path: Path) -> None:
    assert check.run_sections([command("a", WRITES), command("b", WRITES)], tmp_path, 600, tiny=False) == 0


def test_a_section_that_hangs_is_killed_with_all_its_processes(tmp_path: Path) -> None:
    hangs = WRITES + f"sleep 600 & echo $! > {tmp_path}/child; sleep 600"
    out = tmp_path / "out"
    assert (
        check.run_sections([command("hangs", hangs, 2), command("next", WRITES)], out, 600, tiny=False) == 1
    )
    assert outcomes(out) == {"hangs": "timed out", "next": "ok"}
    [hung, _] = json.loads((out / "device.json").read_text())
    assert hung["record"]["rows"], "what it had measured is lost"
    assert gone(int((tmp_path / "child").read_text()))


def test_what_a_section_leaves_running_is_killed(tmp_path: Path) -> None:
    leaves = WRITES + f"sleep 600 & echo $! > {tmp_path}/child"
    assert check.run_section(command("leaves", leaves), tmp_path / "out", 60, tiny=False)["outcome"] == "ok"
    assert gone(int((tmp_path / "child").read_text()))


def gone(process: int) -> bool:
    """Killed, or only not yet collected by its new parent."""
    wait_until(lambda: not is_alive(process))
    return True


def test_no_section_begins_when_the_time_of_all_is_used_up(tmp_path: Path) -> None:
    assert check.run_sections([command("late", WRITES)], tmp_path, 0, tiny=False) == 1
    assert outcomes(tmp_path) == {"late": "no time left"}
    assert "| late | no time left |" in (tmp_path / "device.md").read_text()


def test_both_halves_fit_into_a_quarter_of_an_hour() -> None:
    assert 2 * check.HALF_S <= 15 * 60
    for half in check.HALVES:
        assert sum(p.limit_s for p in (check.MACHINE, *half)) <= check.HALF_S
    for p in (check.MACHINE, *check.SECTIONS):
        assert Path(p.command[-1]).is_file(), p.name


def test_a_report_is_written_with_every_row(tmp_path: Path) -> None:
    report = section.Report(tmp_path / "a.json")

    def written() -> dict[str, Any]:
        return json.loads((tmp_path / "a.json").read_text())

    report.note(summary="begun")
    assert written() == {"summary": "begun", "rows": []}
    report.compare("near", 1e-6, 1e-4)
    report.compare("far", 1e-3, 1e-4)
    report.compare("no number", float("nan"), 1e-4)
    report.add("a figure", "7 s", seconds=7.0)
    report.attempt("an error", lambda: [][0])
    assert [row["ok"] for row in written()["rows"]] == [True, False, False, None, False]
    assert written()["rows"][0] | {"figure": ""} == {
        "what": "near",
        "figure": "",
        "ok": True,
        "difference": 1e-6,
        "tolerance": 1e-4,
    }
    assert "IndexError" in written()["rows"][-1]["figure"]
    assert report.failed == ["far", "no number", "an error"]


# ------------------------------------------------------------------------------------------ what is measured


def test_stages_are_counted_each_for_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    stages = _script("stages")
    now = 0.0
    monkeypatch.setattr(stages.time, "perf_counter", lambda: now)
    watch = stages.StageWatch(CPU)

    def later(seconds: float) -> None:
        nonlocal now
        now += seconds

    backward = watch.within("backward", later)
    with watch.stage("update"):
        later(1)
        backward(10)
        later(2)
    later(100)
    with watch.stage("update"):
        later(4)
    assert watch.seconds == {"update": 7.0, "backward": 10.0}


def test_a_watched_step_has_its_stages() -> None:
    student, teacher = (_script("paper_size").make("test", "float32", CPU, seed) for seed in (0, 1))
    student.model.language_model.requires_grad_(True)
    steps = Steps(
        student,
        processor(),
        teacher,
        prompts_of(processor(), 40),
        method="video-opd",
        engine="prefix",
        tokens=2,
    )
    watch = _script("stages").watched(steps, CPU)
    steps()
    assert {name for name, seconds in watch.seconds.items() if seconds > 0} >= {
        *("prefill", "sample", "teacher", "update", "backward", "optimiser")
    }


def test_a_group_of_one_can_be_measured_whatever_its_rounding() -> None:
    student = _script("paper_size").make("test", "float32", CPU, 0)
    student.model.language_model.requires_grad_(True)
    steps = Steps(
        student, processor(), None, prompts_of(processor(), 40), method="grpo", engine="prefix", tokens=2
    )
    _script("real_shape").any_ratio(steps)
    assert steps.stepper.settings.ratio_tolerance > 1000
    assert len(steps().responses) == 1


def test_a_student_has_as_many_layers_as_its_plan_says_the_card_holds() -> None:
    """Beside a 32B teacher in int8, on a card of 80 GB: all 36 with adapters, some in full. On one of 141 GB
    all in full."""
    memory = _script("memory")
    prompt = SimpleNamespace(length=8493, video_tokens=8192, pair_times_s=[0.0] * 32)
    bench = object.__new__(memory.Bench)
    bench.shapes, bench.prompts = memory.REAL, [prompt]
    adapters, _, in_full, *_ = memory.HOLDINGS
    found = {}
    for limit in (79, 139):
        bench.limit = limit * 2**30
        for holding in (adapters, in_full):
            layers, plan, recipe = bench.fitting(holding)
            assert plan.peak <= memory.FITS * bench.limit and recipe.teacher.quantization == "int8"
            found[limit, holding.name] = layers
    assert found == {
        (79, adapters.name): 36,
        (79, in_full.name): 12,
        (139, adapters.name): 36,
        (139, in_full.name): 36,
    }


def test_a_checkpointed_copy_shares_the_weights_and_not_the_mode() -> None:
    model = _script("paper_size").make("test", "float32", CPU, 0)
    copied = checkpointed(model, "plain")
    assert {id(p) for p in copied.parameters()} == {id(p) for p in model.parameters()}
    assert copied.training and not model.training
    layers = [made.model.language_model.layers[0] for made in (copied, model)]
    assert [layer.gradient_checkpointing for layer in layers] == [True, False]


def test_the_union_of_intervals_counts_no_moment_twice(tmp_path: Path) -> None:
    traces = _script("where_time_goes")
    spans = [("a", 0, 10), ("b", 5, 12), ("c", 6, 8), ("a", 20, 21), ("c", 21, 25), ("b", 40, 41)]
    trace = [{"ph": "X", "cat": "kernel", "name": n, "ts": s, "dur": e - s} for n, s, e in reversed(spans)]
    others = [
        {"ph": "X", "cat": "gpu_user_annotation", "name": "all of it", "ts": 0, "dur": 1000},
        {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 12, "dur": 5},
        {"ph": "i", "cat": "kernel", "name": "an instant", "ts": 500},
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": trace + others}))
    events = traces.read_trace(path, traces.ON_CARD)
    moments = {moment for _, start, end in spans for moment in range(start, end)}
    assert traces.union_us(events) == len(moments) == 18
    assert traces.union_us([]) == 0
    found = traces.longest(events, 2)
    assert [(f["name"], f["calls"]) for f in found] == [("a", 2), ("b", 2)]
    assert found[0]["seconds"] == pytest.approx(11e-6) and found[0]["share"] == pytest.approx(11 / 25)


def test_the_pins_are_those_of_the_other_machine() -> None:
    text = (
        "# a comment\n"
        "av==17.1.0 ; python_full_version < '3.11' \\\n    --hash=sha256:aa\n"
        "av==19.0.2 ; python_full_version >= '3.12' \\\n    --hash=sha256:bb \\\n    --hash=sha256:cc\n"
        "colorama==0.4.6 ; sys_platform == 'win32' \\\n    --hash=sha256:dd\n"
        "rich==15.0.0 \\\n    --hash=sha256:ee\n"
    )
    assert pins.pins(["rich", "av"], text) == [
        "rich==15.0.0 --hash=sha256:ee",
        "av==19.0.2 --hash=sha256:bb --hash=sha256:cc",
    ]
    with pytest.raises(ValueError, match="colorama"):
        pins.pins(["av", "colorama"], text)
    prepare = (BENCHMARKS / "device" / "prepare.sh").read_text()
    carried = prepare.split("PACKAGES=(")[1].split(")")[0].split()
    assert len(pins.pins(carried, pins.BASE.read_text())) == len(carried) >= 6


# --------------------------------------------------------------------------------- operations, by the formula

ROLLOUTS, RESPONSE = 3, 9


class Counted:
    """The operations of each stage of a step as torch counts them, matrix products and attention apart."""

    def __init__(self, *, adapters: bool, recompute: bool) -> None:
        paper_size = _script("paper_size")
        model = paper_size.make("tiny", "float32", CPU, 0)
        if adapters:
            add_adapters(model, LoraConfig(parts=("language",), rank=1), 0)
        else:
            model.model.language_model.requires_grad_(True)
        self.costs = paper_size.costs_of(model)
        prompts = prompts_of(processor(), 300, side_px=128)
        self.prompt = prompts[0]
        self.work = StepWork(
            prompt=self.prompt.length,
            video_tokens=self.prompt.video_tokens,
            frame_pairs=len(self.prompt.pair_times_s),
            rollouts=ROLLOUTS,
            response=RESPONSE,
            shared=True,
            recompute=recompute,
            trained="adapters" if adapters else "full",
            reference=True,
        )
        self.expected = self.work.operations(self.costs, None)
        self.products: dict[str, int] = {}
        self.attention: dict[str, int] = {}
        policy = HFPolicy(model, processor(), recompute=recompute)
        prefix = self.count("prefill", lambda: policy.prefill(prompts, grad=True))
        groups = self.count(
            "sample",
            lambda: policy.sample(
                prefix, n=ROLLOUTS, max_new_tokens=RESPONSE, seeds=seeds_of(prompts, ROLLOUTS)
            ),
        )
        assert max(len(rollout.token_ids) for rollout in groups[0]) == RESPONSE
        responses = [[(rollout.token_ids + groups[0][0].token_ids)[:RESPONSE] for rollout in groups[0]]]
        found = self.count("update", lambda: policy.logprobs(prefix, responses, grad=True))
        self.count("backward", found.logprobs_BT.sum().backward)
        frozen = LocalTeacher(HFPolicy(model, processor()))  # the initial student scores as a teacher does
        self.count("reference", lambda: frozen.logprobs(prompts, responses))

    def count(self, stage: str, work: Callable[[], Any]) -> Any:
        with FlopCounterMode(display=False) as counter:
            result = work()
        found = counter.get_flop_counts()["Global"]
        self.attention[stage] = sum(v for op, v in found.items() if "attention" in str(op))
        self.products[stage] = sum(found.values()) - self.attention[stage]
        return result

    def expected_products(self, stage: str) -> float:
        """The formula without attention scores."""
        costs = type(self.costs)(**{**vars(self.costs), "scores": 0, "vision_scores": 0})
        return self.work.operations(costs, None)[stage]


@lru_cache(maxsize=4)
def counted(adapters: bool, recompute: bool) -> Counted:
    return Counted(adapters=adapters, recompute=recompute)


def test_the_operations_of_a_prefill_are_those_that_torch_counts() -> None:
    """Torch counts all pairs of positions; the causal half of them is what has to be computed."""
    found = counted(False, False)
    assert found.products["prefill"] == found.expected_products("prefill")
    pairs, patches = found.prompt.length**2, 4 * found.prompt.video_tokens
    seen = 4 * found.costs.vision_scores * patches**2 / found.work.frame_pairs
    assert found.attention["prefill"] == 4 * found.costs.scores * pairs + seen
    causal = 4 * found.costs.scores * (pairs + found.prompt.length) / 2
    assert found.expected["prefill"] == found.products["prefill"] + causal + seen


@pytest.mark.parametrize(
    ("adapters", "recompute"), [(False, False), (False, True), (True, False), (True, True)]
)
def test_the_operations_of_a_step_are_those_that_torch_counts(adapters: bool, recompute: bool) -> None:
    """But for a few percent: ``lm_head`` at response positions and the adapters' own products are not in the
    formula, and the first adapted layer's inputs need no gradient."""
    found = counted(adapters, recompute)
    for stage in ("sample", "update", "backward", "reference"):
        ratio = found.products[stage] / found.expected_products(stage)
        assert 0.96 < ratio < 1.15, f"{stage}: {ratio}"


def test_without_a_shared_prefix_every_response_has_its_prompt() -> None:
    costs = counted(False, False).costs
    settings: dict[str, Any] = {
        "prompt": 1000,
        "video_tokens": 900,
        "frame_pairs": 9,
        "response": 10,
        "recompute": False,
    }
    one, eight = (StepWork(rollouts=n, shared=False, **settings).operations(costs, costs) for n in (1, 8))
    for stage in ("teacher", "update", "backward"):
        assert eight[stage] == pytest.approx(8 * one[stage])
    shared = StepWork(rollouts=8, shared=True, **settings).operations(costs, costs)
    assert sum(eight.values()) / sum(shared.values()) > 5
    assert StepWork(rollouts=8, shared=True, **settings).operations(costs, None)["teacher"] == 0


def test_the_large_model_has_the_published_shape() -> None:
    """36 layers of width 4,096, 32 heads and 8 keys of 128, feed-forward of 12,288; 8.77 billion in all."""
    paper_size = _script("paper_size")
    model = paper_size.make("8b", "bfloat16", torch.device("meta"), 0)
    layer = 4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 12288
    assert paper_size.costs_of(model).weights == 36 * layer
    assert sum(p.numel() for p in model.parameters()) == 8_767_123_696
    assert model.config.vision_config.num_position_embeddings == 48**2
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    shallow = paper_size.config_of("8b", layers=8)
    assert shallow.text_config.num_hidden_layers == 8
