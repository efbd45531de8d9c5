"""Renders scenes as pixels: anti-aliased shapes on a textured, drifting, noisy background."""

from __future__ import annotations

import numpy as np

from video_opd.world.queries import COLOURS
from video_opd.world.scene import Actor, Scene, Spell, scene_rng

_TEXTURE_PX = 256


class Renderer:
    """Renders the frames of one scene. A frame depends on the scene and its time alone."""

    def __init__(self, scene: Scene) -> None:
        self.scene = scene
        rng = scene_rng(scene.split, scene.seed, scene.index, "background")
        self.height, self.width = scene.size_px
        self.unit = min(scene.size_px)
        base = rng.uniform(50, 110, size=3)
        coarse = rng.uniform(-1, 1, size=(8, 8, 3))
        texture = coarse.repeat(_TEXTURE_PX // 8, 0).repeat(_TEXTURE_PX // 8, 1)
        for axis in (0, 1):  # smooth the blocks
            for shift in (4, 8):
                texture = (texture + np.roll(texture, shift, axis) + np.roll(texture, -shift, axis)) / 3
        self.texture = (base + 45 * scene.contrast * texture).astype(np.float32)
        self.drift = rng.uniform(-6, 6, size=2)  # px a second
        self.noise_bank = rng.normal(0, scene.noise, size=(4, self.height, self.width, 1)).astype(np.float32)
        yy, xx = np.mgrid[0 : self.height, 0 : self.width].astype(np.float32)
        self.yy, self.xx = yy + 0.5, xx + 0.5

    def frame(self, t: float) -> np.ndarray:
        """The picture at ``t`` seconds: uint8 [H, W, 3]."""
        dy, dx = (round(d * t) % _TEXTURE_PX for d in self.drift)
        image = np.roll(self.texture, (dy, dx), (0, 1))[: self.height, : self.width].copy()
        step = round(t * 1000)
        image += np.roll(
            self.noise_bank[step % 4], (step * 7919 % self.height, step * 104729 % self.width), (0, 1)
        )
        for actor in self.scene.actors:
            for spell in actor.spells:
                if spell.start_s <= t < spell.end_s:
                    self._draw(image, actor, spell, t)
        return np.clip(image, 0, 255).astype(np.uint8)

    def _draw(self, image: np.ndarray, actor: Actor, spell: Spell, t: float) -> None:
        begin, end = spell.event_s
        active = begin <= t < end
        progress = float(np.clip((t - begin) / (end - begin), 0, 1))
        x0, y0, x1, y1 = spell.path
        radius, colour = actor.radius, actor.colour
        if spell.family == "blinks" and active and int((t - begin) / 0.5 + 1e-6) % 2 == 1:
            return
        if spell.family == "recolours" and active:
            colour = spell.colour or colour
        if spell.family == "grows":
            radius *= 0.75 + 0.85 * progress if active else 0.75
        if spell.family == "meets":
            progress = 1.0 if active else 0.0
        x, y = x0 + (x1 - x0) * progress, y0 + (y1 - y0) * progress
        paint(
            image,
            self.xx,
            self.yy,
            actor.shape,
            COLOURS[colour],
            x * self.width,
            y * self.height,
            radius * self.unit,
        )


def paint(
    image: np.ndarray,
    xx: np.ndarray,
    yy: np.ndarray,
    shape: str,
    rgb: tuple[int, int, int],
    x: float,
    y: float,
    r: float,
) -> None:
    """Draws a shape of radius ``r`` px at (``x``, ``y``) into ``image`` (float32 [H, W, 3]), in place."""
    h, w = image.shape[:2]
    top, bottom = max(0, int(y - r - 2)), min(h, int(y + r + 3))
    left, right = max(0, int(x - r - 2)), min(w, int(x + r + 3))
    if top >= bottom or left >= right:
        return
    box = (slice(top, bottom), slice(left, right))
    dx, dy = xx[box] - x, yy[box] - y
    cover = np.clip(0.5 - signed_distance(shape, dx, dy, r), 0, 1)[..., None]
    image[box] = image[box] * (1 - cover) + np.asarray(rgb, np.float32) * cover


def signed_distance(shape: str, dx: np.ndarray, dy: np.ndarray, r: float) -> np.ndarray:
    """The distance to the shape's outline in px; negative inside the shape."""
    if shape == "circle":
        return np.hypot(dx, dy) - r
    if shape == "square":
        return np.maximum(np.abs(dx), np.abs(dy)) - 0.85 * r
    if shape == "triangle":
        return np.maximum(dy - 0.7 * r, np.abs(dx) * 0.894 - (dy + r) * 0.447)
    if shape == "cross":
        a, b = np.abs(dx), np.abs(dy)
        bar = 0.32 * r
        return np.minimum(np.maximum(a - r, b - bar), np.maximum(b - r, a - bar))
    if shape == "ring":
        return np.abs(np.hypot(dx, dy) - 0.74 * r) - 0.26 * r
    raise ValueError(f"unknown shape {shape!r}")
