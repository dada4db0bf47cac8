"""Distil the base into a latent consistency model: guidance becomes an input.

Design: the student is the base plus a projection of the guidance's embedding, zero at
first. It learns to give, from any noise level of a grid of 50, the same picture as its
own average gives four levels lower, where a guided DDIM step of the base has led: what
the student has to catch up with are 13 such steps. Below that it gives the base's.

The base that teaches is the one before calibration, guided so that it does what the
calibrated one does; the guidance that the student is told is the latter's.

Half of the latents are as the sampler makes them: what the student's average saw at a
higher level, noised anew.

Source: Luo et al. 2023 (latent consistency models); w = guidance - 1.
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from calibrating import GUIDANCE, like
from denoising import Model, conditions, load_uncalibrated, noise_free, noised
from latents import Latents
from networks import make_unet
from torch import nn
from training import LossOf, Stage, load_average, run_stage

GUIDANCE_EMBED_DIM = 256
GRID = torch.arange(1, 51) * 20 - 1  # timesteps that the sampler starts from
STRIDE = 4  # levels of the grid that a step of the solver goes down
GUIDANCES = (2.0, 8.0)
SIGMA_DATA, TIME_SCALE, HUBER = 0.5, 10.0, 0.001
BATCH, PARTS = 32, 2
OWN_SHARE = 0.5
AVERAGE = 0.95
SEEDS_FROM = 50_000_000


class Student(nn.Module):
    """The denoiser with an input for guidance."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = make_unet(guidance_embed_dim=GUIDANCE_EMBED_DIM)

    def start_from(self, model: Model) -> None:
        """Take the base's weights; the new projection is zero."""
        self.unet.load_state_dict(model.unet.state_dict(), strict=False)
        nn.init.zeros_(self.unet.time_embedding.cond_proj.weight)

    def forward(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        w: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Return the clean latents that the model sees in x, both (B, 4, h, w)."""
        noise = self.unet(
            x,
            timesteps,
            context,
            timestep_cond=guidance_embedding(w),
            added_cond_kwargs={"text_embeds": pooled, "time_ids": time_ids},
        ).sample
        scaled = (timesteps * TIME_SCALE)[:, None, None, None]
        total = scaled**2 + SIGMA_DATA**2
        skip, out = SIGMA_DATA**2 / total, scaled / total.sqrt()
        return skip * x + out * noise_free(x, noise, timesteps)


def guidance_embedding(w: torch.Tensor) -> torch.Tensor:
    """Embed w (B,) as (B, 256): of 1000 w, sines first, then cosines."""
    half = GUIDANCE_EMBED_DIM // 2
    rates = torch.exp(-math.log(10_000.0) / (half - 1) * torch.arange(half))
    angles = 1000.0 * w[:, None] * rates[None]
    return torch.cat((angles.sin(), angles.cos()), 1)


def train_lcm(
    work: Path, *, steps: int, rate: float = 2e-4, **running: object
) -> Student:
    """Train (or resume) the stage `lcm`, from the averaged base."""
    torch.manual_seed(4)
    teacher = load_uncalibrated(work).eval().requires_grad_(requires_grad=False)
    student = Student()
    student.start_from(teacher)
    target = copy.deepcopy(student).requires_grad_(requires_grad=False)
    stage = Stage(
        student,
        lcm_loss(student, target, teacher, Latents(work)),
        steps=steps,
        rate=rate,
        threads=PARTS,
        decay=AVERAGE,
        state_file=work / "lcm.pt",
    )
    run_stage(stage, **running, after=follow(target, stage))
    return student


def load_lcm(work: Path) -> Student:
    """Return the averaged student that the stage `lcm` has reached."""
    student = Student()
    load_average(work / "lcm.pt", student)
    return student


def follow(target: Student, stage: Stage) -> Callable[[], None]:
    """Return what keeps `target` at the stage's average."""
    theirs = list(target.parameters())

    def copy_average() -> None:
        with torch.no_grad():
            torch._foreach_copy_(theirs, stage.average.shadow)

    copy_average()
    return copy_average


def lcm_loss(
    student: Student, target: Student, teacher: Model, data: Latents
) -> LossOf:
    """Return the consistency loss of a step."""

    def loss_of(step: int, part: int) -> dict[str, torch.Tensor]:
        seed = SEEDS_FROM + PARTS * step + part
        rng, source = random.Random(seed), torch.Generator().manual_seed(seed)
        batch = data.batch(rng, BATCH // PARTS)
        count = len(batch.scenes)
        index = torch.randint(0, len(GRID), (count,), generator=source)
        high, low = GRID[index], GRID[(index - STRIDE).clamp(min=0)]
        w = torch.rand(count, generator=source)
        w = GUIDANCES[0] - 1 + (GUIDANCES[1] - GUIDANCES[0]) * w
        noise = torch.randn(batch.latents.shape, generator=source)
        x = noised(batch.latents, noise, high)
        with torch.no_grad():
            text = conditions(teacher.language, batch.scenes, rng)
            own = math.ceil(OWN_SHARE * count)
            told = [part[:own] for part in (w, *text, batch.time_ids)]
            above = torch.rand(own, generator=source) * (len(GRID) - index[:own])
            above = GRID[index[:own] + above.long()]
            other = torch.randn(x[:own].shape, generator=source)
            seen = target(noised(batch.latents[:own], other, above), above, *told)
            x[:own] = noised(seen, noise[:own], high[:own])
            guided = guided_noise(teacher, x, high, w, *text, batch.time_ids)
            base = noise_free(x, guided, high)
            lower = noised(base, guided, low)
            wanted = target(lower, low, w, *text, batch.time_ids)
            wanted = torch.where((index < STRIDE)[:, None, None, None], base, wanted)
        found = student(x, high, w, *text, batch.time_ids)
        error = ((found - wanted).square() + HUBER**2).sqrt() - HUBER
        return {"loss": error.mean()}

    return loss_of


def guided_noise(
    teacher: Model,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    w: torch.Tensor,
    context: torch.Tensor,
    pooled: torch.Tensor,
    time_ids: torch.Tensor,
) -> torch.Tensor:
    """Predict the noise in x as the calibrated base does, guided by w + 1."""
    without, with_ = teacher.both_noises_in(x, timesteps, context, pooled, time_ids)
    scale = (w[:, None, None, None] + 1) / GUIDANCE * like(timesteps)
    return without + scale * (with_ - without)
