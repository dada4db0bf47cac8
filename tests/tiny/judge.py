"""Say what is in a picture of the small SDXL's world, from its pixels alone.

Design: no network and nothing of the drawing code: the palette and the outlines are
stated anew here, so that drawer and judge can disagree. The background is the border's
median; what differs from it falls into connected parts, of which only what differs by
some of the part's own contrast is kept, without narrow bridges: a shadow in a ring does
not fill it, nor does one between two things make them one. A part's colour is the
nearest of the palette, its shape the outline with which its mask overlaps best. Both
are first laid on their centroid and stretched to one spread along each axis: by their
bounding boxes, a diamond whose tips have faded would be a circle.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

PALETTE: dict[str, tuple[int, int, int]] = {
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
BORDER = 3  # pixels of the frame that show the background
CONTRAST = 45.0  # distance in RGB from which a pixel is not background
DEPTH = 0.4  # of a part's contrast: a pixel below is shadow; a pattern's marks have 0.5
BRIDGE = 2  # pixels from either side that things grow together by, where they near
LEAST_AREA = 40  # pixels; smaller parts are specks
GRID = 64
REACH = 2.6  # standard deviations from the centroid that a mask is looked at


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """One object: x, y are its bounding box's centre, as fractions of the picture."""

    color: str
    shape: str
    x: float
    y: float
    area: int

    @property
    def place(self) -> str:
        """Name the third of the picture, across and down, in which the centre lies."""
        across = ("left", "", "right")[min(2, int(self.x * 3))]
        down = ("top", "", "bottom")[min(2, int(self.y * 3))]
        return f"{down} {across}".strip() or "center"


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What a picture shows; objects from the largest to the smallest."""

    background: str
    objects: tuple[Found, ...]


def judge(picture: np.ndarray) -> Verdict:
    """Judge one picture, uint8 (H, W, 3)."""
    H, W, _ = picture.shape
    rgb = picture.astype(np.float64)
    border = np.ones((H, W), bool)
    border[BORDER:-BORDER, BORDER:-BORDER] = False
    ground = np.median(rgb[border], axis=0)
    contrast = np.linalg.norm(rgb - ground, axis=-1)
    parts = []
    for part in _parts(contrast > CONTRAST):
        depth = DEPTH * np.median(contrast[_eroded(part)])
        for half in _parts(part & (contrast > depth)):
            parts += _untied(half)
    parts.sort(key=lambda part: -int(part.sum()))
    found = tuple(_found(rgb, part) for part in parts)
    return Verdict(background=nearest_color(ground), objects=found)


def nearest_color(rgb: np.ndarray) -> str:
    """Return the palette's name for a colour (3,) in 0..255."""
    distances = {name: np.linalg.norm(rgb - np.array(c)) for name, c in PALETTE.items()}
    return min(distances, key=distances.__getitem__)


def relation(first: Found, second: Found) -> str:
    """Say where the first is seen from the second, along the larger distance."""
    dx, dy = first.x - second.x, first.y - second.y
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def sharpness(picture: np.ndarray) -> float:
    """Return how steep edges are: largest step between neighbours over the contrast.

    The mean, over rows and columns that cross an object, of (largest difference of two
    adjacent pixels) / (range of the line); 1 for a hard edge, 1/n for a ramp of n.
    """
    gray = picture.astype(np.float64).mean(-1)
    ratios = []
    for lines in (gray, gray.T):
        spans = lines.max(1) - lines.min(1)
        steps = np.abs(np.diff(lines, axis=1)).max(1)
        ratios.append(steps[spans > CONTRAST] / spans[spans > CONTRAST])
    every = np.concatenate(ratios)
    return float(every.mean()) if every.size else 0.0


def _parts(mask: np.ndarray) -> list[np.ndarray]:
    """Split a mask into its 4-connected parts, without specks."""
    labels = np.where(mask, np.arange(1, mask.size + 1).reshape(mask.shape), 0)
    while True:
        grown = labels.copy()
        grown[1:] = np.maximum(grown[1:], labels[:-1])
        grown[:-1] = np.maximum(grown[:-1], labels[1:])
        grown[:, 1:] = np.maximum(grown[:, 1:], labels[:, :-1])
        grown[:, :-1] = np.maximum(grown[:, :-1], labels[:, 1:])
        grown[~mask] = 0
        if np.array_equal(grown, labels):
            found, areas = np.unique(labels[mask], return_counts=True)
            return [labels == label for label in found[areas >= LEAST_AREA]]
        labels = grown


