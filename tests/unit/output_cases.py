"""The outputs of the commands, as the parser knows them."""

from __future__ import annotations

from collections.abc import Iterator

from video_opd.cli.commands import build_parser
from video_opd.cli.parser import ALL_SETTINGS, Kind, Parser

RUN_DIR = "--run.dir"  # of the commands that read a whole recipe, and write its run
WRITES_NO_RUN = {"plan"}


def parsers_of_commands() -> list[tuple[str, Parser]]:
    """``("data check", its parser)`` and so on."""
    return list(_leaves(build_parser(), ()))


def _leaves(parser: Parser, words: tuple[str, ...]) -> Iterator[tuple[str, Parser]]:
    if not parser.commands:
        yield " ".join(words), parser
    for name, child in parser.commands.items():
        yield from _leaves(child, (*words, name))


def outputs() -> list[tuple[str, str, Kind]]:
    """(command, flag, kind) of each."""
    found: list[tuple[str, str, Kind]] = []
    for name, parser in parsers_of_commands():
        found += [(name, output.flag, output.kind) for output in parser.outputs]
        if parser.settings == ALL_SETTINGS and name not in WRITES_NO_RUN:
            found.append((name, RUN_DIR, "folder"))
    return found
