"""docs/python.md is run as it stands: every cell, in order, and every output that is shown."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import pytest
from places import ROOT


def cells(text: str) -> list[tuple[str, str | None]]:
    """(code, the output that is shown right after it, if any)."""
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    found: list[tuple[str, str | None]] = []
    for language, body in blocks:
        if language == "python":
            found.append((body, None))
        else:
            assert language == "text" and found and found[-1][1] is None, "an output follows its cell"
            found[-1] = (found[-1][0], body)
    return found


def test_the_loop_is_the_readme_s() -> None:
    (algorithm,) = (
        code
        for code in re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)
        if "def video_opd_step" in code
    )
    assert algorithm in (ROOT / "docs" / "python.md").read_text()


def test_the_document_runs_and_prints_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "models").symlink_to(ROOT / "models")
    monkeypatch.chdir(tmp_path)
    notebook: dict[str, Any] = {}
    document = cells((ROOT / "docs" / "python.md").read_text(encoding="utf-8"))
    assert len(document) >= 8
    for code, shown in document:
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(compile(code, "docs/python.md", "exec"), notebook)
        assert out.getvalue() == (shown or ""), code
    assert (tmp_path / "clip.mp4").stat().st_size > 1000
    assert "data:video/mp4;base64," in (tmp_path / "answers.html").read_text()
