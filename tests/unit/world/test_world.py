"""The world: exact labels, determinism, resumability, and no shortcut that ignores the video."""

from __future__ import annotations

import json
from dataclasses import replace

import av
import numpy as np
import pytest

from video_opd.errors import UserError
from video_opd.world import DEFAULT_VIDEOS
from video_opd.world.make import SPLITS, TEST_SPLITS, frame_times, make_world, rows, write_video
from video_opd.world.queries import FAMILIES
from video_opd.world.render import Renderer
from video_opd.world.scene import Scene, compose


def scenes(split: str, count: int, seed: int = 0) -> list[Scene]:
    return [compose(split, seed, i) for i in range(count)]


def test_scene_is_a_function_of_its_arguments():
    assert compose("long", 3, 5) == compose("long", 3, 5)
    assert compose("long", 3, 5) != compose("long", 4, 5)
    assert compose("train", 0, 0).actors != compose("short", 0, 0).actors


def test_unknown_split():
    with pytest.raises(KeyError):
        compose("shrot", 0, 0)
    with pytest.raises(UserError, match="shrot"):
        make_world("/nonexistent", videos={"shrot": 1})


@pytest.mark.parametrize("split", TEST_SPLITS)
def test_spans_lie_inside_and_on_the_grid(split):
    for scene in scenes(split, 60):
        for q in scene.questions:
            s, e = q.span
            assert 0 < s < e < scene.duration_s
            assert s % 0.5 == 0 and e % 0.5 == 0
            assert q.family in FAMILIES


def test_looks_are_unique_and_distractors_share_colour_or_shape():
    shared = 0
    for scene in scenes("long", 60):
        looks = [(a.colour, a.shape) for a in scene.actors]
        assert len(set(looks)) == len(looks)
        shared += any(a != b and (a[0] == b[0] or a[1] == b[1]) for a in looks for b in looks)
    assert shared > 30


def test_some_actors_come_back_and_the_event_decides():
    """Two questions about one actor with different spans: the object alone does not answer them."""
    ambiguous = 0
    for scene in scenes("long", 60):
        for i in range(len(scene.actors)):
            spans = {q.span for q in scene.questions if q.actor == i and q.family != "appears"}
            ambiguous += len(spans) > 1
    assert ambiguous > 30


def test_no_two_questions_of_a_video_ask_the_same_thing_with_other_answers():
    for split in TEST_SPLITS:
        for scene in scenes(split, 60):
            asked: dict[tuple[int, str], tuple[float, float]] = {}
            for q in scene.questions:
                key = (q.actor, q.family)
                assert asked.setdefault(key, q.span) == q.span


@pytest.mark.parametrize("split", TEST_SPLITS)
def test_best_constant_answer_stays_below_a_quarter(split):
    """Brute force over constant predictions relative to the duration, with its own arithmetic."""
    truth = np.array(
        [(q.span[0] / s.duration_s, q.span[1] / s.duration_s) for s in scenes(split, 60) for q in s.questions]
    )
    best = 0.0
    for a in np.arange(0, 1, 0.04):
        for b in np.arange(a + 0.04, 1.001, 0.04):
            inter = np.clip(np.minimum(b, truth[:, 1]) - np.maximum(a, truth[:, 0]), 0, None)
            union = np.maximum(b, truth[:, 1]) - np.minimum(a, truth[:, 0])
            best = max(best, float(np.where(inter > 0, inter / union, 0).mean()))
    assert best < 0.25


def find(split: str, family: str, bare: bool) -> tuple[Scene, int]:
    """A scene and actor whose only spell is of this family, reduced to that actor, without noise."""
    for scene in scenes(split, 300):
        for i, actor in enumerate(scene.actors):
            if len(actor.spells) == 1 and actor.spells[0].family == family:
                spell = actor.spells[0]
                if bare == (spell.event_s == (spell.start_s, spell.end_s)):
                    alone = replace(scene, actors=(actor,), noise=0.0, contrast=0.0)
                    return alone, i
    raise AssertionError("no such scene")


@pytest.mark.parametrize(
    ("split", "family", "bare"),
    [
        ("short", "appears", True),
        ("short", "moves left", True),
        ("subtle", "recolours", False),
        ("subtle", "grows", False),
        ("short", "blinks", True),
    ],
)
def test_pixels_change_exactly_at_the_labelled_times(split, family, bare):
    scene, index = find(split, family, bare)
    spell = scene.actors[0].spells[0]
    q = next(
        q
        for q in compose(scene.split, scene.seed, scene.index).questions
        if q.actor == index and q.family == family
    )
    assert q.span == spell.event_s
    renderer = Renderer(scene)
    idle = renderer.frame(spell.start_s + 1e-3) if not bare else renderer.frame(0.0)

    def differs(t: float) -> bool:
        return bool(np.abs(renderer.frame(t).astype(int) - idle).max() > 40)

    assert not differs(q.span[0] - 1e-3)
    assert differs(q.span[0] + (1e-3 if family != "grows" else 0.6))
    if family != "blinks":
        assert differs(q.span[1] - 1e-3)
    assert not differs(q.span[1] + 1e-3)


def test_frame_times_start_at_zero_and_increase():
    scene = compose("long", 0, 0)
    for variable in (False, True):
        times = frame_times(replace(scene, variable_rate=variable))
        assert times[0] == 0 and (np.diff(times) > 0).all()
        assert abs(times[-1] + 1 / scene.fps - scene.duration_s) < 1 / scene.fps
    gaps = np.diff(frame_times(replace(scene, variable_rate=True)))
    assert gaps.std() > 0.1 * gaps.mean()


def test_file_is_h264_with_the_scenes_times_and_the_same_bytes_again(tmp_path):
    scene = replace(compose("long", 0, 2), duration_s=3.0, variable_rate=True)
    a, b = tmp_path / "a.mp4", tmp_path / "b.mp4"
    write_video(scene, a)
    write_video(scene, b)
    assert a.read_bytes() == b.read_bytes()
    with av.open(str(a)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264"
        times = [float(f.time or 0.0) for f in container.decode(stream)]
    np.testing.assert_allclose(times, frame_times(scene), atol=1e-6)


def test_make_world_resumes_and_grows(tmp_path, monkeypatch):
    first = make_world(tmp_path, videos={"short": 2}, workers=1)["short"]
    kept = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "videos").iterdir()}
    make_world(tmp_path, videos={"short": 3}, workers=1)
    now = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "videos").iterdir()}
    assert len(now) == 3 and all(now[name] == stamp for name, stamp in kept.items())
    written = [json.loads(line) for line in first.read_text().splitlines()]
    assert written == [row for s in scenes("short", 3) for row in rows(s)]


def test_every_split_has_a_default_count() -> None:
    assert tuple(DEFAULT_VIDEOS) == SPLITS
