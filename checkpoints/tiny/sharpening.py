"""Train the refiner's decoder: pictures of the same latents, with steeper edges.

Design: a refiner has an autoencoder of its own, with which its pictures are decoded.
Steeper edges cannot be asked of its denoiser: those that the encoder has for a
sharpened picture are mostly decoded to one that is farther from it than before, and
shapes are lost on the way. So the decoder learns to draw what the base's decoder draws,
sharpened; for the base's own pictures, with colours put right, and for drawings, some
of them softened as scores below the best ask for. The encoder stays, and so do the
latents.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from autoencoder import edges, load_vae
from diffusers import AutoencoderKL
from latents import sharpened, softened
from mending import decoded
from networks import make_vae, start_folder
from pictures import Picture, load_pictures
from training import LossOf, Stage, load_average, run_stage

BATCH, PARTS = 16, 2
SHARPER = 0.6  # how much of what edges stand out is added to them
SOFT_SHARE, SOFTEST = 0.3, 0.5  # of pictures that are soft, and how much they keep
SEEDS_FROM = 68_000_000


def train_sharp_vae(
    work: Path, *, steps: int, rate: float = 1e-4, **running: object
) -> AutoencoderKL:
    """Train (or resume) the stage `sharpen`, from the decoder that there is."""
    torch.manual_seed(8)
    vae = start_sharp_vae(work)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(requires_grad=False)
    teacher = load_vae(work).eval().requires_grad_(requires_grad=False)
    stage = Stage(
        vae,
        sharpening_loss(vae, teacher, load_pictures(work)),
        steps=steps,
        rate=rate,
        threads=PARTS,
        state_file=work / "sharpen.pt",
    )
    run_stage(stage, **running)
    return vae


def start_sharp_vae(work: Path) -> AutoencoderKL:
    """Return the autoencoder that `work` has for its refiner, or else the base's."""
    folder = start_folder(work, "refiner") / "vae"
    return AutoencoderKL.from_pretrained(folder) if folder.exists() else load_vae(work)


def load_sharp_vae(work: Path) -> AutoencoderKL:
    """Return the trained autoencoder of the refiner, or that which it starts from."""
    if not (work / "sharpen.pt").exists():
        return start_sharp_vae(work)
    vae = make_vae()
    load_average(work / "sharpen.pt", vae)
    return vae


def sharpening_loss(
    vae: AutoencoderKL,
    teacher: AutoencoderKL,
    pictures: Mapping[tuple[int, ...], Sequence[Picture]],
) -> LossOf:
    """Return the loss of a step: of pixels, and of the steps between them."""
    counts = [len(some) for some in pictures.values()]

    def loss_of(step: int, part: int) -> dict[str, torch.Tensor]:
        seed = SEEDS_FROM + PARTS * step + part
        rng, source = random.Random(seed), torch.Generator().manual_seed(seed)
        (some,) = rng.choices(list(pictures.values()), counts)
        count = BATCH // PARTS
        latents = torch.stack([p.righted for p in rng.choices(some, k=count)])
        draws = torch.rand(2, count, generator=source)
        kept = SOFTEST + (1 - SOFTEST) * draws[0]
        latents = softened(latents, torch.where(draws[1] < SOFT_SHARE, kept, 1.0))
        with torch.no_grad():
            wanted = sharpened(decoded(teacher, latents).clamp(-1, 1), SHARPER)
        drawn = decoded(vae, latents)
        l1 = (drawn - wanted).abs().mean()
        pairs = zip(edges(drawn), edges(wanted), strict=True)
        slopes = sum((a - b).abs().mean() for a, b in pairs)
        return {"loss": l1 + slopes, "l1": l1}

    return loss_of
