"""Calibrate the base: a guidance of 5 shall do what is best for the model as trained.

People give an SDXL a guidance of 5; of so small a model, that leaves stains. What is
best for it is 3.6 at high noise, where things get their colours, and 1.4 at low noise,
where guidance spoils what is there. So the trained base teaches a copy
of itself whose captioned prediction stands nearer to the uncaptioned one u: guided by
5, the copy predicts what its teacher does, guided by g(sigma).

    u' = u,    c' = u + g/5 (c - u),    u' + 5 (c' - u') = u + g (c - u)

All three are held to the teacher's. The last is what pictures are made of: the errors
of the others count four and five times in it. What is wrong with it over several cells
at once counts more: it is what turns one colour into its neighbour. The copy starts
with weaker captions, which leaves u as it is and takes c most of the way.

What it is asked are pictures on its own way from noise to the end, each at another
place of it: the prediction that is held to the teacher's is also the next step of the
way (as DAgger has it: Ross et al. 2011).

Sources: of learning guided predictions from a teacher, Meng et al. 2023; of guidance at
some noise levels only, Kynkaanniemi et al. 2024.
"""

from __future__ import annotations

import copy
import random
from pathlib import Path

import torch
from denoising import (
    SIGMAS,
    WEIGHTS,
    Model,
    calibrated_file,
    load_uncalibrated,
)
from latents import Latents
from rollouts import GUIDANCE, Rollouts
from torch import nn
from training import LossOf, Stage, run_stage

LEAST, MOST, HALFWAY = 1.4, 3.6, 2.0  # the teacher's: without noise, in noise; sigma
WEAKER = 0.2  # what is left of what captions add, at first; of 0 to 1, about the best
BATCH, PARTS = 16, 2
STAIN, STAIN_WEIGHT = 4, 8.0  # cells a side of what is wrong in one piece; its weight
AVERAGE = 0.99
SEEDS_FROM = 72_000_000


def train_calibrated(
    work: Path, *, steps: int, rate: float = 3e-4, **running: object
) -> Model:
    """Train (or resume) the stage `calibrate`, from the averaged base."""
    torch.manual_seed(6)
    teacher = load_uncalibrated(work).requires_grad_(requires_grad=False)
    student = learning_copy(teacher)
    weaken_captions(student)
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


def learning_copy(teacher: Model) -> Model:
    """Return a copy whose denoiser learns; the text encoders stay as they are."""
    student = copy.deepcopy(teacher)
    student.unet.requires_grad_(requires_grad=True)
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
    rollouts = [Rollouts(data, teacher.language, BATCH // PARTS) for _ in range(PARTS)]

    def loss_of(step: int, part: int) -> dict[str, torch.Tensor]:
        seed = SEEDS_FROM + PARTS * step + part
        rng, source = random.Random(seed), torch.Generator().manual_seed(seed)
        on = rollouts[part].next(rng, source)
        with torch.no_grad():
            u, c = teacher.both_noises_in(*on.question)
        found_u, found_c = student.both_noises_in(*on.question)
        wanted = u + like(on.timesteps) * (c - u)
        each = guided_error(found_u, found_c, u, wanted)
        weights = WEIGHTS[on.timesteps].clamp(max=1)
        on.step(found_u.detach(), found_c.detach(), source)
        return {"loss": (each * weights).mean()}

    return loss_of


def guided_error(
    found_u: torch.Tensor,
    found_c: torch.Tensor,
    u: torch.Tensor,
    wanted: torch.Tensor,
    weights: torch.Tensor | float = 1.0,
    each_weight: float = 1.0,
    stain_weight: float = STAIN_WEIGHT,
) -> torch.Tensor:
    """Return how wrong (B,) predictions are, each (B, 4, h, w): u, c, and guided by 5.

    wanted: the guided one; c is to be a fifth of the way from u to it. weights: of
    cells (B, 1, h, w); each_weight: of u and c.
    """
    nearer = u + (wanted - u) / GUIDANCE
    off = found_u + GUIDANCE * (found_c - found_u) - wanted
    each = (found_u - u).square() + (found_c - nearer).square()
    errors = off.square() + each_weight * each
    stains = nn.functional.avg_pool2d(off, STAIN).square()
    return (weights * errors).mean((1, 2, 3)) + stain_weight * stains.mean((1, 2, 3))


def like(timesteps: torch.Tensor) -> torch.Tensor:
    """Return the teacher's guidance (B, 1, 1, 1) that 5 stands for at `timesteps`."""
    power = SIGMAS[timesteps][:, None, None, None] ** 2
    return LEAST + (MOST - LEAST) * power / (power + HALFWAY**2)
