"""Reads a message's JSON and arrays, whose sender may have written anything: a value of the right kind, or
:class:`BadMessage`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


class BadMessage(ValueError):
    """A message that is not of this protocol. The text is one line for whoever sent it."""


def take_array(
    arrays: dict[str, np.ndarray], name: str, dtype: type, shape: Sequence[int | None]
) -> np.ndarray:
    """Takes an array out of ``arrays``; None in ``shape`` is any length."""
    found = arrays.pop(name, None)
    if found is None:
        raise BadMessage(f"the array {name!r} is missing")
    fits = found.ndim == len(shape) and all(n in (None, m) for n, m in zip(shape, found.shape, strict=True))
    if found.dtype != dtype or not fits:
        wanted = " × ".join("any" if n is None else str(n) for n in shape)
        raise BadMessage(
            f"{name!r} is {found.dtype} {list(found.shape)}, not {np.dtype(dtype)} of {wanted} numbers"
        )
    return found


def as_mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BadMessage(f"{what} is {value!r:.40}, not an object")
    return value


def _get(tree: Mapping[str, Any], name: str, kind: type | tuple[type, ...], said: str) -> Any:
    value = tree.get(name)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise BadMessage(f"{name} is {value!r:.40}, not {said}")
    return value


def object_of(tree: Mapping[str, Any], name: str) -> dict[str, Any]:
    return dict(_get(tree, name, dict, "an object"))


def list_of(tree: Mapping[str, Any], name: str) -> list[Any]:
    return list(_get(tree, name, list, "a list"))


def text_of(tree: Mapping[str, Any], name: str) -> str:
    return str(_get(tree, name, str, "a text"))


def switch_of(tree: Mapping[str, Any], name: str) -> bool:
    return bool(_get(tree, name, bool, "true or false"))


def whole_of(tree: Mapping[str, Any], name: str) -> int:
    value = int(_get(tree, name, int, "a whole number"))
    if not 0 <= value < 1 << 31:
        raise BadMessage(f"{name} is {value}; it must be from 0 to 2147483647")
    return value


def number_of(tree: Mapping[str, Any], name: str) -> float:
    value = _get(tree, name, (int, float), "a number")
    if not abs(value) < 1e12:  # no NaN either
        raise BadMessage(f"{name} is {value}; it must be an ordinary number")
    return float(value)
