"""Scenes say who is on screen when, and what happens: the exact annotation of a generated video.

A scene is a plain record that depends on (split, seed, index) alone. An actor has a colour and a shape that
no other actor of the video has. It comes on screen for one or more *spells*, and in a spell at most one event
happens. An actor that comes back does something else, or nothing, so that the event must be found and not
only the object. Every event begins and ends on the half-second grid.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from video_opd.world.queries import COLOURS, DIRECTIONS, SHAPES, noun, phrase, variants

GRID_S = 0.5
SIZES_PX = ((128, 128), (112, 160), (160, 112))  # (height, width)


@dataclass(frozen=True, kw_only=True)
class Style:
    """The ranges and chances from which the scenes of a split are drawn."""

    duration_s: tuple[float, float]
    actors: tuple[int, int]
    spells: tuple[int, int]  # times that an actor comes on screen
    families: tuple[str, ...]
    event_s: tuple[float, float]
    embedded: float  # chance that the actor is on screen, doing nothing, before and after an event
    contrast: float  # contrast of the background texture, from 0 to 1
    noise: float  # standard deviation of the noise, in 8-bit levels
    crowd: int = 2  # actors on screen at once, at most
    vfr: float = 0.0  # chance of a variable frame rate


_MOVES = tuple(f"moves {d}" for d in DIRECTIONS)
STYLES = {
    "short": Style(
        duration_s=(10, 14), actors=(2, 3), spells=(1, 2), families=("appears", *_MOVES, "blinks", "grows"),
        event_s=(1.0, 2.5), embedded=0.4, contrast=0.25, noise=4.0,
    ),
    "long": Style(
        duration_s=(18, 24), actors=(3, 4), spells=(1, 3),
        families=("appears", *_MOVES, "blinks", "grows", "recolours", "meets"),
        event_s=(1.5, 3.5), embedded=0.5, contrast=0.5, noise=7.0, crowd=3, vfr=0.3,
    ),
    "subtle": Style(
        duration_s=(13, 17), actors=(2, 3), spells=(1, 2),
        families=("blinks", "grows", "recolours", "meets", *_MOVES),
        event_s=(1.5, 2.5), embedded=0.9, contrast=0.4, noise=6.0, vfr=0.2,
    ),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Spell:
    """An actor is on screen from ``start_s`` to ``end_s``, and ``event_s`` is the span of its event."""

    start_s: float
    end_s: float
    family: str  # family of the event; "idle" if the actor is only there
    event_s: tuple[float, float]
    path: tuple[float, float, float, float]  # x0, y0 → x1, y1 in units of the frame
    other: int | None = None  # the actor that it meets
    colour: str | None = None  # the colour that it turns into


@dataclass(frozen=True, kw_only=True)
class Actor:
    colour: str
    shape: str
    radius: float  # radius in units of the shorter side
    spells: tuple[Spell, ...]


@dataclass(frozen=True, kw_only=True)
class Question:
    query: str
    span: tuple[float, float]
    family: str
    actor: int


@dataclass(frozen=True, kw_only=True)
class Scene:
    """One video's actors, queries and looks: all that the renderer and the annotations need."""

    split: str
    seed: int
    index: int
    duration_s: float
    fps: float
    variable_rate: bool
    size_px: tuple[int, int]
    actors: tuple[Actor, ...]
    questions: tuple[Question, ...]
    contrast: float
    noise: float

    @property
    def name(self) -> str:
        return f"{self.split}-{self.seed}-{self.index:05d}"


def scene_rng(split: str, seed: int, index: int, purpose: str) -> np.random.Generator:
    """A random generator that depends on its arguments alone, on every machine."""
    return np.random.Generator(np.random.PCG64([zlib.crc32(f"{split}/{purpose}".encode()), seed, index]))


def _grid(value: float) -> float:
    return round(value / GRID_S) * GRID_S


