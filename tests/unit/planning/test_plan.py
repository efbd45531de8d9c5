"""Plans of the paper's pair, and what a plan decides."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from places import ROOT
from plan_cases import ADAPTERS, PAIR, paper

from video_opd.config import Recipe, load_recipe
from video_opd.errors import UserError
from video_opd.planning.memory import GIB, PARTS, Memory, memory_of
from video_opd.planning.plan import FITS, RecipeSizes, decide, make_plan
from video_opd.planning.setup import ResolvedPlacement, Setup, Work
from video_opd.progress import duration
from video_opd.types import Sample

GB = 1e9
SPARE = 5 * GB
# What a GPU that is sold with so many GB has for a program.
CARD = {80: 78 * GIB, 141: 139 * GIB}


def planned(recipe: Recipe, gpus: int, sold_gb: int, **settings: Any) -> Memory:
    """The memory with settings that the engines have."""
    setup = replace(Setup.of(recipe, gpus), **settings)
    return decide(setup, Work.of(recipe, None, gpus), PAIR, CARD[sold_gb])[1]


# ---------------------------------------------------------------------------- the three machines of the paper


def test_the_papers_pair_fits_eight_cards_of_80_gb_in_full() -> None:
    memory = planned(paper(), 8, 80, reduce="micro_batch", teacher_placement="sharded")
    assert memory.peak + SPARE <= CARD[80]
    # The table in docs/performance.md, in GB.
    assert memory.parts["weights"] / GB == pytest.approx(17.5, abs=0.1)
    assert (memory.parts["masters"] + memory.parts["moments"]) / GB == pytest.approx(13.2, abs=0.1)
    assert memory.parts["teacher"] / GB == pytest.approx(8.3, abs=0.1)


def test_the_papers_pair_fits_one_card_of_141_gb_in_full() -> None:
    memory = planned(
        paper(),
        1,
        141,
        weights="bfloat16",
        moments="int8",
        teacher_placement="whole",
        teacher_quantization="int8",
    )
    assert memory.peak + SPARE <= CARD[141]


def test_the_papers_pair_fits_one_card_of_80_gb_with_adapters() -> None:
    memory = planned(paper(**ADAPTERS), 1, 80, teacher_placement="whole", teacher_quantization="int8")
    assert memory.peak + SPARE <= CARD[80]


def test_the_plain_settings_do_not_fit() -> None:
    for recipe, gpus, sold_gb in ((paper(), 8, 80), (paper(), 1, 141), (paper(**ADAPTERS), 1, 80)):
        memory = planned(recipe, gpus, sold_gb, teacher_placement="whole")
        assert memory.peak > CARD[sold_gb]


# ---------------------------------------------------------------------------------------- what a plan decides


def test_activations_are_kept_where_they_fit() -> None:
    for memory, again in ((1000, False), (200, True)):
        plan = make_plan(paper(), 8, memory * GIB, sizes=PAIR)
        assert plan.recompute is again and plan.fits
        assert [reason for reason in plan.reasons if "model.gradient_checkpointing" in reason]
    assert (
        make_plan(paper(model={"gradient_checkpointing": False}), 8, 200 * GIB, sizes=PAIR).recompute is False
    )


def test_auto_takes_the_first_placement_that_fits() -> None:
    setup, work = Setup.of(paper(), 8), Work.of(paper(), None, 8)
    open_setup = replace(setup, teacher_placement="auto", reduce="micro_batch")
    for size, place in ((200, "whole"), (80, "sharded"), (74, "sharded")):
        found, _, reasons = decide(open_setup, work, PAIR, size * GIB)
        assert found.teacher_placement == place
        assert any(f"teacher.placement is {place}" in reason for reason in reasons)
    alone = replace(Setup.of(paper(**ADAPTERS), 1), teacher_placement="auto")
    work = Work.of(paper(**ADAPTERS), None, 1)
    _, memory, _ = decide(alone, work, PAIR, 80 * GIB)
    places: tuple[ResolvedPlacement, ...] = ("whole", "cpu")
    peaks = [
        memory_of(
            PAIR.student, PAIR.teachers, replace(alone, teacher_placement=place, recompute=True), work
        ).peak
        for place in places
    ]
    assert memory.peak == min(peaks) > FITS * 80 * GIB  # nothing fits


def test_where_nothing_fits_the_least_is_taken_and_said() -> None:
    plan = make_plan(paper(), 8, 20 * GIB, sizes=PAIR)
    assert not plan.fits and plan.recompute
    assert plan.to_json()["spare_bytes"] < 0


@pytest.mark.parametrize("place", ["whole", "sharded", "cpu"])
def test_the_placement_of_a_recipe_is_kept(place: ResolvedPlacement) -> None:
    """Also where the plan would choose another: into 20 GiB no teacher fits, and into 1,000 a whole one."""
    for size in (20, 1000):
        plan = make_plan(paper(teacher={"placement": place}), 8, size * GIB, sizes=PAIR)
        assert plan.teacher_placement == place
        assert not [reason for reason in plan.reasons if reason.startswith("teacher.placement")]


def test_a_sharded_teacher_needs_several_processes() -> None:
    sharded = paper(teacher={"placement": "sharded"})
    assert Setup.of(sharded, 2).teacher_placement == "sharded"
    with pytest.raises(UserError, match=r"teacher\.placement is sharded"):
        make_plan(sharded, 1, 80 * GIB, sizes=PAIR)


@pytest.mark.parametrize("numbers", [(0, 80), (-1, 80), (8, 0), (8, -1)])
def test_nonsense_numbers_are_refused(numbers: tuple[int, int]) -> None:
    with pytest.raises(UserError, match="needs"):
        make_plan(paper(), *numbers, sizes=PAIR)


# --------------------------------------------------------------------------------------------- the formula


def test_every_part_is_described_and_sums_to_the_peak() -> None:
    memory = make_plan(paper(), 8, 80 * GIB, sizes=PAIR).memory
    assert set(memory.parts) <= set(PARTS)
    assert sum(memory.parts.values()) == memory.peak == max(sum(p.values()) for p in memory.phases.values())


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"reduce": "micro_batch"}, {"gradients"}),
        ({"by_layer": True, "recompute": True}, {"weights", "gradients"}),
        ({"teacher_placement": "sharded"}, {"teacher"}),
        ({"teacher_quantization": "int8"}, {"teacher"}),
        ({"moments": "int8"}, {"moments"}),
        ({"offload": True}, {"masters", "moments"}),
        ({"recompute": True}, {"decoder", "vision"}),
    ],
)
def test_a_setting_saves_what_it_is_for(changes: dict[str, Any], parts: set[str]) -> None:
    setup = replace(Setup.of(paper(), 8), teacher_placement="whole", recompute=False)
    work = Work.of(paper(), None, 8)

    def parts_of(setup: Setup) -> dict[str, int]:
        found = memory_of(PAIR.student, PAIR.teachers, setup, work)
        return {part: max(phase.get(part, 0) for phase in found.phases.values()) for part in PARTS}

    before, after = parts_of(setup), parts_of(replace(setup, **changes))
    assert {part for part in before if after[part] < before[part]} >= parts
    grown = {part for part in before if after[part] > before[part]}
    held = {"caches"} if "recompute" in changes else set()  # keys and values that the graph held before
    assert grown <= {"gathered"} | held, "something else takes more"


def test_a_32b_student_in_full_holds_one_of_its_layers_at_a_time() -> None:
    recipe = load_recipe(ROOT / "recipes" / "qwen3-vl-32b" / "grpo-full.yaml")
    found = make_plan(recipe, 8, 80 * GIB)
    layer = 5120 * (64 + 2 * 8) * 128 + 64 * 128 * 5120 + 3 * 5120 * 25600 + 2 * 5120 + 2 * 128
    gathered = found.memory.phases["prefill"]["gathered"]  # in bfloat16, once more as FSDP copies it
    assert gathered == 2 * 2 * layer
    assert found.memory.peak < 40 * GIB and found.recompute


def test_more_processes_need_no_more_memory_each() -> None:
    peaks = [make_plan(paper(), gpus, 10_000 * GIB, sizes=PAIR).memory.peak for gpus in (2, 4, 8, 16)]
    assert peaks == sorted(peaks, reverse=True)


def test_prompts_are_bounded_by_the_budget_and_by_the_longest_video() -> None:
    recipe = paper()
    unknown = Work.of(recipe, None, 8)
    assert (unknown.video_tokens, unknown.frame_pairs) == (8192, 384)
    assert unknown.rows_assumed and unknown.steps == 79
    short = [Sample(id="a", video="a.mp4", query="q", duration_s=4.0)]  # type: ignore[arg-type]
    work = Work.of(recipe, short, 8)
    assert (work.video_tokens, work.frame_pairs) == (4 * 768, 4)
    assert work.prompt_tokens > 4 * 768 and work.rows == 1 and work.steps == 1 and not work.rows_assumed


def test_time_is_operations_over_the_rate() -> None:
    slow, fast = (make_plan(paper(), 8, None, sizes=PAIR, rate_tflops=rate).times for rate in (100.0, 400.0))
    assert slow.step_s == pytest.approx(4 * fast.step_s) and slow.run_s == pytest.approx(79 * slow.step_s)
    alone = make_plan(paper(), 1, None, sizes=PAIR, rate_tflops=400.0).times
    assert alone.step_s == pytest.approx(8 * fast.step_s)
    assert alone.candidate_s == fast.candidate_s is not None
    assert fast.scoring_s == pytest.approx(fast.candidate_s * 313)  # of 2,500 rows, on eight


def test_a_reference_takes_the_time_of_a_teacher_of_the_students_size() -> None:
    """It scores the responses as a teacher does, once for all updates on them."""
    alone = {"teacher": {"path": ""}}
    settings: list[dict[str, Any]] = [{}, {"loss": {"kl_beta": 0.1}}]
    without, with_reference = (
        make_plan(paper("grpo", **alone, **each), 8, None, sizes=RecipeSizes(student=PAIR.student)).times
        for each in settings
    )
    assert without.stages_s["reference"] == 0
    more = {stage: s - without.stages_s[stage] for stage, s in with_reference.stages_s.items()}
    assert {stage for stage, s in more.items() if s} == {"reference"}
    assert with_reference.step_s == pytest.approx(without.step_s + more["reference"])
    own = RecipeSizes(student=PAIR.student, teachers=(PAIR.student,))
    scaled = paper(teacher={"reward_scale": 1.5}, optim={"updates_per_batch": 2})
    times = make_plan(scaled, 8, None, sizes=own).times
    assert times.stages_s["reference"] == times.stages_s["teacher"] > 0
    plain = make_plan(scaled.changed(**{"teacher.reward_scale": 1.0}), 8, None, sizes=own).times
    assert times.step_s - plain.step_s == pytest.approx(times.stages_s["reference"] / 2)


def test_a_quantised_teacher_is_planned_whole_because_it_is_held_whole() -> None:
    free, tight = paper(teacher={"placement": "auto"}), 60 * GIB
    assert make_plan(free, 8, tight, sizes=PAIR).teacher_placement == "sharded"
    quantised = free.changed(**{"teacher.quantization": "int8"})
    assert make_plan(quantised, 8, tight, sizes=PAIR).teacher_placement == "whole"


def test_the_table_of_scale_holds_what_a_plan_says() -> None:
    text = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if ".yaml` |" in line]
    assert len(lines) == 7
    gpus = {"1x80gb-lora": 1, "1x141gb": 1, "8x80gb": 8, "2x8x80gb": 16}
    for line in lines:
        _, name, changes, gib, seconds, run = (cell.strip() for cell in line.strip("|").split("|"))
        recipe = load_recipe(ROOT / "recipes" / "qwen3-vl-8b" / name.strip("`"), [])
        if changes:
            placed = recipe.teacher.placement != "auto"
            assert changes == "`teacher.urls`" + ", `teacher.placement: auto`" * placed
            recipe = recipe.changed(**{"teacher.urls": ("http://a",), "teacher.placement": "auto"})
        limit = int(gib.split(" of ")[1])
        plan = make_plan(recipe, gpus[name.strip("`").removesuffix(".yaml")], limit * GIB)
        assert plan.fits and gib == f"{plan.memory.peak / GIB:.1f} of {limit}"
        assert seconds == f"{plan.times.step_s:.1f} s" and run == duration(plan.times.run_s)


def test_what_vllm_takes_of_a_card_is_not_there_for_the_run() -> None:
    changes: dict[str, Any] = {
        "sampling.engine": "vllm",
        "loss.max_importance_weight": 2.0,
        "sampling.vllm_memory": 0.25,
    }
    changes["model.sharding"] = None
    alone, shared = paper(), paper().changed(**changes)
    plans = [make_plan(recipe, 1, 100 * GIB, sizes=PAIR) for recipe in (alone, shared)]
    assert "sampling" not in plans[1].memory.phases  # not by our own engine, of a whole batch at once
    assert make_plan(shared, 1, 60 * GIB, total_bytes=100 * GIB, sizes=PAIR).limit == 35 * GIB
    assert [plan.limit for plan in plans] == [100 * GIB, 75 * GIB]
    assert "vLLM takes 0.25 of each GPU (sampling.vllm_memory)" in plans[1].reasons


def test_the_graph_of_the_next_micro_batch_is_counted_while_servers_score() -> None:
    served = paper(teacher={"urls": ["http://a"]}, model={"sharding": None})
    phases = [
        make_plan(recipe, 1, None, sizes=PAIR).memory.phases
        for recipe in (served, served.changed(**{"teacher.overlap": False}))
    ]
    for phase in ("prefill", "sampling", "backward, responses", "backward, last layer"):
        more = {part: phases[0][phase][part] - phases[1][phase].get(part, 0) for part in phases[0][phase]}
        assert more["decoder"] > 0 and more["vision"] > 0
        assert {part for part, size in more.items() if size} <= {"decoder", "vision", "caches", "casts"}
    assert phases[0]["optimiser"] == phases[1]["optimiser"]


def test_the_head_of_a_served_teacher_is_counted_where_the_run_applies_it() -> None:
    served = paper(teacher={"urls": ["http://a"], "dtype": "bfloat16"}, model={"sharding": None})
    for changes, held in (
        ({}, 0),
        ({"teacher.receive": "hidden"}, 2 * 151_936 * 4_096),
        ({"teacher.receive": "hidden", "teacher.dtype": "float32"}, 4 * 151_936 * 4_096),
        # Nobody wants whole distributions.
        ({"teacher.receive": "hidden", "run.analytic_kl": False, "loss.estimator": "sampled"}, 0),
    ):
        phases = make_plan(served.changed(**changes), 1, None, sizes=PAIR).memory.phases
        assert {parts.get("teacher", 0) for parts in phases.values()} == {held}
