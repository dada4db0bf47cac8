"""Scenes of the small SDXL's world: what is in a picture, drawn at random.

Design: a scene is a value, drawn from a seeded `random.Random` and nothing else, so a
data set is a list of integers. Coordinates are fractions of the canvas's width and
height; radii are fractions of its shorter side. What a caption may leave out (a place,
a size) is `None`, so that captions never say what was not asked.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from hashlib import blake2b

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (210, 20, 30),
    "orange": (245, 125, 10),
    "yellow": (255, 230, 50),
    "green": (30, 150, 50),
    "cyan": (60, 210, 220),
    "blue": (35, 65, 215),
    "purple": (130, 40, 170),
    "pink": (250, 130, 190),
    "white": (250, 250, 250),
    "black": (15, 15, 15),
    "gray": (128, 128, 128),
}
OBJECT_COLORS = tuple(name for name in COLORS if name != "gray")
BACKGROUNDS = tuple(COLORS)
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "diamond")
PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.25, 0.25),
    "top": (0.5, 0.25),
    "top right": (0.75, 0.25),
    "left": (0.25, 0.5),
    "center": (0.5, 0.5),
    "right": (0.75, 0.5),
    "bottom left": (0.25, 0.75),
    "bottom": (0.5, 0.75),
    "bottom right": (0.75, 0.75),
}
SIZES = {"small": 0.16, None: 0.26, "large": 0.35}
PLACED_SIZES = {"small": 0.14, None: 0.21}  # away from the center there is less room
RELATIONS = ("left of", "right of", "above", "below")
TEXTURES = ("striped", "dotted")
LAYOUTS: dict[int, tuple[tuple[tuple[float, float], ...], ...]] = {
    2: (((0.27, 0.5), (0.73, 0.5)),),
    3: (((0.5, 0.27), (0.26, 0.72), (0.74, 0.72)),),
    4: (((0.27, 0.27), (0.73, 0.27), (0.27, 0.73), (0.73, 0.73)),),
}
HELD_OUT_SHARE = 10


@dataclass(frozen=True, slots=True, kw_only=True)
class Thing:
    """One object: what it is and where it was put (fractions, as said above)."""

    shape: str
    color: str
    x: float
    y: float
    radius: float
    texture: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """A picture in words and figures.

    `place` and `size` belong to a lone object, `relation` to a pair (the first thing is
    `relation` the second); each is `None` when the caption does not mention it.
    """

    kind: str
    background: str
    things: tuple[Thing, ...]
    place: str | None = None
    size: str | None = None
    relation: str | None = None
    seed: int = field(default=0, compare=False)

    @property
    def combination(self) -> str:
        """Name what is combined: the unit by which scenes are held out."""
        words = [f"{thing.color} {thing.shape}" for thing in self.things]
        if self.kind == "count":
            words = [str(len(words)), words[0]]
        return "/".join([self.kind, *words, self.background])

    @property
    def held_out(self) -> bool:
        """Tell whether training must never see this combination (one in ten)."""
        digest = blake2b(self.combination.encode(), digest_size=4).digest()
        return int.from_bytes(digest, "big") % HELD_OUT_SHARE == 0


def draw_scene(seed: int, *, held_out: bool = False, kind: str | None = None) -> Scene:
    """Draw the scene of `seed`, of either side of the held-out split."""
    rng = random.Random(seed)
    while True:
        scene = _any_scene(rng, kind, seed)
        if scene.held_out == held_out:
            return scene


def _any_scene(rng: random.Random, kind: str | None, seed: int) -> Scene:
    kind = kind or rng.choices(("one", "two", "count"), (60, 27, 13))[0]
    return {"one": _one, "two": _two, "count": _count}[kind](rng, seed)


def _one(rng: random.Random, seed: int) -> Scene:
    background, color = _two_colors(rng)
    size = rng.choices(("small", None, "large"), (25, 50, 25))[0]
    place = rng.choice(tuple(PLACES)) if rng.random() < 0.6 else None
    if size == "large" and place is not None:
        place = "center"
    x, y = PLACES[place or "center"]
    spread = 0.02 if place or size == "large" else 0.06
    radius = (SIZES if place in (None, "center") else PLACED_SIZES)[size]
    thing = Thing(
        shape=rng.choice(SHAPES),
        color=color,
        x=x + rng.uniform(-spread, spread),
        y=y + rng.uniform(-spread, spread),
        radius=radius * rng.uniform(0.95, 1.05),
        texture=rng.choice(TEXTURES)
        if size != "small" and rng.random() < 0.15
        else None,
    )
    return Scene(
        kind="one",
        background=background,
        things=(thing,),
        place=place,
        size=size,
        seed=seed,
    )


def _two(rng: random.Random, seed: int) -> Scene:
    background, first = _two_colors(rng)
    second = rng.choice([c for c in OBJECT_COLORS if c not in (background, first)])
    relation = rng.choice(RELATIONS)
    near, far = rng.uniform(0.24, 0.28), rng.uniform(0.72, 0.76)
    across = (rng.uniform(0.44, 0.56), rng.uniform(0.44, 0.56))
    along = (near, far) if relation in ("left of", "above") else (far, near)
    things = []
    for color, u, v in zip((first, second), along, across, strict=True):
        x, y = (u, v) if relation in ("left of", "right of") else (v, u)
        radius = rng.uniform(0.18, 0.20)
        shape = rng.choice(SHAPES)
        things.append(Thing(shape=shape, color=color, x=x, y=y, radius=radius))
    return Scene(
        kind="two",
        background=background,
        things=tuple(things),
        relation=relation if rng.random() < 0.75 else None,
        seed=seed,
    )


def _count(rng: random.Random, seed: int) -> Scene:
    background, color = _two_colors(rng)
    shape = rng.choice(SHAPES)
    layout = rng.choice(LAYOUTS[rng.choice((2, 3, 4))])
    radius = rng.uniform(0.165, 0.185)
    things = tuple(
        Thing(
            shape=shape,
            color=color,
            x=x + rng.uniform(-0.02, 0.02),
            y=y + rng.uniform(-0.02, 0.02),
            radius=radius,
        )
        for x, y in layout
    )
    return Scene(kind="count", background=background, things=things, seed=seed)


def _two_colors(rng: random.Random) -> tuple[str, str]:
    background = rng.choice(BACKGROUNDS)
    return background, rng.choice([c for c in OBJECT_COLORS if c != background])
