"""All commands: one module each, which holds its arguments and its call."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

import video_opd
from video_opd.cli import (
    bench_data,
    bench_engine,
    data_check,
    data_convert,
    data_stats,
    demo,
    evaluate,
    ground,
    plan,
    predict,
    report,
    reproduce,
    rounds,
    score,
    select,
    serve_teacher,
    suite,
    train,
    world_make,
    world_train,
)
from video_opd.cli.parser import DEBUG_HELP, Command, Group, Parser, parse

COMMANDS: Mapping[str, Command | Group] = {
    "demo": demo,
    "train": train,
    "rounds": rounds,
    "plan": plan,
    "predict": predict,
    "score": score,
    "select": select,
    "evaluate": evaluate,
    "suite": suite,
    "ground": ground,
    "report": report,
    "reproduce": reproduce,
    "serve-teacher": serve_teacher,
    "data": Group(
        "look after data files", {"check": data_check, "convert": data_convert, "stats": data_stats}
    ),
    "world": Group("generated videos and tiny models", {"make": world_make, "train": world_train}),
    "bench": Group(
        "what the engines and the data path cost, as ratios in one run",
        {"engine": bench_engine, "data": bench_data},
    ),
}


def build_parser() -> Parser:
    parser = Parser(
        prog="video-opd",
        description="Post-training of video MLLMs for temporal grounding by on-policy distillation.",
        epilog="example: video-opd demo --out runs/demo",
    )
    parser.add_argument("--version", action="version", version=f"video-opd {video_opd.__version__}")
    parser.add_argument("--debug", action="store_true", help=DEBUG_HELP)
    parser.add_commands(COMMANDS, "COMMAND")
    return parser


def parse_words(words: Sequence[str]) -> argparse.Namespace:
    """The arguments of one command; ``arguments.command.run(arguments)`` runs it."""
    return parse(build_parser(), evaluate.as_suite_words(words))
