"""The documents name what there is: modules, parameters, files, headings, and who may import whom."""

from __future__ import annotations

import functools
import importlib
import inspect
import json
import re
from pathlib import Path
from typing import Any

import pytest
from places import ROOT, SRC
from test_imports import BASE, EXCEPTIONS, MAY_IMPORT

from video_opd.cli import DONE, FAILED, INTERRUPTED, WRONG_INPUT
from video_opd.config import SelectionConfig
from video_opd.curriculum.scores import TEACHER_KEYS
from video_opd.curriculum.tvdf import select_file
from video_opd.data.annotations import read_samples
from video_opd.evaluation.comparison import evaluate_file
from video_opd.evaluation.predict import GenerationSettings, grounding_row
from video_opd.training.run_folder import RunFolder
from video_opd.types import Rollout

PACKAGE = SRC / "video_opd"
ARCHITECTURE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/**/*.md")])
NAME = re.compile(r"((?:[a-z_]+\.)+[A-Za-z_]+)(?:\((.*)\))?")  # data.video.load_clip(path, budget)


def in_backticks(text: str) -> list[str]:
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def resolve(name: str) -> Any:
    """The object that ``name`` (``models.policy.HFPolicy.sample``) stands for. Raises if there is none."""
    words = name.split(".")
    for length in range(len(words), 0, -1):
        try:
            found: Any = importlib.import_module(".".join(["video_opd", *words[:length]]))
        except ModuleNotFoundError as error:
            if not error.name or not error.name.startswith("video_opd"):
                raise
            continue
        return functools.reduce(getattr, words[length:], found)
    raise ImportError(name)


def wrong_parameters(name: str, written: str) -> set[str]:
    """The parameters in ``written`` that the object does not have."""
    parameters = inspect.signature(resolve(name)).parameters
    return {word.strip() for word in written.split(",") if word.strip()} - set(parameters)


NAMES = [match for text in in_backticks(ARCHITECTURE) if (match := NAME.fullmatch(text))]
OURS = [match for match in NAMES if (PACKAGE / match[1].split(".")[0]).exists()]
OURS += [match for match in NAMES if (PACKAGE / f"{match[1].split('.')[0]}.py").exists()]
NOT_NAMES = re.compile(r"(\w+/)*\w+\.(py|yaml|md|json)")  # files


def test_the_architecture_names_many_things() -> None:
    assert len(OURS) > 100


@pytest.mark.parametrize("match", OURS, ids=lambda match: match[0])
def test_every_name_is_there_with_its_parameters(match: re.Match[str]) -> None:
    if NOT_NAMES.fullmatch(match[0]):
        return
    resolve(match[1])
    assert match[2] is None or not wrong_parameters(match[1], match[2])


def test_the_check_sees_what_is_wrong() -> None:
    assert wrong_parameters("data.video.load_clip", "path, budget, colour") == {"colour"}
    with pytest.raises(AttributeError):
        resolve("data.video.load_film")
    with pytest.raises(ImportError):
        resolve("dat.video")


def test_the_table_of_rooms_is_what_the_imports_are_held_to() -> None:
    section = ARCHITECTURE.partition("## Rooms")[2].partition("\n## ")[0]
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in section.splitlines() if "|" in line
    ]
    (base, _, _), *others = rows[2:]
    assert set(in_backticks(base)) == BASE - {""}
    table = {in_backticks(room)[0]: allowed for room, _, allowed in others}
    assert table.pop("cli") == "every room"
    assert MAY_IMPORT["cli"] == set(table)
    assert {room: set(in_backticks(allowed)) for room, allowed in table.items()} == {
        room: MAY_IMPORT[room] for room in MAY_IMPORT if room not in ("cli", "", "__main__")
    }
    assert set(EXCEPTIONS) <= set(in_backticks(section))


# --- links and files ---------------------------------------------------------------------------------


