"""``video-opd suite``: general video understanding, beside grounding."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.cli.arguments import add_shared, positive
from video_opd.cli.output import print_json, write_json
from video_opd.cli.parser import RUN_SETTINGS, Parser
from video_opd.errors import UserError

if TYPE_CHECKING:
    from video_opd.suites.suite import SuiteSettings

HELP = "TempCompass, MVBench and Video-MME through lmms-eval; repeated, it continues"
EXAMPLE = "video-opd suite runs/a/model --tasks tempcompass,videomme --json general.json"
SETTINGS = (*RUN_SETTINGS, "prompt.thinking", "prompt.video_form")  # its questions have a style of their own


def add_arguments(parser: Parser) -> None:
    parser.add_argument("model", nargs="?", metavar="MODEL", help="a model folder")
    parser.add_argument("--check", action="store_true", help="only say what is missing, and how to get it")
    parser.add_argument("--download", action="store_true", help="only get rows and videos (very large)")
    parser.add_argument(
        "--data-root", metavar="DIR", help="read rows and videos of your own, DIR/BENCHMARK/…"
    )
    parser.add_argument("--tasks", type=_names, metavar="A,B", help="only these benchmarks or subtasks")
    parser.add_argument("--skip", type=_names, default=(), metavar="A,B", help="not these")
    parser.add_argument("--limit", type=positive, metavar="N", help="the first N rows of each subtask")
    parser.add_argument("--allow-missing", action="store_true", help="count rows without a video as wrong")
    parser.add_argument(
        "--judge", action="store_true", help="let lmms-eval ask a judge model (TempCompass; OPENAI_API_KEY)"
    )
    parser.add_argument(
        "--out",
        writes="folder",
        writes_if=lambda arguments: not (arguments.check or arguments.download),
        metavar="DIR",
        help="the folder for everything; default: runs/general/MODEL",
    )
    parser.add_argument(
        "--json", writes="file", metavar="OUT.json", help="also write the results there; - is stdout"
    )
    add_shared(parser, "--device")
    add_shared(parser, "--max-new-tokens", default=None, help="default: 64; a model that thinks needs it")
    add_shared(parser, "--seed", "--overwrite", "--batch-size", "--workers")


def run(arguments: argparse.Namespace) -> int | None:
    """Exit code 1 when ``--check`` finds something missing."""
    from video_opd.suites import suite

    settings = suite.SuiteSettings(
        out=Path(arguments.out) if arguments.out else suite.default_out(arguments.model or "."),
        data_root=Path(arguments.data_root) if arguments.data_root else None,
        only=arguments.tasks,
        skip=arguments.skip,
        limit=arguments.limit,
        judge=arguments.judge,
        allow_missing=arguments.allow_missing,
    )
    if arguments.check or arguments.download:
        if arguments.overrides:
            raise UserError(
                f"{arguments.overrides[0]} changes how a model answers: leave out --check and --download"
            )
        return _prepare(arguments, settings)
    if arguments.model is None:
        raise UserError("suite needs a MODEL: video-opd suite runs/a/model (or --check, or --download)")
    from video_opd.suites.terminal import print_suite

    result = suite.run(
        arguments.model,
        settings,
        overrides=arguments.overrides,
        batch_size=arguments.batch_size,
        workers=arguments.workers,
        device=arguments.device,
        max_new_tokens=arguments.max_new_tokens,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    if not _written(arguments, result.to_json()):
        print_suite(result)
    return None


def _prepare(arguments: argparse.Namespace, settings: SuiteSettings) -> int | None:
    """Downloads if that is asked for, then says what is there and what is missing."""
    from video_opd.suites import suite
    from video_opd.suites.terminal import print_survey

    if arguments.download:
        suite.download(settings)
    found = suite.survey(settings)
    if not _written(arguments, [need.to_json() for need in found.needs]):
        print_survey(found)
    return 1 if found.missing else None


def _written(arguments: argparse.Namespace, record: Any) -> bool:
    """Writes the record where ``--json`` says. True if that was stdout, which then holds nothing else."""
    if arguments.json == "-":
        print_json(record)
        return True
    if arguments.json:
        write_json(arguments.json, record)
    return False


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)
