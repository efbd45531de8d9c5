"""The reward that all frameworks use. Its values do not matter; they only differ within a group."""

from __future__ import annotations

from typing import Any


def of_text(text: str) -> float:
    """Returns a number in [0, 1): a fixed, arbitrary function of the response."""
    return sum((i + 1) * ord(letter) for i, letter in enumerate(text)) % 97 / 97


def of_sample(sample: Any, text: str) -> float:
    """The reward as ``video-opd`` calls it."""
    return of_text(text)


def of_completions(completions: list[Any], **_: Any) -> list[float]:
    """The reward as TRL and ms-swift call it: texts, or conversations that end with the response."""
    return [of_text(c if isinstance(c, str) else c[-1]["content"]) for c in completions]
