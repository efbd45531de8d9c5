"""Values as containers store them: a table's cells are text, and other containers hold numbers as text, too.

A number is one with a decimal point, as JSON writes it ("12.5"; "12,5" may be two numbers, and is none).
"""

from __future__ import annotations

import ast
import json
import math
import re
import warnings
from collections.abc import Mapping
from datetime import timedelta
from decimal import Decimal
from numbers import Real
from typing import Any

from video_opd.answer_numbers import clock_time_s
from video_opd.jsonl import no_key_twice

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?")
_ABSENT = ("", "nan", "none", "null")
_MOST_LITERAL = 1 << 20  # characters of a cell that is tried as a Python literal


def is_absent(value: Any) -> bool:
    """Whether a field holds nothing: null, an empty cell, or NaN, a table's sign for a missing number."""
    if isinstance(value, str):
        return value.strip().lower() in _ABSENT
    return value is None or (isinstance(value, float) and math.isnan(value))


def number(value: Any) -> float | None:
    """A finite number, also written as text; None for anything else."""
    if isinstance(value, str):
        value = value.strip()
        if not _NUMBER.fullmatch(value):
            return None
    elif isinstance(value, bool) or not isinstance(value, Real | Decimal):
        return None
    try:
        result = float(value)
    except (OverflowError, ValueError):  # an integer of hundreds of digits; a signalling NaN
        return None
    return result if math.isfinite(result) else None


def seconds(value: Any) -> float | None:
    """A time: a number of seconds, or a clock time as text ("0:12", "00:01:02.5"); None for anything else."""
    if isinstance(value, timedelta):
        return value.total_seconds()
    found = number(value)
    return clock_time_s(value.strip()) if found is None and isinstance(value, str) else found


def structure(value: Any) -> Any:
    """A list or an object that a cell holds as text, as JSON or as Python prints it; else ``value``."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{", "(")):
        return value
    try:
        found = json.loads(value, object_pairs_hook=no_key_twice)
    except (ValueError, RecursionError):
        found = _literal(value)
    return found if isinstance(found, list | tuple | dict) else value


def _literal(text: str) -> Any:
    if len(text) > _MOST_LITERAL:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an odd escape in a text is no error
            return ast.literal_eval(text.strip())
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        return None


def as_json(value: Any) -> Any:
    """``value`` in the types of JSON: Parquet and pickles hold decimals, dates and bytes, too."""
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(key): as_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [as_json(item) for item in value]
    found = seconds(value)
    return str(value) if found is None else found


def shown(value: Any) -> str:
    """``value`` as text for people, cut if it is long."""
    plain = (str, int, float, type(None))
    if isinstance(value, list | tuple):
        value = [item if isinstance(item, plain) else type(item).__name__ for item in value[:3]]
    elif not isinstance(value, plain):
        return f"a {type(value).__name__}"
    try:
        text = repr(value)
    except ValueError:  # an integer too long to be written
        return "a number of too many digits"
    return text if len(text) <= 60 else f"{text[:57]}…"
