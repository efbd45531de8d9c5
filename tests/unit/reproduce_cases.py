"""What tests of experiments share: videos without files, and predictions that are right or late."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from video_opd.cli.commands import parse_words
from video_opd.config import load_recipe
from video_opd.reproduce.places import Place, predictions_of
from video_opd.reproduce.tasks import Task
from video_opd.world.make import rows
from video_opd.world.questions import question_rows
from video_opd.world.scene import compose


def recipe_of(task: Task) -> Any:
    arguments = parse_words([str(word) for word in task.words()])
    return load_recipe(arguments.recipe, arguments.overrides)


def write_rows(path: Path, found: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in found))


def make_place(out: Path) -> Place:
    """Two videos in each set, without their files."""
    place = Place(out=out)
    for sets in (place.tests, place.validation):
        for split, path in sets.items():
            write_rows(path, [row for i in (0, 1) for row in rows(compose(split, 0, i))])
    scenes = [compose(split, 0, i) for split in place.tests for i in (0, 1)]
    write_rows(place.questions, [row for scene in scenes for row in question_rows(scene)])
    return place


def predict(run: Path, sets: dict[str, Path], later_s: float) -> None:
    """Answers every row with a span that is so much later than the true one."""
    for path in sets.values():
        data = map(json.loads, path.read_text().splitlines())
        made = [{"id": row["id"], "span": [t + later_s for t in row["spans"][0]]} for row in data]
        write_rows(predictions_of(run, path), made)


def answer(run: Path, questions: Path, wrong: float) -> None:
    """Answers every question; a share of them, spread evenly, wrong."""
    data = list(map(json.loads, questions.read_text().splitlines()))
    made = [
        {"id": row["id"], "response": "?" if int((n + 1) * wrong) > int(n * wrong) else row["answer"]}
        for n, row in enumerate(data)
    ]
    write_rows(predictions_of(run, questions), made)
