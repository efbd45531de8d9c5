"""Which room may import which (docs/architecture.md), and what must stay free of torch."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from places import SRC

PACKAGE = SRC / "video_opd"

BASE = {
    "types",
    "temporal",
    "answer_numbers",
    "config",
    "errors",
    "jsonl",
    "files",
    "locks",
    "pools",
    "seals",
    "seeds",
    "processes",
    "progress",
    "terminal",
    "",
}
PATH_OF_A_RUN = {
    "data",
    "models",
    "algorithms",
    "evaluation",
    "curriculum",
    "planning",
    "serving",
    "training",
}
MAY_IMPORT = {
    "data": set[str](),
    "models": {"data"},
    "algorithms": {"models", "data"},
    "evaluation": {"data", "models"},
    "curriculum": {"evaluation", "data", "models", "serving"},
    "planning": {"models"},  # the files of a checkpoint; no torch
    "serving": {"data", "models"},
    "training": {"data", "models", "algorithms", "evaluation", "curriculum", "planning", "serving"},
    # Tools around the path of a run; nothing on it imports them.
    "convert": {"data"},
    "grounding": {"data", "models", "evaluation"},
    "suites": {"data", "models", "evaluation"},
    "reports": {"evaluation"},  # how rows are scored and compared; no torch
    "world": {"data", "models", "evaluation"},
    "bench": {"data", "models", "algorithms", "training"},
    "reproduce": {"data", "models", "algorithms", "evaluation", "curriculum", "training", "world"},
    "api": {"data", "models", "evaluation", "training", "grounding", "reports"},
    "cli": PATH_OF_A_RUN
    | {"api", "convert", "grounding", "suites", "reports", "world", "bench", "reproduce"},
    "": {"api"},  # the package itself, lazily
    "__main__": {"cli"},
}
# The demo makes a run from everything; nothing of the rest may import it at its top.
EXCEPTIONS = {
    "world/demo.py": MAY_IMPORT["cli"],
    # Choosing from files needs the files only.
    "curriculum/gate.py": {"curriculum"},
    "curriculum/lazy.py": {"curriculum"},
    "curriculum/samplers.py": {"curriculum"},
    "curriculum/score_files.py": {"curriculum"},
    "curriculum/tvdf.py": {"curriculum"},
}
NO_TORCH = (
    "types",
    "temporal",
    "config",
    "seeds",
    "algorithms.rewards",
    "evaluation.failures",
    "evaluation.metrics",
    "evaluation.predictions",
    "evaluation.terminal",
    "terminal",
    "suites.requirements",
    "suites.entry",
    "suites.suite",
    "suites.terminal",
    "curriculum.samplers",
    "curriculum.gate",
    "curriculum.lazy",
    "curriculum.tvdf",
    "curriculum.terminal",
    "data.annotations",
    "convert.check",
    "convert.conversion",
    "convert.describe",
    "convert.terminal",
    "planning.plan",
    "planning.suggest",
    "planning.terminal",
    "reports.dataset",
    "reproduce.document",
    "reproduce.experiments",
    "reports.html",
    "reports.watch",
    "reports.gallery",
    "reports.selections",
    "serving.address",
    "serving.requirements",
    "grounding.page",
    "grounding.consensus",
    "grounding.output_formats",
    "grounding.query_files",
    "api",
    "cli",
)


def modules() -> list[Path]:
    return sorted(PACKAGE.rglob("*.py"))


def room_of(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return (
        relative.parts[0].removesuffix(".py").replace("__init__", "")
        if len(relative.parts) == 1
        else relative.parts[0]
    )


def imported_rooms(path: Path) -> Iterator[tuple[int, str]]:
    """Every import of ours in the file, also those inside functions and for type checking."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Import | ast.ImportFrom):
            continue
        names: list[str] = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: imports are absolute"
            if node.module == "video_opd":
                names = [f"video_opd.{alias.name}" for alias in node.names]
            elif node.module:
                names = [node.module]
        else:
            names = [alias.name for alias in node.names]
        for name in names:
            head, *rest = name.split(".")
            if head == "video_opd":
                yield node.lineno, "" if not rest or rest[0].startswith("_") else rest[0]


def wrong_imports(path: Path) -> list[str]:
    relative = path.relative_to(PACKAGE).as_posix()
    room = room_of(path)
    allowed = EXCEPTIONS.get(relative, MAY_IMPORT.get(room, set()) | {room}) | BASE
    return [
        f"{relative}:{line} imports {target}"
        for line, target in imported_rooms(path)
        if target not in allowed
    ]


def test_every_room_is_known() -> None:
    assert {room_of(path) for path in modules()} <= BASE | set(MAY_IMPORT)


@pytest.mark.parametrize("path", modules(), ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path: Path) -> None:
    assert not wrong_imports(path)


def test_the_check_sees_what_it_should(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    file = tmp_path / "data" / "bad.py"
    file.parent.mkdir()
    file.write_text(
        "from video_opd import types\n"
        "def f():\n"
        "    from video_opd.models import policy\n"
        "    import video_opd.cli\n"
    )
    assert wrong_imports(file) == ["data/bad.py:3 imports models", "data/bad.py:4 imports cli"]


def run_python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(SRC)},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_light_modules_import_no_torch() -> None:
    """One process for all: each module, and whether torch or transformers is there after it."""
    code = "import importlib, sys\n" + "".join(
        f"importlib.import_module('video_opd.{name}')\n"
        f"assert not {{'torch', 'transformers', 'torchvision'}} & set(sys.modules), 'video_opd.{name}'\n"
        for name in NO_TORCH
    )
    run_python(code)


def test_help_is_given_without_pydantic_and_torch() -> None:
    """They take most of a second, and records and spans need neither."""
    run_python(
        "import contextlib, sys\n"
        "import video_opd.types, video_opd.temporal\n"
        "from video_opd.cli import main\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['--help'])\n"
        "with contextlib.suppress(SystemExit):\n"
        "    main(['select', '--help'])\n"
        "assert not {'pydantic', 'torch', 'yaml', 'numpy'} & set(sys.modules)\n"
    )


def test_files_are_evaluated_without_torch(tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text(
        '{"id": "a", "video": "a.mp4", "query": "q", "duration": 20, "spans": [[5, 10]]}\n'
        '{"id": "b", "video": "a.mp4", "query": "r", "duration": 20, "spans": [[12, 15]]}\n'
    )
    (tmp_path / "p.jsonl").write_text('{"id": "a", "response": "5 to 10"}\n{"id": "b", "span": [5, 10]}\n')
    out = run_python(
        "import sys\n"
        "from video_opd.data.annotations import read_samples\n"
        "from video_opd.evaluation.best_constant import best_constant\n"
        "from video_opd.evaluation.metrics import evaluate\n"
        "from video_opd.evaluation.query_swap import query_swap\n"
        "from video_opd.evaluation.predictions import read_predictions\n"
        "from video_opd.evaluation.terminal import print_metrics\n"
        f"samples = read_samples({str(tmp_path / 'd.jsonl')!r})\n"
        f"predictions = read_predictions({str(tmp_path / 'p.jsonl')!r})\n"
        "print_metrics({'m': evaluate(samples, predictions)}, constant=best_constant(samples),\n"
        "              swaps={'m': query_swap(samples, predictions)})\n"
        "assert 'torch' not in sys.modules\n"
    )
    assert "mIoU 50.0" in out and "query swap 50.0%" in out
