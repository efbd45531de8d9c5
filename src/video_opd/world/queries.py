"""Words for the world's events."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

COLOURS = {
    "red": (214, 40, 40),
    "green": (36, 160, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 210, 30),
    "purple": (160, 50, 190),
    "white": (245, 245, 245),
}
SHAPES = ("circle", "square", "triangle", "cross", "ring")
DIRECTIONS = ("left", "right", "up", "down")
FAMILIES = (
    "appears",
    "moves left",
    "moves right",
    "moves up",
    "moves down",
    "blinks",
    "grows",
    "recolours",
    "meets",
)

_TEMPLATES: dict[str, tuple[str, ...]] = {
    "appears": (
        "{a} appears", "{a} is visible", "{a} shows up", "{a} can be seen", "there is {a} in the scene",
        "{a} stays in view",
    ),
    "moves left": (
        "{a} moves left", "{a} moves to the left", "{a} slides left", "{a} travels to the left side",
    ),
    "moves right": (
        "{a} moves right", "{a} moves to the right", "{a} slides right", "{a} travels to the right side",
    ),
    "moves up": ("{a} moves up", "{a} rises", "{a} goes upwards", "{a} climbs to the top"),
    "moves down": ("{a} moves down", "{a} falls", "{a} goes downwards", "{a} drops to the bottom"),
    "blinks": ("{a} blinks", "{a} flashes", "{a} flickers on and off", "{a} is blinking"),
    "grows": ("{a} grows", "{a} gets bigger", "{a} becomes larger", "{a} is growing"),
    "recolours": (
        "{a} turns {c}", "{a} changes colour to {c}", "{a} becomes {c}", "the colour of {a} changes to {c}",
    ),
    "meets": ("{a} touches {b}", "{a} meets {b}", "{a} and {b} touch", "{a} comes next to {b}"),
}  # fmt: skip


def phrase(
    family: str, actor: str, variant: int, *, other: str | None = None, colour: str | None = None
) -> str:
    """A query for an event. ``actor`` and ``other`` are noun phrases such as "the red circle"."""
    templates = _TEMPLATES[family]
    return templates[variant % len(templates)].format(a=actor, b=other, c=colour)


def variants(family: str) -> int:
    return len(_TEMPLATES[family])


def noun(colour: str, shape: str, size: str | None = None, article: str = "the") -> str:
    return " ".join(word for word in (article, size, colour, shape) if word)


@functools.cache
def corpus() -> tuple[str, ...]:
    """Every kind of sentence with every word, always in the same order: what the tokenizer learns from."""
    return tuple(_sentences())


def _sentences() -> Iterator[str]:
    for family, colour, shape in itertools.product(FAMILIES, COLOURS, SHAPES):
        for variant in range(variants(family)):
            for article, size in (("the", None), ("a", None), ("the", "small"), ("the", "large")):
                name = noun(colour, shape, size, article)
                yield " " + phrase(family, name, variant, other=name, colour=colour)
                yield phrase(family, name, variant, other=name, colour=colour)
    for _ in range(200):
        yield "<0.2 seconds>"
        yield "12.54 to 17.83"
        yield "system\n"
        yield "user\n"
        yield "assistant\n"
