"""Pictures for the refiner to learn from: such as the base draws, and drawings.

Design: the base draws a batch from noise to its end, as it is run; the end is kept,
with the places of low noise that it came through. What the base has left of the noise
there is of its own making, and tells where it was going. That takes as long as the
learning, which wants thousands of pictures, and each many times; so they are kept in
chunk files that can be added to.

An end's colours are put right, as in `mending`, but only where they are wrong or nearly
so, for what is recoloured loses some of its shape.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from denoising import Model, some_captions
from diffusers import AutoencoderKL
from latents import Latents
from mending import in_color
from networks import TEXT_WIDTH
from rollouts import GUIDANCE, Rollouts, scenes_told
from training import write_state

HIGHEST_TIMESTEP = 200
STRIDES = (40, 60)  # timesteps of steps: of 50, twenty are a whole way
USUAL_STRIDE, USUAL_SHARE = 50, 0.7  # of batches that the base draws as it usually is
DRAWN, DRAWINGS = 32, 4  # pictures of a chunk: the base's, and drawings
NEAR = 0.6  # of the distance to other colours, up to which one is right
THREADS = 2
SEEDS_FROM = 65_000_000


@dataclass(frozen=True)
class Picture:
    """One picture: its latents, and what they should be with the right colours.

    latents, righted (4, h, w); context (77, C) of the second encoder, pooled (C,),
    time_ids (6,); whether it is of a pair; `seen`: x on the way to it, and timesteps;
    how many of these a step takes.
    """

    latents: torch.Tensor
    righted: torch.Tensor
    context: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor
    pair: bool
    seen: list[tuple[torch.Tensor, int]]
    stride: int


class Painter:
    """Make chunks of pictures."""

    def __init__(self, base: Model, vae: AutoencoderKL, data: Latents) -> None:
        self.base, self.vae, self.data = base, vae, data
        self.rollouts = Rollouts(data, base.language, DRAWN)

    @torch.no_grad()
    def chunk(self, index: int) -> list[Picture]:
        """Return the pictures of a chunk, all of one size."""
        rng = random.Random(SEEDS_FROM + index)
        source = torch.Generator().manual_seed(SEEDS_FROM + index)
        size = self.data.any_size(rng)
        return self._drawn(size, rng, source) + self._drawings(size, rng)

    def _drawn(
        self, size: tuple[int, ...], rng: random.Random, source: torch.Generator
    ) -> list[Picture]:
        """Have the base draw pictures."""
        on = self.rollouts.begin(size, rng, source)
        stride = rng.randint(*STRIDES)
        if rng.random() < USUAL_SHARE:
            stride, on.guidance[:], on.stirred[:] = USUAL_STRIDE, GUIDANCE, 0.0
        on.strides = torch.full_like(on.strides, stride)
        ways: list[tuple[torch.Tensor, torch.Tensor]] = []
        while (on.timesteps >= 0).all():
            if (on.timesteps < HIGHEST_TIMESTEP).all():
                ways.append((on.x, on.timesteps))
            end = on.step(*self.base.both_noises_in(*on.question), source)
        seen = [[(x[n], int(t[n])) for x, t in ways] for n in range(len(end))]
        told = on.context[..., -TEXT_WIDTH:], on.pooled, on.time_ids
        righted = self._recolored(end, on.asked)
        strides = [stride] * len(seen)
        return _pictures(end, righted, on.asked, told, seen, strides)

    def _drawings(self, size: tuple[int, ...], rng: random.Random) -> list[Picture]:
        """Take drawings as they are."""
        batch = self.data.batch(rng, DRAWINGS, size)
        texts = some_captions(batch.scenes, rng)
        context, pooled = self.base.language(texts)
        told = context[..., -TEXT_WIDTH:], pooled, batch.time_ids
        asked, none = scenes_told(batch.scenes, texts), [[] for _ in texts]
        strides = [rng.randint(*STRIDES) for _ in texts]
        drawings = batch.latents
        return _pictures(drawings, drawings, asked, told, none, strides)

    def _recolored(self, latents: torch.Tensor, scenes: np.ndarray) -> torch.Tensor:
        """Return latents (B, 4, h, w) in the colours of scenes (B,), if any."""
        where = [n for n, scene in enumerate(scenes) if scene is not None]
        recolored = latents.clone()
        recolored[where] += in_color(self.vae, latents[where], scenes[where], NEAR)[1]
        return recolored


def _pictures(
    latents: torch.Tensor,
    righted: torch.Tensor,
    asked: np.ndarray,
    told: tuple[torch.Tensor, ...],
    seen: Sequence[list[tuple[torch.Tensor, int]]],
    strides: Sequence[int],
) -> list[Picture]:
    pairs = [scene is not None and scene.kind == "two" for scene in asked]
    each = zip(latents, righted, *told, pairs, seen, strides, strict=True)
    return [Picture(*values) for values in each]


def add_pictures(
    work: Path,
    painter: Painter,
    count: int,
    *,
    say: Callable[[str], None] = print,
) -> None:
    """Make chunks until `work` has `count` of them."""
    folder = work / "pictures"
    folder.mkdir(exist_ok=True)

    def add(index: int) -> None:
        path = folder / f"{index:05d}.pt"
        if not path.exists():
            some = [vars(picture) for picture in painter.chunk(index)]
            write_state(path, {"pictures": some})

    with ThreadPoolExecutor(THREADS, "chunk", torch.set_num_threads, (1,)) as pool:
        for index, _ in enumerate(pool.map(add, range(count)), 1):
            if index % 8 == 0:
                say(f"pictures {index}/{count} chunks")


def load_pictures(work: Path) -> dict[tuple[int, ...], list[Picture]]:
    """Return the pictures of `work` by the size (h, w) of their latents."""
    by_size: dict[tuple[int, ...], list[Picture]] = {}
    folder = work / "pictures"
    for path in sorted(folder.glob("*.pt")):
        for values in torch.load(path, weights_only=True)["pictures"]:
            picture = Picture(**values)
            by_size.setdefault(picture.latents.shape[1:], []).append(picture)
    if not by_size:
        raise FileNotFoundError(
            f"{folder}: no pictures; `train.py pictures` draws them"
        )
    return by_size
