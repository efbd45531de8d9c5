"""Arguments of every command. Standard library only.

A recipe's keys are given as ``--section.key value``; they are taken out before argparse sees the rest, so a
value may begin with a dash and may stand anywhere.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Sequence
from typing import Any, NoReturn

import video_opd
from video_opd.errors import UserError

STRATEGIES = ("topk", "dsus", "bbds", "gwds", "gaussian", "random")
PROTOCOLS = ("paper", "timelens")
FORMATS = ("text", "markdown", "latex", "json")

# Which settings of a recipe a command reads: how their keys begin.
OF_RECIPE = ("",)
OF_MODEL = ("model.", "video.", "prompt.")
OF_PAIR = (*OF_MODEL, "teacher.dtype")
OF_VIDEO = ("video.",)


class Parser(argparse.ArgumentParser):
    """Errors are a single line with the remedy; the caller prints them."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Arguments with ``run`` (the function of :mod:`video_opd.cli.commands`) and ``overrides``."""
    plain, overrides = split_overrides(words)
    parser = build_parser()
    chosen = _chosen(parser, plain)
    try:
        arguments, rest = parser.parse_known_args(plain)
    except UserError:
        # What is missing may be what is misspelt.
        if flags := [word for word in plain if _is_unknown_flag(word, chosen)]:
            _refuse(flags, chosen)
        raise
    if rest and ("more" not in arguments or any(word.startswith("-") for word in rest)):
        _refuse(rest, chosen)
    if rest:  # argparse gives a list that may be empty only the words right after the ones before it
        getattr(arguments, arguments.more).extend(rest)
    if overrides and not arguments.takes_overrides:
        chosen.error(f"{overrides[0]}: this command reads no recipe")
    arguments.overrides = overrides
    return arguments


def _chosen(parser: argparse.ArgumentParser, words: Sequence[str]) -> argparse.ArgumentParser:
    """The parser of the command that ``words`` name, as far as they name one."""
    for word in words:
        children = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
        if not children:
            break
        if word.startswith("-"):  # none of those before a command takes a value
            continue
        if word not in children[0].choices:
            break
        parser = children[0].choices[word]
    return parser


def _is_unknown_flag(word: str, parser: argparse.ArgumentParser) -> bool:
    name = word.partition("=")[0]
    return name.startswith("--") and len(name) > 2 and " " not in word and name not in _flags(parser)


def _flags(parser: argparse.ArgumentParser) -> list[str]:
    return [flag for action in parser._actions for flag in action.option_strings if flag.startswith("--")]


def _refuse(words: Sequence[str], parser: argparse.ArgumentParser) -> NoReturn:
    near = [hit for word in words if _is_unknown_flag(word, parser) if (hit := _nearest(word, parser))]
    hint = f" (did you mean {near[0]}?)" if near else ""
    parser.error(f"unrecognized arguments: {' '.join(words)}{hint}")


def _nearest(word: str, parser: argparse.ArgumentParser) -> str | None:
    """What a flag that is not known may mean: a setting of that very name, else what is spelt like it."""
    flag = word.partition("=")[0]
    settings = _settings(parser.get_default("takes_overrides") or ())
    name = flag.removeprefix("--").replace("-", "_")
    if name in settings:
        return settings[name]
    if near := difflib.get_close_matches(flag, _flags(parser), 1, 0.7):
        return near[0]
    near = difflib.get_close_matches(name, settings, 1, 0.7)
    return settings[near[0]] if near else None


def _settings(begins: tuple[str, ...]) -> dict[str, str]:
    """``{"lr": "--optim.lr", …}``: the last word of a setting that begins so, and other trainers' words."""
    if not begins:
        return {}
    from video_opd.config import SYNONYMS, Recipe
    from video_opd.strict import leaves

    words = {
        path.rpartition(".")[2]: path for path in reversed(list(leaves(Recipe))) if path.startswith(begins)
    }
    words |= {word: path for word, path in SYNONYMS.items() if path.startswith(begins)}
    return {word: f"--{path}" for word, path in words.items()}


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """``(other words, ["--a.b", "value", …])``. ``--method`` is a recipe's key too."""
    plain: list[str] = []
    overrides: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if not name.startswith("--") or ("." not in name and name != "--method"):
            plain.append(word)
            continue
        given = value if equals else next(rest, None)
        if given is None:
            raise UserError(f"{name} has no value; write {name} VALUE")
        overrides += [name, given]
    return plain, overrides


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="video-opd",
        description="Post-training of video MLLMs for temporal grounding by on-policy distillation.",
        epilog="example: video-opd demo --out runs/demo",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"video-opd {video_opd.__version__}")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        _demo,
        _train,
        _rounds,
        _predict,
        _score,
        _select,
        _evaluate,
        _ground,
        _report,
        _data,
        _world,
        _bench,
    ):
        add(commands)
    return parser


