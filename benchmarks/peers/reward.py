"""The same reward everywhere. What it rewards does not matter here, but that answers of a group differ."""

from __future__ import annotations

from typing import Any


def of_text(text: str) -> float:
    """In [0, 1): a fixed, arbitrary function of the answer."""
    return sum((i + 1) * ord(letter) for i, letter in enumerate(text)) % 97 / 97


def of_sample(sample: Any, text: str) -> float:
    """As ``video-opd`` calls a reward."""
    return of_text(text)


def of_completions(completions: list[Any], **_: Any) -> list[float]:
    """As TRL and ms-swift call one: texts, or conversations whose last message is the answer."""
    return [of_text(c if isinstance(c, str) else c[-1]["content"]) for c in completions]
