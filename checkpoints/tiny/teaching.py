"""Lessons for the refiner, made of pictures.

Design: lessons begin at places of low noise, mostly at those that the base came
through, and half the time at the one that is usually handed over. Noise drawn anew
tells nothing of where the base was going, so that colours must be read from the
caption; so they must where a lesson begins with colours that are off. From there
lessons go on as the refiner's own steps lead (as DAgger has it: Ross et al. 2011), to
the same end; so its last steps learn to make good what its first did wrong.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from denoising import SIGMAS, noise_free, noised
from pictures import HIGHEST_TIMESTEP, Picture
from rollouts import replace_some

BEST_SCORE, WORST_SCORE = 6.0, 1.0
BEST_SHARE = 0.6  # of lessons that ask for the best
PAIRS = 2  # how often pictures of pairs are taken; others once
SEEN_SHARE = 0.9  # of starts with the base's pictures, at places that it came through
LAST, LAST_SHARE = 2, 0.8  # steps that are mostly left to the refiner, and how often


@dataclass
class Lesson:
    """What is asked and what is in it: each (B, ...), of one size of picture.

    x at `timesteps`; the latents that are in x, and those that the caption asks for;
    the scores that are asked for, and how far a step goes down.
    """

    x: torch.Tensor
    timesteps: torch.Tensor
    latents: torch.Tensor
    righted: torch.Tensor
    context: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor
    scores: torch.Tensor
    strides: torch.Tensor

    def step(self, noise: torch.Tensor) -> None:
        """Go down as the predicted noise (B, 4, h, w) says.

        So much of the noise as goes, goes of what should not be in x.
        """
        clean = noise_free(self.x, noise, self.timesteps)
        low = self.timesteps - self.strides
        left = SIGMAS[low.clamp(min=0)] / SIGMAS[self.timesteps]
        left = left[:, None, None, None]
        self.latents = torch.lerp(self.righted, self.latents, left)
        self.x, self.timesteps = noised(clean, noise, low.clamp(min=0)), low


class Teaching:
    """Lessons of every size of picture."""

    def __init__(self, pictures: Mapping[tuple[int, ...], Sequence[Picture]]) -> None:
        self.pictures = {
            size: (some, [PAIRS if one.pair else 1 for one in some])
            for size, some in pictures.items()
        }
        self.lessons: dict[tuple[int, ...], Lesson] = {}

    @torch.no_grad()
    def lesson(self, count: int, rng: random.Random, source: torch.Generator) -> Lesson:
        """Return the lesson of one size, `count` pictures.

        What its steps have brought to the end is replaced by what begins.
        """
        counts = [len(some) for some, _ in self.pictures.values()]
        (size,) = rng.choices(list(self.pictures), counts)
        if size not in self.lessons:
            self.lessons[size] = self._begin(self.pictures[size], count, rng, source)
        lesson = self.lessons[size]
        over = lesson.timesteps < 0
        if over.any():
            begun = self._begin(self.pictures[size], int(over.sum()), rng, source)
            replace_some(lesson, over, begun)
        return lesson

    def _begin(
        self,
        known: tuple[Sequence[Picture], Sequence[int]],
        count: int,
        rng: random.Random,
        source: torch.Generator,
    ) -> Lesson:
        """Begin at places of low noise with some of the known pictures, by weight."""
        pictures = rng.choices(*known, k=count)
        latents = torch.stack([picture.latents for picture in pictures])
        timesteps = torch.randint(HIGHEST_TIMESTEP, (count,), generator=source)
        x = noised(latents, torch.randn(latents.shape, generator=source), timesteps)
        for n, picture in enumerate(pictures):
            if picture.seen and rng.random() < SEEN_SHARE:
                usual = rng.random() < LAST_SHARE
                place = picture.seen[-LAST] if usual else rng.choice(picture.seen)
                x[n], timesteps[n] = place
        names = ("righted", "context", "pooled", "time_ids")
        told = {n: torch.stack([getattr(p, n) for p in pictures]) for n in names}
        draws = torch.rand(2, count, generator=source)
        worse = torch.where(draws[0] < BEST_SHARE, 0.0, draws[1])
        return Lesson(
            x=x,
            timesteps=timesteps,
            latents=latents,
            scores=BEST_SCORE - (BEST_SCORE - WORST_SCORE) * worse,
            strides=torch.tensor([picture.stride for picture in pictures]),
            **told,
        )
