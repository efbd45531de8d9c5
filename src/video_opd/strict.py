"""Settings classes from plain trees, strictly: an unknown key or a wrong type is an error that says where.

Knows nothing of any particular setting; :mod:`video_opd.config` holds those. Supported annotations: bool,
int, float, str, ``Literal``, ``X | None``, ``tuple[X, ...]``, ``tuple[X, Y]``, ``dict[str, X]`` and other
settings classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import math
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import yaml

from video_opd.errors import UserError

MAX_NODES, MAX_DEPTH = 10_000, 50  # of a recipe


def need(condition: bool, message: str) -> None:
    """Raises :class:`UserError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise UserError(message)


def to_dict(recipe: Any) -> dict[str, Any]:
    """Nested plain dicts and lists, as YAML and JSON have them."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, list | tuple) else value

    return plain(dataclasses.asdict(recipe))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``("optim.lr", 1e-6)``, … in the order of the tree."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``tree`` with ``--a.b value`` pairs set; values are read as YAML."""
    result = _copy(tree)
    words = list(overrides)
    while words:
        word = words.pop(0)
        need(word.startswith("--") and len(word) > 2, f"{word!r}: overrides are written --section.key value")
        name, equals, text = word[2:].partition("=")
        if not equals:
            need(bool(words), f"--{name} has no value: write --{name} VALUE")
            text = words.pop(0)
        *sections, key = name.split(".")
        node = result
        for section in sections:
            node = node.setdefault(section, {})
            need(isinstance(node, dict), f"--{name}: {section!r} is not a section")
        node[key] = parse_yaml(text, f"--{name}")
    return result


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def parse_yaml(text: str, where: str) -> Any:
    """The value that ``text`` spells; a UserError names ``where`` and the line."""
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        at = "" if line is None else f" line {line + 1}"
        problem = getattr(error, "problem", None) or "cannot be read"
        raise UserError(f"{where}{at}: not valid YAML ({problem})") from error
    except (ValueError, RecursionError) as error:  # an impossible date, thousands of digits or of brackets
        raise UserError(f"{where}: holds a value that cannot be read ({error})") from error
    _check_extent(value, where)
    return value


def _check_extent(value: Any, where: str) -> None:
    """Aliases can make a few lines a tree without end; a recipe is neither deep nor large."""
    left, nodes = [(value, 0)], 0
    while left:
        node, depth = left.pop()
        nodes += 1
        need(
            nodes <= MAX_NODES and depth <= MAX_DEPTH,
            f"{where}: more than {MAX_NODES} values or {MAX_DEPTH} levels: take out aliases that multiply",
        )
        if isinstance(node, Mapping):
            left += [(child, depth + 1) for child in node.values()]
        elif isinstance(node, list | tuple | set):
            left += [(child, depth + 1) for child in node]


class TreeReader:
    """Makes an instance of the settings class ``root`` from nested mappings.

    ``synonyms`` names our key for words that other programs use, for the hint that follows an unknown key.
    """

    def __init__(self, root: type, synonyms: Mapping[str, str]) -> None:
        self.root = root
        self.synonyms = synonyms

    def read(self, tree: Any) -> Any:
        return self._section(self.root, tree, "")

    def _section(self, cls: type, tree: Any, path: str) -> Any:
        tree = {} if tree is None else tree  # an empty section
        need(isinstance(tree, Mapping), f"{path[:-1]} must be a section of keys, not {tree!r}")
        hints = _hints(cls)
        known = {spec.name: spec for spec in dataclasses.fields(cls)}
        for key in tree:
            if key not in known:
                raise UserError(self._unknown(f"{path}{key}", [f"{path}{name}" for name in known]))
        values = {}
        for name, spec in known.items():
            if name in tree or dataclasses.is_dataclass(hints[name]):
                values[name] = self._value(tree.get(name), hints[name], f"{path}{name}")
            elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
                raise UserError(f"{path}{name} is missing: add it to the recipe or give --{path}{name} VALUE")
        return cls(**values)

    def _unknown(self, key: str, siblings: list[str]) -> str:
        """Names the nearest key: the same word in another section, else a sibling by spelling, else any."""
        everywhere = list(leaves(self.root, ""))
        word = key.rpartition(".")[2]
        words = {path.rpartition(".")[2]: path for path in siblings}
        near = [path for path in everywhere if path.rpartition(".")[2] == word][:1]
        near = near or [self.synonyms[word] for _ in range(word in self.synonyms)]
        near = near or [words[hit] for hit in difflib.get_close_matches(word, words, 1, 0.6)]
        near = near or difflib.get_close_matches(key, everywhere, 1, 0.7)
        hint = f"did you mean {near[0]}?" if near else "known here: " + ", ".join(siblings)
        return f"{key} is not a known key; {hint}"

    def _value(self, value: Any, hint: Any, path: str) -> Any:
        """``value`` as the annotated type ``hint``, or a UserError that names ``path``."""
        if dataclasses.is_dataclass(hint):
            return self._section(typing.cast(type, hint), value, f"{path}.")
        origin, arguments = typing.get_origin(hint), typing.get_args(hint)
        if origin in (types.UnionType, typing.Union):  # only "X | None" occurs
            (inner,) = (argument for argument in arguments if argument is not type(None))
            return None if value is None else self._value(value, inner, path)
        if origin is Literal:
            return _choice(value, arguments, path)
        if origin is dict:
            need(value is not None, f"{path} is empty; for none, write {{}}")
            need(isinstance(value, Mapping), f"{path} must be a section of keys, not {value!r}")
            return {str(key): self._value(item, arguments[1], f"{path}.{key}") for key, item in value.items()}
        if origin is tuple:
            need(value is not None, f"{path} is empty; for none, write []")
            if isinstance(value, str) and "," in value and arguments[0] is not str:  # a text may have commas
                listed = ", ".join(part.strip() for part in value.split(","))
                raise UserError(f'{path} is a list: write "[{listed}]", not {value!r}')
            items = list(value) if isinstance(value, list | tuple) else [value]
            kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
            need(len(items) == len(kinds), f"{path} needs {len(kinds)} values, not {len(items)}")
            pairs = enumerate(zip(items, kinds, strict=True))
            return tuple(self._value(item, kind, f"{path}[{i}]") for i, (item, kind) in pairs)
        return _scalar(value, hint, path)


_hints = functools.cache(typing.get_type_hints)


def leaves(cls: type, path: str = "") -> Iterator[str]:
    """``"optim.lr"``, …: every key of a settings class that is no section, below ``path``."""
    for name, hint in _hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from leaves(typing.cast(type, hint), f"{path}{name}.")
        else:
            yield f"{path}{name}"


def _choice(value: Any, choices: Sequence[str], path: str) -> Any:
    if value in choices:
        return value
    need(value is not None, f"{path} is empty; choose one of: {', '.join(choices)}")
    near = difflib.get_close_matches(str(value), choices, 1, 0.5)
    hint = f"; did you mean {near[0]}?" if near else ""
    raise UserError(f"{path} is {value!r}; choose one of: {', '.join(choices)}{hint}")


def _scalar(value: Any, kind: type, path: str) -> Any:
    if kind is float and isinstance(value, str):
        with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-6 as text
            value = float(value)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        with contextlib.suppress(OverflowError):  # hundreds of digits: not a number that anything can use
            value = float(value)
    ok = isinstance(value, kind) and not (isinstance(value, bool) and kind is not bool)
    ok = ok and not (isinstance(value, float) and math.isnan(value))
    if not ok:
        names = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}
        found = "but it is empty" if value is None else f"not {value!r}"
        raise UserError(f"{path} must be {names[kind]}, {found}")
    return value
