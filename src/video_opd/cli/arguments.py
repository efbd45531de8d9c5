"""Flags that several commands share, and how their values are read."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from typing import Any

from video_opd.cli.parser import Parser
from video_opd.errors import UserError
from video_opd.seeds import LARGEST_SEED

PROTOCOLS = ("paper", "timelens", "timelens-2026-02", "timelens-2025", "lmms-eval-timelens")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def seed(text: str) -> int:
    number = int(text)
    if not 0 <= number <= LARGEST_SEED:
        raise argparse.ArgumentTypeError(f"{number} is not between 0 and {LARGEST_SEED}")
    return number


def check_engine(engine: str, overrides: Sequence[str]) -> None:
    """Raises :class:`UserError` for settings of an engine that is not used."""
    given = next((word for word in overrides if word.startswith("--vllm.")), None)
    if engine != "vllm" and given is not None:
        raise UserError(f"{given} belongs to --engine vllm: add that, or leave it out")


SHARED: Mapping[str, Mapping[str, Any]] = {
    "--device": {"help": "cpu, cuda, cuda:1 ...; default: a GPU if there is one"},
    "--engine": {
        "choices": ("hf", "vllm"), "default": "hf",
        "help": "hf: this package's, on transformers; vllm: vLLM (extra vllm); default: %(default)s",
    },
    "--max-new-tokens": {"type": positive, "default": 64, "metavar": "N", "help": "default: %(default)s"},
    "--seed": {"type": seed, "default": 0, "help": "default: %(default)s"},
    "--overwrite": {"action": "store_true", "help": "throw away what --out holds"},
    "--batch-size": {"type": positive, "default": 8, "metavar": "N", "help": "responses at once; default: 8"},
    "--video-root": {"metavar": "DIR", "help": "where the videos are; default: beside the data"},
    "--workers": {
        "type": positive, "default": 2, "metavar": "N", "help": "threads that decode videos; default: 2"
    },
    "--json": {"action": "store_true", "help": "print the result as one JSON object"},
}  # fmt: skip


def add_shared(parser: Parser, *flags: str, **changed: Any) -> None:
    """Adds flags of ``SHARED``; ``changed`` are argparse's options that differ here, e.g. ``default=4``."""
    for flag in flags:
        parser.add_argument(flag, **{**SHARED[flag], **changed})
