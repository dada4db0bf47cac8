"""Train the refiner: the last fifth of the process, told how good a picture should be.

Design: the base teaches it. What it is to predict is the noise that leaves the picture
that the guided base sees, with a share of its edges kept, by the aesthetic score: so it
changes nothing but the edges. It is run at a guidance of 5 between a score and 2.5,
which overshoots that share; the share therefore falls slowly at first, so that 6 gives
edges a fifteenth more than the base's, of which pictures take no harm, and 1 little
more than half of them. That guided prediction is held to what it should be as well, as
in `calibrating`: it is what pictures are made of, and stains count more in it.

Most of the latents come out of guided steps of the base. The refiner reads the second
encoder alone, and has no zeroed branch: an empty text stands against the caption.
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from calibrating import STAIN, STAIN_WEIGHT
from captions import caption
from denoising import (
    SIGMAS,
    Model,
    guided_steps,
    load_base,
    noise_free,
    noise_of,
    noised,
)
from diffusers import UNet2DConditionModel
from language import SECOND, Language
from latents import Batch, Latents
from networks import make_refiner_unet, start_folder
from rollouts import GUIDANCE
from torch import nn
from training import LossOf, Stage, load_average, run_stage

BATCH, PARTS = 16, 2
EMPTY_SHARE = 0.1
HIGHEST_TIMESTEP = 200
NEGATIVE_SCORE = 2.5  # what the refiner is run with
BEST_SCORE, WORST_SCORE = 6.0, 1.0
SOFTEST, FALL = 0.1, 5  # what the worst score takes off edges; how late others follow
BASE_SHARE, BASE_GUIDANCE = 0.75, (4.0, 6.0)  # of latents, from steps of the base
CLEAR = 0.2  # sigma up to which what is wrong with the picture counts, not the noise
SEEDS_FROM = 60_000_000


class Refiner(nn.Module):
    """The refiner's denoiser; the text encoder is the base's second, as it is."""

    def __init__(self) -> None:
        super().__init__()
        self.unet: UNet2DConditionModel = make_refiner_unet()

    def noise_in(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Predict the noise in x (B, 4, h, w); time_ids (B, 5) end with the score."""
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return self.unet(x, timesteps, context, added_cond_kwargs=added).sample


def train_refiner(
    work: Path, *, steps: int, rate: float = 1e-3, **running: object
) -> Refiner:
    """Train (or resume) the stage `refiner`, with the encoder of the base."""
    torch.manual_seed(5)
    base = load_base(work).eval().requires_grad_(requires_grad=False)
    refiner = start_refiner(work)
    stage = Stage(
        refiner,
        refiner_loss(refiner, base, Latents(work)),
        steps=steps,
        rate=rate,
        threads=PARTS,
        state_file=work / "refiner.pt",
    )
    run_stage(stage, **running)
    return refiner


def start_refiner(work: Path) -> Refiner:
    """Return a new refiner, or the one that `work` starts from."""
    refiner, folder = Refiner(), start_folder(work, "refiner")
    if folder.exists():
        refiner.unet = UNet2DConditionModel.from_pretrained(folder / "unet").train()
    return refiner


def load_refiner(work: Path) -> Refiner:
    """Return the averaged refiner of `work`."""
    refiner = Refiner()
    load_average(work / "refiner.pt", refiner)
    return refiner


def refiner_loss(refiner: Refiner, base: Model, data: Latents) -> LossOf:
    """Return the loss of a step: of a score's prediction, 2.5's, and both guided."""

    def loss_of(step: int, part: int) -> dict[str, torch.Tensor]:
        seed = SEEDS_FROM + PARTS * step + part
        rng, source = random.Random(seed), torch.Generator().manual_seed(seed)
        batch = data.batch(rng, BATCH // PARTS)
        count = len(batch.scenes)
        texts = [caption(scene, rng) for scene in batch.scenes]
        told = ["" if rng.random() < EMPTY_SHARE else text for text in texts]
        timesteps = torch.randint(0, HIGHEST_TIMESTEP, (count,), generator=source)
        noise = torch.randn(batch.latents.shape, generator=source)
        x = noised(batch.latents, noise, timesteps)
        scores = torch.rand(count, generator=source)
        scores = WORST_SCORE + (BEST_SCORE - WORST_SCORE) * scores
        scores[::2] = BEST_SCORE
        negative = torch.full_like(scores, NEGATIVE_SCORE)
        with torch.no_grad():
            text = second_encoding(base.language, told + [""] * count)
            told_base = base.language(texts)
            n = math.ceil(BASE_SHARE * count)
            where = (batch, noise, timesteps, told_base, source, n)
            x[:n] = guided_steps(base, *where, guidance=BASE_GUIDANCE)
            u, c = base.both_noises_in(x, timesteps, *told_base, batch.time_ids)
            seen = noise_free(x, u + GUIDANCE * (c - u), timesteps)
        ids = [refiner_ids(batch, asked) for asked in (scores, negative)]
        twice = torch.cat((x, x)), torch.cat((timesteps, timesteps))
        found, low = refiner.noise_in(*twice, *text, torch.cat(ids)).chunk(2)
        guided = low + GUIDANCE * (found - low)
        kept, least = edges_kept(scores), edges_kept(negative)
        wanted = [
            noise_of(x, softened(seen, share), timesteps)
            for share in (kept, least, least + GUIDANCE * (kept - least))
        ]
        off = guided - wanted[2]
        errors = (found - wanted[0]).square() + (low - wanted[1]).square()
        stains = nn.functional.avg_pool2d(off, STAIN).square().mean((1, 2, 3))
        errors = (errors + off.square()).mean((1, 2, 3)) + STAIN_WEIGHT * stains
        weights = (SIGMAS[timesteps] / CLEAR).square().clamp(max=1)
        loss = (errors * weights).mean()
        return {"loss": loss, "guided": (off.square().mean((1, 2, 3)) * weights).mean()}

    return loss_of


def edges_kept(scores: torch.Tensor) -> torch.Tensor:
    """Return the share of edges that a score (B,) keeps: 1 at 6, 0.9 at 1."""
    worse = (BEST_SCORE - scores) / (BEST_SCORE - WORST_SCORE)
    return 1 - SOFTEST * worse**FALL


def second_encoding(
    language: Language, texts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the second encoder's context (B, 77, 32) and pooled (B, 32)."""
    ids = torch.from_numpy(SECOND(texts)[0]).long()
    two = language.second(ids, output_hidden_states=True)
    return two.hidden_states[-2], two.text_embeds


def softened(latents: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Keep a share (B,) of what stands out from the mean of a cell's neighbourhood."""
    mean = nn.functional.avg_pool2d(latents, 3, 1, 1, count_include_pad=False)
    return torch.lerp(mean, latents, kept[:, None, None, None])


def refiner_ids(batch: Batch, scores: torch.Tensor) -> torch.Tensor:
    """Return original size, crop and score (B, 5)."""
    return torch.cat((batch.time_ids[:, :4], scores[:, None]), 1)
