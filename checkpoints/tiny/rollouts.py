"""Pictures on their way from noise to the end, for a model to learn on its own ways.

Design: a batch holds pictures at as many places of their ways. The guided prediction
that a training step makes of them is also their next step, so that ways cost nothing;
where one ends, the next begins, of another caption and from noise alone.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from captions import tells_colors
from denoising import noise_free, noised, some_captions
from language import Language
from latents import Batch, Latents
from scenes import Scene

LAST = 999
STRIDES = (25, 75)  # timesteps of a picture's steps: of 50, twenty are a whole way
GUIDANCE = 5.0  # what pictures are drawn with
OTHER_SHARE, OTHER_GUIDANCE = 0.3, (3.0, 8.0)  # of pictures guided otherwise
STIRRED_SHARE = 0.3  # of pictures whose noise is partly drawn anew at every step


@dataclass
class Rollout:
    """A batch of pictures of one size, x (B, 4, h, w) at `timesteps` (B,).

    Per picture: its scene, or None where the caption leaves a colour out (B,); the
    conditioning, how far a step goes down, the guidance, and how much of the noise's
    amplitude is drawn anew at every step (both (B, 1, 1, 1)).
    """

    x: torch.Tensor
    timesteps: torch.Tensor
    asked: np.ndarray
    context: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor
    strides: torch.Tensor
    guidance: torch.Tensor
    stirred: torch.Tensor

    @property
    def question(self) -> tuple[torch.Tensor, ...]:
        """Return what a model's predictions are asked with."""
        return (self.x, self.timesteps, self.context, self.pooled, self.time_ids)

    def step(
        self, u: torch.Tensor, c: torch.Tensor, source: torch.Generator
    ) -> torch.Tensor:
        """Go down as the predictions say: u without caption, c with it.

        Returns the noise-free latents (B, 4, h, w) that they see.
        """
        noise = u + self.guidance * (c - u)
        clean = noise_free(self.x, noise, self.timesteps)
        fresh = torch.randn(noise.shape, generator=source)
        noise = (1 - self.stirred**2).sqrt() * noise + self.stirred * fresh
        self.timesteps = self.timesteps - self.strides
        self.x = noised(clean, noise, self.timesteps.clamp(min=0))
        return clean


class Rollouts:
    """A rollout of `count` pictures for every size of picture in `data`."""

    def __init__(self, data: Latents, language: Language, count: int) -> None:
        self.data, self.language, self.count = data, language, count
        self.of: dict[tuple[int, ...], Rollout] = {}

    @torch.no_grad()
    def next(self, rng: random.Random, source: torch.Generator) -> Rollout:
        """Return the rollout of one size, the size chosen by its share in the data."""
        size = self.data.any_size(rng)
        if size not in self.of:
            self.of[size] = self._underway(size, rng, source)
        rollout = self.of[size]
        over = rollout.timesteps < 0
        if over.any():
            batch = self.data.batch(rng, int(over.sum()), size)
            replace_some(rollout, over, self._begin(batch, rng, source))
        return rollout

    @torch.no_grad()
    def begin(
        self, size: tuple[int, ...], rng: random.Random, source: torch.Generator
    ) -> Rollout:
        """Return new pictures of a size, all of them noise."""
        return self._begin(self.data.batch(rng, self.count, size), rng, source)

    def _underway(
        self, size: tuple[int, ...], rng: random.Random, source: torch.Generator
    ) -> Rollout:
        """Begin a batch at all places of the way, from noised drawings."""
        batch = self.data.batch(rng, self.count, size)
        rollout = self._begin(batch, rng, source)
        rollout.timesteps = torch.randint(
            LAST + 1, (len(batch.scenes),), generator=source
        )
        rollout.x = noised(batch.latents, rollout.x, rollout.timesteps)
        return rollout

    def _begin(
        self, batch: Batch, rng: random.Random, source: torch.Generator
    ) -> Rollout:
        """Begin at noise alone."""
        count = len(batch.scenes)
        texts = some_captions(batch.scenes, rng)
        context, pooled = self.language(texts)
        draws = torch.rand(4, count, 1, 1, 1, generator=source)
        low, high = OTHER_GUIDANCE
        other = low + (high - low) * draws[1]
        return Rollout(
            x=torch.randn(batch.latents.shape, generator=source),
            timesteps=torch.full((count,), LAST),
            asked=scenes_told(batch.scenes, texts),
            context=context,
            pooled=pooled,
            time_ids=batch.time_ids,
            strides=torch.randint(*STRIDES, (count,), generator=source),
            guidance=torch.where(draws[0] < OTHER_SHARE, other, GUIDANCE),
            stirred=torch.where(draws[2] < STIRRED_SHARE, draws[3], 0.0),
        )


def replace_some(on: object, where: torch.Tensor, others: object) -> None:
    """Put the pictures of `others`, as many, in the places of `on` where `where` (B,).

    Both of one class, all of whose fields are arrays (B, ...).
    """
    for name, value in vars(on).items():
        places = where if isinstance(value, torch.Tensor) else where.numpy()
        value[places] = getattr(others, name)


def scenes_told(scenes: Sequence[Scene], texts: Sequence[str]) -> np.ndarray:
    """Return scenes (B,), or None in place of those whose text leaves a colour out."""
    told = np.empty(len(scenes), object)
    for n, (scene, text) in enumerate(zip(scenes, texts, strict=True)):
        told[n] = scene if tells_colors(text, scene) else None
    return told
