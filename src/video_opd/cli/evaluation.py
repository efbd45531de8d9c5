"""``video-opd evaluate``: which files and names its arguments mean, and where its tables go."""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.errors import UserError
from video_opd.files import write_text
from video_opd.progress import log

if TYPE_CHECKING:
    from video_opd.evaluation.comparison import Comparison
    from video_opd.evaluation.prediction_files import Answers
    from video_opd.evaluation.protocols import Protocol
    from video_opd.types import Sample


def evaluate(arguments: argparse.Namespace) -> None:
    from video_opd.evaluation import comparison, comparison_formats
    from video_opd.evaluation.protocols import get_protocol

    _check(arguments)
    form, out = _form_and_place(arguments)
    protocol = get_protocol(arguments.protocol)
    files = named_files(arguments.data, "--data")
    data_sets = _data_sets(files, arguments)
    shown = comparison.by_source(data_sets) if arguments.by_source else data_sets
    # Everything that can be wrong, before a model answers for hours.
    if arguments.published:
        comparison_formats.published_rows(tuple(shown))
    baseline = _baseline(arguments, protocol)
    models = _models(arguments, protocol, data_sets)
    compared = comparison.compare(shown, models, protocol, baseline)
    _show(arguments, compared, form, out)


def _check(arguments: argparse.Namespace) -> None:
    """What argparse cannot say: grounding needs data and answers, and knows none of the suite's options."""
    from video_opd.cli.suite import FOR_SUITES

    if arguments.suite_model is not None:
        raise UserError(
            f"{arguments.suite_model}: name the model with --model, or choose a --suite; "
            "see video-opd evaluate --help"
        )
    for name in FOR_SUITES:
        if getattr(arguments, name):
            raise UserError(f"--{name.replace('_', '-')} belongs to --suite general: add it")
    if not arguments.data or not (arguments.predictions or arguments.model):
        raise UserError(
            "evaluate needs --data and one of --predictions and --model, or --suite general; "
            "see video-opd evaluate --help"
        )


def named_files(words: Sequence[str], option: str) -> dict[str, list[str]]:
    """``[NAME=]FILE`` → the files of each name, in order.

    A file without a name is called by its stem, or by its path where two stems are the same. Raises
    :class:`UserError` for an empty name or file.
    """
    pairs = [_split_name(word) for word in words]
    stems = [Path(path).stem for name, path in pairs if name is None]
    found: dict[str, list[str]] = {}
    for name, path in pairs:
        if not path or name == "":
            raise UserError(f"{option}: write FILE or NAME=FILE")
        stem = Path(path).stem
        called = name if name is not None else stem if stems.count(stem) == 1 else path
        found.setdefault(called, []).append(path)
    return found


def _split_name(word: str) -> tuple[str | None, str]:
    name, equals, path = word.partition("=")
    if not equals or "/" in name or Path(word).exists():
        return None, word
    return name, path


def _form_and_place(arguments: argparse.Namespace) -> tuple[str, str | None]:
    """The format of the table and the file that it goes to (none: stdout).

    The ending of the file decides the format, unless it is said; a file without an ending is text.
    """
    out = arguments.out
    if out is not None and arguments.model and out.endswith(".jsonl"):  # the older spelling of --answers
        if arguments.answers not in (None, out):
            raise UserError(
                f"--out {out} and --answers {arguments.answers}: both keep answers, leave out one"
            )
        arguments.answers, out = out, None
    if arguments.answers and not arguments.model:
        raise UserError("--answers keeps what --model answers: leave it out with --predictions")
    return arguments.format or _format_of(out), out


def _format_of(out: str | None) -> str:
    from video_opd.evaluation.comparison_formats import SUFFIXES

    suffix = "" if out is None else Path(out).suffix.lower()
    if not suffix:
        return "text"
    if suffix not in SUFFIXES:
        *most, last = SUFFIXES
        raise UserError(
            f"--out {out}: {suffix} is not an ending of a table; it may be {', '.join(most)} or {last}, "
            "or say --format"
        )
    return SUFFIXES[suffix]


def _data_sets(files: Mapping[str, Sequence[str]], arguments: argparse.Namespace) -> dict[str, list[Sample]]:
    from video_opd.data.annotations import read_samples

    for name, paths in files.items():
        if len(paths) > 1:
            raise UserError(f"--data: {name} is {' and '.join(paths)}; give each its own NAME=")
    return {name: read_samples(paths[0], arguments.video_root) for name, paths in files.items()}


def _baseline(arguments: argparse.Namespace, protocol: Protocol) -> Answers | None:
    if not arguments.baseline:
        return None
    files = named_files(arguments.baseline, "--baseline")
    if any("=" in word for word in arguments.baseline) and len(files) > 1:
        raise UserError(f"--baseline: {' and '.join(files)} are two models; a difference is from one")
    name = next(iter(files)) if len(files) == 1 else "baseline"
    return _read([path for paths in files.values() for path in paths], name, arguments, protocol)


