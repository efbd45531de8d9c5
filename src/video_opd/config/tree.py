"""Nested mappings of plain values, as a recipe file holds them: read from YAML, overridden, flattened.

Nothing here knows a particular setting.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import yaml

from video_opd.errors import UserError, need

MAX_NODES, MAX_DEPTH = 10_000, 50  # limits on a YAML tree
MAX_LETTERS = 1 << 20  # of a YAML text
MAX_BITS = 4096  # bits of an integer; Python does not print much longer ones


def parse_yaml(text: str, where: str) -> Any:
    """The value that ``text`` spells. A :class:`UserError` names ``where`` and the line.

    A key that is written twice in one mapping is an error, because YAML would drop its first value. So is a
    tree of more than MAX_NODES values, aliases counted as often as they are used, or of more than MAX_DEPTH
    levels, and so is a text of more than MAX_LETTERS.
    """
    need(
        len(text) <= MAX_LETTERS,
        f"{where}: more than {MAX_LETTERS:,} letters, which no recipe has: name a recipe",
    )
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", None)
        at = "" if line is None else f" line {line + 1}"
        problem = getattr(error, "problem", None) or "cannot be read"
        raise UserError(f"{where}{at}: not valid YAML ({problem})") from error
    except UserError as error:
        raise UserError(f"{where} {error}") from None
    except (ValueError, RecursionError) as error:  # an impossible date, thousands of digits or of brackets
        raise UserError(f"{where}: holds a value that cannot be read ({error})") from error


# libyaml's, which PyYAML has almost everywhere, writes the same text in a quarter of the time.
_Dumper: Any = getattr(yaml, "CSafeDumper", yaml.SafeDumper)


NOT_FOLDED = 2**31 - 1  # letters: libyaml takes no larger width


def dump_yaml(tree: Any, width: int = 80) -> str:
    """``tree`` as YAML in the order of its keys. Texts of more than ``width`` letters may be folded."""
    text: str = yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=width)
    return text


class _Loader(yaml.SafeLoader):
    """Refuses repeated keys and trees that are too large, while the nodes are composed.

    The size is known before any value is made: aliases and merges (``<<: *a``) can make a few lines a tree
    without end.
    """

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._level = 0
        self._extents: dict[yaml.Node, tuple[int, int]] = {}  # values and levels, aliases written out

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        line = self.peek_event().start_mark.line + 1
        self._level += 1
        self._check_extent(1, self._level, line)
        node = super().compose_node(parent, index)
        self._level -= 1
        if node is None or node in self._extents:  # an alias
            return node
        children: list[yaml.Node] = []
        if isinstance(node, yaml.CollectionNode):
            if node.end_mark is None:  # an alias inside of what it stands for
                self._check_extent(MAX_NODES + 1, self._level, line)
            children = node.value
        if isinstance(node, yaml.MappingNode):
            _refuse_repeated_keys(self, node)
            children = [value for _, value in node.value]
        extents = [self._extents[child] for child in children]
        extent = (1 + sum(size for size, _ in extents), 1 + max((levels for _, levels in extents), default=0))
        self._check_extent(*extent, line)
        self._extents[node] = extent
        return node

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        value: int = super().construct_yaml_int(node)
        need(
            value.bit_length() <= MAX_BITS,
            f"line {node.start_mark.line + 1}: an integer of thousands of digits",
        )
        _refuse_old_number(node, value)
        return value

    def construct_yaml_float(self, node: yaml.ScalarNode) -> float:
        value: float = super().construct_yaml_float(node)
        _refuse_old_number(node, value)
        return value

    def _check_extent(self, values: int, levels: int, line: int) -> None:
        need(
            values <= MAX_NODES and levels <= MAX_DEPTH,
            f"line {line}: more than {MAX_NODES} values or {MAX_DEPTH} levels: take out aliases that "
            "multiply",
        )


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)
_Loader.add_constructor("tag:yaml.org,2002:float", _Loader.construct_yaml_float)


def _refuse_old_number(node: yaml.ScalarNode, value: float) -> None:
    """Refuses what YAML 1.1 reads in base 60 (1:30 is 90) or in base 8 (010 is 8)."""
    text = node.value.replace("_", "").lstrip("+-")
    octal = text.isdecimal() and text.startswith("0") and int(text) != abs(value)
    need(
        ":" not in text and not octal,
        f"line {node.start_mark.line + 1}: YAML 1.1 reads {node.value} as {value}; write the number that you "
        "mean in plain digits, or quotation marks around a text",
    )


def _refuse_repeated_keys(loader: _Loader, node: yaml.MappingNode) -> None:
    lines: dict[str, int] = {}
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode):
            continue  # no section has such a key
        plain = key.tag in ("tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")
        # As text: 1 and "1" name the same, and so do yes and true.
        name = key.value if plain else str(loader.construct_object(key))
        line = key.start_mark.line + 1
        need(
            name not in lines,
            f"line {line}: the key {name!r} was already given on line {lines.get(name)}: keep one of the two",
        )
        lines[name] = line


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
            if node.get(section) is None:  # an empty section of a file, "optim:"
                node[section] = {}
            node = node[section]
            need(isinstance(node, dict), f"--{name}: {section!r} is not a section")
        node[key] = parse_yaml(text, f"--{name}")
    return result


def override_words(settings: Mapping[str, Any]) -> list[str]:
    """``["--a.b", "value", …]`` with which :func:`apply_overrides` sets these very values.

    A text stays the text that it is, also where YAML would read 2024 or a comment in it, and a path is a
    text. Raises :class:`UserError` for a value that no recipe can hold.
    """
    return [word for key, value in settings.items() for word in (f"--{key}", _as_yaml(key, value))]


def _as_yaml(key: str, value: Any) -> str:
    try:
        text: str = yaml.dump(
            _plain(value), Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=NOT_FOLDED
        )
    except yaml.representer.RepresenterError:
        raise UserError(
            f"{key}: a recipe holds numbers, texts, and lists of them, not a {type(value).__name__}"
        ) from None
    return text.removesuffix("\n").removesuffix("\n...")  # which ends a document that is a bare value


def _plain(value: Any) -> Any:
    """``value`` of the types that YAML has: numpy's float64 is a float, for example."""
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, PurePath):
        return str(value)
    kinds = (bool, int, float, str)  # a bool is an int
    return next((kind(value) for kind in kinds if isinstance(value, kind)), value)


def _copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    return {key: _copy(value) if isinstance(value, Mapping) else value for key, value in tree.items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """``("optim.lr", 1e-6)``, … in the order of the tree."""
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
