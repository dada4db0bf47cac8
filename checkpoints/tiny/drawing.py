"""Scenes to pixels, with Pillow.

Design: a picture is a window of an endless plane on which the canvas lies, so a crop
is a window that was moved. Everything is drawn three times too large and reduced,
which is all the antialiasing there is.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw
from scenes import COLORS, Scene, Thing

OVERSAMPLING = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """How a scene is seen; lengths in pixels of the finished picture.

    The canvas is `canvas_width` by `canvas_height`; the picture is its window at
    (`left`, `top`). `resolution` below 1 means that the canvas was that much smaller
    before it was enlarged: the picture is blurred, and its original size says so.
    """

    width: int = 128
    height: int = 128
    canvas_width: int = 128
    canvas_height: int = 128
    left: int = 0
    top: int = 0
    resolution: float = 1.0

    @property
    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """Return SDXL's six figures: original size, crop, target size; (h, w) each."""
        original_h = round(self.canvas_height * self.resolution)
        original_w = round(self.canvas_width * self.resolution)
        return (original_h, original_w, self.top, self.left, self.height, self.width)


def draw(scene: Scene, view: View | None = None) -> Image.Image:
    """Draw what `view` shows of `scene` as an RGB picture."""
    view = view or View()
    rng = random.Random(scene.seed)
    k = OVERSAMPLING
    size = (view.width * k, view.height * k)
    image = Image.new("RGB", size, _shade(scene.background, rng))
    shades: dict[str, tuple[int, int, int]] = {}
    for thing in scene.things:
        color = shades.setdefault(thing.color, _shade(thing.color, rng))
        _paste(image, thing, view, color)
    image = image.reduce(k)
    return image if view.resolution >= 1 else _blurred(image, view.resolution)


def pixels(scene: Scene, view: View | None = None) -> np.ndarray:
    """Return the picture as float32 (3, H, W) in -1..1."""
    array = np.asarray(draw(scene, view), np.float32) / 127.5 - 1.0
    return array.transpose(2, 0, 1)


def mark_color(color: tuple[int, int, int]) -> tuple[int, int, int]:
    """Return what marks a color: a lighter tone (a darker one when it is light)."""
    toward = 0 if sum(color) > 380 else 255
    red, green, blue = (round(0.5 * value + 0.5 * toward) for value in color)
    return red, green, blue


def _shade(color: str, rng: random.Random) -> tuple[int, int, int]:
    red, green, blue = (
        min(255, max(0, value + rng.randint(-5, 5))) for value in COLORS[color]
    )
    return red, green, blue


def _blurred(image: Image.Image, resolution: float) -> Image.Image:
    width, height = image.size
    small = (max(1, round(width * resolution)), max(1, round(height * resolution)))
    return image.resize(small, Image.Resampling.BOX).resize(
        image.size, Image.Resampling.BICUBIC
    )


def _paste(
    image: Image.Image, thing: Thing, view: View, color: tuple[int, int, int]
) -> None:
    k = OVERSAMPLING
    x = (thing.x * view.canvas_width - view.left) * k
    y = (thing.y * view.canvas_height - view.top) * k
    r = thing.radius * min(view.canvas_width, view.canvas_height) * k
    mask = Image.new("L", image.size, 0)
    _shape(ImageDraw.Draw(mask), thing.shape, x, y, r)
    if thing.texture is None:
        image.paste(color, mask=mask)
    else:
        image.paste(_pattern(image.size, thing.texture, color, x, y), mask=mask)


def _shape(pen: ImageDraw.ImageDraw, shape: str, x: float, y: float, r: float) -> None:
    if shape in ("circle", "ring"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=255)
        if shape == "ring":
            hole = 0.55 * r
            pen.ellipse((x - hole, y - hole, x + hole, y + hole), fill=0)
        return
    if shape == "cross":
        arm = 0.33 * r
        pen.rectangle((x - r, y - arm, x + r, y + arm), fill=255)
        pen.rectangle((x - arm, y - r, x + arm, y + r), fill=255)
        return
    outline = [(x + r * u, y + r * v) for u, v in OUTLINES[shape]]
    pen.polygon(outline, fill=255)


def _pattern(
    size: tuple[int, int],
    texture: str,
    color: tuple[int, int, int],
    x: float,
    y: float,
) -> Image.Image:
    """Return `color` with the marks of a texture."""
    mark = mark_color(color)
    picture = Image.new("RGB", size, color)
    pen = ImageDraw.Draw(picture)
    period = 24 * OVERSAMPLING
    across = range(math.floor(x) % period - period, size[0] + period, period)
    down = range(math.floor(y) % period - period, size[1] + period, period)
    if texture == "striped":
        for top in down:
            pen.rectangle((0, top, size[0], top + period * 0.45), fill=mark)
        return picture
    r = 0.27 * period
    for left in across:
        for top in down:
            pen.ellipse((left - r, top - r, left + r, top + r), fill=mark)
    return picture


def _star() -> list[tuple[float, float]]:
    points = []
    for i in range(10):
        radius = 1.1 if i % 2 == 0 else 0.45
        angle = math.pi * i / 5
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return points


def _heart() -> list[tuple[float, float]]:
    points = []
    for i in range(60):
        t = 2 * math.pi * i / 60
        y = (
            13 * math.cos(t)
            - 5 * math.cos(2 * t)
            - 2 * math.cos(3 * t)
            - math.cos(4 * t)
        )
        points.append((math.sin(t) ** 3 * 1.05, -(y + 2.5) / 14.5))
    return points


OUTLINES: dict[str, list[tuple[float, float]]] = {
    "square": [(-0.88, -0.88), (0.88, -0.88), (0.88, 0.88), (-0.88, 0.88)],
    "triangle": [(0.0, -1.0), (1.05, 0.85), (-1.05, 0.85)],
    "diamond": [(0.0, -1.15), (0.8, 0.0), (0.0, 1.15), (-0.8, 0.0)],
    "star": _star(),
    "heart": _heart(),
}
