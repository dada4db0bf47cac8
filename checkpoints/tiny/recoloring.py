"""Give the things of a picture the colours they were asked to have; leave all else.

Design: nothing is drawn anew. The background is the border's median, and a pixel is
taken for a mixture of it with a thing's colour, which is seen where the thing differs
most from it. The mixture stays, with its edges and holes, and only the thing's colour
is exchanged. A pattern has two colours, the lighter and the darker half of a thing.

Things of a pair are told apart by where they lie, and known by their relation, unless
far fewer changes are to be made the other way round.
"""

from __future__ import annotations

import numpy as np
from drawing import mark_color
from scenes import COLORS, Scene, Thing

BORDER = 3  # pixels of the frame that show the background
CORE = 200  # pixels that show how much a thing stands out
NEAR = 0.7  # of that, from which a pixel shows the thing's colour
FAINT = 0.3  # distance below which colours are not told apart; of -1..1
PLAIN = 0.8  # distance from which a thing is as good as any other
DOUBT = 1.0  # how much nearer a pair's colours must be for its order to be turned
TIED = 0.15  # of a line between two things, what stands out if they are not apart
ROUNDS = 8


def recolored(picture: np.ndarray, scene: Scene, near: float = 0.0) -> np.ndarray:
    """Return a picture (H, W, 3) in -1..1 of `scene` with the colours of its things.

    What is too faint to have a colour, and a pattern that cannot be seen, stay. So does
    a thing with its colour nearer than `near` of the distance to any other colour.
    """
    ground = _ground(picture)
    contrast = np.linalg.norm(picture - ground, axis=-1)
    changed = picture.copy()
    for where, thing in _things(picture, contrast, scene):
        seen = _colors(picture, np.where(where, contrast, 0), thing)
        if seen is not None and not _is_near(seen[0], thing.color, near):
            mixture = _mixture(picture[where] - ground, seen - ground)
            changed[where] = ground + mixture @ (_asked(thing) - ground)
    return changed


def _ground(picture: np.ndarray) -> np.ndarray:
    border = np.ones(picture.shape[:2], bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    return np.median(picture[border], axis=0)


def _things(
    picture: np.ndarray, contrast: np.ndarray, scene: Scene
) -> list[tuple[np.ndarray, Thing]]:
    """Return masks (H, W) that part the picture, and what is to be seen in each."""
    if scene.kind != "two":
        return [(np.ones(contrast.shape, bool), scene.things[0])]
    stands_out = contrast > PLAIN / 2
    weights = np.where(stands_out, contrast.clip(max=PLAIN), 1e-6)
    rows, columns = np.indices(contrast.shape)
    if scene.relation is None:
        across = _spread(columns, weights) > _spread(rows, weights)
    else:
        across = scene.relation.endswith("of")
    low = _lower_half(columns if across else rows, weights)
    if (stands_out & _last(low, across)).sum() > TIED * low.shape[not across]:
        return []
    halves, things = [low, ~low], list(scene.things)
    if scene.relation in ("right of", "below"):
        things.reverse()
    seen = [_color(picture, np.where(half, contrast, 0)) for half in halves]
    if _change(seen, things[::-1]) + DOUBT < _change(seen, things):
        things.reverse()
    return list(zip(halves, things, strict=True))


def _last(low: np.ndarray, across: bool) -> np.ndarray:
    """Return the last line of a half that is the left one, or the upper one."""
    beyond = np.zeros_like(low)
    if across:
        beyond[:, :-1] = ~low[:, 1:]
    else:
        beyond[:-1] = ~low[1:]
    return low & beyond


def _spread(places: np.ndarray, weights: np.ndarray) -> float:
    mean = np.average(places, weights=weights)
    return float(np.average((places - mean) ** 2, weights=weights))


def _lower_half(places: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Part places in two by the middle between the means of the parts (2-means)."""
    middle = np.average(places, weights=weights)
    for _ in range(ROUNDS):
        low = places < middle
        parts = [half for half in (low, ~low) if half.any()]
        means = [np.average(places[half], weights=weights[half]) for half in parts]
        middle = np.mean(means)
    return places < middle


def _change(seen: list[np.ndarray], things: list[Thing]) -> float:
    """Return how far the things' colours are from what is seen."""
    pairs = zip(seen, things, strict=True)
    return sum(float(np.linalg.norm(s - _tone(COLORS[t.color]))) for s, t in pairs)


def _color(picture: np.ndarray, contrast: np.ndarray) -> np.ndarray:
    """Return the colour (3,) where a picture stands out."""
    return np.median(picture[contrast >= NEAR * _core(contrast)], axis=0)


def _core(contrast: np.ndarray) -> float:
    """Return how much the thing stands out."""
    return float(np.sort(contrast, axis=None)[-CORE:].mean())


def _colors(
    picture: np.ndarray, contrast: np.ndarray, thing: Thing
) -> np.ndarray | None:
    """Return the colours (1, 3) of a thing, or (2, 3) with its pattern's, if seen."""
    core = _core(contrast)
    if core < FAINT:
        return None
    if thing.texture is None:
        return _color(picture, contrast)[None]
    pixels = picture[contrast > core / 2]
    light = pixels.mean(1)
    dark = _lower_half(light, np.ones_like(light))
    if dark.all() or not dark.any():
        return None
    darker, lighter = np.median(pixels[dark], 0), np.median(pixels[~dark], 0)
    if np.linalg.norm(lighter - darker) < FAINT:
        return None
    color, mark = _asked(thing)
    return np.stack(
        (darker, lighter) if color.sum() < mark.sum() else (lighter, darker)
    )


def _is_near(seen: np.ndarray, name: str, near: float) -> bool:
    """Tell whether a colour (3,) is nearer to the named one than `near` of others."""
    far = {other: np.linalg.norm(seen - _tone(COLORS[other])) for other in COLORS}
    return far.pop(name) < near * min(far.values())


def _asked(thing: Thing) -> np.ndarray:
    """Return the colours (1, 3) that a thing shall have, or (2, 3) with its marks."""
    color = COLORS[thing.color]
    colors = (color,) if thing.texture is None else (color, mark_color(color))
    return np.stack([_tone(value) for value in colors])


def _tone(color: tuple[int, int, int]) -> np.ndarray:
    return np.array(color) / 127.5 - 1.0


def _mixture(stands_out: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Return how much (N, K) of colours (K, 3) is in pixels (N, 3): at most 1 in all.

    By least squares, all of them counted from the background; a colour that hardly
    differs from it gets nothing.
    """
    inner = colors @ colors.T + FAINT**2 / 10 * np.eye(len(colors))
    mixture = np.linalg.solve(inner, colors @ stands_out.T).T.clip(min=0)
    return mixture / mixture.sum(1, keepdims=True).clip(min=1)
