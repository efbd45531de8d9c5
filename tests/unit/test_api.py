"""``from video_opd import load, ground, evaluate, train``."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from places import SRC
from video_cases import write_video

import video_opd
from video_opd import evaluate, ground, load, train
from video_opd.config import recipe_from_dict
from video_opd.errors import UserError
from video_opd.models.inference import InferenceModel
from video_opd.types import Prediction, Sample
from video_opd.world.tiny import build_model, build_processor


def run_python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SRC)},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_importing_the_package_imports_nothing_else() -> None:
    run_python(
        "import sys; before = set(sys.modules)\n"
        "import video_opd\n"
        "assert {'load', 'ground', 'evaluate', 'train'} <= set(dir(video_opd))\n"
        "assert {n for n in sys.modules if n.startswith('video_opd')} == {'video_opd'}\n"
        "heavy = {'torch', 'transformers', 'numpy', 'av', 'yaml', 'rich'}\n"
        "from video_opd import load, ground, evaluate, train\n"
        "assert not heavy & (set(sys.modules) - before), heavy & set(sys.modules)\n"
    )


def test_evaluating_answers_needs_no_torch(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(
        '{"id": "a", "video": "a.mp4", "query": "q", "duration": 20, "spans": [[5, 10]]}\n'
    )
    out = run_python(
        "import sys; sys.modules['torch'] = None\n"
        "from video_opd import evaluate\n"
        f"print(evaluate({str(tmp_path / 'd.jsonl')!r}, {{'a': (5, 7.5)}}).miou)"
    )
    assert float(out) == pytest.approx(50.0)


def test_other_names_are_attribute_errors() -> None:
    with pytest.raises(AttributeError, match="no attribute 'grond'"):
        video_opd.grond  # noqa: B018
    with pytest.raises(ImportError):
        run: Any = {}
        exec("from video_opd import grond", run)


@pytest.mark.parametrize("function", [load, ground, evaluate, train])
def test_docstrings_name_every_argument_and_have_an_example(function: Any) -> None:
    text = inspect.getdoc(function) or ""
    names = list(inspect.signature(function).parameters)
    arguments = text.partition("Args:")[2].partition("\n\n")[0]
    assert [
        line.split(":")[0].strip()
        for line in arguments.splitlines()
        if line.startswith("    ") and line[4] != " "
    ] == names
    assert "Raises:" in text and "Example::" in text
    assert all(
        p.annotation is not inspect.Parameter.empty for p in inspect.signature(function).parameters.values()
    )


# --- with a random tiny model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("api")
    build_model("test", seed=0).save_pretrained(folder / "model")
    build_processor().save_pretrained(folder / "model")
    facts = {"video": {"max_video_tokens": 64, "min_frame_tokens": 4}, "prompt": {}}
    (folder / "model" / "video_opd.json").write_text(json.dumps(facts))
    write_video(folder / "v.mp4", 40, size=(64, 64))
    rows = [
        {"id": i, "video": "v.mp4", "query": f"the red circle {i}", "duration": 4.0, "spans": [[1, 3]]}
        for i in "ab"
    ]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> InferenceModel:
    return load(folder / "model", device="cpu")


def test_settings_are_those_of_a_recipe(folder: Path, model: InferenceModel) -> None:
    assert (model.budget.max_video_tokens, model.budget.fps) == (64, 2.0)
    changed = load(str(folder / "model"), device="cpu", settings={"video.fps": 1, "prompt.style": "timelens"})
    assert (changed.budget.fps, changed.config.prompt.style) == (1.0, "timelens")
    with pytest.raises(UserError, match=r"video\.fps"):
        load(folder / "model", settings={"video.fsp": 1})
    with pytest.raises(UserError):
        load(folder / "nothing")


def test_a_query_has_an_answer_and_a_list_a_list(folder: Path, model: InferenceModel) -> None:
    one = ground(model, folder / "v.mp4", "the red circle", max_new_tokens=4)
    (first, second) = ground(model, str(folder / "v.mp4"), ["the red circle", "a cat"], max_new_tokens=4)
    assert (one.query, first.query, second.query) == ("the red circle", "the red circle", "a cat")
    assert one.text == first.text and str(one) == one.line() and one.frames == 8
    by_path = ground(folder / "model", folder / "v.mp4", "the red circle", max_new_tokens=4)
    assert by_path.text == one.text
    sampled = ground(model, folder / "v.mp4", "a cat", samples=3, max_new_tokens=4, seed=1, window_s=2.0)
    assert len(sampled.samples) == 3 and len(sampled.windows) == 3 and sampled.agreement is not None
    with pytest.raises(UserError, match="all be the same"):
        ground(model, folder / "v.mp4", "a cat", samples=3, temperature=0.0)
    for queries in ("", [], ["a", ""]):
        with pytest.raises(UserError, match="empty query"):
            ground(model, folder / "v.mp4", queries)


def test_a_run_is_trained_from_a_file_a_tree_or_a_recipe(folder: Path, tmp_path: Path) -> None:
    tree = {
        "method": "sft",
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "d.jsonl"), "workers": 0},
        "video": {"max_video_tokens": 64, "min_frame_tokens": 4},
        "optim": {"lr": 1e-3, "batch_size": 2, "max_steps": 2},
        "run": {"dir": str(tmp_path / "tree"), "trackers": []},
    }
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(tree))
    one = {"optim.max_steps": 1}
    results = {
        "file": train(tmp_path / "recipe.yaml", settings={**one, "run.dir": str(tmp_path / "file")}),
        "tree": train(tree, settings=one),
        "recipe": train(recipe_from_dict(tree), settings={**one, "run.dir": str(tmp_path / "recipe")}),
    }
    for name, result in results.items():
        assert result.path == tmp_path / name and result.steps == result.metrics["step"] == 1
        assert result.metrics["loss"] == results["tree"].metrics["loss"]
    assert train(tree, settings=one) == results["tree"]  # it is finished
    opd = recipe_from_dict({**tree, "method": "video-opd", "teacher": {"path": "t"}})
    with pytest.raises(UserError, match=r"set sampling\.max_new_tokens"):
        train(opd, settings={"prompt.thinking": True})
    assert load(results["tree"].model, device="cpu").budget.max_video_tokens == 64
    for wrong in (tree, {**tree, "optim": {"step": 1}}):  # another recipe in that folder; an unknown key
        with pytest.raises(UserError, match="optim"):
            train(wrong)


def test_evaluating_a_model_is_evaluating_its_predictions(
    folder: Path, model: InferenceModel, capsys: Any
) -> None:
    from video_opd.cli import main

    words = ["evaluate", "--data", folder / "d.jsonl", "--model", folder / "model", "--json", "-"]
    for protocol in ("paper", "timelens"):
        assert main([*map(str, words), "--protocol", protocol, "--max-new-tokens", "6"]) == 0
        record = json.loads(capsys.readouterr().out)
        result = evaluate(folder / "d.jsonl", model=model, protocol=protocol, max_new_tokens=6)
        assert json.loads(json.dumps(result.to_json())) == {
            k: v for k, v in record.items() if k not in ("data", "answers")
        }
    assert model.config.prompt.style == "paper"  # the caller's model is as it was


def test_answers_at_hand_are_spans_texts_and_nothing(folder: Path) -> None:
    given = {"a": (1.0, 2.0), "b": "from 1.0 to 3.0"}
    result = evaluate(folder / "d.jsonl", given)
    assert result.miou == result.metrics.miou == pytest.approx(100 * (0.5 + 1.0) / 2)
    assert "mIoU 75.0" in str(result) and "best constant" in str(result)
    prediction = Prediction(id="a", responses=(), spans=((1.0, 3.0),), rules=("given",))
    assert evaluate(folder / "d.jsonl", {"a": prediction, "b": None}).metrics.unparsed == 1
    rows = [Sample(id="x", video=Path("x.mp4"), query="q", spans=((0.0, 1.0),))]
    assert evaluate(rows, {"x": (0.0, 1.0)}).best_constant is None
    with pytest.raises(UserError, match="'a'"):
        evaluate(folder / "d.jsonl", {"a": (1.0, 2.0, 3.0)})


def test_evaluate_wants_one_kind_of_answers(folder: Path, model: InferenceModel) -> None:
    both: dict[str, Any] = {"predictions": {}, "model": model}
    for options in ({}, both):
        with pytest.raises(UserError, match="either predictions or a model"):
            evaluate(folder / "d.jsonl", **options)


def test_a_model_does_not_predict_rows_without_annotation() -> None:
    with pytest.raises(UserError, match="no row of the data is annotated"):
        evaluate([Sample(id="a", video=Path("a.mp4"), query="q")], model="no/such/model")


def test_a_model_that_thinks_is_not_evaluated_without_a_length() -> None:
    model: Any = SimpleNamespace(
        config=SimpleNamespace(prompt=SimpleNamespace(thinking=True)),
        policy=None,
        prompts=None,
        provenance=dict,
        with_prompt_style=lambda _: model,
    )
    with pytest.raises(UserError, match="max_new_tokens"):
        evaluate([Sample(id="a", video=Path("a.mp4"), query="q", spans=((1.0, 2.0),))], model=model)
