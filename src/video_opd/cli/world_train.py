"""``video-opd world train``: a pointer to the tool that makes the tiny models."""

from __future__ import annotations

import argparse

from video_opd.cli.parser import NO_SETTINGS, Parser
from video_opd.errors import UserError

HELP = "how the tiny models were made: says where the tool is"
EXAMPLE = "video-opd world train"
SETTINGS = NO_SETTINGS


def add_arguments(parser: Parser) -> None:
    for flag in ("--recipe", "--out", "--workers"):  # the tool's own
        parser.add_argument(flag, help=argparse.SUPPRESS)


def run(arguments: argparse.Namespace) -> None:
    raise UserError(
        "the tiny models are made by tools/tiny_models in the repository, which the package does not hold: "
        "in a clone, run PYTHONPATH=tools python -m tiny_models --out runs/world-models"
    )
