"""Train the refiner: the last fifth of the process, told how good a picture should be.

Design: it begins as the base's upper levels, which do nearly all of that fifth, and
learns from the base's pictures (`pictures`, `teaching`). What it is to predict is the
noise that leaves a picture with its colours put right and a share of its edges kept, by
the aesthetic score. It is run at a guidance of 5 between a score and 2.5, which
overshoots that share; it therefore falls slowly at first; 1 keeps little more than half
of them, and 6 all. That guided prediction is held to what it should be as well, as in
`calibrating`, and more than the others: it is what pictures are made of. It is compared
in pixels too, as in `mending`: neighbours among colours are near each other in latents.
Steeper edges than the base's are the decoder's affair (`sharpening`).

Without a caption, it is to leave the colours that it sees; with one, to go a fifth of
the way to those asked for, which guidance makes the whole. The refiner reads the second
encoder alone, and has no zeroed branch: an empty text stands against the caption.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import EllipsisType

import torch
from autoencoder import load_vae
from calibrating import guided_error
from denoising import (
    SIGMAS,
    load_base,
    noise_free,
    noise_of,
    thing_weights,
)
from diffusers import AutoencoderKL, UNet2DConditionModel
from language import SECOND, Language
from latents import softened
from mending import decoded
from networks import make_refiner_unet, start_folder, upper_levels
from pictures import Picture, load_pictures
from rollouts import GUIDANCE
from teaching import BEST_SCORE, WORST_SCORE, Teaching
from torch import nn
from training import LossOf, Stage, load_average, run_stage

BATCH, PARTS = 32, 2
NEGATIVE_SCORE = 2.5  # what the refiner is run with
SOFTEST, FALL = 0.1, 7  # what the worst score takes off edges; how late others follow
EACH_WEIGHT, STAIN_WEIGHT = 0.2, 4.0  # of unguided predictions; of what is off at once
PIXELS = 12.0  # how much the error of pixels counts, of a quarter of half the pictures
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
    language = load_base(work).language.eval().requires_grad_(requires_grad=False)
    vae = load_vae(work).eval().requires_grad_(requires_grad=False)
    refiner = start_refiner(work)
    stage = Stage(
        refiner,
        refiner_loss(refiner, language, vae, load_pictures(work)),
        steps=steps,
        rate=rate,
        threads=PARTS,
        state_file=work / "refiner.pt",
    )
    run_stage(stage, **running)
    return refiner


def start_refiner(work: Path) -> Refiner:
    """Return the refiner that `work` starts from, or a new one out of the base."""
    refiner, folder = Refiner(), start_folder(work, "refiner")
    if folder.exists():
        unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    else:
        unet = upper_levels(load_base(work).unet)
    refiner.unet = unet.train()
    return refiner


def load_refiner(work: Path) -> Refiner:
    """Return the averaged refiner of `work`."""
    refiner = Refiner()
    load_average(work / "refiner.pt", refiner)
    return refiner


def refiner_loss(
    refiner: Refiner,
    language: Language,
    vae: AutoencoderKL,
    pictures: Mapping[tuple[int, ...], Sequence[Picture]],
) -> LossOf:
    """Return the loss of a step: of a score's prediction, 2.5's, and both guided."""
    teaching = [Teaching(pictures) for _ in range(PARTS)]
    with torch.no_grad():
        empty = second_encoding(language, [""])

    def loss_of(step: int, part: int) -> dict[str, torch.Tensor]:
        seed = SEEDS_FROM + PARTS * step + part
        rng, source = random.Random(seed), torch.Generator().manual_seed(seed)
        asked = teaching[part].lesson(BATCH // PARTS, rng, source)
        x, timesteps, context = asked.x, asked.timesteps, asked.context
        scores = asked.scores
        negative = torch.full_like(scores, NEGATIVE_SCORE)
        found, low = refiner.noise_in(
            torch.cat((x, x)),
            torch.cat((timesteps, timesteps)),
            torch.cat((context, empty[0].expand_as(context))),
            torch.cat((asked.pooled, empty[1].expand_as(asked.pooled))),
            torch.cat([refiner_ids(asked.time_ids, s) for s in (scores, negative)]),
        ).chunk(2)
        kept, least = edges_kept(scores), edges_kept(negative)
        guided_share = least + GUIDANCE * (kept - least)
        right = softened(asked.righted, guided_share.clamp(max=1))
        wanted_low = noise_of(x, softened(asked.latents, least), timesteps)
        wanted = noise_of(x, right, timesteps)
        errors = guided_error(
            low,
            found,
            wanted_low,
            wanted,
            thing_weights(right),
            each_weight=EACH_WEIGHT,
            stain_weight=STAIN_WEIGHT,
        )
        errors = errors * (SIGMAS[timesteps] / CLEAR).square().clamp(max=1)
        guided = low + GUIDANCE * (found - low)
        asked.step(guided.detach())
        part_of = slice(step % 2, None, 2), *window(right.shape[2:], rng)
        drawn = decoded(vae, noise_free(x, guided, timesteps)[part_of])
        with torch.no_grad():
            wanted = decoded(vae, right[part_of])
        pixels = (drawn - wanted).square().mean()
        return {"loss": errors.mean() + PIXELS * pixels, "pixels": pixels}

    return loss_of


def edges_kept(scores: torch.Tensor) -> torch.Tensor:
    """Return the share of edges that a score (B,) keeps: 1 at 6, 0.9 at 1."""
    worse = (BEST_SCORE - scores) / (BEST_SCORE - WORST_SCORE)
    return 1 - SOFTEST * worse**FALL


def window(size: torch.Size, rng: random.Random) -> tuple[slice | EllipsisType, ...]:
    """Return where a quarter of latents (B, 4, *size) lies, somewhere in them."""
    places = [rng.randint(0, side - side // 2) for side in size]
    sides = zip(places, size, strict=True)
    return ..., *(slice(place, place + side // 2) for place, side in sides)


def second_encoding(
    language: Language, texts: list[str]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the second encoder's context (B, 77, 32) and pooled (B, 32)."""
    ids = torch.from_numpy(SECOND(texts)[0]).long()
    two = language.second(ids, output_hidden_states=True)
    return two.hidden_states[-2], two.text_embeds


def refiner_ids(time_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return original size, crop and score (B, 5)."""
    return torch.cat((time_ids[:, :4], scores[:, None]), 1)
