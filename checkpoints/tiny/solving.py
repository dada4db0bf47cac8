"""Pictures that the base draws step by step, and what was seen on the way to each.

Design: solving the base's process from noise gives, for every place on the way, the
picture it leads to: as many lessons for a model of few steps as there were steps, each
for two evaluations of the base. A batch of ways is always under way; whole ones go to a
pool, out of which lessons are drawn a few times each before they are forgotten.

A way's end is not the last of its caption: a model of few steps draws a picture at
once, noises that anew, less, and draws again. So does the next way begin, from what the
model would have drawn at the beginning of this one.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch
from denoising import Model, conditions, noise_free, noised
from latents import Latents
from rollouts import GUIDANCE, LAST

STRIDES = (40, 80)  # timesteps of a solver's step
FALLS = (180, 300)  # timesteps from one way's beginning to the next's: of four, 250
WHOLE, AT_FIRST = 300, 32  # ways in the pool: at most, and before the first lesson
START_SHARE = 0.65  # of lessons, from where a way began
OTHER_SHARE, OTHER_GUIDANCE = 0.5, (2.0, 8.0)  # of ways guided otherwise than by 5

Predicts = Callable[..., torch.Tensor]
"""From x (B, 4, h, w), timesteps (B,), w (B,), context, pooled, time_ids: as x."""


@dataclass
class Way:
    """One picture: its conditioning, latents and timesteps seen so far, the end."""

    told: tuple[torch.Tensor, ...]
    stride: int
    seen: list[tuple[torch.Tensor, int]]
    end: torch.Tensor | None = None


@dataclass(frozen=True)
class Lessons:
    """What is asked and what is right: x at timesteps (B,), wanted, both (B, 4, h, w).

    told: w (B,), context, pooled, time_ids.
    """

    x: torch.Tensor
    timesteps: torch.Tensor
    told: tuple[torch.Tensor, ...]
    wanted: torch.Tensor


class Solving:
    """Ways of pictures of every size in `data`, `count` of each under way.

    `noise_in` predicts the noise as the guided base does, `draws` the picture as the
    model of few steps does.
    """

    def __init__(
        self,
        data: Latents,
        teacher: Model,
        noise_in: Predicts,
        draws: Predicts,
        count: int,
    ) -> None:
        self.data, self.teacher, self.count = data, teacher, count
        self.noise_in, self.draws = noise_in, draws
        self.under_way: dict[tuple[int, ...], list[Way]] = {}
        self.whole: dict[tuple[int, ...], deque[Way]] = {}

    @torch.no_grad()
    def lessons(
        self, count: int, rng: random.Random, source: torch.Generator
    ) -> Lessons:
        """Go a step on with pictures of one size; return lessons of that size."""
        size = self.data.any_size(rng)
        whole = self.whole.setdefault(size, deque(maxlen=WHOLE))
        self.go_on(size, rng, source)
        while len(whole) < AT_FIRST:
            self.go_on(size, rng, source)
        ways = [rng.choice(whole) for _ in range(count)]
        first = [rng.random() < START_SHARE for _ in ways]
        seen = [
            way.seen[0] if at else rng.choice(way.seen)
            for way, at in zip(ways, first, strict=True)
        ]
        return Lessons(
            x=torch.stack([x for x, _ in seen]),
            timesteps=torch.tensor([timestep for _, timestep in seen]),
            told=stacked(ways),
            wanted=torch.stack([way.end for way in ways]),
        )

    def go_on(
        self, size: tuple[int, ...], rng: random.Random, source: torch.Generator
    ) -> None:
        """Take a solver's step with all pictures of a size that are under way."""
        if size not in self.under_way:
            self.under_way[size] = self.begin(
                size, self.count, rng, source, under_way=True
            )
        ways = self.under_way[size]
        x = torch.stack([way.seen[-1][0] for way in ways])
        timesteps = torch.tensor([way.seen[-1][1] for way in ways])
        noise = self.noise_in(x, timesteps, *stacked(ways))
        clean = noise_free(x, noise, timesteps)
        lower = timesteps - torch.tensor([way.stride for way in ways])
        x = noised(clean, noise, lower.clamp(min=0))
        over = []
        for n, timestep in enumerate(lower.tolist()):
            if timestep >= 0:
                ways[n].seen.append((x[n], timestep))
            else:
                ways[n].end = clean[n]
                over.append(ways[n])
        if over:
            self.whole[size].extend(over)
            going = [way for way in ways if way.end is None]
            self.under_way[size] = going + self.after(over, size, rng, source)

    def after(
        self,
        over: list[Way],
        size: tuple[int, ...],
        rng: random.Random,
        source: torch.Generator,
    ) -> list[Way]:
        """Begin as many ways as are over: lower, or of another caption."""
        lower = [way.seen[0][1] - rng.randint(*FALLS) for way in over]
        again = [(way, low) for way, low in zip(over, lower, strict=True) if low > 0]
        begun = []
        if again:
            x = torch.stack([way.seen[0][0] for way, _ in again])
            timesteps = torch.tensor([way.seen[0][1] for way, _ in again])
            drawn = self.draws(x, timesteps, *stacked([way for way, _ in again]))
            noise = torch.randn(drawn.shape, generator=source)
            x = noised(drawn, noise, torch.tensor([low for _, low in again]))
            begun = [
                Way(way.told, rng.randint(*STRIDES), [(x[n], low)])
                for n, (way, low) in enumerate(again)
            ]
        new = len(over) - len(again)
        return begun + (self.begin(size, new, rng, source) if new else [])

    def begin(
        self,
        size: tuple[int, ...],
        count: int,
        rng: random.Random,
        source: torch.Generator,
        *,
        under_way: bool = False,
    ) -> list[Way]:
        """Begin at noise alone, or all along the way at noised drawings."""
        batch = self.data.batch(rng, count, size)
        context, pooled = conditions(self.teacher.language, batch.scenes, rng)
        low, high = OTHER_GUIDANCE
        draws = torch.rand(2, count, generator=source)
        other = low + (high - low) * draws[1]
        w = torch.where(draws[0] < OTHER_SHARE, other, GUIDANCE) - 1
        x = torch.randn(batch.latents.shape, generator=source)
        timesteps = torch.full((count,), LAST)
        if under_way:
            timesteps = torch.randint(LAST + 1, (count,), generator=source)
            x = noised(batch.latents, x, timesteps)
        return [
            Way((w[n], context[n], pooled[n], batch.time_ids[n]), stride, [(x[n], at)])
            for n, (stride, at) in enumerate(
                (rng.randint(*STRIDES), at) for at in timesteps.tolist()
            )
        ]


def stacked(ways: list[Way]) -> tuple[torch.Tensor, ...]:
    """Return the conditioning of ways as a batch."""
    return tuple(map(torch.stack, zip(*(way.told for way in ways), strict=True)))
