"""Draw held-out prompts with the trained networks in torch, for the judge to look at.

It is the trainer's own check, with a plain Euler sampler; the figures of the model card
come from the MindSpore runner.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from captions import plain_caption
from denoising import KEPT, Model
from diffusers import AutoencoderKL
from scenes import Scene, draw_scene

HELD_OUT_FROM = 90_000_000


def held_out(count: int) -> list[Scene]:
    """Return scenes of combinations that training never saw."""
    return [draw_scene(HELD_OUT_FROM + i, held_out=True) for i in range(count)]


@torch.no_grad()
def pictures(
    model: Model,
    vae: AutoencoderKL,
    texts: Sequence[str],
    *,
    steps: int = 20,
    guidance: float = 5.0,
    time_ids: tuple[int, ...] = (128, 128, 0, 0, 128, 128),
    seed: int = 0,
    count: int = 25,
) -> Iterator[np.ndarray]:
    """Yield a uint8 picture (H, W, 3) for every text, `count` at a time."""
    sigmas = ((1 - KEPT) / KEPT).sqrt()
    timesteps = [int(999 - 999 * i / steps) for i in range(steps)]
    ladder = [*(float(sigmas[t]) for t in timesteps), 0.0]
    for first in range(0, len(texts), count):
        some = list(texts[first : first + count])
        source = torch.Generator().manual_seed(seed + first)
        size = (len(some), 4, time_ids[4] // 8, time_ids[5] // 8)
        x = torch.randn(size, generator=source) * (ladder[0] ** 2 + 1) ** 0.5
        context, pooled = model.language(some)
        context = torch.cat((torch.zeros_like(context), context))
        pooled = torch.cat((torch.zeros_like(pooled), pooled))
        ids = torch.tensor(time_ids, dtype=torch.float32).expand(len(context), -1)
        for i, timestep in enumerate(timesteps):
            scaled = x / (ladder[i] ** 2 + 1) ** 0.5
            t = torch.full((len(context),), timestep)
            noise = model.noise_in(torch.cat((scaled, scaled)), t, context, pooled, ids)
            without, with_ = noise.chunk(2)
            x = x + (without + guidance * (with_ - without)) * (
                ladder[i + 1] - ladder[i]
            )
        decoded = vae.decode(x / vae.config.scaling_factor).sample
        levels = ((decoded / 2 + 0.5).clamp(0, 1) * 255).round().byte()
        yield from levels.permute(0, 2, 3, 1).numpy()


def sheet(images: Sequence[np.ndarray], columns: int = 10) -> np.ndarray:
    """Lay pictures of one size out as one picture."""
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    rows = [row for row in rows if len(row) == columns]
    return np.concatenate([np.concatenate(row, 1) for row in rows], 0)


def prompts(scenes: Sequence[Scene]) -> list[str]:
    """Return the one caption per scene that the evaluation uses."""
    return [plain_caption(scene) for scene in scenes]
