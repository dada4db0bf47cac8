"""Train the calibrated base on, from drawings, so that 5 stays the best guidance.

Design: calibration left u and c', predictions without and with a caption, which stand
for those of a denoiser that is trained as usual, u and c (`calibrating`):

    c = u + 5/g (c' - u),    u + 5 (c' - u) = u + g (c - u)

So u and c are held to the noise that is in the drawing, as a denoiser's are, and the
guided prediction gets better along with them: there is no teacher whose quality it
could not exceed. As in `calibrating`, what is wrong over several cells at once counts
more with a caption, which says what colour they have; without one it can't be known.

Half of the pictures come out of guided steps of the model itself, as in `denoising`. A
quarter hold what the model must not believe: things partly of other colours and shapes
than the caption says, as where its first steps went wrong. Without a caption there is
nothing else to believe, so there it learns nothing from them; guided, it is to find the
drawing as it should have been.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from calibrating import STAIN, like
from denoising import (
    SIGMAS,
    THING_SHARE,
    WEIGHTS,
    Model,
    any_timesteps,
    conditions,
    guided_file,
    guided_steps,
    load_base,
    noise_of,
    noised,
    offset_noise,
    thing_weights,
)
from latents import Latents
from rollouts import GUIDANCE
from torch import nn
from training import LossOf, Stage, run_stage

BATCH, PARTS = 24, 2
OWN_SHARE = 0.5  # of pictures, from the model's own steps
OWN_GUIDANCE = (3.0, 7.0)
ALTERED_SHARE = 0.25  # of pictures, with things that the caption does not say
SEEN = 0.5  # sigma at which what is seen may be half of another picture, at most
STAIN_WEIGHT = 4.0
SEEDS_FROM = 76_000_000


def train_guided(
    work: Path, *, steps: int, rate: float = 6e-4, **running: object
) -> Model:
    """Train (or resume) the stage `guided`, from the calibrated base."""
    torch.manual_seed(7)
    model = load_base(work)
    stage = Stage(
        model,
        guided_loss(model, Latents(work), steps),
        steps=steps,
        rate=rate,
        groups=model.groups(rate),
        threads=PARTS,
        state_file=guided_file(work),
    )
    run_stage(stage, **running)
    return model


def guided_loss(model: Model, data: Latents, steps: int, count: int = BATCH) -> LossOf:
    """Return the loss of a step; the text encoders learn on every fourth."""

    def loss_of(step: int, part: int) -> dict[str, torch.Tensor]:
        seed = SEEDS_FROM + PARTS * step + part
        rng, source = random.Random(seed), torch.Generator().manual_seed(seed)
        batch = data.batch(rng, count // PARTS)
        with torch.set_grad_enabled(step % 4 == 0):
            told = conditions(model.language, batch.scenes, rng)
        timesteps = any_timesteps(len(batch.scenes), source)
        noise = offset_noise(batch.latents.shape, source)
        other = torch.arange(len(noise)) >= len(noise) * (1 - ALTERED_SHARE)
        other = other[:, None, None, None]
        share = other * altered_share(timesteps, source)
        x = noised(batch.latents.lerp(batch.altered, share), noise, timesteps)
        n = math.ceil(OWN_SHARE * len(x))
        where = (batch, noise, timesteps, told, source, n)
        x[:n] = guided_steps(model, *where, guidance=OWN_GUIDANCE)
        noise = noise_of(x, batch.latents, timesteps)
        u, c = model.both_noises_in(x, timesteps, *told, batch.time_ids)
        u_seen = torch.where(other, u.detach(), u)
        c = u_seen + GUIDANCE / torch.where(other, 1, like(timesteps)) * (c - u_seen)
        errors = (c - noise).square() + ~other * (u - noise).square()
        if step < THING_SHARE * steps:
            errors = errors * thing_weights(batch.latents)
        stains = nn.functional.avg_pool2d(c - noise, STAIN).square().mean((1, 2, 3))
        each = errors.mean((1, 2, 3)) + STAIN_WEIGHT * stains
        weights = WEIGHTS[timesteps]
        return {"loss": (each * weights).mean(), "stains": (stains * weights).mean()}

    return loss_of


def altered_share(timesteps: torch.Tensor, source: torch.Generator) -> torch.Tensor:
    """Draw how much (B, 1, 1, 1) of what is seen is another picture: less the later."""
    sigmas = SIGMAS[timesteps][:, None, None, None]
    return torch.rand(sigmas.shape, generator=source) * sigmas / (sigmas + SEEN)
