"""Pictures for the refiner to learn from: such as the base draws, and drawings.

Design: the base draws a batch from noise to its end, as it is run; the end is kept,
with the places of low noise that it came through. What the base has left of the noise
there is of its own making, and tells where it was going; noise drawn anew tells
nothing, so that colours must be read from the caption. Lessons begin at both, and
mostly at what the refiner is handed: the base's own places. From there they go on as
the refiner's own steps lead (as DAgger has it: Ross et al. 2011), to the same end; so
its last steps learn to make good what its first did wrong.

An end's colours are put right, as in `mending`, but only where they are wrong or nearly
so, for what is recoloured loses some of its shape. How it would be sharper is found in
pixels, for in latents, what is sharpened changes its colour.

What a wrong colour would change is kept as well, where all things have one colour: some
lessons begin with colours that are off by a part of that, which the caption alone can
tell. Else it is hardly ever needed, and never read. In pairs, so small a network would
take one thing for the other.
"""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from denoising import KEPT, SIGMAS, Model, noise_free, noised, some_captions
from diffusers import AutoencoderKL
from latents import Latents, sharpened
from mending import added_by, decoded, in_color
from rollouts import Rollouts, replace_some, scenes_told
from scenes import OBJECT_COLORS, Scene

HIGHEST_TIMESTEP = 200
STRIDES = (40, 60)  # timesteps of steps: of 50, twenty are a whole way
USUAL_STRIDE = 50  # of every other batch that the base draws
BEST_SCORE, WORST_SCORE = 6.0, 1.0
BEST_SHARE = 0.5  # of lessons that ask for the best
DRAWN, DRAWINGS = 16, 4  # pictures that are added at a time: the base's, and drawings
KEPT_PICTURES = 600  # at most, of a size
SEEN_SHARE = 0.8  # of starts with the base's pictures, at places that it came through
NEAR = 0.6  # of the distance to other colours, up to which one is right
SHARPER = 0.75  # how much of what edges stand out is added to them
OFF_SHARE, MOST_OFF = 0.25, 0.35  # of starts with a colour that is off, and how far


@dataclass(frozen=True)
class Picture:
    """One picture: its latents, and what they should be with the right colours.

    latents, righted, off, sharper (4, h, w), the last two what wrong colours and
    sharper edges would add; context (77, C), pooled (C,), time_ids (6,); `seen`: x on
    the way to it, and timesteps; how many of these a step takes.
    """

    latents: torch.Tensor
    righted: torch.Tensor
    off: torch.Tensor
    sharper: torch.Tensor
    context: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor
    seen: list[tuple[torch.Tensor, int]]
    stride: int