class _Stage:
    """Bookkeeping of who is on screen while a scene is composed."""

    def __init__(self, rng: np.random.Generator, style: Style, duration_s: float, actors: int) -> None:
        self.rng, self.style, self.duration_s = rng, style, duration_s
        self.busy: list[list[tuple[float, float]]] = [[] for _ in range(actors)]

    def free(self, actor: int, start: float, end: float) -> bool:
        """Whether ``actor`` is off screen from a second before to a second after, and few others are on."""
        own = all(end + 1.0 <= a or b + 1.0 <= start for a, b in self.busy[actor])
        others = sum(any(a < end and start < b for a, b in spans) for spans in self.busy)
        return own and others < self.style.crowd

    def book(self, family: str, actors: list[int]) -> tuple[float, float, tuple[float, float]] | None:
        """Finds and books a spell for ``actors``: (start, end, event span). None if there is no room."""
        style, rng = self.style, self.rng
        for _ in range(40):
            length = _grid(rng.uniform(*style.event_s))
            embedded = family in ("recolours", "meets") or (
                family != "appears" and rng.random() < style.embedded
            )
            before, after = (
                (_grid(rng.uniform(1.0, 2.0)), _grid(rng.uniform(1.0, 2.0))) if embedded else (0.0, 0.0)
            )
            last = self.duration_s - 1.0 - after - length
            if last <= before + 0.5:
                continue
            start = _grid(rng.uniform(before + 0.5, last))
            span = (start - before, start + length + after)
            if all(self.free(a, *span) for a in actors):
                for a in actors:
                    self.busy[a].append(span)
                return span[0], span[1], (start, start + length)
        return None


def _path(rng: np.random.Generator, family: str) -> tuple[float, float, float, float]:
    a, b = 0.16, 0.84
    x, y = rng.uniform(0.25, 0.75, size=2)
    path = {
        "moves left": (b, y, a, y),
        "moves right": (a, y, b, y),
        "moves up": (x, b, x, a),
        "moves down": (x, a, x, b),
    }.get(family, (x, y, x, y))
    return tuple(round(float(v), 4) for v in path)  # type: ignore[return-value]


def style_name(split: str, index: int) -> str:
    """The style of a scene: that of its split. The split "train" takes the three styles in turn."""
    return split if split in STYLES else ("short", "short", "long", "subtle")[index % 4]


def compose(split: str, seed: int, index: int) -> Scene:
    """Makes scene number ``index`` of a split.

    The split "train" mixes the styles of the three test splits. Raises ``KeyError`` for an unknown split.
    """
    rng = scene_rng(split, seed, index, "scene")
    style = STYLES[style_name(split, index)]
    if split not in STYLES and split != "train":
        raise KeyError(split)
    duration = _grid(rng.uniform(*style.duration_s))
    count = int(rng.integers(style.actors[0], style.actors[1] + 1))
    # Distractors share a colour or a shape with another actor; no two share both.
    looks: list[tuple[str, str]] = []
    while len(looks) < count:
        colour, shape = str(rng.choice(list(COLOURS))), str(rng.choice(SHAPES))
        if looks and rng.random() < 0.7:
            model = looks[int(rng.integers(len(looks)))]
            colour, shape = (model[0], shape) if rng.random() < 0.5 else (colour, model[1])
        if (colour, shape) not in looks:
            looks.append((colour, shape))
    stage = _Stage(rng, style, duration, count)
    spells: list[list[Spell]] = [[] for _ in range(count)]
    for actor in range(count):
        for _ in range(int(rng.integers(style.spells[0], style.spells[1] + 1))):
            _add_spell(rng, style, stage, looks, spells, actor)
    actors = tuple(
        Actor(
            colour=c,
            shape=s,
            radius=round(float(rng.uniform(0.15, 0.19)), 3),
            spells=tuple(sorted(sp, key=lambda x: x.start_s)),
        )
        for (c, s), sp in zip(looks, spells, strict=True)
    )
    return Scene(
        split=split, seed=seed, index=index, duration_s=duration,
        fps=float(rng.choice([8.0, 10.0, 12.0, 12.5])),
        variable_rate=bool(rng.random() < style.vfr),
        size_px=SIZES_PX[int(rng.integers(len(SIZES_PX)))],
        actors=actors, questions=_questions(rng, actors),
        contrast=round(float(style.contrast * rng.uniform(0.5, 1.0)), 3),
        noise=round(float(style.noise * rng.uniform(0.5, 1.0)), 3),
    )  # fmt: skip


