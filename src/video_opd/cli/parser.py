"""The parser of the command line, without the commands themselves. Standard library only.

argparse reads the flags of a command. The keys of a recipe are no flags: ``--section.key value`` is taken out
of the words before argparse sees them, so it needs no declaration and its value may begin with a dash.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn, Protocol, TypeAlias

from video_opd.errors import UserError
from video_opd.files import is_same_file, need_another_file

# The keys that a command reads, by how they begin; others are refused. A command without settings reads none.
# A command that takes a RECIPE leaves this to the recipe's classes, which know every key.
NO_SETTINGS: tuple[str, ...] = ()
ALL_SETTINGS: tuple[str, ...] = ("",)
VIDEO_SETTINGS: tuple[str, ...] = ("video.",)
RUN_SETTINGS: tuple[str, ...] = ("model.dtype", "model.attn", "model.engine", *VIDEO_SETTINGS)
MODEL_SETTINGS: tuple[str, ...] = (*RUN_SETTINGS, "prompt.")
VLLM_SETTINGS: tuple[str, ...] = ("vllm.",)
DEBUG_HELP = "show the traceback of an error"
Kind: TypeAlias = Literal["file", "folder"]
Read: TypeAlias = Literal["file", "named file"]  # FILE, or [NAME=]FILE


class Output(NamedTuple):
    """Where a command writes."""

    path: str
    kind: Kind


class Command(Protocol):
    """A command is a module with these five names. It imports what is heavy inside ``run``."""

    HELP: str  # what the command does, without a capital and a full stop
    EXAMPLE: str
    SETTINGS: tuple[str, ...]

    def add_arguments(self, parser: Parser) -> None: ...

    def run(self, arguments: argparse.Namespace) -> int | None:
        """Returns the exit code; None is 0."""


class Group(NamedTuple):
    """Commands that share their first word, as ``video-opd data check`` and ``video-opd data stats`` do."""

    help: str
    commands: Mapping[str, Command]


@dataclass(frozen=True, kw_only=True)
class OutputFlag:
    """A flag that names what the command writes, and when: ``data stats --out`` is written with --probe."""

    flag: str
    name: str  # of the attribute that holds its value
    kind: Kind
    written_if: Callable[[argparse.Namespace], bool]


@dataclass(frozen=True, kw_only=True)
class Input:
    """A flag, or a word without one, that names files which the command reads."""

    flag: str  # "--data", or "DATA" for a word without a flag
    name: str  # of the attribute that holds its value
    kind: Read

    def paths(self, arguments: argparse.Namespace) -> list[str]:
        value = getattr(arguments, self.name)
        words = value if isinstance(value, list) else [] if value is None else [value]
        return [split_name(word)[1] for word in words] if self.kind == "named file" else words


class Parser(argparse.ArgumentParser):
    """An argparse parser that records its flags, its inputs, its outputs and its commands.

    An error is a single line with the remedy, raised as :class:`UserError`.
    """

    def __init__(self, **options: Any) -> None:
        self.flags: list[str] = []  # flags in the order in which they were added, "--help" first
        self.inputs: list[Input] = []
        self.outputs: list[OutputFlag] = []
        self.commands: dict[str, Parser] = {}
        self.settings: tuple[str, ...] = NO_SETTINGS
        # The name of a positional that takes several words, which may stand anywhere between the flags.
        self.scattered: str | None = None
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def add_argument(
        self,
        *names: str,
        reads: Read | None = None,
        writes: Kind | None = None,
        writes_if: Callable[[argparse.Namespace], bool] = lambda arguments: True,
        **options: Any,
    ) -> argparse.Action:
        """argparse's. A flag that names an output says so by ``writes``: the command then locks it. One that
        names files to read says so by ``reads``: none of them may be an output as well."""
        action = super().add_argument(*names, **options)
        self.record(action, reads, writes, writes_if)
        return action

    def record(
        self,
        action: argparse.Action,
        reads: Read | None,
        writes: Kind | None,
        written_if: Callable[[argparse.Namespace], bool],
    ) -> None:
        """Records a flag, here or in an exclusive group."""
        flags = [name for name in action.option_strings if name.startswith("--")]
        self.flags += flags
        if reads is not None:
            shown = flags[0] if flags else str(action.metavar).split()[-1]  # of "[FORMAT] INPUT" the last
            self.inputs.append(Input(flag=shown, name=action.dest, kind=reads))
        if writes is not None:
            self.outputs.append(
                OutputFlag(flag=flags[0], name=action.dest, kind=writes, written_if=written_if)
            )

    def exclusive(self, required: bool = False) -> Exclusive:
        """A group of flags of which one may be given, or must be."""
        return Exclusive(self, self.add_mutually_exclusive_group(required=required))

    def add_commands(self, commands: Mapping[str, Command | Group], metavar: str) -> None:
        actions = self.add_subparsers(title="commands", metavar=metavar, required=True)
        for name, command in commands.items():
            help = command.help if isinstance(command, Group) else command.HELP
            settings = NO_SETTINGS if isinstance(command, Group) else command.SETTINGS
            note = " Settings of a recipe are given as --section.key VALUE." if settings else ""
            child = self.commands[name] = actions.add_parser(
                name,
                help=help.replace("%", "%%"),  # argparse formats help, and not the description
                description=f"{help[0].upper()}{help[1:]}.{note}",
                epilog=f"example: {_example(command)}",
            )
            # SUPPRESS: a default here would undo "video-opd --debug COMMAND".
            child.add_argument(
                "--debug",
                action="store_true",
                default=argparse.SUPPRESS,
                help=DEBUG_HELP,
            )
            child.settings = settings
            if isinstance(command, Group):
                child.add_commands(command.commands, "ACTION")
            else:
                child.set_defaults(command=command)
                command.add_arguments(child)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")

    def chosen(self, words: Sequence[str]) -> Parser:
        """The parser of the command that ``words`` name, as far as they name one.

        Raises :class:`UserError` for a word in place of a command that is none.
        """
        parser, certain = self, True
        for word in words:
            if word in parser.commands:
                parser = parser.commands[word]
            elif word.startswith("-"):
                # Behind --help the words do not matter, and behind an unknown flag stands its value.
                certain = certain and word == "--debug"
            else:
                if parser.commands and certain:
                    near = difflib.get_close_matches(word, parser.commands, 1)
                    hint = f"did you mean {near[0]}?" if near else f"choose from {', '.join(parser.commands)}"
                    parser.error(f"there is no command {word!r} ({hint})")
                break
        return parser

    def knows(self, word: str) -> bool:
        """False for a word that is meant as a flag and is none of this command."""
        flag = word.partition("=")[0]
        return not flag.startswith("--") or len(flag) == 2 or " " in flag or flag in self.flags

    def refuse(self, words: Sequence[str]) -> NoReturn:
        """Raises the error of words that the command has no place for."""
        near = [hit for word in words if not self.knows(word) and (hit := self._nearest(word))]
        hint = f" (did you mean {near[0]}?)" if near else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{hint}")

    def refuse_setting(self, name: str) -> NoReturn:
        """Raises the error of ``--a.b``, which this command does not read."""
        key = name.removeprefix("--")
        word = key.rpartition(".")[2]
        settings, flag = _last_words(self.settings), f"--{word.replace('_', '-')}"
        near = [flag] if flag in self.flags else [settings[word]] if word in settings else []
        near = near or difflib.get_close_matches(name, settings.values(), 1, 0.7)
        known = ", ".join(f"--{key}*" if key.endswith(".") else f"--{key}" for key in self.settings)
        hint = f"did you mean {near[0]}?" if near else f"it reads {known}"
        self.error(f"{name}: this command does not read that setting ({hint})")

    def _nearest(self, word: str) -> str | None:
        """The flag or setting that an unknown flag may mean: a setting of this name, else the nearest."""
        flag = word.partition("=")[0]
        settings = _last_words(self.settings)
        name = flag.removeprefix("--").replace("-", "_")
        if name in settings:
            return settings[name]
        if near := difflib.get_close_matches(flag, self.flags, 1, 0.7):
            return near[0]
        near = difflib.get_close_matches(name, settings, 1, 0.7)
        return settings[near[0]] if near else None


class Exclusive:
    """Flags of a parser that exclude each other."""

    def __init__(self, parser: Parser, group: Any) -> None:
        self._parser, self._group = parser, group

    def add_argument(
        self, *names: str, reads: Read | None = None, writes: Kind | None = None, **options: Any
    ) -> None:
        action = self._group.add_argument(*names, **options)
        self._parser.record(action, reads, writes, lambda arguments: True)


def parse(parser: Parser, words: Sequence[str]) -> argparse.Namespace:
    """The arguments, with the ``command`` that they belong to, its ``outputs`` and the ``overrides``.

    ``outputs`` are the places that it writes, ``overrides`` are ``["--a.b", "value", …]``.

    Raises :class:`UserError` for words that the command does not accept, and for an output that the command
    reads or writes as something else, too.
    """
    plain, overrides = split_overrides(words)
    chosen = parser.chosen(plain)
    try:
        arguments, rest = parser.parse_known_args(plain)
    except UserError:
        # A flag that is missing may have been given misspelt.
        if unknown := [word for word in plain if not chosen.knows(word)]:
            chosen.refuse(unknown)
        raise
    if rest and (chosen.scattered is None or any(word.startswith("-") for word in rest)):
        chosen.refuse(rest)
    if rest and chosen.scattered:  # argparse fills such a positional with the first words only
        getattr(arguments, chosen.scattered).extend(rest)
    if overrides and not chosen.settings:
        chosen.error(f"{overrides[0]}: this command reads no recipe")
    if "recipe" not in arguments:
        for name in overrides[::2]:
            if not name.removeprefix("--").startswith(chosen.settings):
                chosen.refuse_setting(name)
    _refuse_repeats(overrides[::2])
    arguments.overrides = overrides
    written = [
        (output, path)
        for output in chosen.outputs
        if (path := getattr(arguments, output.name)) is not None and output.written_if(arguments)
    ]
    _refuse_lost_files(chosen, arguments, [(out.flag, path) for out, path in written if out.kind == "file"])
    arguments.outputs = [Output(path=path, kind=output.kind) for output, path in written]
    return arguments


def split_name(word: str) -> tuple[str | None, str]:
    """``(NAME or None, FILE)`` of ``[NAME=]FILE``. A file that is there may have a "=" in its name."""
    name, equals, path = word.partition("=")
    if not equals or "/" in name or Path(word).exists():
        return None, word
    return name, path


def _refuse_lost_files(
    parser: Parser, arguments: argparse.Namespace, outputs: Sequence[tuple[str, str]]
) -> None:
    """Raises :class:`UserError` if one of the ``(flag, path)`` would replace an input or another output."""
    inputs = [(each.flag, path) for each in parser.inputs for path in each.paths(arguments)]
    outputs = [(flag, path) for flag, path in outputs if path != "-"]  # which is stdout
    for number, (flag, path) in enumerate(outputs):
        need_another_file(flag, path, inputs)
        for earlier, other in outputs[:number]:
            if is_same_file(path, other):
                raise UserError(
                    f"{flag} {path} is also {earlier}: one would replace the other; name two files"
                )


def split_overrides(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """``(other words, ["--a.b", "value", …])``. ``--method`` is a key of a recipe, too."""
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


def _refuse_repeats(names: Sequence[str]) -> None:
    """Raises :class:`UserError` for a setting that a later override would silently replace."""
    for i, name in enumerate(names):
        for earlier in names[:i]:
            if f"{earlier}.".startswith(f"{name}."):
                what = "is given twice" if earlier == name else f"replaces the whole section, with {earlier}"
                raise UserError(f"{name} {what}: keep one of the two")


def _example(command: Command | Group) -> str:
    """A group shows the example of its first command."""
    if isinstance(command, Group):
        return next(iter(command.commands.values())).EXAMPLE
    return command.EXAMPLE


def _last_words(prefixes: tuple[str, ...]) -> dict[str, str]:
    """``{"lr": "--optim.lr", …}``: the last word of each setting, and other trainers' words for it."""
    if not prefixes:
        return {}
    from video_opd.config import METHODS, VLLMConfig
    from video_opd.config.messages import SYNONYMS, leaves

    keys = [key for key in leaves(*METHODS.values()) if key.startswith(prefixes)]
    if VLLM_SETTINGS[0] in prefixes:  # no recipe has that section
        keys += [f"{VLLM_SETTINGS[0]}{key}" for key in leaves(VLLMConfig)]
    words = {key.rpartition(".")[2]: key for key in reversed(keys)}
    words |= {word: key for word, key in SYNONYMS.items() if key.startswith(prefixes)}
    return {word: f"--{key}" for word, key in words.items()}
