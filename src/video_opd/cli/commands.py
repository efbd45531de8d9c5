"""What each command does: one function a command, from parsed arguments to calls into the rooms.

Every import of a room is inside the function that needs it. A function returns None or an exit code.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.errors import UserError
from video_opd.files import write_text
from video_opd.progress import is_first_process, log, track

if TYPE_CHECKING:
    from video_opd.evaluation.opened import Access, OpenModel
    from video_opd.types import Prediction, Sample


def demo(arguments: argparse.Namespace) -> None:
    from video_opd.reports.html import write_report
    from video_opd.reports.runs import read_run
    from video_opd.reports.text import before_after
    from video_opd.world.demo import run_demo

    folder = run_demo(Path(arguments.out), seed=arguments.seed, steps=arguments.steps)
    written = write_report([folder], Path(arguments.out) / "report.html")
    print("\n".join(before_after(read_run(folder))))
    print(f"report: {written}")


def train(arguments: argparse.Namespace) -> None:
    from video_opd.config import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    from video_opd.training.loop import train as run

    result = run(recipe)
    if not is_first_process():
        return
    if arguments.json:
        print_json(asdict(result))
    else:
        print(f"{result.steps} steps; model: {result.model}")


def rounds(arguments: argparse.Namespace) -> None:
    from video_opd.config import load_recipe

    recipe = load_recipe(arguments.recipe, arguments.overrides)
    recipe.check_rounds()  # before torch is imported
    from video_opd.reports.html import write_report
    from video_opd.reports.runs import read_run
    from video_opd.reports.text import before_after
    from video_opd.training.rounds import run_rounds

    def report(folder: Path) -> Path:
        return write_report([folder], folder / "report.html")

    result = run_rounds(recipe, after_round=report)
    if not is_first_process():
        return
    written = report(result.path)
    if arguments.json:
        print_json({"path": result.path, "model": result.model, "report": written, **result.summary})
        return
    for record in result.summary["rounds"]:
        counts = f"{record['selected']} of {record['rows']} rows, {record['steps']} steps"
        print(f"round {record['round']}: {counts}; model: {result.path / record['model']}")
    run = read_run(result.path)
    if run.testsets:
        print("\n".join(before_after(run)))
    if result.summary["ended"]:
        print(result.summary["ended"])
    print(f"report: {written}")


def predict(arguments: argparse.Namespace) -> None:
    from video_opd.data.annotations import read_samples
    from video_opd.evaluation.opened import open_model, read_access

    samples = read_samples(arguments.data, arguments.video_root)
    model = open_model(read_access(arguments.model, arguments.overrides), arguments.device)
    result = _answers(arguments, model, samples, arguments.out)
    if arguments.json:
        print_json({**asdict(result), "out": arguments.out})
    else:
        print(f"{arguments.out}: {result.kept + result.answered} of {len(samples)} rows answered")


def _answers(arguments: argparse.Namespace, model: OpenModel, samples: list[Sample], out: str) -> Any:
    from video_opd.evaluation.predict import AnswerSettings
    from video_opd.evaluation.predict import predict as run

    settings = AnswerSettings(
        n=getattr(arguments, "n", 1),
        temperature=getattr(arguments, "temperature", 0.0),
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        thinking=model.access.prompt.thinking,
    )
    return run(
        model.policy,
        samples,
        model.loader,
        out,
        made_by=model.made_by(),
        settings=settings,
        batch_size=arguments.batch_size,
        overwrite=arguments.overwrite,
    )


def score(arguments: argparse.Namespace) -> None:
    access, teacher_access, data, video_root = _scored(arguments)
    from video_opd.curriculum.pool import score_pool
    from video_opd.curriculum.scores import ScoreSettings
    from video_opd.data.annotations import read_samples

    samples = read_samples(data, arguments.video_root or video_root)
    settings = ScoreSettings(
        k=arguments.k,
        student_k=arguments.student_k,
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        thinking=access.prompt.thinking,
        reverse_kl=arguments.reverse_kl,
    )
    result = score_pool(
        access,
        teacher_access,
        samples,
        arguments.out,
        settings=settings,
        batch_size=arguments.batch_size,
        device=arguments.device,
        teacher_from=arguments.teacher_from,
        overwrite=arguments.overwrite,
    )
    if arguments.json:
        print_json({**asdict(result), "out": arguments.out})
    else:
        print(f"{arguments.out}: {result.kept + result.scored} of {len(samples)} rows scored")


def _scored(arguments: argparse.Namespace) -> tuple[Access, Access | None, str, str | None]:
    """Student, teacher (shown the same input; none where none is named), data file and video root: of a
    recipe or of the options."""
    if arguments.recipe and any((arguments.student, arguments.teacher, arguments.data)):
        raise UserError("a RECIPE names student, teacher and data: leave the options out, or the recipe")
    if not arguments.recipe and not (arguments.student and arguments.data):
        raise UserError("score needs a RECIPE, or --student and --data (and --teacher, for TVDF)")
    from video_opd.config import load_recipe
    from video_opd.evaluation.opened import read_access

    if arguments.recipe:
        from video_opd.curriculum.pool import accesses

        recipe = load_recipe(arguments.recipe, arguments.overrides)
        return *accesses(recipe), recipe.data.train, recipe.data.video_root
    access = read_access(arguments.student, arguments.overrides)
    if not arguments.teacher:
        return access, None, arguments.data, None
    teacher_model = replace(access.model, path=arguments.teacher)
    return access, replace(access, model=teacher_model), arguments.data, None


def select(arguments: argparse.Namespace) -> None:
    if arguments.explain:
        _explain(arguments)
        return
    if arguments.strategy is None:
        raise UserError("select --out needs a --strategy; see video-opd select --help")
    from video_opd.curriculum.samplers import SamplerSettings
    from video_opd.curriculum.tables import print_summary
    from video_opd.curriculum.tvdf import select_file

    settings = SamplerSettings(
        rank_by=arguments.rank_by,
        buckets=arguments.buckets,
        fill=not arguments.no_fill,
        center=arguments.center,
        sigma=arguments.sigma,
        seed=arguments.seed,
    )
    _, summary = select_file(
        arguments.data,
        arguments.scores,
        arguments.strategy,
        arguments.k,
        settings=settings,
        min_teacher_iou=arguments.min_teacher_iou,
        video_root=arguments.video_root,
        out=arguments.out,
    )
    if arguments.json:
        print_json(summary.to_json())
    else:
        print_summary(summary)
    log(f"wrote {arguments.out}")


def _explain(arguments: argparse.Namespace) -> None:
    from video_opd.curriculum.tables import print_explanation
    from video_opd.curriculum.tvdf import explain_file

    table = explain_file(arguments.data, arguments.scores, arguments.k)
    if arguments.json:
        print_json([row.to_json() for row in table])
    else:
        print_explanation(table, arguments.k)


def evaluate(arguments: argparse.Namespace) -> None:
    from video_opd.evaluation import metrics
    from video_opd.evaluation.tables import evaluation_record, print_metrics

    samples, predictions = _predictions(arguments)
    result = metrics.evaluate(samples, predictions, arguments.protocol)
    constant = metrics.best_constant(samples)
    swap = metrics.query_swap(samples, predictions, arguments.protocol)
    answers = arguments.predictions or arguments.model
    record = {**evaluation_record(result, constant, swap), "data": arguments.data, "answers": answers}
    if arguments.json == "-":
        print_json(record)
        return
    if arguments.json:
        write_text(arguments.json, _json(record) + "\n")
    print_metrics({answers: result}, constant=constant, swaps={answers: swap})


def _predictions(arguments: argparse.Namespace) -> tuple[list[Sample], Mapping[str, Prediction]]:
    from video_opd.data.annotations import read_samples
    from video_opd.evaluation.predictions import read_predictions

    samples = read_samples(arguments.data, arguments.video_root)
    if arguments.predictions:
        if arguments.overrides:
            raise UserError(f"{arguments.overrides[0]} changes how a model answers: give --model")
        return samples, read_predictions(arguments.predictions)
    from video_opd.evaluation.opened import open_model, read_access
    from video_opd.evaluation.protocols import get_protocol

    asked = ["--prompt.style", get_protocol(arguments.protocol).prompt_style]
    model = open_model(read_access(arguments.model, [*arguments.overrides, *asked]), arguments.device)
    with _kept_or_temporary(arguments.out) as out:
        _answers(arguments, model, samples, out)
        return samples, read_predictions(out)


@contextlib.contextmanager
def _kept_or_temporary(path: str | None) -> Iterator[str]:
    if path is not None:
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        yield str(Path(folder) / "predictions.jsonl")


def ground(arguments: argparse.Namespace) -> None:
    from video_opd.cli.grounding import run

    run(arguments)


def report(arguments: argparse.Namespace) -> None:
    from video_opd.reports.html import write_report

    print(write_report(arguments.runs, arguments.out))


def data_check(arguments: argparse.Namespace) -> int:
    """Exit code 1 when a row cannot be used."""
    from concurrent.futures import ThreadPoolExecutor

    from video_opd.data.annotations import read_annotations
    from video_opd.data.video import VideoError, probe

    annotations = read_annotations(arguments.data, arguments.video_root)
    videos = list(dict.fromkeys(sample.video for sample in annotations.samples))

    def look(video: Path) -> tuple[float | None, str]:
        try:
            return probe(video).duration_s, ""
        except VideoError as error:
            return None, error.reason

    with ThreadPoolExecutor(arguments.workers) as pool:
        found = dict(zip(videos, track(pool.map(look, videos), "checking", len(videos)), strict=True))
    problems = [
        {"id": sample.id, "video": str(sample.video), "problem": problem}
        for sample in annotations.samples
        if (problem := _problem(sample, *found[sample.video]))
    ]
    record = {
        "rows": len(annotations.samples),
        "videos": len(videos),
        "unannotated": annotations.unannotated,
        "clamped": len(annotations.clamped),
        "problems": problems,
    }
    if arguments.json:
        print_json(record)
    else:
        for row in problems:
            print(f"{row['id']}: {row['problem']} ({row['video']})")
        print(
            f"{record['rows']} rows, {record['videos']} videos: {len(problems)} rows with problems, "
            f"{record['clamped']} spans cut to the duration, {record['unannotated']} rows without spans"
        )
    return 1 if problems else 0


DURATION_TOLERANCE_S = 1.0  # containers round, and count the last frame or do not


def _problem(sample: Sample, duration_s: float | None, reason: str) -> str:
    """What is wrong with a row, or nothing. ``duration_s`` is the video's own."""
    if duration_s is None:
        return reason
    if sample.spans and min(start_s for start_s, _ in sample.spans) >= duration_s:
        return f"a span begins after the video's end at {duration_s:.2f} s"
    if sample.duration_s is not None and abs(sample.duration_s - duration_s) > DURATION_TOLERANCE_S:
        return f"duration {sample.duration_s:g} s, but the video lasts {duration_s:.2f} s"
    return ""


def world_make(arguments: argparse.Namespace) -> None:
    from video_opd.world.make import make_world

    files = make_world(
        arguments.out,
        videos=None if arguments.videos is None else dict(arguments.videos),
        seed=arguments.seed,
        workers=arguments.workers,
        track=track,
    )
    if arguments.json:
        print_json({split: str(path) for split, path in files.items()})
        return
    for split, path in files.items():
        print(f"{split}: {path}")


def world_train(arguments: argparse.Namespace) -> None:
    if arguments.recipe and not Path(arguments.recipe).is_file():
        raise UserError(f"{arguments.recipe}: no such file; name a YAML file, or leave --recipe out")
    from video_opd.world.pretraining.stages import run_recipe

    folders = run_recipe(arguments.recipe, arguments.out, arguments.workers)
    if arguments.json:
        print_json([str(folder) for folder in folders])
        return
    for folder in folders:
        print(folder)


def print_json(record: Any) -> None:
    print(_json(record))


def _json(record: Any) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False, default=str)
