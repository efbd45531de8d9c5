"""Nested mappings of plain values, as a recipe file holds them: read from YAML, overridden, flattened.

Nothing here knows a particular setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import yaml

from video_opd.errors import UserError, need

MAX_NODES, MAX_DEPTH = 10_000, 50  # limits on a YAML tree


def parse_yaml(text: str, where: str) -> Any:
    """The value that ``text`` spells. A :class:`UserError` names ``where`` and the line."""
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
    """Refuses a tree that is too deep or too large: aliases can make a few lines a tree without end."""
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


def apply_overrides(tree: Mapping[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A copy of ``tree`` with the ``--a.b value`` (or ``--a.b=value``) pairs set. Values are YAML."""
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


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``("optim.lr", 1e-6)``, … in the order of the tree."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