def _command(
    commands: Any, name: str, run: str, help: str, example: str, overrides: tuple[str, ...] = ()
) -> argparse.ArgumentParser:
    settings = " Settings of a recipe are given as --section.key VALUE." if overrides else ""
    parser = commands.add_parser(
        name,
        help=help,
        description=f"{help[0].upper()}{help[1:]}.{settings}".replace(
            "%%", "%"
        ),  # argparse formats help only
        epilog=f"example: {example}",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # SUPPRESS: without it the default here would undo "video-opd --debug COMMAND".
    parser.add_argument(
        "--debug", action="store_true", default=argparse.SUPPRESS, help="show the traceback of an error"
    )
    parser.set_defaults(run=run, takes_overrides=overrides)
    return parser


def _demo(commands: Any) -> None:
    parser = _command(
        commands,
        "demo",
        "demo",
        "generated videos, tiny models: select, train, evaluate, report",
        "video-opd demo --out runs/demo --seed 0",
    )
    parser.add_argument("--out", default="runs/demo", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument(
        "--steps", type=_positive, metavar="N", help="optimiser steps; fewer for a quick look"
    )


def _train(commands: Any) -> None:
    parser = _command(
        commands,
        "train",
        "train",
        "one post-training run; repeated, it continues",
        "video-opd train recipes/tiny/video-opd.yaml --optim.lr 1e-4 --run.dir runs/a",
        overrides=OF_RECIPE,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="a YAML file")
    _json_flag(parser)


def _rounds(commands: Any) -> None:
    parser = _command(
        commands,
        "rounds",
        "rounds",
        "score, select, train and evaluate, repeated from the last student; repeated, it continues",
        "video-opd rounds recipes/tiny/rounds.yaml --rounds.count 2 --tvdf.k 128 --run.dir runs/b",
        overrides=OF_RECIPE,
    )
    parser.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file as for train; data.train is the candidate pool"
    )
    _json_flag(parser)


def _predict(commands: Any) -> None:
    parser = _command(
        commands,
        "predict",
        "predict",
        "answers for every row of a data file; repeated, it continues",
        "video-opd predict runs/a/model data/test.jsonl --out runs/a/eval/predictions.jsonl",
        overrides=OF_MODEL,
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder")
    parser.add_argument("data", metavar="DATA", help="a data file (JSON Lines)")
    parser.add_argument("--out", required=True, metavar="P.jsonl", help="the predictions file")
    parser.add_argument("--n", type=_positive, default=1, metavar="K", help="answers a row; default: 1")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="T", help="0 (default): greedy")
    parser.add_argument("--engine", choices=("hf",), default="hf", help="default: %(default)s")
    parser.add_argument(
        "--protocol",
        choices=PROTOCOLS,
        help="decides the prompt and the length of answers; default: the prompt the model was trained with",
    )
    _model_options(parser, length=None)
    _workers_option(parser)
    _json_flag(parser)


def _score(commands: Any) -> None:
    parser = _command(
        commands,
        "score",
        "score",
        "TVDF scores: how well teacher and student answer each row; repeated, it continues",
        "video-opd score --student models/base --teacher models/teacher --data pool.jsonl --out scores.jsonl",
        overrides=OF_PAIR,
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE", help="names student, teacher and data")
    parser.add_argument("--student", metavar="M", help="the student's checkpoint folder")
    parser.add_argument(
        "--teacher",
        metavar="M",
        help="the teacher's (its type: --teacher.dtype); left out, only the student is scored, for gaussian",
    )
    parser.add_argument("--data", metavar="D.jsonl", help="the candidates")
    parser.add_argument("--out", required=True, metavar="S.jsonl", help="the scores file")
    parser.add_argument("--k", type=_positive, default=4, metavar="K", help="answers a model; default: 4")
    parser.add_argument("--student-k", type=_positive, metavar="K", help="the student's; default: as --k")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: 1")
    parser.add_argument(
        "--reverse-kl", action="store_true", help="also measure it along the student's answers"
    )
    parser.add_argument("--teacher-from", metavar="S.jsonl", help="take the teacher's part from there")
    _model_options(parser)
    _json_flag(parser)


def _select(commands: Any) -> None:
    parser = _command(
        commands,
        "select",
        "select",
        "choose training rows by their scores",
        "video-opd select --data pool.jsonl --scores scores.jsonl --strategy topk --k 2500 --out train.jsonl",
    )
    parser.add_argument("--data", required=True, metavar="D.jsonl", help="the candidates")
    parser.add_argument("--scores", required=True, metavar="S.jsonl", help="made by video-opd score")
    parser.add_argument("--strategy", choices=STRATEGIES, help="needed with --out")
    parser.add_argument("--k", required=True, type=_positive, metavar="N", help="rows to choose")
    target = parser.add_mutually_exclusive_group(required=True)
    target.add_argument("--out", metavar="OUT.jsonl", help="the chosen data rows")
    target.add_argument(
        "--explain", action="store_true", help="choose nothing: show what each gate would leave"
    )
    parser.add_argument("--rank-by", choices=("iou_gap", "reverse_kl"), default="iou_gap", help="%(default)s")
    parser.add_argument("--min-teacher-iou", type=float, metavar="X", help="the gate; default: 0.5, or none")
    parser.add_argument("--buckets", type=_positive, default=5, metavar="N", help="of bbds; default: 5")
    parser.add_argument("--no-fill", action="store_true", help="bbds: leave short buckets short (eq 20)")
    parser.add_argument("--center", type=float, metavar="c", help="of gwds (0.9) and gaussian (0.3)")
    parser.add_argument("--sigma", type=float, metavar="s", help="of gwds and gaussian (0.2)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--video-root", metavar="DIR", help="where the videos are; default: beside the data")
    _json_flag(parser)


def _evaluate(commands: Any) -> None:
    parser = _command(
        commands,
        "evaluate",
        "evaluate",
        "grounding metrics with 95%% intervals over videos, or general video understanding (--suite general)",
        "video-opd evaluate --data test.jsonl --predictions student=p.jsonl --baseline base=b.jsonl",
        overrides=OF_MODEL,
    )
    file = "[NAME=]FILE"
    parser.add_argument("--data", nargs="+", metavar=file, help="the annotated rows; a data set a file")
    source = parser.add_mutually_exclusive_group()
    source.add_argument(
        "--predictions",
        nargs="+",
        metavar=file,
        help="answers that were made before; a model a name, several make a table",
    )
    source.add_argument("--model", metavar="M", help="a checkpoint folder that answers now")
    parser.add_argument(
        "--baseline",
        nargs="+",
        metavar=file,
        help="answers of another model: also show the differences from it",
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, default="paper", help="default: %(default)s")
    parser.add_argument(
        "--any-protocol", action="store_true", help="evaluate answers that were made under another protocol"
    )
    parser.add_argument(
        "--thinking", action="store_true", help="read only what follows </think>; known where a note says so"
    )
    parser.add_argument("--by-source", action="store_true", help="a data set for each source of the rows")
    parser.add_argument(
        "--published", action="store_true", help="also show the paper's own rows, marked as published"
    )
    parser.add_argument("--format", choices=FORMATS, help="default: by the ending of --out, else text")
    parser.add_argument(
        "--out",
        metavar="OUT",
        help="write the table there (.md, .tex, .json, .txt); with --suite: a folder for all it writes",
    )
    parser.add_argument("--no-intervals", action="store_true", help="figures alone in the table")
    parser.add_argument("--json", metavar="OUT.json", help="also write the metrics there; - is stdout")
    parser.add_argument(
        "--answers", metavar="P.jsonl", help="with --model: keep the answers there; default: the cache folder"
    )
    _model_options(parser, length=None)
    _workers_option(parser)
    _suite_options(parser)


def _suite_options(parser: argparse.ArgumentParser) -> None:
    suite = parser.add_argument_group(
        "general video understanding",
        "TempCompass, MVBench and Video-MME through lmms-eval; repeated, it continues. "
        "video-opd evaluate --suite general runs/a/model",
    )
    suite.add_argument("--suite", choices=("general",), help="instead of --data")
    suite.add_argument("suite_model", nargs="?", metavar="MODEL", help="with --suite: a checkpoint folder")
    suite.add_argument("--check", action="store_true", help="only say what is missing, and how to get it")
    suite.add_argument("--download", action="store_true", help="only get rows and videos (very large)")
    suite.add_argument("--data-root", metavar="DIR", help="rows and videos of one's own, DIR/BENCHMARK/…")
    suite.add_argument("--tasks", type=_names, metavar="A,B", help="only these benchmarks or subtasks")
    suite.add_argument("--skip", type=_names, default=(), metavar="A,B", help="not these")
    suite.add_argument("--limit", type=_positive, metavar="N", help="the first N rows of each subtask")
    suite.add_argument("--allow-missing", action="store_true", help="rows without a video count as wrong")
    suite.add_argument(
        "--judge", action="store_true", help="let lmms-eval ask a judge model (TempCompass; OPENAI_API_KEY)"
    )


def _ground(commands: Any) -> None:
    parser = _command(
        commands,
        "ground",
        "ground",
        "where in one video does it happen",
        'video-opd ground runs/a/model video.mp4 "the cup falls" --view answers.html',
        overrides=OF_MODEL,
    )
    parser.add_argument("model", metavar="MODEL", help="a checkpoint folder")
    parser.add_argument("video", metavar="VIDEO", help="a video file")
    parser.add_argument("query", metavar="QUERY", nargs="*", help="what to look for")
    parser.add_argument("--queries", metavar="FILE", help="more queries: one a line, or JSON Lines")
    parser.add_argument(
        "--samples",
        type=_positive,
        default=1,
        metavar="K",
        help="answer by consensus of K samples; default: 1",
    )
    parser.add_argument(
        "--temperature", type=float, metavar="T", help="default: 0 (greedy), with --samples 1"
    )
    parser.add_argument(
        "--window", type=float, metavar="SECONDS", help="search a long video in windows; default: whole"
    )
    parser.add_argument("--overlap", type=float, metavar="S", help="of the windows; default: half a window")
    _model_options(parser, data=False)
    parser.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="answers at a time; default: 8"
    )
    form = parser.add_mutually_exclusive_group()
    form.add_argument(
        "--format",
        choices=("text", "json", "srt", "csv"),
        help="default: text on a terminal, else json",
    )
    form.add_argument("--json", action="store_const", const="json", dest="format", help="--format json")
    parser.add_argument("--view", metavar="OUT.html", help="also write a page to look at the answers")
    parser.add_argument(
        "--embed-mb",
        type=float,
        default=20.0,
        metavar="MB",
        help="larger videos are linked by it; default: 20",
    )
    parser.add_argument("--cut", metavar="OUT.mp4", help="also write the answer as a clip")
    parser.set_defaults(more="query")


def _report(commands: Any) -> None:
    parser = _command(
        commands,
        "report",
        "report",
        "one HTML file about one or several runs",
        "video-opd report runs/a runs/b --out report.html",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="a run folder")
    parser.add_argument("--out", required=True, metavar="report.html")


def _data(commands: Any) -> None:
    parser = _command(
        commands, "data", "data_check", "look after data files", "video-opd data check train.jsonl"
    )
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    _data_convert(actions)
    _data_check(actions)
    _data_stats(actions)


def _bench(commands: Any) -> None:
    parser = _command(
        commands,
        "bench",
        "bench_engine",
        "what the engines and the data path cost, as ratios in one run",
        "video-opd bench engine --lengths 400 1000 --json engine.json",
    )
    subjects = parser.add_subparsers(metavar="SUBJECT", required=True)
    engine = _command(
        subjects,
        "engine",
        "bench_engine",
        "the prefix engine against the plain one: operations, seconds and peak memory of steps; scoring; "
        "queries on a video",
        "video-opd bench engine --lengths 400 1000 --json engine.json",
    )
    engine.add_argument("--model", metavar="M", help="the student; default: the shipped tiny base")
    engine.add_argument("--teacher", metavar="M", help="default: the shipped tiny teacher, or --model")
    engine.add_argument(
        "--lengths", type=_positive, nargs="+", default=[300, 1000, 3000], metavar="N",
        help="prompt tokens; default: 300 1000 3000",
    )  # fmt: skip
    engine.add_argument(
        "--plain-up-to", type=_positive, default=1500, metavar="N",
        help="of longer prompts nothing is sampled without a cache; default: 1500",
    )  # fmt: skip
    engine.add_argument("--prompts", type=_positive, default=1, metavar="N", help="of a step; default: 1")
    engine.add_argument(
        "--rollouts", type=_positive, nargs="+", default=[8], metavar="G", help="of GRPO; default: 8"
    )
    engine.add_argument("--repeats", type=_positive, default=5, metavar="N", help="turns; default: 5")
    engine.add_argument("--max-new-tokens", type=_positive, default=16, metavar="N", help="default: 16")
    engine.add_argument("--frame-side", type=_positive, default=64, metavar="PX", help="default: 64")
    engine.add_argument(
        "--dtype", choices=("float32", "bfloat16"), default="float32", help="default: float32"
    )
    engine.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: a GPU where there is one")
    engine.add_argument("--no-memory", action="store_true", help="leave the peak memory out")
    engine.add_argument(
        "--operations-only", action="store_true",
        help="count the operations of a step of each method, and time nothing",
    )  # fmt: skip
    engine.add_argument("--json", metavar="OUT.json", help="also write everything there")
    data = _command(
        subjects,
        "data",
        "bench_data",
        "from a video file to a prompt, against qwen-vl-utils and the processor",
        "video-opd bench data holiday.mp4 lecture.mkv --json data.json",
        overrides=OF_VIDEO,
    )
    data.add_argument("videos", nargs="*", metavar="VIDEO", help="default: three that are made")
    data.add_argument("--model", metavar="M", help="whose processor; default: the shipped tiny base")
    data.add_argument("--repeats", type=_positive, default=5, metavar="N", help="turns; default: 5")
    data.add_argument("--workers", type=_positive, default=2, metavar="N", help="default: 2")
    data.add_argument("--json", metavar="OUT.json", help="also write everything there")


def _data_convert(actions: Any) -> None:
    convert = _command(
        actions,
        "convert",
        "data_convert",
        "make a data file from a public format of annotations",
        "video-opd data convert charades_sta_test.json --video-root Charades_v1 --out charades.jsonl",
    )
    convert.add_argument(
        "words",
        nargs="*",
        metavar="[FORMAT] INPUT",
        help="the annotations, and their format where it is not to be recognised",
    )
    convert.add_argument("--out", metavar="D.jsonl", help="the new data file")
    convert.add_argument(
        "--list-formats", action="store_true", help="convert nothing: show the formats and how they look"
    )
    convert.add_argument("--video-root", metavar="DIR", help="where the videos are; they are looked up")
    convert.add_argument(
        "--source", metavar="NAME", help="of all rows; default: the rows' own, or the format's"
    )
    convert.add_argument(
        "--durations",
        action="append",
        default=[],
        metavar="FILE",
        help="JSON {vid: seconds} or a CSV with id and length; may be given several times",
    )
    convert.add_argument(
        "--probe", action="store_true", help="ask the videos for durations that are not stated anywhere"
    )
    convert.add_argument("--split", metavar="NAME", help="of a folder or a set that has several")
    convert.add_argument(
        "--clips",
        choices=("cut", "whole"),
        default="cut",
        help="rows about a part of a video: do files hold it alone (default), or all? then times move",
    )
    convert.add_argument("--workers", type=_positive, default=4, metavar="N", help="of --probe; default: 4")
    _json_flag(convert)


def _data_check(actions: Any) -> None:
    check = _command(
        actions,
        "check",
        "data_check",
        "open every video and find what cannot be used; exit code 1 if there is any; repeated, it continues",
        "video-opd data check train.jsonl --write-good train-good.jsonl",
    )
    check.add_argument("data", metavar="DATA", help="a data file (JSON Lines)")
    check.add_argument("--video-root", metavar="DIR", help="where the videos are; default: beside the data")
    check.add_argument("--out", metavar="C.jsonl", help="what the videos hold; default: DATA.check.jsonl")
    check.add_argument("--write-good", metavar="OUT.jsonl", help="write the rows without problems there")
    check.add_argument(
        "--tolerance",
        type=float,
        default=1.0,
        metavar="S",
        help="seconds by which a duration or a span's end may differ from the video's; default: %(default)s",
    )
    check.add_argument(
        "--decode", action="store_true", help="also decode the frames that a model is shown: thorough, slow"
    )
    check.add_argument("--workers", type=_positive, default=4, metavar="N", help="default: %(default)s")
    _json_flag(check)


def _data_stats(actions: Any) -> None:
    stats = _command(
        actions,
        "stats",
        "data_stats",
        "describe a data file: durations, spans, queries, sources, tokens",
        "video-opd data stats train.jsonl --size 640x360 --html stats.html",
        overrides=OF_VIDEO,
    )
    stats.add_argument("data", metavar="DATA", help="a data file (JSON Lines)")
    stats.add_argument("--video-root", metavar="DIR", help="where the videos are; default: beside the data")
    stats.add_argument("--html", metavar="OUT.html", help="also write one page with charts")
    token_cost = stats.add_mutually_exclusive_group()
    token_cost.add_argument(
        "--size", type=_size, metavar="WxH", help="count tokens as if every video had this size, e.g. 640x360"
    )
    token_cost.add_argument(
        "--probe", action="store_true", help="open every video to count its tokens; repeated, it continues"
    )
    stats.add_argument("--out", metavar="C.jsonl", help="of --probe and check; default: DATA.check.jsonl")
    stats.add_argument("--workers", type=_positive, default=4, metavar="N", help="of --probe; default: 4")
    _json_flag(stats)


def _world(commands: Any) -> None:
    example = "video-opd world make --out world --videos train=200 short=40"
    parser = _command(commands, "world", "world_make", "generated videos and tiny models", example)
    actions = parser.add_subparsers(metavar="ACTION", required=True)
    make = _command(actions, "make", "world_make", "render videos with exactly known events", example)
    make.add_argument("--out", required=True, metavar="DIR")
    make.add_argument("--videos", nargs="+", type=_count_of, metavar="SPLIT=N", help="how many of each split")
    make.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    make.add_argument(
        "--workers", type=_positive, metavar="N", help="rendering processes; default: all cores"
    )
    _json_flag(make)
    train = _command(
        actions,
        "train",
        "world_train",
        "how the tiny models were made: says where the tool is",
        "video-opd world train",
    )
    for flag in ("--recipe", "--out", "--workers"):  # the tool's own
        train.add_argument(flag, help=argparse.SUPPRESS)


def _model_options(parser: argparse.ArgumentParser, data: bool = True, length: int | None = 64) -> None:
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: a GPU where there is one")
    default = "default: the protocol's" if length is None else "default: %(default)s"
    parser.add_argument("--max-new-tokens", type=_positive, default=length, metavar="N", help=default)
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    if data:
        parser.add_argument("--overwrite", action="store_true", help="throw away what --out holds")
        parser.add_argument("--batch-size", type=_positive, default=8, metavar="N", help="default: 8")
        parser.add_argument(
            "--video-root", metavar="DIR", help="where the videos are; default: beside the data"
        )


def _workers_option(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--workers", type=_positive, default=2, metavar="N", help="threads that decode videos; default: 2"
    )


def _json_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _size(text: str) -> tuple[int, int]:
    width, _, height = text.lower().partition("x")
    if not (width.isdecimal() and height.isdecimal() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"{text!r} is not WIDTHxHEIGHT, e.g. 640x360")
    return int(width), int(height)


def _count_of(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if not name or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is not SPLIT=N, e.g. train=200")
    return name, int(number)
