"""The commands that documents and recipes tell a reader to type are valid; so are the figures they copy."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import ROOT

from video_opd.cli.commands import parse_words
from video_opd.config import load_recipe
from video_opd.evaluation.published import published

DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
RECIPES = sorted((ROOT / "recipes").rglob("*.yaml"))
OTHERS = {"find", "lmms-eval", "mkdir"}  # programs whose words nobody checks here
ON_A_RECIPE = {"train", "rounds", "score", "plan"}


def joined(lines: list[str]) -> list[str]:
    """Lines of a shell; one that ends with a backslash continues in the next."""
    return "\n".join(lines).replace("\\\n", " ").splitlines()


def commands(path: Path) -> Iterator[str]:
    """The lines of a document's shell blocks, or the indented lines of a recipe's first comment."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        for block in re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            yield from joined(block.splitlines())
    else:
        yield from joined(re.findall(r"^#   +(\S.*)$", text, re.MULTILINE))


def check(line: str) -> None:
    """Raises for a command that is not valid."""
    program, *words = shlex.split(line, comments=True)
    if "-m" in words and words[words.index("-m") + 1] == "video_opd":
        assert program == "torchrun"
        program, words = "video-opd", words[words.index("-m") + 2 :]
    if program == "video-opd":
        arguments = parse_words(words)
        assert callable(arguments.command.run)
        recipe = ROOT / str(getattr(arguments, "recipe", None))
        if words[0] in ON_A_RECIPE and recipe.is_relative_to(ROOT / "recipes"):
            load_recipe(recipe, arguments.overrides)
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif program == "hf":
        hub(words)
    elif program.endswith("pip"):
        (extra,) = re.findall(r"\.\[(\w+)\]", line)
        assert re.search(rf"^{extra} = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    else:
        assert program in OTHERS, program


def hub(words: list[str]) -> None:
    """Checks ``hf download REPO --option value …``, whose options are parameters of ``snapshot_download``."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import validate_repo_id

    command, repo, *options = words
    assert command == "download"
    validate_repo_id(repo)
    names = {name.removeprefix("--").replace("-", "_") for name in options[::2]}
    assert names <= set(inspect.signature(snapshot_download).parameters)


LINES = [
    pytest.param(line, id=f"{path.relative_to(ROOT)}-{number}")
    for path in (*DOCUMENTS, *RECIPES)
    for number, line in enumerate(commands(path))
]


@pytest.mark.parametrize("line", LINES)
def test_commands_are_valid(line: str) -> None:
    check(line)


@pytest.mark.parametrize(
    "line",
    [
        "video-opd trian recipe.yaml",
        "video-opd data convert a.json --ot b.jsonl",
        "torchrun --nproc_per_node 8 -m video_opd train recipes/qwen3-vl-8b/8x80gb.yaml --optim.rate 1",
        "video-opd train recipes/qwen3-vl-8b/gone.yaml",
        "hf download a/b --local-directory c",
        "make dmeo",
        "rm -r data",
        'pip install -e ".[parket]"',
    ],
)
def test_the_check_sees_what_is_wrong(line: str) -> None:
    with pytest.raises((Exception, SystemExit)):
        check(line)


def test_many_commands_are_checked() -> None:
    said = [str(line.values[0]) for line in LINES]
    assert len(said) > 60 and sum("torchrun" in line for line in said) > 20
    assert not any(line.endswith("\\") for line in said)


# --- docs/official.md --------------------------------------------------------------------------------

OFFICIAL = (ROOT / "docs" / "official.md").read_text(encoding="utf-8")


def test_the_copied_figures_are_those_of_the_published_table() -> None:
    rows = {row.name: row for row in published().rows}
    averages = {average.name: average for average in published().averages}
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in OFFICIAL.splitlines()]
    copied = [cells for cells in lines if len(cells) == 5 and cells[0] in rows]
    assert len(copied) == 6
    for name, *figures, average in copied:
        scores = [[float(figure) for figure in cell.split()] for cell in figures]
        assert scores == [list(rows[name].scores[data_set]) for data_set in published().data_sets]
        assert average == f"{averages[name].value:.1f}"
    alone = {cells[0]: float(cells[1]) for cells in lines if len(cells) == 2 and cells[0] in averages}
    assert alone == {a.name: a.value for a in averages.values() if "CAPD" in a.source}


def test_its_recipes_are_all_that_there_are() -> None:
    section = OFFICIAL.partition("\n## Other machines")[2]
    folder = ROOT / "recipes" / "qwen3-vl-8b"
    assert set(re.findall(r"`([\w.-]+\.yaml)`", section)) >= {path.name for path in folder.glob("*.yaml")} - {
        "video-opd-thinking.yaml"
    }