@dataclass
class Lesson:
    """What is asked and what is in it: each (B, ...), of one size of picture.

    x at `timesteps`; the latents that are in x, those that the caption asks for, what
    makes these sharper; the scores that are asked for, and how far a step goes down.
    """

    x: torch.Tensor
    timesteps: torch.Tensor
    latents: torch.Tensor
    righted: torch.Tensor
    sharper: torch.Tensor
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
    """What the base has drawn of late, and some drawings; lessons; all by size."""

    def __init__(self, base: Model, vae: AutoencoderKL, data: Latents) -> None:
        self.base, self.vae, self.data = base, vae, data
        self.rollouts = Rollouts(data, base.language, DRAWN)
        self.pictures: dict[tuple[int, ...], deque[Picture]] = {}
        self.lessons: dict[tuple[int, ...], Lesson] = {}

    @torch.no_grad()
    def lesson(
        self, count: int, rng: random.Random, source: torch.Generator, *, anew: bool
    ) -> Lesson:
        """Return the lesson of one size, `count` pictures; if anew, add some before.

        What its steps have brought to the end is replaced by what begins.
        """
        size = self.data.any_size(rng)
        known = self.pictures.setdefault(size, deque(maxlen=KEPT_PICTURES))
        if anew or not known:
            known.extend(self._drawn(size, rng, source))
            known.extend(self._drawings(size, rng))
        if size not in self.lessons:
            self.lessons[size] = self._begin(known, count, rng, source)
        lesson = self.lessons[size]
        over = lesson.timesteps < 0
        if over.any():
            begun = self._begin(known, int(over.sum()), rng, source)
            replace_some(lesson, over, begun)
        return lesson

    def _begin(
        self,
        known: Sequence[Picture],
        count: int,
        rng: random.Random,
        source: torch.Generator,
    ) -> Lesson:
        """Begin at places of low noise with some of the known pictures."""
        pictures = rng.choices(known, k=count)
        share = torch.rand(2, count, 1, 1, 1, generator=source)
        share = torch.where(share[0] < OFF_SHARE, MOST_OFF * share[1], 0.0)
        off = share * torch.stack([picture.off for picture in pictures])
        latents = torch.stack([picture.latents for picture in pictures])
        timesteps = torch.randint(HIGHEST_TIMESTEP, (count,), generator=source)
        x = noised(latents, torch.randn(latents.shape, generator=source), timesteps)
        for n, picture in enumerate(pictures):
            if picture.seen and rng.random() < SEEN_SHARE:
                x[n], timesteps[n] = rng.choice(picture.seen)
        names = ("righted", "sharper", "context", "pooled", "time_ids")
        told = {n: torch.stack([getattr(p, n) for p in pictures]) for n in names}
        kept = KEPT.float()[timesteps][:, None, None, None]
        draws = torch.rand(2, count, generator=source)
        worse = torch.where(draws[0] < BEST_SHARE, 0.0, draws[1])
        return Lesson(
            x=x + kept.sqrt() * off,
            timesteps=timesteps,
            latents=latents + off,
            scores=BEST_SCORE - (BEST_SCORE - WORST_SCORE) * worse,
            strides=torch.tensor([picture.stride for picture in pictures]),
            **told,
        )

    def _drawn(
        self, size: tuple[int, ...], rng: random.Random, source: torch.Generator
    ) -> list[Picture]:
        """Have the base draw pictures."""
        on = self.rollouts.begin(size, rng, source)
        stride = rng.choice((USUAL_STRIDE, rng.randint(*STRIDES)))
        on.strides = torch.full_like(on.strides, stride)
        ways: list[tuple[torch.Tensor, torch.Tensor]] = []
        while (on.timesteps >= 0).all():
            if (on.timesteps < HIGHEST_TIMESTEP).all():
                ways.append((on.x, on.timesteps))
            end = on.step(*self.base.both_noises_in(*on.question), source)
        seen = [[(x[n], int(t[n])) for x, t in ways] for n in range(len(end))]
        told = on.context, on.pooled, on.time_ids
        righted = self._recolored(end, on.asked, NEAR)
        strides = [stride] * len(seen)
        return self._pictures(end, righted, on.asked, told, seen, strides, rng)

    def _drawings(self, size: tuple[int, ...], rng: random.Random) -> list[Picture]:
        """Take drawings as they are."""
        batch = self.data.batch(rng, DRAWINGS, size)
        texts = some_captions(batch.scenes, rng)
        told = *self.base.language(texts), batch.time_ids
        asked, none = scenes_told(batch.scenes, texts), [[] for _ in texts]
        strides = [rng.randint(*STRIDES) for _ in texts]
        drawings = batch.latents
        return self._pictures(drawings, drawings, asked, told, none, strides, rng)

    def _pictures(
        self,
        latents: torch.Tensor,
        righted: torch.Tensor,
        asked: np.ndarray,
        told: tuple[torch.Tensor, ...],
        seen: Sequence[list[tuple[torch.Tensor, int]]],
        strides: Sequence[int],
        rng: random.Random,
    ) -> list[Picture]:
        """Find what wrong colours and sharper edges would add to each."""
        wrong = np.empty(len(asked), object)
        for n, scene in enumerate(asked):
            plain = scene is not None and scene.kind != "two"
            wrong[n] = miscolored(scene, rng) if plain else None
        off = self._recolored(latents, wrong) - latents
        sharper = self._sharper(righted)
        each = zip(latents, righted, off, sharper, *told, seen, strides, strict=True)
        return [Picture(*values) for values in each]

    def _recolored(
        self, latents: torch.Tensor, scenes: np.ndarray, near: float = 0.0
    ) -> torch.Tensor:
        """Return latents (B, 4, h, w) in the colours of scenes (B,), if any."""
        where = [n for n, scene in enumerate(scenes) if scene is not None]
        recolored = latents.clone()
        recolored[where] += in_color(self.vae, latents[where], scenes[where], near)[1]
        return recolored

    def _sharper(self, latents: torch.Tensor) -> torch.Tensor:
        """Return what makes latents (B, 4, h, w) those of a sharper picture."""
        pictures = decoded(self.vae, latents).clamp(-1, 1)
        return added_by(self.vae, pictures, sharpened(pictures, SHARPER))


def miscolored(scene: Scene, rng: random.Random) -> Scene:
    """Return the scene with other colours for its things, none the background's."""
    new = {}
    for color in sorted({thing.color for thing in scene.things}):
        taken = (color, scene.background)
        new[color] = rng.choice([name for name in OBJECT_COLORS if name not in taken])
    things = tuple(replace(thing, color=new[thing.color]) for thing in scene.things)
    return replace(scene, things=things)