def _untied(part: np.ndarray) -> list[np.ndarray]:
    """Split a part that bridges narrower than twice `BRIDGE` hold together."""
    core = part
    for _ in range(BRIDGE):
        core = core & _by_neighbours(core, np.logical_and)
    cores = _parts(core)
    if len(cores) < 2:
        return [part]
    for _ in range(BRIDGE):
        cores = [part & _by_neighbours(core, np.logical_or) for core in cores]
    return cores


def _by_neighbours(mask: np.ndarray, combine: np.ufunc) -> np.ndarray:
    """Combine each pixel with its four neighbours; beyond the picture is nothing."""
    wide = np.pad(mask, 1)
    views = (
        wide[1:-1, 1:-1],
        wide[:-2, 1:-1],
        wide[2:, 1:-1],
        wide[1:-1, :-2],
        wide[1:-1, 2:],
    )
    return combine.reduce(views)


def _found(rgb: np.ndarray, part: np.ndarray) -> Found:
    H, W = part.shape
    rows, columns = np.flatnonzero(part.any(1)), np.flatnonzero(part.any(0))
    return Found(
        color=_color(rgb[_eroded(part)]),
        shape=_shape(part),
        x=(columns[0] + columns[-1] + 1) / 2 / W,
        y=(rows[0] + rows[-1] + 1) / 2 / H,
        area=int(part.sum()),
    )


def _eroded(part: np.ndarray) -> np.ndarray:
    """Drop the rim, where colours mix with the background's, if anything is left."""
    inner = _by_neighbours(part, np.logical_and)
    return inner if inner.sum() >= 8 else part


def _color(pixels: np.ndarray) -> str:
    """Return the colour most of `pixels` (N, 3) have, marks of a pattern allowed for.

    A pattern's marks lie half way to white or black, so a candidate explains a pixel
    that is near itself or, at a price, near that mark.
    """
    costs = {}
    for name, value in PALETTE.items():
        color = np.array(value, np.float64)
        mark = (color + (0 if color.sum() > 380 else 255)) / 2
        plain = np.linalg.norm(pixels - color, axis=1)
        marked = np.linalg.norm(pixels - mark, axis=1) + 20
        costs[name] = float(np.minimum(plain, marked).mean())
    return min(costs, key=costs.__getitem__)


def _shape(part: np.ndarray) -> str:
    """Return the outline that overlaps best with a part."""
    mask = _normalized(part)
    overlaps = {
        name: (mask & outline).sum() / (mask | outline).sum()
        for name, outline in OUTLINES.items()
    }
    return max(overlaps, key=overlaps.__getitem__)


def _normalized(mask: np.ndarray) -> np.ndarray:
    """Lay a mask on its centroid and stretch it to one spread: (GRID, GRID)."""
    inside, index = [], []
    for places, length in zip(np.nonzero(mask), mask.shape, strict=True):
        steps = np.linspace(-REACH, REACH, GRID) * max(places.std(), 0.5)
        at = np.rint(places.mean() + steps).astype(int)
        inside.append((at >= 0) & (at < length))
        index.append(at.clip(0, length - 1))
    return mask[np.ix_(*index)] & np.logical_and.outer(*inside)


def _outlines() -> dict[str, np.ndarray]:
    """Return each shape as a mask (GRID, GRID), laid as parts are."""
    axis = (np.arange(4 * GRID) + 0.5) / (4 * GRID) * 2 - 1
    x, y = np.meshgrid(axis, axis)
    radius, side = np.hypot(x, y), np.abs(x)
    outlines = {
        "circle": radius < 1,
        "square": np.ones_like(x, bool),
        "triangle": side < (y + 1) / 2,
        "diamond": side + np.abs(y) < 1,
        "ring": (radius < 1) & (radius > 0.55),
        "cross": (side < 0.33) | (np.abs(y) < 0.33),
        "star": _star(x, y),
        "heart": _heart(x, y),
    }
    return {name: _normalized(mask) for name, mask in outlines.items()}


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points: beyond one at most of the lines that join every second tip."""
    u, v = x * 0.951, (y + 1) * 0.9045 - 1  # its box is not centred on its middle
    angles = 2 * np.pi * np.arange(5) / 5
    inside = [u * np.sin(a) - v * np.cos(a) < 0.33 for a in angles]
    return np.sum(inside, axis=0) >= 4


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The usual heart curve (x = sin^3 t), filled between its two branches."""
    t = np.linspace(0, np.pi, 400)
    across = np.sin(t) ** 3
    down = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    down = (down - down.min()) / (down.max() - down.min()) * 2 - 1
    half = int(np.argmax(across))
    top = np.interp(np.abs(x), across[: half + 1], down[: half + 1])
    bottom = np.interp(np.abs(x), across[half:][::-1], down[half:][::-1])
    return (y > top) & (y < bottom)


OUTLINES = _outlines()
