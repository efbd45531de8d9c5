"""Examples for pretraining: rendered scenes, windows of them, and dense labels."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from video_opd.pools import worker_map
from video_opd.world.queries import COLOURS, FAMILIES, SHAPES
from video_opd.world.render import Renderer
from video_opd.world.scene import GRID_S, Scene, Spell, compose, style_name

LOOKS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
OBJECTS, STATES = 2 * len(LOOKS), len(LOOKS) * len(FAMILIES)


@dataclass(frozen=True, kw_only=True)
class Example:
    """A rendered scene: the frames that its decoded file would give, and their times.

    ``frames`` is uint8 [T, H, W, 3].
    """

    scene: Scene
    frames: np.ndarray
    times_s: np.ndarray
    shift: tuple[float, float] = (0.0, 0.0)  # how far the picture was rolled, in units of the frame (y, x)


_MIRRORED = {"moves left": "moves right", "moves right": "moves left"}
_NOISE = np.random.default_rng(0).normal(0, 1, size=1 << 22).astype(np.float32)


def augment(example: Example, rng: np.random.Generator) -> Example:
    """Changes the picture and keeps the events: mirrors every second one, rolls it, and changes its light."""
    scene, frames = example.scene, example.frames
    if rng.random() < 0.5:
        scene, frames = mirror(scene), frames[:, :, ::-1]
    h, w = frames.shape[1:3]
    dy, dx = int(rng.integers(-6, 7)), int(rng.integers(-6, 7))
    lit = np.roll(frames, (dy, dx), (1, 2)).astype(np.float32)
    lit = lit * rng.uniform(0.85, 1.15, size=3).astype(np.float32) + np.float32(rng.uniform(-12, 12))
    start = int(rng.integers(len(_NOISE) - lit.shape[1] * lit.shape[2] * 3))
    for i in range(len(lit)):  # every frame takes its noise from elsewhere in the bank
        at = (start + i * 99991) % (len(_NOISE) - h * w * 3)
        lit[i] += np.float32(rng.uniform(0, 4)) * _NOISE[at : at + h * w * 3].reshape(h, w, 3)
    return replace(example, scene=scene, frames=np.clip(lit, 0, 255).astype(np.uint8), shift=(dy / h, dx / w))


def mirror(scene: Scene) -> Scene:
    """The mirrored scene: left and right change places."""

    def turn(spell: Spell) -> Spell:
        x0, y0, x1, y1 = spell.path
        return replace(spell, family=_MIRRORED.get(spell.family, spell.family), path=(1 - x0, y0, 1 - x1, y1))

    actors = tuple(replace(a, spells=tuple(turn(s) for s in a.spells)) for a in scene.actors)
    questions = tuple(replace(q, family=_MIRRORED.get(q.family, q.family)) for q in scene.questions)
    return replace(scene, actors=actors, questions=questions)


def window(example: Example, pairs: int, rng: np.random.Generator) -> Example:
    """A window of ``pairs`` frame pairs with at least one whole event. Its times are those of the video."""
    total = len(example.times_s) // 2
    if pairs >= total:
        return example
    times = example.times_s.reshape(-1, 2)
    target = example.scene.questions[int(rng.integers(len(example.scene.questions)))].span
    first = min(int(np.searchsorted(times[:, 0], target[0], "right")) - 1, total - pairs)
    last = min(int(np.searchsorted(times[:, 1], target[1])), total - 1)
    start = int(rng.integers(max(0, min(last - pairs + 1, first)), max(0, min(first, total - pairs)) + 1))
    cut = slice(2 * start, 2 * (start + pairs))
    inside = tuple(
        q
        for q in example.scene.questions
        if times[start, 0] <= q.span[0] + 1e-6 and q.span[1] <= times[start + pairs - 1, 1] + GRID_S / 2
    )
    return replace(
        example,
        scene=replace(example.scene, questions=inside),
        frames=example.frames[cut],
        times_s=example.times_s[cut],
    )


def sampled_times(scene: Scene, fps: float = 2.0) -> np.ndarray:
    """The times at which the video budget samples a file of this scene with a constant rate."""
    total = round(scene.duration_s * scene.fps)
    n = max(4, int(total / scene.fps * fps) // 2 * 2)
    return np.linspace(0, total - 1, n).round() / scene.fps


def model_size_px(scene: Scene) -> tuple[int, int]:
    h, w = scene.size_px
    return (64, 64) if h == w else ((64, 96) if w > h else (96, 64))


def render_example(split: str, seed: int, index: int) -> Example:
    from torchvision.transforms.v2 import functional as tv

    scene = compose(split, seed, index)
    renderer = Renderer(scene)
    times = sampled_times(scene)
    frames = np.stack([renderer.frame(float(t)) for t in times])
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2)
    small = tv.resize(
        pixels, list(model_size_px(scene)), interpolation=tv.InterpolationMode.BICUBIC, antialias=True
    )
    return Example(scene=scene, frames=small.permute(0, 2, 3, 1).contiguous().numpy(), times_s=times)


def _render(args: tuple[str, int, int]) -> Example:
    if multiprocessing.parent_process() is not None:  # several workers share the cores
        torch.set_num_threads(1)
    return render_example(*args)


def render_sets(sets: Mapping[str, tuple[int, int]], workers: int | None = None) -> dict[str, list[Example]]:
    """Renders videos of several splits: ``sets[split]`` is the seed, and the number of videos.

    ``workers`` is the number of processes (None: one for each core; one renders in this process). One pool
    renders all sets, because a worker imports torch, which takes longer than a few videos.
    """
    tasks = [(split, seed, i) for split, (seed, count) in sets.items() for i in range(count)]
    made: dict[str, list[Example]] = {split: [] for split in sets}
    with worker_map(workers, chunksize=16) as map_tasks:
        for (split, *_), example in zip(tasks, map_tasks(_render, tasks), strict=True):
            made[split].append(example)
    return made


def patches(frames: np.ndarray) -> torch.Tensor:
    """Cuts frames (uint8 [T, H, W, 3]) into Qwen3-VL's patches in [-1, 1]: [T/2·H/16·W/16, 1536]."""
    t, h, w, _ = frames.shape
    x = torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 127.5 - 1
    x = x.view(t // 2, 2, 3, h // 32, 2, 16, w // 32, 2, 16).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return x.reshape(t // 2 * (h // 16) * (w // 16), 1536)


def blur(
    span: tuple[float, float], duration: float, looseness: float, rng: np.random.Generator
) -> tuple[float, float]:
    """Moves each boundary out by up to ``2·looseness`` event lengths, as in weakly aligned data."""
    length = span[1] - span[0]
    before, after = rng.uniform(0, 2 * looseness * length, size=2)
    start, end = max(0.0, span[0] - before), min(duration, span[1] + after)
    return round(start / GRID_S) * GRID_S, round(end / GRID_S) * GRID_S


def label_events(scene: Scene, pair_times: np.ndarray) -> np.ndarray:
    """Labels frame pairs with events: uint8 [pairs, 4, looks, families].

    The channels are: active in the first frame, active in the second, begins, ends in this pair.
    """
    out = np.zeros((len(pair_times), 4, len(LOOKS), len(FAMILIES)), np.uint8)
    flat = pair_times.reshape(-1)
    for q in scene.questions:
        actor = scene.actors[q.actor]
        look, family = LOOKS.index((actor.colour, actor.shape)), FAMILIES.index(q.family)
        active = (flat >= q.span[0] - 1e-6) & (flat < q.span[1] - 1e-6)
        out[:, :2, look, family] |= active.reshape(-1, 2)
        for channel, when in ((2, q.span[0]), (3, q.span[1])):
            if not flat[0] - 0.3 <= when <= flat[-1] + 0.3:
                continue
            at = min(int(np.searchsorted(flat, when - 1e-6)), len(flat) - 1) // 2
            out[at, channel, look, family] = 1
    return out


def label_cells(
    scene: Scene, pair_times: np.ndarray, gh: int, gw: int, shift: tuple[float, float] = (0.0, 0.0)
) -> np.ndarray:
    """Labels the cells of frame pairs: uint8 [pairs·gh·gw, 2·looks + looks·families].

    The first labels say whose centre lies in the cell, for each of the pair's frames; the rest say which
    event happens there, and to whom.
    """
    out = np.zeros((len(pair_times), gh, gw, OBJECTS + STATES), np.uint8)
    for actor in scene.actors:
        own = LOOKS.index((actor.colour, actor.shape))
        for spell in actor.spells:
            x0, y0, x1, y1 = spell.path
            begin, end = spell.event_s
            inside = (pair_times >= spell.start_s - 1e-6) & (pair_times < spell.end_s - 1e-6)
            for i, frame in np.argwhere(inside):
                t = float(pair_times[i, frame]) + 1e-6
                active = begin <= t < end
                if spell.family == "blinks" and active and int((t - begin) / 0.5) % 2 == 1:
                    continue
                p = (
                    float(active)
                    if spell.family == "meets"
                    else min(max((t - begin) / (end - begin), 0.0), 1.0)
                )
                look = own
                if spell.family == "recolours" and active and spell.colour:
                    look = LOOKS.index((spell.colour, actor.shape))
                y, x = (y0 + (y1 - y0) * p + shift[0]) % 1, (x0 + (x1 - x0) * p + shift[1]) % 1
                cell = out[i, min(gh - 1, int(y * gh)), min(gw - 1, int(x * gw))]
                cell[frame * len(LOOKS) + look] = 1
                if active and spell.family != "idle":
                    cell[OBJECTS + own * len(FAMILIES) + FAMILIES.index(spell.family)] = 1
    return out.reshape(-1, OBJECTS + STATES)


def by_size(examples: Sequence[Example]) -> list[list[Example]]:
    groups: dict[tuple[int, ...], list[Example]] = {}
    for ex in examples:
        groups.setdefault(ex.frames.shape[1:3], []).append(ex)
    return list(groups.values())


def batches(
    pool: Sequence[Example], size: int, rng: np.random.Generator, long_share: float | None = None
) -> Iterator[list[Example]]:
    """Yields batches of videos of one frame size, without end.

    About ``long_share`` of the videos are of the long style; None draws them as the pool has them.
    """
    groups = by_size(pool)
    weights = np.array([len(g) for g in groups]) / len(pool)
    while True:
        group = groups[int(rng.choice(len(groups), p=weights))]
        chances = _chances(group, long_share)
        yield [group[int(i)] for i in rng.choice(len(group), size, replace=False, p=chances)]


def _chances(group: Sequence[Example], long_share: float | None) -> np.ndarray | None:
    if long_share is None:
        return None
    is_long = np.array([style_name(e.scene.split, e.scene.index) == "long" for e in group])
    count = int(is_long.sum())
    if count in (0, len(group)):
        return None
    return np.where(is_long, long_share / count, (1 - long_share) / (len(group) - count))
