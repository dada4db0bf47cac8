"""Train the refiner: the last fifth of the process, told how good a picture should be.

Design: the aesthetic score is how sharp a picture is. Latents are softened on the way,
each drawing's by as much as its score says: 6 is the drawing, 1 what a 3x3 mean leaves
of it. So 6 against 2.5, which the refiner is run with, leads away from soft edges. It
reads the second encoder alone, and always a caption: it has no zeroed branch.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from captions import caption
from denoising import KEPT, MIN_SNR, load_base, noised
from diffusers import UNet2DConditionModel
from language import SECOND, Language
from latents import Batch, Latents
from networks import make_refiner_unet
from torch import nn
from training import LossOf, Stage, load_average, run_stage

BATCH, PARTS = 32, 2
EMPTY_SHARE = 0.1
HIGHEST_TIMESTEP = 200
SEEDS_FROM = 60_000_000
SHARP_SHARE = 0.4  # of drawings that are left as they are


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
    language = load_base(work).language.eval().requires_grad_(requires_grad=False)
    refiner = Refiner()
    stage = Stage(
        refiner,
        refiner_loss(refiner, language, Latents(work)),
        steps=steps,
        rate=rate,
        threads=PARTS,
        state_file=work / "refiner.pt",
    )
    run_stage(stage, **running)
    return refiner


def load_refiner(work: Path) -> Refiner:
    """Return the averaged refiner of `work`."""
    refiner = Refiner()
    load_average(work / "refiner.pt", refiner)
    return refiner


def refiner_loss(refiner: Refiner, language: Language, data: Latents) -> LossOf:
    """Return the loss of a step."""

    def loss_of(step: int, part: int) -> dict[str, torch.Tensor]:
        seed = SEEDS_FROM + PARTS * step + part
        rng, source = random.Random(seed), torch.Generator().manual_seed(seed)
        batch = data.batch(rng, BATCH // PARTS)
        empty = [rng.random() < EMPTY_SHARE for _ in batch.scenes]
        texts = [
            "" if none else caption(scene, rng)
            for scene, none in zip(batch.scenes, empty, strict=True)
        ]
        with torch.no_grad():
            context, pooled = second_encoding(language, texts)
        count = len(texts)
        timesteps = torch.randint(0, HIGHEST_TIMESTEP, (count,), generator=source)
        noise = torch.randn(batch.latents.shape, generator=source)
        kept = [1 if rng.random() < SHARP_SHARE else rng.random() for _ in texts]
        x = noised(softened(batch.latents, kept), noise, timesteps)
        ids = refiner_ids(batch, kept, rng)
        found = refiner.noise_in(x, timesteps, context, pooled, ids)
        errors = (found - noise).square().mean((1, 2, 3))
        snr = (KEPT / (1 - KEPT)).float()[timesteps]
        return {"loss": (errors * (MIN_SNR / snr).clamp(max=1)).mean()}

    return loss_of


def second_encoding(
    language: Language, texts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the second encoder's context (B, 77, 32) and pooled (B, 32)."""
    ids = torch.from_numpy(SECOND(texts)[0]).long()
    two = language.second(ids, output_hidden_states=True)
    return two.hidden_states[-2], two.text_embeds


def softened(latents: torch.Tensor, kept: list[float]) -> torch.Tensor:
    """Keep a share of what stands out from the mean of each cell's neighbourhood."""
    mean = nn.functional.avg_pool2d(latents, 3, 1, 1, count_include_pad=False)
    return torch.lerp(mean, latents, torch.tensor(kept)[:, None, None, None])


def refiner_ids(batch: Batch, kept: list[float], rng: random.Random) -> torch.Tensor:
    """Return original size, crop and score (B, 5); the size tells nothing of blur.

    The original size is given as if nothing had been enlarged, so that the score alone
    says how soft a picture is: by its original, and by what was kept of its edges.
    """
    rows = []
    for figures, share in zip(batch.time_ids.tolist(), kept, strict=True):
        h, w, top, left, height, width = figures
        sharp = share * min(1.0, h / height, w / width)
        score = 1 + 5 * sharp + rng.gauss(0, 0.3)
        rows.append((max(h, height), max(w, width), top, left, score))
    return torch.tensor(rows, dtype=torch.float32)
