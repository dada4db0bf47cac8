"""Mend the base's colours: in what it draws itself, things get the colours asked for.

Design: of so small a model, most mistakes are colours taken for their neighbours, which
are settled half way and then kept. So the calibrated base teaches a copy of itself on
the copy's own ways, as in `calibrating`, but what it sees in them is first decoded,
recoloured as the caption says, and encoded again; the copy is to predict the noise that
leaves that. What decoding and encoding alone would change is left out. Its picture is
held to the recoloured one as well, in pixels: neighbours among colours are a tenth as
far from each other in latents as black and white are, in pixels a quarter.

What guidance has taken from small originals is given back, too: of those with less
than 0.6 of the side of the picture, the copy is to see edges the softer the smaller
they are.

In a picture that has not taken shape, and for a caption that leaves a colour out, the
copy is held to its teacher; so is its prediction without a caption, always, but for
those edges.

Source: of correcting a model where its own steps lead it, Ross et al. 2011 (DAgger).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from autoencoder import load_vae
from calibrating import guided_error, learning_copy
from denoising import (
    WEIGHTS,
    Model,
    load_calibrated,
    mended_file,
    noise_free,
    noise_of,
    thing_weights,
)
from diffusers import AutoencoderKL
from latents import Latents, softened
from recoloring import recolored
from rollouts import GUIDANCE, Rollout, Rollouts
from scenes import Scene
from training import LossOf, Stage, run_stage

BATCH, PARTS = 16, 2
SHAPED = 650  # timestep below which a picture has taken shape
ROBUST = 5.0  # how early a picture that is wholly wrong counts less than its error
PIXELS = 3.0  # how much the error of pixels counts
LEAST_KEPT = 0.4  # of edges, for originals next to nothing; rises with their side
AVERAGE = 0.995
SEEDS_FROM = 77_000_000


def train_mended(
    work: Path, *, steps: int, rate: float = 6e-5, **running: object
) -> Model:
    """Train (or resume) the stage `mend`, from the calibrated base."""
    torch.manual_seed(7)
    teacher = load_calibrated(work).requires_grad_(requires_grad=False)
    student = learning_copy(teacher)
    vae = load_vae(work).eval().requires_grad_(requires_grad=False)
    stage = Stage(
        student,
        mending_loss(student, teacher, vae, Latents(work)),
        steps=steps,
        rate=rate,
        threads=PARTS,
        decay=AVERAGE,
        state_file=mended_file(work),
    )
    run_stage(stage, **running)
    return student


def mending_loss(
    student: Model, teacher: Model, vae: AutoencoderKL, data: Latents
) -> LossOf:
    """Return the loss of a step."""
    rollouts = [Rollouts(data, teacher.language, BATCH // PARTS) for _ in range(PARTS)]

    def loss_of(step: int, part: int) -> dict[str, torch.Tensor]:
        seed = SEEDS_FROM + PARTS * step + part
        rng, source = random.Random(seed), torch.Generator().manual_seed(seed)
        on = rollouts[part].next(rng, source)
        with torch.no_grad():
            u, c = teacher.both_noises_in(*on.question)
            guided = u + GUIDANCE * (c - u)
            seen = noise_free(on.x, guided, on.timesteps)
            seen = softened(seen, original_edges(on.time_ids))
            u = u + noise_of(on.x, seen, on.timesteps) - guided
            where = shaped(on)
            pictures, added = in_color(vae, seen[where], on.asked[where.numpy()])
            clean = seen.index_add(0, where, added)
            wanted = noise_of(on.x, clean, on.timesteps)
        found_u, found_c = student.both_noises_in(*on.question)
        each = guided_error(found_u, found_c, u, wanted, thing_weights(clean))
        each = each * WEIGHTS[on.timesteps].clamp(max=1)
        found = found_u + GUIDANCE * (found_c - found_u)
        drawn = decoded(vae, noise_free(on.x, found, on.timesteps)[where])
        off = (drawn - pictures).square().mean((1, 2, 3))
        each = each.index_add(0, where, PIXELS * off)
        on.step(found_u.detach(), found_c.detach(), source)
        pixels = off.sum() / max(1, len(where))
        return {"loss": robust(each).mean(), "pixels": pixels}

    return loss_of


def robust(errors: torch.Tensor) -> torch.Tensor:
    """Let pictures that are wholly wrong count for less than their error."""
    return (ROBUST * errors).log1p() / ROBUST


def shaped(on: Rollout) -> torch.Tensor:
    """Return which pictures have taken shape and are told their colours (N,)."""
    told = torch.tensor([scene is not None for scene in on.asked])
    return torch.nonzero(told & (on.timesteps < SHAPED))[:, 0]


def original_edges(time_ids: torch.Tensor) -> torch.Tensor:
    """Return the share of edges (B,) that originals keep: less below 0.6 of the side.

    time_ids: (B, 6), original size, crop, target size.
    """
    return (LEAST_KEPT + time_ids[:, 0] / time_ids[:, 4]).clamp(max=1)


@torch.no_grad()
def in_color(
    vae: AutoencoderKL,
    latents: torch.Tensor,
    scenes: Sequence[Scene],
    near: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Recolour pictures; return them and what that adds to their latents.

    latents: (B, 4, h, w); near: as in `recolored`. Returns pictures (B, 3, 8 h, 8 w) in
    -1..1 and latents.
    """
    if not len(scenes):
        return decoded(vae, latents), torch.zeros_like(latents)
    before = decoded(vae, latents).clamp(-1, 1)
    pairs = zip(before.permute(0, 2, 3, 1).numpy(), scenes, strict=True)
    after = np.stack([recolored(picture, scene, near) for picture, scene in pairs])
    pictures = torch.from_numpy(after).permute(0, 3, 1, 2)
    return pictures, added_by(vae, before, pictures)


def added_by(
    vae: AutoencoderKL, before: torch.Tensor, after: torch.Tensor
) -> torch.Tensor:
    """Return what a change of pictures (B, 3, H, W) adds to their latents."""
    with torch.autocast("cpu", torch.bfloat16):
        means = vae.encode(torch.cat((before, after))).latent_dist.mean.float()
    old, new = means.chunk(2)
    return (new - old) * vae.config.scaling_factor


def decoded(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Return pictures (B, 3, 8 h, 8 w) of latents (B, 4, h, w)."""
    if not len(latents):
        return latents.new_zeros(0, 3, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        return vae.decode(latents / vae.config.scaling_factor).sample.float()
