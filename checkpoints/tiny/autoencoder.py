"""Train the f=8 autoencoder on drawings, then give its latents mean 0 and variance 1.

Design: it learns on 64x64 windows, which cost a quarter of a picture, and ends on
whole ones. Latents get a little noise before decoding, so that the decoder forgives
what a denoiser gets slightly wrong.
"""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from drawing import View, pixels
from networks import SCALE_FACTOR, make_vae, start_vae
from scenes import Scene, draw_scene
from training import LossOf, Stage, load_average, run_stage

KL_WEIGHT = 1e-4
LATENT_NOISE = 0.05
SEEDS_FROM = 10_000_000
WHOLE_SHARE = 0.15
PARTS = 2


def train_vae(
    work: Path, *, steps: int, rate: float = 1e-3, **running: object
) -> AutoencoderKL:
    """Train (or resume) the stage `vae` and return it with whitened latents."""
    torch.manual_seed(1)
    vae = start_vae(work)
    loss_of = vae_loss(vae, steps)
    stage = Stage(
        vae,
        loss_of,
        steps=steps,
        rate=rate,
        threads=PARTS,
        state_file=work / "vae.pt",
    )
    run_stage(stage, **running)
    return whiten(vae)


def train_decoder(
    work: Path, *, steps: int, rate: float = 5e-4, **running: object
) -> AutoencoderKL:
    """Train the decoder on alone: latents, and what learned from them, stay valid."""
    torch.manual_seed(6)
    vae = whitened(work)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(requires_grad=False)
    stage = Stage(
        vae,
        vae_loss(vae, steps),
        steps=steps,
        rate=rate,
        threads=PARTS,
        state_file=work / "decoder.pt",
    )
    run_stage(stage, **running)
    return vae


def whitened(work: Path) -> AutoencoderKL:
    """Return the autoencoder that the stage `vae` left in `work`, whitened."""
    vae = make_vae()
    load_average(work / "vae.pt", vae)
    return whiten(vae)


def load_vae(work: Path) -> AutoencoderKL:
    """Return the trained autoencoder of `work`, with its later decoder if any."""
    if (work / "decoder.pt").exists():
        vae = make_vae()
        load_average(work / "decoder.pt", vae)
        return vae
    return whitened(work) if (work / "vae.pt").exists() else start_vae(work)


def vae_loss(vae: AutoencoderKL, steps: int) -> LossOf:
    def loss_of(step: int, part: int) -> dict[str, torch.Tensor]:
        seed = SEEDS_FROM + PARTS * step + part
        rng, source = random.Random(seed), torch.Generator().manual_seed(seed)
        whole = step > steps * (1 - WHOLE_SHARE)
        x = torch.from_numpy(_batch(rng, (4 if whole else 16) // PARTS, whole=whole))
        with torch.autocast("cpu", torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.sample(source)
            blur = LATENT_NOISE * z.detach().float().std()
            y = vae.decode(z + blur * torch.randn(z.shape, generator=source)).sample
        y, weight = y.float(), _weight(x)
        kl = posterior.kl().float().mean() / z[0].numel()
        l1 = (weight * (y - x).abs()).mean()
        l2 = (weight * (y - x).square()).mean()
        pairs = zip(edges(y), edges(x), strict=True)
        slopes = sum((a - b).abs().mean() for a, b in pairs)
        loss = l1 + 2 * l2 + 0.5 * slopes + KL_WEIGHT * kl
        return {"loss": loss, "l1": l1, "kl": kl}

    return loss_of


def _weight(x: torch.Tensor) -> torch.Tensor:
    """Return (B, 1, H, W): 4 where a picture differs from its most common colour."""
    ground = x.flatten(2).median(-1).values[..., None, None]
    return 1 + 3 * ((x - ground).abs().amax(1, keepdim=True) > 0.15).float()


def edges(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the steps between pixels (..., H, W): across, and down."""
    return x[..., 1:] - x[..., :-1], x[..., 1:, :] - x[..., :-1, :]


def _batch(rng: random.Random, count: int, *, whole: bool) -> np.ndarray:
    scenes = [draw_scene(rng.getrandbits(40)) for _ in range(count)]
    return np.stack([pixels(s, View() if whole else _window(s, rng)) for s in scenes])


def _window(scene: Scene, rng: random.Random) -> View:
    """Return a 64x64 window near one of the things."""
    thing = rng.choice(scene.things)
    left = round(thing.x * 128 - 32 + rng.gauss(0, 16))
    top = round(thing.y * 128 - 32 + rng.gauss(0, 16))
    blur = rng.uniform(0.25, 0.9) if rng.random() < 0.15 else 1.0
    return View(width=64, height=64, left=left, top=top, resolution=blur)


@torch.no_grad()
def whiten(vae: AutoencoderKL, pictures: int = 256) -> AutoencoderKL:
    """Fold a 4x4 whitening of the latents into the 1x1 convolutions around them.

    Afterwards the latents of drawings, times the scale factor, have mean 0 and the unit
    matrix as covariance over pictures and places; decoded pictures are what they were.
    """
    rng = random.Random(SEEDS_FROM - 1)
    moments = []
    for _ in range(pictures // 16):
        x = torch.from_numpy(_batch(rng, 16, whole=True))
        z = vae.encode(x).latent_dist.mean
        moments.append(z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]))
    z = torch.cat(moments).double()
    mean = z.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(z.T))
    inverse = vectors @ torch.diag(values.sqrt()) @ vectors.T * SCALE_FACTOR
    forward = torch.linalg.inv(inverse)
    before, after = vae.quant_conv, vae.post_quant_conv
    weight, bias = before.weight[:4, :, 0, 0].double(), before.bias[:4].double()
    before.weight[:4, :, 0, 0] = (forward @ weight).float()
    before.bias[:4] = (forward @ (bias - mean)).float()
    gain = torch.log(forward.abs().sum(1)) * 2
    before.bias[4:] += gain.float()
    weight = after.weight[:, :, 0, 0].double()
    after.bias += (weight @ mean).float()
    after.weight[:, :, 0, 0] = (weight @ inverse).float()
    return vae