def _read(paths: Sequence[str], name: str, arguments: argparse.Namespace, protocol: Protocol) -> Answers:
    from video_opd.evaluation.prediction_files import read_answers

    return read_answers(
        paths,
        protocol,
        name=name,
        thinking=True if arguments.thinking else None,
        any_protocol=arguments.any_protocol,
    )


def _models(
    arguments: argparse.Namespace, protocol: Protocol, data_sets: Mapping[str, list[Sample]]
) -> list[Answers]:
    if arguments.predictions:
        if arguments.overrides:
            raise UserError(f"{arguments.overrides[0]} changes how a model answers: give --model")
        named = named_files(arguments.predictions, "--predictions")
        if len(arguments.predictions) == 1 and "=" not in arguments.predictions[0]:
            named = {arguments.predictions[0]: [arguments.predictions[0]]}
        return [_read(paths, name, arguments, protocol) for name, paths in named.items()]
    return [_answer(arguments, protocol, data_sets)]


def _answer(
    arguments: argparse.Namespace, protocol: Protocol, data_sets: Mapping[str, list[Sample]]
) -> Answers:
    from video_opd.cli.commands import answer_settings, run_predict
    from video_opd.evaluation.prediction_cache import kept_path
    from video_opd.models.inference import load_inference_model, read_inference_config

    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # each process would answer everything
        raise UserError(
            "evaluate --model answers on one process: use video-opd predict, then evaluate --predictions"
        )
    if arguments.answers and len(data_sets) > 1:
        raise UserError("--answers is one file: evaluate one data set at a time, or leave it out")
    config = read_inference_config(arguments.model, arguments.overrides, protocol, arguments.device)
    settings = answer_settings(arguments, config)
    model = load_inference_model(config, arguments.device)
    files = []
    for name, samples in data_sets.items():
        made_by = {**model.made_by(), "answers": asdict(settings)}
        out = arguments.answers or str(kept_path(made_by, samples))
        log(f"{name}: the answers are kept in {out}")
        run_predict(arguments, model, samples, out, settings)
        files.append(out)
    return _read(files, arguments.model, arguments, protocol)


def _show(arguments: argparse.Namespace, compared: Comparison, form: str, out: str | None) -> None:
    from video_opd.cli.commands import as_json, print_json
    from video_opd.evaluation import comparison_formats

    record = _record(arguments, compared)
    if arguments.json and arguments.json != "-":
        write_text(arguments.json, as_json(record) + "\n")
    elif arguments.json or (form == "json" and out is None):
        print_json(record)
        return
    table = comparison_formats.make_table(
        compared, published=arguments.published, intervals=not arguments.no_intervals
    )
    writers = {
        "markdown": comparison_formats.as_markdown,
        "latex": comparison_formats.as_latex,
        "text": comparison_formats.as_text,
    }
    if out is not None:
        write_text(out, as_json(record) + "\n" if form == "json" else writers[form](table))
        log(f"wrote {out}")
    elif form != "text":
        print(writers[form](table), end="")
    elif _is_single(compared) and not arguments.published:
        _print_single(compared)
    else:
        from rich.console import Console

        comparison_formats.print_table(table, Console())


def _is_single(compared: Comparison) -> bool:
    """One model on one data set; it may have a baseline."""
    return len(compared.data_sets) == 1 and len(compared.results) == 1 + (compared.baseline is not None)


def _print_single(compared: Comparison) -> None:
    from video_opd.evaluation.terminal import print_metrics

    ((data, constant),) = compared.constants.items()
    results = {model: found[data] for model, found in compared.results.items()}
    print_metrics(
        {model: result.metrics for model, result in results.items()},
        constant=constant,
        swaps={model: result.swap for model, result in results.items()},
        differences=next((r.difference for r in results.values() if r.difference is not None), None),
    )


def _record(arguments: argparse.Namespace, compared: Comparison) -> dict[str, Any]:
    """For one model on one data set the metrics themselves, else a tree of them."""
    from video_opd.evaluation import comparison_formats
    from video_opd.evaluation.terminal import evaluation_record

    if not _is_single(compared):
        return comparison_formats.as_json(compared, published=arguments.published)
    ((data, constant),) = compared.constants.items()
    *_, model = compared.results
    result = compared.results[model][data]
    record = {
        **evaluation_record(result.metrics, constant, result.swap),
        "data": _split_name(arguments.data[0])[1],
        "answers": arguments.model or result.files[0],
    }
    if result.difference is not None and compared.baseline is not None:
        record["baseline"] = {
            "answers": compared.results[compared.baseline][data].files[0],
            **compared.results[compared.baseline][data].metrics.to_json(),
            "difference": {name: rise.to_json() for name, rise in result.difference.items()},
        }
    if arguments.published:
        record["published"] = comparison_formats.as_json(compared, published=True)["published"]
    return record
