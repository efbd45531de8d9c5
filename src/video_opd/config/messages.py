"""One line from pydantic's ``ValidationError``: what is wrong first, what is right, what else is wrong."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, TypeAlias

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

# The names that other trainers give our keys.
SYNONYMS = {
    "learning_rate": "optim.lr",
    "num_generations": "sampling.rollouts",
    "max_completion_length": "sampling.max_new_tokens",
    "output_dir": "run.dir",
    "gradient_accumulation_steps": "optim.micro_batch_size",
    "num_iterations": "optim.updates_per_batch",
    "beta": "loss.kl_beta",
    "epsilon": "loss.clip_low",
    "epsilon_high": "loss.clip_high",
    "lora_r": "lora.rank",
    "lora_alpha": "lora.alpha",
}

Model: TypeAlias = type[BaseModel]
UNKNOWN = ("extra_forbidden", "invalid_key")  # a key that is a number is no known one either
KINDS = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "string_type": "text",
    "bool_type": "true or false",
}
BOUNDS = {
    "greater_than": ("above", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("below", "lt"),
    "less_than_equal": ("at most", "le"),
}


def one_line(error: ValidationError, root: Model | Mapping[str, Model]) -> str:
    """The first mistake in ``error``, and the keys of the others.

    Unknown keys hide all other mistakes, because they may explain them. ``root`` is the class that was read,
    or the classes of a union by their tags.
    """
    errors = error.errors(include_url=False)
    errors = [item for item in errors if item["type"] in UNKNOWN] or errors
    first, *others = errors
    if not isinstance(root, Mapping):
        return _explain(first, first["loc"], root, [root]) + _also(others, first["loc"], 0)
    if first["type"].startswith("union_tag"):
        name = str(first["ctx"]["discriminator"]).strip("'")
        return f"{name} {_choose(first['input'].get(name), list(root))}"
    tag, *location = first["loc"]
    return _explain(first, location, root[str(tag)], list(root.values())) + _also(others, first["loc"], 1)


def _also(others: Sequence[ErrorDetails], first: Sequence[str | int], skip: int) -> str:
    """Names the keys of further mistakes; the first ``skip`` words of a location are no key."""
    paths = dict.fromkeys(_path(item["loc"][skip:]) for item in others if item["loc"] != tuple(first))
    return f" (also wrong: {', '.join(filter(None, paths))})" if any(paths) else ""


def leaves(*roots: Model) -> dict[str, FieldInfo]:
    """``{"optim.lr": field, …}``: every key of the classes that is no section. The first class counts."""
    found: dict[str, FieldInfo] = {}
    for root in roots:
        for path, field in _leaves(root, ""):
            found.setdefault(path, field)
    return found


def _leaves(model: Model, prefix: str) -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if (section := section_of(field)) is not None:
            yield from _leaves(section, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


def section_of(field: FieldInfo) -> Model | None:
    """The settings class of a field that is a section; None for a value."""
    kind = field.annotation
    return kind if isinstance(kind, type) and issubclass(kind, BaseModel) else None


def _explain(error: ErrorDetails, location: Sequence[str | int], model: Model, roots: Sequence[Model]) -> str:
    path, value, kind, facts = _path(location), error["input"], error["type"], error.get("ctx", {})
    _, field = _walk(model, location)
    if kind in UNKNOWN:
        section, _ = _walk(model, location[:-1])
        assert section is not None
        return unknown_key(_path([*location[:-1], str(location[-1])]), section, roots)
    if kind == "missing":
        if isinstance(location[-1], int):  # a list of a fixed length
            length, given = len(typing.get_args(field.annotation)), len(value)  # type: ignore[union-attr]
            return f"{_path(location[:-1])} needs {length} values, not {given}"
        return f"{path} is missing: add it to the recipe or give --{path} VALUE"
    if kind == "value_error":  # a validator of ours; it names the field
        return f"{path}.{facts['error']}" if path else str(facts["error"])
    if kind in KINDS:
        return f"{path} must be {KINDS[kind]}, " + ("but it is empty" if value is None else f"not {value!r}")
    if kind in BOUNDS:
        relation, bound = BOUNDS[kind]
        number = facts[bound] if isinstance(facts[bound], int) else f"{facts[bound]:g}"
        return f"{path} must be {relation} {number}, not {value!r}{_described(field)}"
    if kind == "string_too_short":
        return f"{path} is empty{_described(field)}"
    if kind == "literal_error":
        return f"{path} {_choose(value, _choices(field))}"
    if kind == "tuple_type" and isinstance(value, str):
        listed = ", ".join(item.strip() for item in value.split(","))
        return f'{path} is a list: write "[{listed}]", not {value!r}'
    if kind == "too_long":
        return f"{path} needs {facts['max_length']} values, not {facts['actual_length']}"
    if value is None and kind in ("tuple_type", "dict_type"):
        return f"{path} is empty; for none, write {'[]' if kind == 'tuple_type' else '{}'}"
    if kind in ("model_type", "dict_type"):
        return f"{path} must be a section of keys, not {value!r}"
    return f"{path}: {error['msg']}"


def unknown_key(path: str, section: Model, roots: Sequence[Model]) -> str:
    """Names the nearest key: the same word in another section, else a sibling by spelling, else any."""
    everywhere = list(leaves(*roots))
    prefix, dot, word = path.rpartition(".")
    siblings = {name: f"{prefix}{dot}{name}" for name in section.model_fields}
    near = [known for known in everywhere if known.rpartition(".")[2] == word][:1]
    near = near or [SYNONYMS[word] for _ in range(SYNONYMS.get(word) in everywhere)]
    near = near or [siblings[hit] for hit in difflib.get_close_matches(word, siblings, 1, 0.6)]
    near = near or difflib.get_close_matches(path, everywhere, 1, 0.7)
    hint = f"did you mean {near[0]}?" if near else "known here: " + ", ".join(siblings.values())
    return f"{path} is not a known key; {hint}"


def _choose(value: Any, choices: Sequence[str]) -> str:
    if value is None:
        return f"is empty; choose one of: {', '.join(choices)}"
    near = difflib.get_close_matches(str(value), choices, 1, 0.5)
    return f"is {value!r}; choose one of: {', '.join(choices)}" + (
        f"; did you mean {near[0]}?" if near else ""
    )


def _choices(field: FieldInfo | None) -> list[str]:
    """The values of the ``Literal`` in a field's type, be it alone, optional or the items of a list."""
    kinds, found = [field.annotation if field else None], list[str]()
    while kinds:
        kind = kinds.pop()
        if typing.get_origin(kind) is Literal:
            found += typing.get_args(kind)
        elif typing.get_origin(kind) in (tuple, types.UnionType, typing.Union):
            kinds += typing.get_args(kind)
    return found


def _described(field: FieldInfo | None) -> str:
    return f" ({field.description})" if field and field.description else ""


def _path(location: Sequence[str | int]) -> str:
    """``("optim", "betas", 1)`` → ``"optim.betas[1]"``."""
    words = [f"[{word}]" if isinstance(word, int) else f".{word}" for word in location]
    return "".join(words).removeprefix(".")


def _walk(root: Model, location: Sequence[str | int]) -> tuple[Model | None, FieldInfo | None]:
    """(the settings class at ``location``, or None for a value; the last field on the way there)."""
    model: Model | None = root
    field: FieldInfo | None = None
    for word in location:
        if isinstance(word, int):  # an item of a list: the list's field is its own
            continue
        if model is None or word not in model.model_fields:
            break
        field = model.model_fields[word]
        model = section_of(field) or _item_section(field)
    return model, field


def _item_section(field: FieldInfo) -> Model | None:
    """The settings class of the items of a list, if they are sections."""
    kinds = typing.get_args(field.annotation)
    return kinds[0] if kinds and isinstance(kinds[0], type) and issubclass(kinds[0], BaseModel) else None
