"""Distil the base into a latent consistency model: guidance becomes an input.

Design: the student is the base plus a projection of the guidance's embedding, zero at
first. It learns to give, from any place of a way from noise to a picture, the picture.
Things count more than the background, and so does what is wrong over several cells;
some pictures are compared in pixels too, for the sake of colours (see `mending`).
What it is unsure of, it draws soft; its last step is therefore taught a tenth more of
the edges, which makes pictures as sharp as the base's and their colours as full.
One that begins from trained weights (`train.py start`) is first given what the base has
learned since they were made from it: the difference of the base's weights.

Three ways in four begin as the sampler's steps do: at what the student's average drew
from higher up, noised anew.

Source: Luo et al. 2023 (latent consistency models); w = guidance - 1. They learn the
same function from neighbouring places of a way, of which only one step is solved; the
whole way costs no more per place, and a small model needs no other to tell where it
leads (as Luhman & Luhman 2021 distil, from noise alone). Differences of weights as what
was learned: Ilharco et al. 2023 (task vectors).
"""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable
from pathlib import Path

import torch
from autoencoder import load_vae
from calibrating import STAIN
from denoising import Model, load_base, noise_free, start_model, thing_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from latents import Latents, softened
from mending import decoded
from networks import make_unet, start_folder
from solving import Solving
from torch import nn
from training import LossOf, Stage, load_average, run_stage

GUIDANCE_EMBED_DIM = 256
SHARPENED, LAST_STEP = 1.1, 300  # how much of edges, and up to which timestep
SIGMA_DATA, TIME_SCALE, HUBER = 0.5, 10.0, 0.001
BATCH, UNDER_WAY, PARTS = 32, 24, 2
SHOWN = 6  # of a part's pictures, how many are compared in pixels
AVERAGE = 0.95
SEEDS_FROM = 51_000_000


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
    teacher = load_base(work).eval().requires_grad_(requires_grad=False)
    vae = load_vae(work).eval().requires_grad_(requires_grad=False)
    student = start_student(work, teacher)
    target = copy.deepcopy(student).requires_grad_(requires_grad=False)
    stage = Stage(
        student,
        lcm_loss(student, target, teacher, vae, Latents(work)),
        steps=steps,
        rate=rate,
        threads=PARTS,
        decay=AVERAGE,
        state_file=work / "lcm.pt",
    )
    run_stage(stage, **running, after=follow(target, stage))
    return student


def start_student(work: Path, teacher: Model) -> Student:
    """Return the base with a new input, or unpacked weights brought up to the base."""
    student, folder = Student(), start_folder(work, "lcm")
    if not folder.exists():
        student.start_from(teacher)
        return student
    student.unet = UNet2DConditionModel.from_pretrained(folder / "unet").train()
    add_learned(student.unet, start_model(work).unet, teacher.unet)
    return student


@torch.no_grad()
def add_learned(nets: nn.Module, before: nn.Module, now: nn.Module) -> None:
    """Add what has changed from `before` to `now`; parameters of its own stay."""
    then, since = dict(before.named_parameters()), dict(now.named_parameters())
    for name, parameter in nets.named_parameters():
        if name in then:
            parameter += since[name] - then[name]


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
    student: Student,
    target: Student,
    teacher: Model,
    vae: AutoencoderKL,
    data: Latents,
) -> LossOf:
    """Return the loss of a step: how far the student is from where ways have led."""

    def noise_in(x: torch.Tensor, *told: torch.Tensor) -> torch.Tensor:
        return guided_noise(teacher, x, *told)

    solving = [
        Solving(data, teacher, noise_in, target, UNDER_WAY // PARTS)
        for _ in range(PARTS)
    ]

    def loss_of(step: int, part: int) -> dict[str, torch.Tensor]:
        seed = SEEDS_FROM + PARTS * step + part
        rng, source = random.Random(seed), torch.Generator().manual_seed(seed)
        asked = solving[part].lessons(BATCH // PARTS, rng, source)
        kept = torch.where(asked.timesteps < LAST_STEP, SHARPENED, 1.0)
        wanted = softened(asked.wanted, kept)
        drawn = student(asked.x, asked.timesteps, *asked.told)
        off = drawn - wanted
        each = huber(off) * thing_weights(asked.wanted)
        stains = huber(nn.functional.avg_pool2d(off, STAIN))
        with torch.no_grad():
            pictures = decoded(vae, wanted[:SHOWN])
        pixels = huber(decoded(vae, drawn[:SHOWN]) - pictures).mean()
        loss = each.mean() + stains.mean() + pixels
        return {"loss": loss, "stains": stains.mean(), "pixels": pixels}

    return loss_of


def huber(error: torch.Tensor) -> torch.Tensor:
    """Return nearly the absolute error."""
    return (error.square() + HUBER**2).sqrt() - HUBER


def guided_noise(
    teacher: Model,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    w: torch.Tensor,
    context: torch.Tensor,
    pooled: torch.Tensor,
    time_ids: torch.Tensor,
) -> torch.Tensor:
    """Predict the noise in x as the base does, guided by w + 1."""
    without, with_ = teacher.both_noises_in(x, timesteps, context, pooled, time_ids)
    return without + (w[:, None, None, None] + 1) * (with_ - without)
