"""Folders from somebody else take no time and no memory without end: their prompts are tried first."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest
from model_cases import processor

from video_opd.data.encode import PromptEncoder
from video_opd.errors import UserError
from video_opd.models import folder_trial
from video_opd.models.loading import load_processor


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    processor().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def edit(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


ENDLESS = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a power of a power": "{{ 9 ** (9 ** 9) }}",
    "a long text": "{{ 'x' * (messages | length) * 10**11 }}",
    "a long list": "{{ ([messages] * 10**10) | length }}",
    "a doubled list": "{% set ns = namespace(a=[0]) %}{% for i in range(60) %}{% set ns.a = ns.a + ns.a %}"
    "{% endfor %}",
    "a long prompt": "{% for i in range(99999) %}{{ 'x' * 1000 }}{% endfor %}",
    "a wide field": "{{ '%999999999999d' % 1 }}",
}


@pytest.fixture
def short_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_trial, "CPU_S", 1)
    monkeypatch.setattr(folder_trial, "MEMORY_BYTES", 1 << 30)


@pytest.mark.parametrize("what", ENDLESS)
def test_a_chat_template_without_end_is_refused(folder: Path, what: str, short_trial: None) -> None:
    (folder / "chat_template.jinja").write_text(ENDLESS[what])
    with pytest.raises(UserError, match=r"a prompt by its chat template and tokenizer .*; copy") as refused:
        load_processor(folder)
    assert "\n" not in str(refused.value)


def test_a_deeply_nested_chat_template_ends_nothing(folder: Path, short_trial: None) -> None:
    (folder / "chat_template.jinja").write_text("{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}")
    with pytest.raises((UserError, RecursionError), match=r"chat template|recursion"):
        PromptEncoder(load_processor(folder))


def test_a_tokenizer_that_writes_texts_without_end_is_refused(folder: Path, short_trial: None) -> None:
    tenfold = {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10}
    edit(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": [tenfold] * 12})
    with pytest.raises(UserError, match=r"tokenizer (takes more|needs more|ends the process)"):
        load_processor(folder)


def test_our_own_processor_passes_the_trial(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert load_processor(folder).chat_template and capfd.readouterr().err == ""


def test_a_machine_that_cannot_fork_says_that_nothing_was_tried(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full() -> int:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(folder_trial.os, "fork", full)
    assert load_processor(folder).chat_template
    assert "is not tried before it is used (Cannot allocate memory)" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["tokenizer.json", "chat_template.jinja", "merges.txt"])
def test_text_files_of_gigabytes_are_not_read(folder: Path, name: str) -> None:
    with (folder / name).open("ab") as file:
        file.truncate(3 << 30)  # a hole: it takes no place
    with pytest.raises(UserError, match=f"{name} has 3,221,225,472 bytes"):
        load_processor(folder)
