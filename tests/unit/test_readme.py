"""What the README tells a newcomer to type is valid."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import yaml
from places import ROOT

from video_opd.cli.commands import parse_words
from video_opd.config import recipe_from_dict
from video_opd.data.annotations import read_samples


def blocks(language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE
    )


def test_the_data_row_is_one(tmp_path: Path) -> None:
    (row,) = blocks("json")
    (tmp_path / "d.jsonl").write_text(row)
    (sample,) = read_samples(tmp_path / "d.jsonl")
    assert sample.spans == (tuple(json.loads(row)["spans"][0]),)


def test_the_recipe_is_one() -> None:
    (text,) = blocks("yaml")
    recipe = recipe_from_dict(yaml.safe_load(text))
    assert recipe.optim.lr == 1e-6


LINES = [line for block in blocks("sh") for line in block.splitlines()]


@pytest.mark.parametrize("line", LINES)
def test_commands_parse(line: str) -> None:
    program, *words = shlex.split(line, comments=True)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    else:
        assert program == "video-opd" and callable(parse_words(words).command.run)


def test_the_folders_are_there() -> None:
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"^\| `([^`]+)/`", text, re.MULTILINE)
    assert len(named) >= 9 and all((ROOT / name).is_dir() for name in named)
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if not link.endswith(".png")]
    assert all((ROOT / link).exists() for link in links), links
