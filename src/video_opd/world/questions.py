"""Questions about a generated video that do not ask when: the other abilities of the tiny models (figure 4).

Post-training for grounding should not cost what a model could do before. So there are four kinds of
questions whose answers follow from the scene, each with a short answer and a known level of chance:

===========  ==================================================  =====================  ==========
ability      question                                            answer                 chance
===========  ==================================================  =====================  ==========
``colour``   What colour is the circle that moves left?          one of six colours     17%
``count``    How many objects are in the video?                  1 to 4                 about 48%
``order``    What comes first? A: the red circle moves left.     A or B                 50%
             B: the blue ring blinks.
``yes-no``   Is there a red circle in the video?                 yes or no              50%
===========  ==================================================  =====================  ==========
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from video_opd.types import Prediction, Sample
from video_opd.world.queries import COLOURS, SHAPES, noun, phrase
from video_opd.world.scene import Scene, reword, scene_rng

ABILITIES = ("colour", "count", "order", "yes-no")
ASKED_BY_LOOK = ("appears", "moves left", "moves right", "moves up", "moves down", "blinks", "grows")
"""The families of events that show the object in its own colour, and nobody else."""


@dataclass(frozen=True, kw_only=True)
class GeneralQuestion:
    """A question about a whole video with its only right answer."""

    ability: str  # one of ABILITIES
    query: str
    answer: str


def general_questions(scene: Scene, rng: np.random.Generator | None = None) -> list[GeneralQuestion]:
    """One question for each ability that the scene allows, in random words and order.

    They depend on the scene alone if ``rng`` is None. Every scene with two queries about different objects
    allows all four but ``colour``, which needs an event that tells one object from the others of its shape.
    """
    rng = scene_rng(scene.split, scene.seed, scene.index, "questions") if rng is None else rng
    return [*_colour(scene, rng), *_count(scene), *_order(scene, rng), *_yes_no(scene, rng)]


def is_right(response: str, answer: str) -> bool:
    """Whether a response is the answer: the same word, but for case, white space and a full stop."""
    return response.strip().rstrip(".").casefold() == answer.casefold()


def right_answers(questions: Sequence[Sample], predictions: Mapping[str, Prediction]) -> list[bool]:
    """Whether each question's first response is right. One without a response is wrong."""
    found = []
    for question in questions:
        prediction = predictions.get(question.id)
        responses = prediction.responses if prediction else ()
        found.append(bool(responses) and is_right(responses[0], question.row["answer"]))
    return found


def question_rows(scene: Scene, folder: str = "videos") -> list[dict]:
    """Data rows of a scene's questions: ``source`` is the ability, and ``answer`` the right answer."""
    return [
        {
            "id": f"{scene.name}-{question.ability}",
            "video": f"{folder}/{scene.name}.mp4",
            "query": question.query,
            "answer": question.answer,
            "duration": scene.duration_s,
            "source": question.ability,
        }
        for question in general_questions(scene)
    ]


def _colour(scene: Scene, rng: np.random.Generator) -> Iterator[GeneralQuestion]:
    """An event that only one object of its shape has names the object without its colour."""
    asked = [q for q in scene.questions if q.family in ASKED_BY_LOOK]
    events = [(scene.actors[q.actor].shape, q.family) for q in scene.questions]
    clear = [q for q in asked if events.count((scene.actors[q.actor].shape, q.family)) == 1]
    alone = [q for q in clear if q.family != "appears" or _only_one(scene, q.actor)]
    if alone:
        q = alone[int(rng.integers(len(alone)))]
        actor = scene.actors[q.actor]
        words = phrase(q.family, "that", int(rng.integers(2)))
        yield GeneralQuestion(
            ability="colour", query=f"What colour is the {actor.shape} {words}?", answer=actor.colour
        )


def _only_one(scene: Scene, actor: int) -> bool:
    return [a.shape for a in scene.actors if a.spells].count(scene.actors[actor].shape) == 1


def _count(scene: Scene) -> Iterator[GeneralQuestion]:
    seen = sum(bool(actor.spells) for actor in scene.actors)
    yield GeneralQuestion(ability="count", query="How many objects are in the video?", answer=str(seen))


def _order(scene: Scene, rng: np.random.Generator) -> Iterator[GeneralQuestion]:
    """Two events of different objects, of which the first begins a second or more before the other."""
    pairs = [
        (a, b)
        for a, b in itertools.permutations(scene.questions, 2)
        if a.actor != b.actor and b.span[0] - a.span[0] >= 1.0
    ]
    if pairs:
        first, second = pairs[int(rng.integers(len(pairs)))]
        answer = "AB"[int(rng.integers(2))]
        a, b = (reword(scene, q, rng) for q in ((first, second) if answer == "A" else (second, first)))
        yield GeneralQuestion(ability="order", query=f"What comes first? A: {a}. B: {b}.", answer=answer)


def _yes_no(scene: Scene, rng: np.random.Generator) -> Iterator[GeneralQuestion]:
    """Half of the objects asked for are there. The others share a colour or a shape with one that is."""
    there = [(a.colour, a.shape) for a in scene.actors if a.spells]
    absent = [
        look
        for look in itertools.product(COLOURS, SHAPES)
        if look not in [(a.colour, a.shape) for a in scene.actors]
        and any(look[0] == colour or look[1] == shape for colour, shape in there)
    ]
    yes = bool(rng.integers(2))
    looks = there if yes else absent
    colour, shape = looks[int(rng.integers(len(looks)))]
    name = noun(colour, shape, article="a")
    yield GeneralQuestion(
        ability="yes-no", query=f"Is there {name} in the video?", answer="yes" if yes else "no"
    )
