"""General questions have the one answer that the scene shows, and no prior finds it."""

from __future__ import annotations

from collections import Counter

import pytest

from video_opd.world.queries import COLOURS
from video_opd.world.questions import ABILITIES, general_questions, is_right, question_rows
from video_opd.world.scene import STYLES, Scene, compose

SCENES = [compose(split, 0, i) for split in STYLES for i in range(100)]


def answers(ability: str) -> list[tuple[Scene, str, str]]:
    return [(s, q.query, q.answer) for s in SCENES for q in general_questions(s) if q.ability == ability]


def test_every_scene_has_questions_that_depend_on_it_alone() -> None:
    for scene in SCENES:
        found = [q.ability for q in general_questions(scene)]
        assert {"count", "yes-no"} <= set(found) <= set(ABILITIES) and len(found) == len(set(found))
        assert general_questions(scene) == general_questions(scene)
    for ability in ABILITIES:
        assert len(answers(ability)) > 0.85 * len(SCENES), ability


def test_a_colour_is_asked_of_the_only_object_that_fits() -> None:
    for scene, query, answer in answers("colour"):
        shape = query.split()[4]
        assert query.startswith(f"What colour is the {shape} that ") and query.endswith("?")
        families = {q.family for a, q in events(scene) if a.shape == shape and says(query, q.family)}
        fitting = {a.colour for a, q in events(scene) if a.shape == shape and q.family in families}
        assert fitting == {answer}
        if families == {"appears"}:  # every object on screen does
            assert [a.shape for a in scene.actors if a.spells].count(shape) == 1


def events(scene: Scene):
    return [(scene.actors[q.actor], q) for q in scene.questions]


def says(query: str, family: str) -> bool:
    """Whether a query is about a family of events."""
    words = {
        "appears": ("appears", "visible"),
        "moves left": ("left",),
        "moves right": ("right",),
        "moves up": ("moves up", "rises"),
        "moves down": ("moves down", "falls"),
        "blinks": ("blinks", "flashes"),
        "grows": ("grows", "bigger"),
    }
    return any(word in query for word in words.get(family, ()))


def test_the_first_event_begins_a_second_before_the_other() -> None:
    for scene, query, answer in answers("order"):
        head, a, b = query.replace(". B: ", "|").replace("? A: ", "|").removesuffix(".").split("|")
        assert head == "What comes first"
        starts = {}
        for letter, words in (("A", a), ("B", b)):
            starts[letter] = {
                q.span[0] for actor, q in events(scene) if actor.colour in words and actor.shape in words
            }
        assert min(starts[answer]) < max(starts["AB".replace(answer, "")])


def test_counts_and_presence() -> None:
    for scene, _, answer in answers("count"):
        assert int(answer) == sum(bool(actor.spells) for actor in scene.actors)
    for scene, query, answer in answers("yes-no"):
        *_, colour, shape, _, _, _ = query.split()
        there = any((a.colour, a.shape) == (colour, shape) for a in scene.actors if a.spells)
        assert answer == ("yes" if there else "no")


@pytest.mark.parametrize(("ability", "chance"), [("colour", 0.25), ("order", 0.6), ("yes-no", 0.6)])
def test_the_commonest_answer_is_little_better_than_chance(ability: str, chance: float) -> None:
    found = Counter(answer for _, _, answer in answers(ability))
    assert max(found.values()) < chance * sum(found.values())
    assert ability != "colour" or set(found) == set(COLOURS)


def test_rows_and_what_is_right() -> None:
    scene = SCENES[0]
    rows = question_rows(scene)
    assert len({row["id"] for row in rows}) == len(rows)
    assert rows[0]["video"] == f"videos/{scene.name}.mp4" and "spans" not in rows[0]
    assert [row["answer"] for row in rows] == [q.answer for q in general_questions(scene)]
    assert is_right(" Red.\n", "red") and not is_right("red circle", "red") and not is_right("", "red")
