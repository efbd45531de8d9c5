"""What has to change in a recipe that does not fit."""

from __future__ import annotations

import itertools

import pytest
import yaml
from plan_cases import ADAPTERS, PAIR, paper

from video_opd.config import METHODS, WITH_TEACHER, load_recipe, recipe_from_dict
from video_opd.config.tree import flatten
from video_opd.errors import UserError
from video_opd.planning import suggest as module
from video_opd.planning.memory import GIB
from video_opd.planning.plan import RecipeSizes, make_plan
from video_opd.planning.suggest import CHANGES, gpus_needed, suggest


def test_nothing_changes_where_the_recipe_fits() -> None:
    found = suggest(paper(), 8, 1000 * GIB, sizes=PAIR)
    assert not found.changes and found.lines == [] and found.plan.fits


def test_the_lines_make_the_recipe_fit(tmp_path) -> None:
    recipe = paper(model={"dtype": "float32", "sharding": None}, teacher={"dtype": "float32"})
    memory = 150 * GIB
    assert not make_plan(recipe, 8, memory, sizes=PAIR).fits
    found = suggest(recipe, 8, memory, sizes=PAIR)
    assert found.plan.fits and found.changes
    # As lines of a recipe, and as words of a command.
    tree = recipe.to_dict()
    for section, keys in yaml.safe_load("\n".join(found.lines)).items():
        tree[section] |= keys
    changed = recipe_from_dict(tree)
    assert make_plan(changed, 8, memory, sizes=PAIR).memory.peak == found.plan.memory.peak
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe.to_dict()))
    assert load_recipe(path, found.overrides) == changed


def test_no_cheaper_set_would_do() -> None:
    recipe = paper(model={"dtype": "float32", "sharding": None}, teacher={"dtype": "float32"})
    memory = 150 * GIB
    found = suggest(recipe, 8, memory, sizes=PAIR)
    price = sum(change.price for change in found.changes)
    useful = [change for change in CHANGES if module._applies(change, recipe, 8)]
    for size in range(len(useful)):
        for changes in itertools.combinations(useful, size):
            keys = [key for change in changes for key in change.settings]
            if sum(change.price for change in changes) >= price or len(keys) != len(set(keys)):
                continue
            settings = {key: value for change in changes for key, value in change.settings.items()}
            changed = recipe.changed(**settings)
            try:
                changed.check_processes(8)
            except UserError:  # train would refuse it
                continue
            assert not make_plan(changed, 8, memory, sizes=PAIR).fits


def test_the_least_is_given_where_nothing_fits_and_every_line_of_it_saves() -> None:
    recipe = paper(teacher={"dtype": "float32"})
    found = suggest(recipe, 1, 10 * GIB, sizes=PAIR)
    assert not found.plan.fits and found.changes
    for left_out in found.changes:
        settings = {k: v for c in found.changes if c is not left_out for k, v in c.settings.items()}
        try:
            fewer = make_plan(recipe.changed(**settings), 1, 10 * GIB, sizes=PAIR)
        except UserError:  # another line rests on it
            continue
        assert fewer.memory.peak > found.plan.memory.peak


def test_more_gpus_are_named_only_if_they_would_do() -> None:
    assert gpus_needed(paper(), 1, GIB, sizes=PAIR) is None
    recipe = paper(teacher={"path": "Qwen3-VL-2B"})
    sizes = RecipeSizes.of(recipe)
    assert gpus_needed(recipe, 2, 20 * GIB, sizes=sizes) == 16
    assert [suggest(recipe, count, 20 * GIB, sizes=sizes).plan.fits for count in (8, 16)] == [False, True]


def test_settings_for_one_process_are_not_suggested_to_several() -> None:
    alone = paper(model={"weights": "bfloat16", "sharding": None})
    assert gpus_needed(alone, 1, GIB, sizes=PAIR) is None
    with pytest.raises(UserError, match=r"model\.weights bfloat16 with 8 processes"):
        suggest(alone, 8, 80 * GIB, sizes=PAIR)
    # A plan refuses an optimiser that is on the CPU once for each process; shards mend it.
    found = suggest(paper(model={"sharding": None}, optim={"offload": True}), 8, 200 * GIB, sizes=PAIR)
    assert found.plan.fits and found.settings["model.sharding"] == "fsdp2"


def test_parts_that_the_recipe_freezes_get_no_adapters() -> None:
    found = list(module._changes(paper(model={"freeze": ["vision"]})))
    (adapters,) = [change for change in found if "lora.parts" in change.settings]
    assert adapters.settings == {"lora.parts": ["merger", "language"], "model.freeze": ["lm_head", "vision"]}
    recipe_from_dict(paper().to_dict() | ADAPTERS)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: ",".join(change.settings))
def test_every_change_is_one_that_a_recipe_accepts(change) -> None:
    adapters = ADAPTERS_FLAT if "lora.base_quantization" in change.settings else {}
    changed = dict(flatten(paper().changed(**adapters).changed(**change.settings).to_dict()))
    assert {key: changed[key] for key in change.settings} == change.settings


@pytest.mark.parametrize("method", METHODS)
def test_every_method_has_the_keys_of_all_changes(method) -> None:
    recipe = paper(method, **({} if method in WITH_TEACHER else {"teacher": {"path": ""}}))
    assert {key for change in CHANGES for key in change.settings} <= set(dict(flatten(recipe.to_dict())))


def test_changes_are_in_the_order_of_their_price_and_behind_what_they_rest_on() -> None:
    *others, quantised = CHANGES
    assert [change.price for change in others] == sorted(change.price for change in others)
    assert "lora.base_quantization" in quantised.settings and "lora.parts" in others[-1].settings


ADAPTERS_FLAT = {"lora.parts": ["vision", "merger", "language"], "model.freeze": ["lm_head"]}


def test_shards_are_not_undone_for_what_only_one_process_can_do() -> None:
    sharded = paper(model={"reduce": "micro_batch"}, teacher={"placement": "sharded"})
    for processes, expected in ((1, True), (8, False)):
        useful = [
            change for change in module._changes(sharded) if module._applies(change, sharded, processes)
        ]
        keys = {key for change in useful for key in change.settings}
        assert {"model.weights", "optim.moments", "model.sharding"} <= keys or not expected
        assert keys.isdisjoint({"model.weights", "optim.moments", "model.sharding"}) or expected
    found = suggest(sharded.changed(**{"model.dtype": "float32"}), 8, 80 * GIB, sizes=PAIR)
    assert found.settings == {"model.dtype": "bfloat16"}
