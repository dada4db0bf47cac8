"""A large array from tiles that overlap: where they lie, how they become one. numpy.

Along each axis the fewest tiles are spread evenly. Where two overlap, one fades into
the other in a straight line, so that what differs between them has no edge.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import numpy as np


def places(length: int, tile: int, overlap: int) -> tuple[int, ...]:
    """Give the first places of tiles that cover a length, overlapping by `overlap`.

    Where they do not fit evenly they overlap by more; a length within a tile is one.
    """
    if length <= tile:
        return (0,)
    count = -(-(length - overlap) // (tile - overlap))
    return tuple(round(i * (length - tile) / (count - 1)) for i in range(count))


def weights(length: int, tile: int, starts: tuple[int, ...]) -> list[np.ndarray]:
    """Give each tile's weights along one axis; at every place they add up to 1."""
    tile = min(tile, length)
    middle = np.arange(tile) + 0.5
    ramps = []
    for i, start in enumerate(starts):
        ramp = np.ones(tile)
        if i > 0:
            ramp = np.minimum(ramp, middle / (starts[i - 1] + tile - start))
        if i + 1 < len(starts):
            after = start + tile - starts[i + 1]
            ramp = np.minimum(ramp, (tile - middle) / after)
        ramps.append(ramp)
    total = np.zeros(length)
    for start, ramp in zip(starts, ramps, strict=True):
        total[start : start + tile] += ramp
    return [
        (ramp / total[start : start + tile]).astype(np.float32)
        for start, ramp in zip(starts, ramps, strict=True)
    ]


def blended(
    x: np.ndarray,
    tile: int,
    overlap: int,
    scale: int,
    make: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Make (B, C', scale h, scale w) from (B, C, h, w), a tile at a time.

    `make` takes tiles (B, C, tile, tile), smaller only where the array is, and returns
    them `scale` times as large.
    """
    _, _, h, w = x.shape
    rows, columns = places(h, tile, overlap), places(w, tile, overlap)
    down, across = (
        weights(scale * length, scale * tile, tuple(scale * start for start in starts))
        for length, starts in ((h, rows), (w, columns))
    )
    out: np.ndarray | None = None
    for (i, y), (j, x0) in product(enumerate(rows), enumerate(columns)):
        part = make(x[:, :, y : y + tile, x0 : x0 + tile])
        if out is None:
            out = np.zeros((*part.shape[:2], scale * h, scale * w), np.float32)
        H, W = part.shape[2:]
        place = np.s_[:, :, scale * y : scale * y + H, scale * x0 : scale * x0 + W]
        out[place] += part * (down[i][:, None] * across[j])
    assert out is not None
    return out
