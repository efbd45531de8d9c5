"""The card of a model folder: what hubs read of it, what people read, and that it names no folder of ours."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData
from markdown_it import MarkdownIt
from training_cases import Build, make_recipe

from video_opd import evaluate
from video_opd.config import dump_recipe
from video_opd.data.annotations import write_rows
from video_opd.models.fingerprint import model_fingerprint
from video_opd.terminal import visible
from video_opd.training.loop import train
from video_opd.training.model_card import model_card, public_name
from video_opd.training.run_folder import RunFolder
from video_opd.types import Sample


def sample(i: int, source: str | None = None) -> Sample:
    return Sample(
        id=f"s{i}", video=Path(f"v{i}.mp4"), query="q", duration_s=10.0, spans=((2.0, 4.0),), source=source
    )


def model_card_data(text: str) -> ModelCardData:
    """Returns the card's data as the Hub's own parser reads them."""
    data = ModelCard(text).data
    assert isinstance(data, ModelCardData)
    return data


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    """Three steps were made; the student answers one query of two exactly, the base none."""
    folder = RunFolder(tmp_path / "kitchen")
    folder.evaluations.mkdir(parents=True)
    folder.metrics.write_text('{"step": 3}\n')
    for who, spans in {"student": [(2.0, 4.0), (6.0, 8.0)], "base": [(5.0, 6.0)] * 2}.items():
        found = evaluate([sample(0), sample(1)], {f"s{i}": span for i, span in enumerate(spans)})
        record = {**found.to_json(), "data": str(tmp_path / "charades.jsonl")}
        (folder.evaluations / f"{who}-charades.json").write_text(json.dumps(record))
    return folder


def test_a_hub_reads_the_card(run: RunFolder, tmp_path: Path):
    recipe = make_recipe(
        run.path,
        "grpo",
        model={"path": "Qwen/Qwen3-VL-2B-Instruct"},
        data={"train": str(tmp_path / "train.jsonl")},
        sampling={"rollouts": 4},
        reward={"function": f"{tmp_path}/mine.py:reward"},
        evaluate={"data": [str(tmp_path / "charades.jsonl")]},
    )
    sources = ("charades", "lmms-lab/qvhighlights", "charades")
    text = model_card(recipe, run, [sample(i, source) for i, source in enumerate(sources)])
    data = model_card_data(text)
    about = data.to_dict()
    assert about["base_model"] == "Qwen/Qwen3-VL-2B-Instruct"
    assert about["pipeline_tag"] == "video-text-to-text" and about["library_name"] == "transformers"
    assert about["tags"] == ["video-opd", "temporal-grounding", "grpo"]
    assert about["datasets"] == ["lmms-lab/qvhighlights"]  # the other is no name on a hub
    results = {result.metric_type: result for result in data.eval_results or ()}
    assert data.model_name == "Qwen3-VL-2B-Instruct-grpo"
    assert {r.dataset_name for r in results.values()} == {"charades"}
    assert results["mIoU"].metric_value == 50.0 and results["R@0.7"].metric_value == 50.0
    assert str(tmp_path) not in text and "cache_dir" not in text
    assert "| charades | 2 |" in text and "| lmms-lab/qvhighlights | 1 |" in text
    assert "# Qwen3-VL-2B-Instruct-grpo (kitchen)\n" in text and "Names without an owner" in text
    assert "was a local folder" not in text
    lines = text.splitlines()
    (ours,) = [line for line in lines if line.startswith("| charades | this model |")]
    (base,) = [line for line in lines if line.startswith("| charades | base |")]
    assert ours.count("50.0 [0.0, 100.0]") == 4 and base.count("0.0 [0.0, 0.0]") == 4
    assert lines[lines.index(ours) - 1].count("|") == ours.count("|")
    assert sum(line.startswith("- protocol paper: prompt paper") for line in lines) == 1


def test_the_recipe_is_in_the_card_without_folders_of_this_machine(run: RunFolder, tmp_path: Path):
    (tmp_path / "teachers" / "large").mkdir(parents=True)
    recipe = make_recipe(
        run.path,
        teacher={"path": str(tmp_path / "teachers" / "large")},
        data={"train": str(tmp_path / "train.jsonl"), "cache_dir": str(tmp_path / "clips")},
        evaluate={"data": [str(tmp_path / "charades.jsonl")], "video_root": str(tmp_path)},
    )
    text = model_card(recipe, run, [sample(0)])
    found = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)
    assert found is not None
    shown, whole = yaml.safe_load(found[1]), yaml.safe_load(dump_recipe(recipe))
    whole["teacher"]["path"], whole["data"]["train"] = "large", "train.jsonl"
    whole["evaluate"]["data"] = ["charades.jsonl"]
    for section, key in (("run", "dir"), ("data", "cache_dir"), ("data", "video_root")):
        del whole[section][key]
    del whole["evaluate"]["video_root"]
    assert shown == whole
    assert "| train | 1 |" in text  # rows without a source
    assert "the teacher was large" in text and str(tmp_path) not in text


def test_the_metadata_name_nothing_that_no_hub_has(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for path in (str(tmp_path / "models" / "tiny"), "models/tiny"):  # the second has the form of a hub's name
        text = model_card(make_recipe(run.path, model={"path": path}), run, [sample(0, "charades")])
        about = model_card_data(text).to_dict()
        assert "base_model" not in about and "datasets" not in about and about["pipeline_tag"]
        assert "The base, tiny, was a local folder" in text and "# tiny-video-opd (kitchen)\n" in text
        assert "Names without an owner" in text
    hub = make_recipe(run.path, model={"path": "Qwen/Qwen3-VL-2B-Instruct"})
    assert "Names without an owner" not in model_card(hub, run, [sample(0, "lmms-lab/charades")])


def test_names_are_public(tmp_path: Path):
    (tmp_path / "kitchen" / "round-2" / "model").mkdir(parents=True)
    (tmp_path / "base").mkdir()
    assert public_name("Qwen/Qwen3-VL-8B-Instruct") == "Qwen/Qwen3-VL-8B-Instruct"
    assert public_name(str(tmp_path / "base")) == "base"
    assert public_name(str(tmp_path / "gone")) == "gone"
    assert public_name(str(tmp_path / "kitchen" / "round-2" / "model")) == "kitchen-round-2"


def test_a_run_writes_the_card_and_its_metrics(tmp_path: Path):
    row = {"id": "s1", "video": "v0.mp4", "query": "query 1", "duration": 3.0, "spans": [[0.25, 1.5]]}
    write_rows(tmp_path / "test.jsonl", [row])
    evaluated = make_recipe(
        tmp_path / "evaluated",
        optim={"max_steps": 1},
        evaluate={"data": [str(tmp_path / "test.jsonl")], "max_new_tokens": 4},
    )
    folder = RunFolder(train(evaluated, Build(rows=4)).path)
    record = json.loads((folder.evaluations / "student-test.json").read_text())
    results = model_card_data((folder.model / "README.md").read_text()).eval_results or ()
    (miou,) = [result for result in results if result.metric_type == "mIoU"]
    assert miou.dataset_name == "test" and miou.metric_value == pytest.approx(record["mIoU"], abs=0.005)
    text = (folder.model / "README.md").read_text()
    folder.done.unlink()  # a kill while the card and the metrics were written
    (folder.model / ".part-README.md.1a2b").write_text("half")
    (folder.evaluations / ".part-student-test.json.1a2b").write_text("half")
    train(evaluated, Build(rows=4))
    assert (folder.model / "README.md").read_text() == text and folder.finished
    assert not list(folder.path.rglob(".part*"))
    before = model_fingerprint(folder.model)
    (folder.model / "README.md").unlink()
    assert model_fingerprint(folder.model) == before

    plain = train(make_recipe(tmp_path / "plain", optim={"max_steps": 1}), Build(rows=4))
    text = (plain.model / "README.md").read_text()
    assert model_card_data(text).eval_results is None and "has not been evaluated" in text
    assert "1 optimiser steps" in text


HOSTILE = (
    "</script><script>alert(1)</script>",
    "<!-- hidden",
    "[click](http://evil.example/x)",
    "![x](http://evil.example/x.png)",
    "http://evil.example www.evil.example",
    "a | b | c",
    "*bold* _it_ __b__ ~~s~~ `code` $x$",
    "``` ~~~ ````",
    "# heading",
    "- list",
    "+ list",
    "1. list",
    "2) list",
    "> quote",
    "===",
    "a\n---\nbase_model: evil/model",
    "a\r\n\r\n# heading",
    "a\n```\n# heading",
    "x: y",
    "{a: b}",
    "!!python/object/apply:os.system [id]",
    "&anchor *alias",
    '\'"); import os; os.system("id") #',
    "\\",
    "\x1b[31m\u202e\udcff",
    "&lt;b&gt;",
)


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_names_are_shown_and_are_nothing_else(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    """The card has the structure of one with plain names, and its text shows the hostile ones."""

    def card(name: str) -> str:
        path = name.replace("\udcff", "")  # a recipe is text, a data row's source need not be
        recipe = make_recipe(
            run.path,
            "video-opd",
            model={"path": path},
            teacher={"path": path},
            data={"train": f"{path}.jsonl"},
            evaluate={"data": [f"{path}.jsonl"]},
        )
        folder = RunFolder(tmp_path / "kitchen")
        folder.path = tmp_path / name.replace("/", "∕")
        record = json.loads((run.evaluations / "student-charades.json").read_text())
        record["protocol"]["name"] = name
        record["protocol"]["deviations"] = {name: name}
        monkeypatch.setattr("video_opd.training.run_folder.read_record", lambda path: record)
        return model_card(recipe, folder, [sample(0, name), sample(1, "other")])

    plain, hostile = card("plain"), card(name)
    parser = MarkdownIt("commonmark", {"html": True}).enable("table")

    def split(text: str) -> tuple[str, str]:
        _, head, body = re.split(r"(?m)^---$", text, maxsplit=2)
        return head, body

    (plain_head, plain_body), (head, body) = split(plain), split(hostile)
    assert structure(parser, body) == structure(parser, plain_body)
    about, expected = yaml.safe_load(head), yaml.safe_load(plain_head)
    assert about.keys() == expected.keys() and "base_model" not in about
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f\u202e\ud800-\udfff]", hostile)
    (code,) = re.findall(r"(?ms)^```python\n(.*?)^```$", body)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert len(calls) == 3  # load, ground, print
    shown = "".join(token.content for block in parser.parse(body) for token in block.children or ())
    assert visible(name).strip() in shown
    assert ModelCard(hostile).data.to_dict()["library_name"] == "transformers"


def structure(parser: MarkdownIt, text: str) -> list[Any]:
    """The types of all blocks, and of all parts of lines that are not plain text."""
    return [
        (block.type, block.tag, [part.type for part in block.children or () if part.type not in PLAIN])
        for block in parser.parse(text)
    ]


PLAIN = ("text", "softbreak", "text_special")


@pytest.mark.parametrize("damaged", [{}, {"mIoU": "x"}, {"ci95": None}, {"protocol": {}}, {"n": 10**400}])
def test_a_damaged_record_is_left_out(run: RunFolder, tmp_path: Path, damaged: dict[str, Any]):
    path = run.evaluations / "base-charades.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **damaged} if damaged else {}))
    recipe = make_recipe(run.path, evaluate={"data": [str(tmp_path / "charades.jsonl")]})
    text = model_card(recipe, run, [sample(0)])
    assert "| charades | this model |" in text and "| charades | base |" not in text