def _add_spell(
    rng: np.random.Generator,
    style: Style,
    stage: _Stage,
    looks: list[tuple[str, str]],
    spells: list[list[Spell]],
    actor: int,
) -> None:
    done = {s.family for s in spells[actor]}
    left = [f for f in style.families if f not in done]
    family = str(rng.choice(left))
    other = None
    if family == "meets":
        candidates = [i for i in range(len(looks)) if i != actor]
        other = int(rng.choice(candidates))
    booked = stage.book(family, [actor] if other is None else [actor, other])
    if booked is None:
        return
    start, end, event = booked
    colour = None
    if family == "recolours":
        taken = {c for c, s in looks if s == looks[actor][1]}
        colour = str(rng.choice([c for c in COLOURS if c not in taken]))
    path = _path(rng, family)
    if other is not None:  # the actor that is met stands in the middle, and the other comes from a side
        side = 1.0 if rng.random() < 0.5 else -1.0
        y = round(float(rng.uniform(0.3, 0.7)), 4)
        path = (0.5 - 0.32 * side, y, 0.5 + 0.02 * side, y)
        spells[other].append(
            Spell(start_s=start, end_s=end, family="idle", event_s=event, path=(0.5 + 0.28 * side, y) * 2)
        )
    spells[actor].append(
        Spell(start_s=start, end_s=end, family=family, event_s=event, path=path, other=other, colour=colour)
    )


def _questions(rng: np.random.Generator, actors: tuple[Actor, ...]) -> tuple[Question, ...]:
    """One query for each event. Only an actor that comes once has a query for its appearance."""
    questions = []
    for i, actor in enumerate(actors):
        article = "the" if rng.random() < 0.7 else "a"
        name = noun(actor.colour, actor.shape, article=article)
        for spell in actor.spells:
            if spell.family == "idle" or (spell.family == "appears" and len(actor.spells) > 1):
                continue
            other = None
            if spell.other is not None:
                met = actors[spell.other]
                other = noun(met.colour, met.shape, article=article)
            words = phrase(
                spell.family,
                name,
                int(rng.integers(variants(spell.family))),
                other=other,
                colour=spell.colour,
            )
            questions.append(Question(query=words, span=spell.event_s, family=spell.family, actor=i))
            if len(actor.spells) == 1 and spell.family != "appears" and rng.random() < 0.35:
                words = phrase("appears", name, int(rng.integers(variants("appears"))))
                questions.append(
                    Question(query=words, span=(spell.start_s, spell.end_s), family="appears", actor=i)
                )
    return tuple(questions)


def reword(scene: Scene, question: Question, rng: np.random.Generator) -> str:
    """The query of a question in other words, which say what the scene shows, also if it is mirrored."""
    actor = scene.actors[question.actor]
    article = "the" if rng.random() < 0.7 else "a"
    spell = spell_of(scene, question)
    other = None
    if spell.other is not None:
        met = scene.actors[spell.other]
        other = noun(met.colour, met.shape, article=article)
    return phrase(
        question.family,
        noun(actor.colour, actor.shape, article=article),
        int(rng.integers(variants(question.family))),
        other=other,
        colour=spell.colour,
    )


def spell_of(scene: Scene, question: Question) -> Spell:
    """The spell in which a question's event happens."""
    spells = scene.actors[question.actor].spells
    return next((s for s in spells if s.family == question.family), spells[0])