def anchors(path: Path) -> set[str]:
    """The headings of a document, as a link names them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(path: Path) -> None:
    links = re.findall(r"\]\(([^)\s]+)\)", path.read_text(encoding="utf-8"))
    for link in links:
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


# Files of other projects (TimeLens' scripts), and what is written here later.
FOREIGN = {"eval_dataloader.py", "utils.py"}
WRITTEN_LATER = "benchmarks/results/device"


@functools.cache
def files() -> frozenset[str]:
    """Every file of the repository that a document may name, by each end of its path."""
    folders = ("src", "tools", "tests", "benchmarks", "recipes", "requirements", "docs")
    paths = [path for name in folders for path in (ROOT / name).rglob("*")]
    names = {path.relative_to(ROOT).parts for path in [*paths, *ROOT.iterdir()] if path.is_file()}
    return frozenset("/".join(parts[i:]) for parts in names for i in range(len(parts)))


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_file_of_ours_that_is_named_is_there(path: Path) -> None:
    """Modules by any end of their path (``training/step.py``), paths from the root by all of it."""
    named = in_backticks(path.read_text(encoding="utf-8"))
    modules = {name for name in named if re.fullmatch(r"[\w./]+\.py", name)}
    roots = r"(src|tools|tests|docs|benchmarks|recipes|requirements)/[\w/.-]*"
    paths = {name for name in named if re.fullmatch(roots, name)}
    assert not {name for name in modules - FOREIGN if name not in files()}
    assert not {name for name in paths - {WRITTEN_LATER} if not (ROOT / name).exists()}


def test_every_module_of_the_models_is_in_their_table() -> None:
    text = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    first_cells = re.findall(r"^\| (`\w+\.py`[^|]*) \|", text, re.MULTILINE)
    table = set(re.findall(r"`(\w+\.py)`", " ".join(first_cells)))
    modules = {path.name for path in (ROOT / "src" / "video_opd" / "models").glob("*.py")}
    assert table == modules - {"__init__.py"}


# --- docs/files.md -----------------------------------------------------------------------------------

FILES = (ROOT / "docs" / "files.md").read_text(encoding="utf-8")


def test_the_examples_of_files_are_what_the_commands_read_and_write(tmp_path: Path) -> None:
    data, predictions, scores, selected = re.findall(r"^```json\n(.*?)```", FILES, re.DOTALL | re.MULTILINE)
    for name, text in {"data": data, "predictions": predictions, "scores": scores}.items():
        (tmp_path / f"{name}.jsonl").write_text(text)
    rows, _ = select_file(
        tmp_path / "data.jsonl", tmp_path / "scores.jsonl", SelectionConfig(strategy="topk", k=1)
    )
    (sample,) = read_samples(tmp_path / "data.jsonl")
    rollout = Rollout(token_ids=(1,), logprobs=(0.0,), text="12.50 to 14.50", truncated=False)
    row = grounding_row(sample, [rollout], GenerationSettings())
    assert json.loads(json.dumps(rows)) == [json.loads(selected)]
    assert json.loads(json.dumps(row)) == json.loads(predictions)
    assert list(json.loads(scores))[2:6] == list(TEACHER_KEYS)
    record = evaluate_file([sample], tmp_path / "predictions.jsonl")
    assert record["mIoU"] == pytest.approx(75.0)
    assert set(record) <= set(in_backticks(FILES.partition("## Metrics of predictions")[2]))


def test_every_path_of_a_run_folder_is_described(tmp_path: Path) -> None:
    paths = {value.name for value in vars(RunFolder(tmp_path)).values() if value != tmp_path}
    table = re.findall(r"^\| (`[^|]*`) \|", FILES.partition("## Run folder")[2], re.MULTILINE)
    described = {name.split("/")[0] for name in in_backticks("\n".join(table))}
    assert paths <= described


def test_the_exit_codes_are_described() -> None:
    codes = re.findall(r"^\| (\d+) \|", FILES, re.MULTILINE)
    assert [int(code) for code in codes] == [DONE, FAILED, WRONG_INPUT, INTERRUPTED]
