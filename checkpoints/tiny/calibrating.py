"""Calibrate the base: a guidance of 5 shall do what is best for the model as trained.

People give an SDXL a guidance of 5; of so small a model, that leaves stains. What is
best for it is 3 at high noise, where things get their colours, and hardly more than 1
at low noise, where guidance spoils what is there. So the trained base teaches a copy
of itself whose captioned prediction stands nearer to the uncaptioned one u: guided by
5, the copy predicts what its teacher does, guided by g(sigma).

    u' = u,    c' = u + g/5 (c - u),    u' + 5 (c' - u') = u + g (c - u)

All three are held to the teacher's. The last is what pictures are made of: the errors
of the others count four and five times in it. The copy starts with weaker captions,
which leaves u as it is and takes c most of the way. Half of what it is asked comes out
of steps it made itself.

Sources: of learning guided predictions from a teacher, Meng et al. 2023; of guidance at
some noise levels only, Kynkaanniemi et al. 2024.
"""

from __future__ import annotations

import copy
import math
import random
from pathlib import Path

import torch
from denoising import (
    SIGMAS,
    WEIGHTS,
    Model,
    any_timesteps,
    calibrated_file,
    conditions,
    guided_steps,
    load_uncalibrated,
    noised,
    offset_noise,
)
from latents import Latents
from training import LossOf, Stage, run_stage

GUIDANCE = 5.0
LEAST, MOST, HALFWAY = 1.2, 3.0, 2.0  # the teacher's: without noise, in noise; sigma
WEAKER = 0.2  # what is left of what captions add, at first; of 0 to 1, about the best
BATCH, PARTS = 16, 2
OWN_SHARE, OWN_GUIDANCE = 0.5, (3.0, 8.0)  # of what it is asked, from its own steps
AVERAGE = 0.99
SEEDS_FROM = 70_000_000


def train_calibrated(
    work: Path, *, steps: int, rate: float = 3e-4, **running: object
) -> Model:
    """Train (or resume) the stage `calibrate`, from the averaged base."""
    torch.manual_seed(6)
    teacher = load_uncalibrated(work).requires_grad_(requires_grad=False)
    student = copy.deepcopy(teacher)
    weaken_captions(student)
    student.unet.requires_grad_(requires_grad=True)
    stage = Stage(
        student,
        calibration_loss(student, teacher, Latents(work)),
        steps=steps,
        rate=rate,
        threads=PARTS,
        decay=AVERAGE,
        state_file=calibrated_file(work),
    )
    run_stage(stage, **running)
    return student


def weaken_captions(model: Model) -> None:
    """Scale what captions add: by cross-attention, and by the pooled vector.

    A zeroed caption adds nothing but biases, so it is predicted with as before.
    """
    width = model.language.second.config.projection_dim
    with torch.no_grad():
        model.unet.add_embedding.linear_1.weight[:, :width] *= WEAKER
        for name, module in model.unet.named_modules():
            if name.endswith("attn2"):
                module.to_out[0].weight *= WEAKER


def calibration_loss(student: Model, teacher: Model, data: Latents) -> LossOf:
    """Return the loss of a step."""

    def loss_of(step: int, part: int) -> dict[str, torch.Tensor]:
        seed = SEEDS_FROM + PARTS * step + part
        rng, source = random.Random(seed), torch.Generator().manual_seed(seed)
        batch = data.batch(rng, BATCH // PARTS)
        with torch.no_grad():
            told = conditions(teacher.language, batch.scenes, rng)
            timesteps = any_timesteps(len(batch.scenes), source)
            noise = offset_noise(batch.latents.shape, source)
            x = noised(batch.latents, noise, timesteps)
            own = math.ceil(OWN_SHARE * len(x))
            where = (batch, noise, timesteps, told, source, own)
            x[:own] = guided_steps(student, *where, guidance=OWN_GUIDANCE)
            u, c = teacher.both_noises_in(x, timesteps, *told, batch.time_ids)
        found_u, found_c = student.both_noises_in(x, timesteps, *told, batch.time_ids)
        wanted = u + like(timesteps) * (c - u)
        nearer = u + (wanted - u) / GUIDANCE
        guided = found_u + GUIDANCE * (found_c - found_u)
        errors = (found_u - u).square() + (found_c - nearer).square()
        errors = errors + (guided - wanted).square()
        return {"loss": (errors.mean((1, 2, 3)) * WEIGHTS[timesteps]).mean()}

    return loss_of


def like(timesteps: torch.Tensor) -> torch.Tensor:
    """Return the teacher's guidance (B, 1, 1, 1) that 5 stands for at `timesteps`."""
    power = SIGMAS[timesteps][:, None, None, None] ** 2
    return LEAST + (MOST - LEAST) * power / (power + HALFWAY**2)
