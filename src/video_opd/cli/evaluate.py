"""``video-opd evaluate``: grounding metrics of predictions, or of a model that predicts now.

With ``--predictions`` it needs no torch.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from video_opd.cli import predict
from video_opd.cli.arguments import PROTOCOLS, add_shared
from video_opd.cli.output import as_json, print_json, write_json
from video_opd.cli.parser import MODEL_SETTINGS, Parser, split_name
from video_opd.errors import UserError
from video_opd.files import write_text
from video_opd.processes import launched_count
from video_opd.progress import log

if TYPE_CHECKING:
    from video_opd.evaluation.comparison import Comparison
    from video_opd.evaluation.predictions import ModelPredictions
    from video_opd.evaluation.protocols import Protocol
    from video_opd.types import Sample

HELP = "grounding metrics with 95% intervals over videos"
EXAMPLE = "video-opd evaluate --data test.jsonl --predictions student=p.jsonl --baseline base=b.jsonl"
SETTINGS = MODEL_SETTINGS
FORMATS = ("text", "markdown", "latex", "json")
SUITES = ("general",)


def add_arguments(parser: Parser) -> None:
    file = "[NAME=]FILE"
    parser.add_argument("stray", nargs="*", help=argparse.SUPPRESS)  # refused with a hint
    parser.add_argument(
        "--data",
        reads="named file",
        nargs="+",
        metavar=file,
        help="the annotated rows; each file is a data set",
    )
    source = parser.exclusive()
    source.add_argument(
        "--predictions",
        reads="named file",
        nargs="+",
        metavar=file,
        help="predictions that were made before; each name is a model, several make a table",
    )
    source.add_argument("--model", metavar="M", help="the folder of a model that predicts now")
    parser.add_argument(
        "--baseline",
        reads="named file",
        nargs="+",
        metavar=file,
        help="predictions of another model: also show the differences from it",
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default="paper", help="default: %(default)s")
    parser.add_argument(
        "--any-protocol", action="store_true", help="accept predictions that were made under another protocol"
    )
    parser.add_argument(
        "--thinking",
        action="store_true",
        help="read only what follows </think>; needless where a .meta.json says so",
    )
    parser.add_argument("--by-source", action="store_true", help="a data set for each source of the rows")
    parser.add_argument(
        "--published",
        action="store_true",
        help="also show the paper's own rows and published average recalls, marked so",
    )
    parser.add_argument("--format", choices=FORMATS, help="default: by the ending of --out, else text")
    parser.add_argument(
        "--out",
        writes="file",
        writes_if=lambda arguments: not _keeps_answers(arguments),
        metavar="OUT",
        help="write the table there (.md, .tex, .json, .txt)",
    )
    parser.add_argument("--no-intervals", action="store_true", help="leave the intervals out of the table")
    parser.add_argument(
        "--json", writes="file", metavar="OUT.json", help="also write the metrics there; - is stdout"
    )
    parser.add_argument(
        "--answers",
        writes="file",
        metavar="P.jsonl",
        help="with --model: keep the predictions there; default: the cache folder",
    )
    add_shared(parser, "--device")
    add_shared(parser, "--max-new-tokens", default=None, help="default: the protocol's")
    add_shared(parser, "--seed", "--overwrite", "--batch-size", "--video-root", "--workers")


def as_suite_words(words: Sequence[str]) -> Sequence[str]:
    """Turns ``evaluate --suite general …``, the older spelling of ``suite …``, into the newer one.

    Raises :class:`UserError` for a suite that is not there. Other words are returned as they are.
    """
    place = next((number for number, word in enumerate(words) if not word.startswith("-")), None)
    if place is None or words[place] != "evaluate":
        return words
    kept: list[str] = []
    suites: list[str] = []
    rest = iter(words[place + 1 :])
    for word in rest:
        name, equals, value = word.partition("=")
        if name == "--suite":
            suites.append(value if equals else next(rest, ""))
        else:
            kept.append(word)
    if not suites:
        return words
    if suites[-1] not in SUITES:
        raise UserError(f"--suite {suites[-1]}: there is one suite; write video-opd suite MODEL")
    log("evaluate --suite general is now a command of its own: video-opd suite")
    return [*words[:place], "suite", *kept]


def run(arguments: argparse.Namespace) -> None:
    from video_opd.evaluation import comparison, comparison_formats
    from video_opd.evaluation.protocols import get_protocol

    _check(arguments)
    form, out = _form_and_place(arguments)
    protocol = get_protocol(arguments.protocol)
    files = named_files(arguments.data, "--data")
    data_sets = _data_sets(files, arguments)
    shown = comparison.by_source(data_sets) if arguments.by_source else data_sets
    # Everything that can be wrong is checked before a model predicts for hours.
    if arguments.published:
        comparison_formats.published_rows(tuple(shown))
    baseline = _baseline(arguments, protocol)
    if arguments.model:
        comparison.check(shown, [] if baseline is None else [baseline], [arguments.model])
    models = _models(arguments, protocol, data_sets)
    compared = comparison.compare(shown, models, protocol, baseline)
    _show(arguments, compared, form, out)


def _check(arguments: argparse.Namespace) -> None:
    """Checks what argparse cannot express."""
    if arguments.stray:
        raise UserError(
            f"{arguments.stray[0]}: name the model with --model M; see video-opd evaluate --help "
            "(general video understanding is video-opd suite MODEL)"
        )
    if not arguments.data or not (arguments.predictions or arguments.model):
        raise UserError(
            "evaluate needs --data and one of --predictions and --model; see video-opd evaluate --help"
        )


def named_files(words: Sequence[str], option: str) -> dict[str, list[str]]:
    """Turns words ``[NAME=]FILE`` into ``{name: files}``, in order.

    A file without a name gets its stem as the name, or its path if two stems are the same. Raises
    :class:`UserError` for an empty name or file.
    """
    pairs = [split_name(word) for word in words]
    stems = [Path(path).stem for name, path in pairs if name is None]
    found: dict[str, list[str]] = {}
    for name, path in pairs:
        if not path or name == "":
            raise UserError(f"{option}: write FILE or NAME=FILE")
        stem = Path(path).stem
        called = name if name is not None else stem if stems.count(stem) == 1 else path
        found.setdefault(called, []).append(path)
    return found


def _form_and_place(arguments: argparse.Namespace) -> tuple[str, str | None]:
    """The format of the table, and the file that it is written to (None: stdout).

    Without ``--format``, the ending of the file decides; a file without an ending is text.
    """
    out = arguments.out
    if out is not None and _keeps_answers(arguments):
        if arguments.answers not in (None, out):
            raise UserError(
                f"--out {out} and --answers {arguments.answers}: both keep predictions, leave out one"
            )
        arguments.answers, out = out, None
    if arguments.answers and not arguments.model:
        raise UserError("--answers keeps the predictions of --model: leave it out with --predictions")
    if arguments.json == "-" and out is None and arguments.format not in (None, "json"):
        raise UserError(
            f"--json - and --format {arguments.format} both write to stdout: give the table a file with --out"
        )
    return arguments.format or _format_of(out), out


def _keeps_answers(arguments: argparse.Namespace) -> bool:
    """Whether ``--out`` names predictions of ``--model``, the older spelling of ``--answers``."""
    return bool(arguments.model) and str(arguments.out).endswith(".jsonl")


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


def _baseline(arguments: argparse.Namespace, protocol: Protocol) -> ModelPredictions | None:
    if not arguments.baseline:
        return None
    files = named_files(arguments.baseline, "--baseline")
    if any("=" in word for word in arguments.baseline) and len(files) > 1:
        raise UserError(f"--baseline: {' and '.join(files)} are two models; a difference is from one")
    name = next(iter(files)) if len(files) == 1 else "baseline"
    return _read([path for paths in files.values() for path in paths], name, arguments, protocol)


def _read(
    paths: Sequence[str], name: str, arguments: argparse.Namespace, protocol: Protocol
) -> ModelPredictions:
    from video_opd.evaluation.predictions import read_model_predictions

    return read_model_predictions(
        paths,
        protocol,
        name=name,
        thinking=True if arguments.thinking else None,
        any_protocol=arguments.any_protocol,
    )


def _models(
    arguments: argparse.Namespace, protocol: Protocol, data_sets: Mapping[str, list[Sample]]
) -> list[ModelPredictions]:
    if arguments.predictions:
        if arguments.overrides:
            raise UserError(f"{arguments.overrides[0]} changes how a model answers: give --model")
        named = named_files(arguments.predictions, "--predictions")
        if len(arguments.predictions) == 1 and "=" not in arguments.predictions[0]:
            named = {arguments.predictions[0]: [arguments.predictions[0]]}
        return [_read(paths, name, arguments, protocol) for name, paths in named.items()]
    return [_predict(arguments, protocol, data_sets)]


def _predict(
    arguments: argparse.Namespace, protocol: Protocol, data_sets: Mapping[str, list[Sample]]
) -> ModelPredictions:
    from video_opd.evaluation.prediction_cache import cached_predictions_path
    from video_opd.models.inference import load_inference_model, read_inference_config

    if launched_count() > 1:  # each process would predict everything
        raise UserError(
            "evaluate --model runs in one process: use video-opd predict, then evaluate --predictions"
        )
    if arguments.answers and len(data_sets) > 1:
        raise UserError("--answers is one file: evaluate one data set at a time, or leave it out")
    config = read_inference_config(arguments.model, arguments.overrides, protocol, arguments.device)
    settings = predict.response_settings(arguments, config)
    model = load_inference_model(config, arguments.device)
    files = []
    for name, samples in data_sets.items():
        provenance = {**model.provenance(), "answers": asdict(settings)}
        out = arguments.answers or str(cached_predictions_path(provenance, samples))
        log(f"{name}: the predictions are kept in {out}")
        predict.respond(arguments, model, samples, out, settings)
        files.append(out)
    return _read(files, arguments.model, arguments, protocol)


def _show(arguments: argparse.Namespace, compared: Comparison, form: str, out: str | None) -> None:
    from video_opd.evaluation import comparison_formats

    record = _record(arguments, compared)
    if arguments.json and arguments.json != "-":
        write_json(arguments.json, record)
    if arguments.json == "-" or (form == "json" and out is None):
        print_json(record)
        if out is None:  # stdout holds the record and nothing else
            return
    table = comparison_formats.make_table(
        compared, with_published=arguments.published, intervals=not arguments.no_intervals
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
        from video_opd.terminal import print_lines

        print_lines(writers[form](table).removesuffix("\n").split("\n"))
    elif _is_single(compared) and not arguments.published:
        _print_single(compared, intervals=not arguments.no_intervals)
    else:
        from video_opd.evaluation.terminal import print_table
        from video_opd.terminal import stdout

        print_table(table, stdout())


def _is_single(compared: Comparison) -> bool:
    """Whether there is one model on one data set, with or without a baseline."""
    return len(compared.data_sets) == 1 and len(compared.results) == 1 + (compared.baseline is not None)


def _print_single(compared: Comparison, *, intervals: bool) -> None:
    from video_opd.evaluation.terminal import print_metrics

    ((data, constant),) = compared.constants.items()
    results = {model: found[data] for model, found in compared.results.items()}
    print_metrics(
        {model: result.metrics for model, result in results.items()},
        constant=constant,
        swaps={model: result.swap for model, result in results.items()},
        differences=next((r.difference for r in results.values() if r.difference is not None), None),
        intervals=intervals,
    )


def _record(arguments: argparse.Namespace, compared: Comparison) -> dict[str, Any]:
    """The metrics themselves for one model on one data set, otherwise a tree of them."""
    from video_opd.evaluation import comparison_formats
    from video_opd.evaluation.metrics import evaluation_record

    if not _is_single(compared):
        return comparison_formats.as_json(compared, with_published=arguments.published)
    ((data, constant),) = compared.constants.items()
    *_, model = compared.results
    result = compared.results[model][data]
    record = {
        **evaluation_record(result.metrics, constant, result.swap),
        "data": split_name(arguments.data[0])[1],
        "answers": arguments.model or result.files[0],
    }
    if result.difference is not None and compared.baseline is not None:
        record["baseline"] = {
            "answers": compared.results[compared.baseline][data].files[0],
            **compared.results[compared.baseline][data].metrics.to_json(),
            "difference": {name: rise.to_json() for name, rise in result.difference.items()},
        }
    if arguments.published:
        record["published"] = comparison_formats.as_json(compared, with_published=True)["published"]
    return record
