"""What each command does: one function a command, from parsed arguments to calls into the rooms.

Every import of a room is inside the function that needs it. A function returns None or an exit code.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.errors import UserError
from video_opd.files import write_text
from video_opd.progress import is_first_process, log, track

if TYPE_CHECKING:
    from video_opd.evaluation.predict import AnswerSettings, PredictResult
    from video_opd.models.inference import InferenceConfig, InferenceModel
    from video_opd.processes import Processes
    from video_opd.types import Sample


def demo(arguments: argparse.Namespace) -> None:
    from video_opd.reports.html import write_report
    from video_opd.reports.runs import read_run
    from video_opd.reports.terminal import before_after
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
    from video_opd.reports.terminal import before_after
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
    from video_opd.evaluation.protocols import get_protocol
    from video_opd.models.inference import load_inference_model, read_inference_config
    from video_opd.processes import Processes

    samples = read_samples(arguments.data, arguments.video_root)
    protocol = None if arguments.protocol is None else get_protocol(arguments.protocol)
    config = read_inference_config(arguments.model, arguments.overrides, protocol, arguments.device)
    settings = answer_settings(arguments, config)
    processes = Processes.of_environment()
    model = load_inference_model(config, arguments.device)
    result = run_predict(arguments, model, samples, arguments.out, settings, processes)
    if not is_first_process():
        return
    if arguments.json:
        print_json({**asdict(result), "out": arguments.out})
    else:
        print(f"{arguments.out}: {result.kept + result.answered} of {len(samples)} rows answered")


def answer_settings(arguments: argparse.Namespace, config: InferenceConfig) -> AnswerSettings:
    """How long and how answers may be: as the options say, else as the protocol of the prompt does."""
    from video_opd.evaluation.predict import AnswerSettings
    from video_opd.evaluation.protocols import PROTOCOLS, protocol_of

    length = arguments.max_new_tokens
    if length is None and config.prompt.thinking:
        raise UserError(
            "the model thinks before it answers, and reasoning has no natural end: give --max-new-tokens"
        )
    if length is None:
        length = (protocol_of(config.prompt.style) or PROTOCOLS["paper"]).max_new_tokens
    return AnswerSettings(
        n=getattr(arguments, "n", 1),
        temperature=getattr(arguments, "temperature", 0.0),
        max_new_tokens=length,
        seed=arguments.seed,
        thinking=config.prompt.thinking,
    )


def run_predict(
    arguments: argparse.Namespace,
    model: InferenceModel,
    samples: list[Sample],
    out: str,
    settings: AnswerSettings,
    processes: Processes | None = None,
) -> PredictResult:
    from video_opd.evaluation.predict import predict as run

    return run(
        model.policy,
        samples,
        replace(model, workers=arguments.workers).loader,
        out,
        made_by=model.made_by(),
        settings=settings,
        batch_size=arguments.batch_size,
        overwrite=arguments.overwrite,
        processes=processes,
    )


def score(arguments: argparse.Namespace) -> None:
    config, teacher_config, data, video_root = _scored(arguments)
    from video_opd.curriculum.pool import score_pool
    from video_opd.curriculum.scores import ScoreSettings
    from video_opd.data.annotations import read_samples
    from video_opd.processes import Processes

    samples = read_samples(data, arguments.video_root or video_root)
    settings = ScoreSettings(
        k=arguments.k,
        student_k=arguments.student_k,
        temperature=arguments.temperature,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        thinking=config.prompt.thinking,
        reverse_kl=arguments.reverse_kl,
    )
    result = score_pool(
        config,
        teacher_config,
        samples,
        arguments.out,
        settings=settings,
        batch_size=arguments.batch_size,
        device=arguments.device,
        teacher_from=arguments.teacher_from,
        overwrite=arguments.overwrite,
        processes=Processes.of_environment(),
    )
    if not is_first_process():
        return
    if arguments.json:
        print_json({**asdict(result), "out": arguments.out})
    else:
        print(f"{arguments.out}: {result.kept + result.scored} of {len(samples)} rows scored")


def _scored(arguments: argparse.Namespace) -> tuple[InferenceConfig, InferenceConfig | None, str, str | None]:
    """Student, teacher (shown the same input; none where none is named), data file and video root: of a
    recipe or of the options."""
    if arguments.recipe and any((arguments.student, arguments.teacher, arguments.data)):
        raise UserError("a RECIPE names student, teacher and data: leave the options out, or the recipe")
    if not arguments.recipe and not (arguments.student and arguments.data):
        raise UserError("score needs a RECIPE, or --student and --data (and --teacher, for TVDF)")
    from video_opd.config import load_recipe

    if arguments.recipe:
        from video_opd.curriculum.pool import inference_configs

        recipe = load_recipe(arguments.recipe, arguments.overrides)
        return *inference_configs(recipe), recipe.data.train, recipe.data.video_root
    from video_opd.models.inference import read_inference_pair

    of_teacher = [word for word in arguments.overrides[::2] if word.startswith("--teacher.")]
    if "--teacher.path" in of_teacher or (of_teacher and not arguments.teacher):
        raise UserError(f"{of_teacher[0]}: without a RECIPE the teacher is named by --teacher M")
    pair = read_inference_pair(arguments.student, arguments.teacher, arguments.overrides, arguments.device)
    return *pair, arguments.data, None


def select(arguments: argparse.Namespace) -> None:
    if arguments.explain:
        _explain(arguments)
        return
    if arguments.strategy is None:
        raise UserError("select --out needs a --strategy; see video-opd select --help")
    from video_opd.curriculum.samplers import SamplerSettings
    from video_opd.curriculum.terminal import print_summary
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
    from video_opd.curriculum.terminal import print_explanation
    from video_opd.curriculum.tvdf import explain_file

    table = explain_file(arguments.data, arguments.scores, arguments.k)
    if arguments.json:
        print_json([row.to_json() for row in table])
    else:
        print_explanation(table, arguments.k)


def evaluate(arguments: argparse.Namespace) -> int | None:
    if arguments.suite:
        from video_opd.cli.suite import evaluate_suite

        return evaluate_suite(arguments)
    from video_opd.cli.evaluation import evaluate as run

    run(arguments)
    return None


def ground(arguments: argparse.Namespace) -> None:
    from video_opd.cli.grounding import run

    run(arguments)


def report(arguments: argparse.Namespace) -> None:
    from video_opd.reports.html import write_report

    print(write_report(arguments.runs, arguments.out))


def bench_engine(arguments: argparse.Namespace) -> None:
    import sys

    import torch

    from video_opd.bench.engine import against_grpo, table
    from video_opd.bench.engine import bench_engine as run
    from video_opd.bench.operations import count_operations
    from video_opd.bench.operations import table as operations_table
    from video_opd.bench.timing import machine
    from video_opd.models.loading import check_same_tokens, load_model
    from video_opd.world.demo import shipped

    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    student = arguments.model or shipped("tiny-base")
    teacher = arguments.teacher or arguments.model or shipped("tiny-teacher")
    model, processor = load_model(student, dtype="float32", device=device)
    teaching = load_model(teacher, dtype=arguments.dtype, device=device)
    check_same_tokens((model, processor), teaching)
    record: dict[str, Any] = {"command": sys.argv[1:], "machine": machine(device)}
    work: dict[str, Any] = {
        "lengths": arguments.lengths,
        "rollouts": arguments.rollouts,
        "prompts": arguments.prompts,
        "dtype": arguments.dtype,
        "tokens": arguments.max_new_tokens,
        "side_px": arguments.frame_side,
    }
    record["operations"] = count_operations(model, processor, teaching[0], **work)
    record["results"] = []
    if not arguments.operations_only:
        record["results"] = run(
            model,
            processor,
            teaching[0],
            **work,
            repeats=arguments.repeats,
            memory=not arguments.no_memory,
            plain_up_to=arguments.plain_up_to,
        )
    if arguments.json:
        write_text(arguments.json, as_json(record) + "\n")
    print(operations_table(record["operations"]))
    if record["results"]:
        print("\n".join(["", table(record["results"]), "", *against_grpo(record["results"])]))


def bench_data(arguments: argparse.Namespace) -> None:
    import sys
    import tempfile

    import torch

    from video_opd.bench.data import bench_data as run
    from video_opd.bench.data import make_videos, table
    from video_opd.bench.timing import machine
    from video_opd.convert.describe import read_budget
    from video_opd.models.loading import load_processor
    from video_opd.world.demo import shipped

    processor = load_processor(arguments.model or shipped("tiny-base"))
    budget = read_budget(arguments.overrides)
    with tempfile.TemporaryDirectory() as folder:
        videos = [Path(video) for video in arguments.videos]
        videos = videos or make_videos(Path(folder), (10, 60, 180), (360, 640))
        results = run(processor, videos, budget=budget, repeats=arguments.repeats, workers=arguments.workers)
    record = {"command": sys.argv[1:], "machine": machine(torch.device("cpu")), "results": results}
    if arguments.json:
        write_text(arguments.json, as_json(record) + "\n")
    print(table(results))


def data_convert(arguments: argparse.Namespace) -> None:
    from video_opd.convert.terminal import conversion_lines, format_lines

    if arguments.list_formats:
        if arguments.json:
            from video_opd.convert.formats import FORMATS

            print_json({name: format.layout for name, format in FORMATS.items()})
            return
        print("\n".join(format_lines()))
        return
    if not 1 <= len(arguments.words) <= 2:
        raise UserError("convert needs INPUT, or FORMAT and INPUT; see video-opd data convert --help")
    if arguments.out is None:
        raise UserError("convert needs --out, the data file to write; see video-opd data convert --help")
    from video_opd.convert.conversion import ConvertSettings, convert
    from video_opd.convert.formats.durations import read_durations

    *format, source = arguments.words
    settings = ConvertSettings(
        video_root=arguments.video_root,
        name=arguments.source,
        durations=read_durations(arguments.durations),
        probe=arguments.probe,
        workers=arguments.workers,
        clips=arguments.clips,
        split=arguments.split,
    )
    result = convert(source, arguments.out, format[0] if format else None, settings)
    if arguments.json:
        print_json(result.to_json())
    else:
        print("\n".join(conversion_lines(result)))


def data_check(arguments: argparse.Namespace) -> int:
    """Exit code 1 when a row cannot be used."""
    from video_opd.convert.check import CheckSettings, check, default_out
    from video_opd.convert.terminal import check_lines
    from video_opd.data.budget import VideoBudget

    record = check(
        arguments.data,
        arguments.out or default_out(arguments.data),
        video_root=arguments.video_root,
        settings=CheckSettings(
            tolerance_s=arguments.tolerance,
            decode=VideoBudget() if arguments.decode else None,
            workers=arguments.workers,
        ),
        good=arguments.write_good,
    )
    if arguments.json:
        print_json(record)
    else:
        print("\n".join(check_lines(record)))
    return 1 if record["problems"] else 0


def data_stats(arguments: argparse.Namespace) -> None:
    from video_opd.convert import check
    from video_opd.convert.describe import describe, read_budget
    from video_opd.convert.terminal import stats_lines
    from video_opd.data.annotations import read_annotations

    budget = read_budget(arguments.overrides)
    annotations = read_annotations(arguments.data, arguments.video_root)
    out = arguments.out or check.default_out(arguments.data)
    if arguments.probe:
        checked = check.check_videos(annotations.samples, out, check.CheckSettings(workers=arguments.workers))
    else:
        checked = check.known_videos(annotations.samples, out)
    record = describe(annotations, budget, size_px=arguments.size, checked=checked)
    record = {"data": arguments.data, **record}
    if arguments.json:
        print_json(record)
    else:
        print("\n".join(stats_lines(record)))
    if arguments.html:
        from video_opd.reports.dataset import write_page

        log(f"wrote {write_page(record, arguments.html)}")


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
    raise UserError(
        "the tiny models are made by tools/tiny_models in the repository, which the package does not hold: "
        "in a clone, run PYTHONPATH=tools python -m tiny_models --out runs/world-models"
    )


def print_json(record: Any) -> None:
    print(as_json(record))


def as_json(record: Any) -> str:
    return json.dumps(record, indent=2, ensure_ascii=False, default=str)
