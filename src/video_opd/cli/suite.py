"""``video-opd evaluate --suite general``: general video understanding, beside grounding."""

from __future__ import annotations

import argparse
from pathlib import Path

from video_opd.errors import UserError
from video_opd.files import write_text

FOR_GROUNDING = (
    "data", "predictions", "model", "video_root", "baseline", "any_protocol", "thinking", "by_source",
    "published", "format", "no_intervals", "answers",
)  # fmt: skip
FOR_SUITES = ("check", "download", "data_root", "tasks", "skip", "limit", "allow_missing", "judge")


def evaluate_suite(arguments: argparse.Namespace) -> int | None:
    """Exit code 1 when ``--check`` finds something missing."""
    for name in FOR_GROUNDING:
        if getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} does not go with --suite: leave it out")
    from video_opd.cli.commands import as_json, print_json
    from video_opd.suites import suite
    from video_opd.suites.terminal import print_suite, print_survey

    settings = suite.SuiteSettings(
        out=Path(arguments.out) if arguments.out else suite.default_out(arguments.suite_model or "."),
        data_root=Path(arguments.data_root) if arguments.data_root else None,
        only=arguments.tasks,
        skip=arguments.skip,
        limit=arguments.limit,
        judge=arguments.judge,
        allow_missing=arguments.allow_missing,
    )
    if arguments.download:
        suite.download(settings)
    if arguments.check or arguments.download:
        found = suite.survey(settings)
        needs = [need.to_json() for need in found.needs]
        if arguments.json == "-":
            print_json(needs)
        else:
            if arguments.json:
                write_text(arguments.json, as_json(needs) + "\n")
            print_survey(found)
        return 1 if found.missing else None
    if arguments.suite_model is None:
        raise UserError("--suite general needs a MODEL: video-opd evaluate --suite general runs/a/model")
    result = suite.run(
        arguments.suite_model,
        settings,
        overrides=arguments.overrides,
        batch_size=arguments.batch_size,
        device=arguments.device,
        max_new_tokens=arguments.max_new_tokens or suite.MAX_NEW_TOKENS,
        seed=arguments.seed,
        overwrite=arguments.overwrite,
    )
    if arguments.json == "-":
        print_json(result.to_json())
        return None
    if arguments.json:
        write_text(arguments.json, as_json(result.to_json()) + "\n")
    print_suite(result)
    return None
