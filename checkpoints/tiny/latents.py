"""The data of the denoisers: drawings as latents, in chunk files that can be added to.

Design: a chunk holds pictures of one size, their seeds and their size figures. Captions
are not stored: a seed gives back its scene, and the scene is told anew at every step.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL
from drawing import View, pixels
from scenes import Scene, draw_scene
from torch import nn

CHUNK = 128
THREADS = 2
SHARP = 5  # pixels across the neighbourhood that a picture is sharpened by
SEEDS_FROM = 30_000_000
ASPECTS = ((128, 128),) * 6 + ((192, 128), (128, 192))


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """Scenes with their latents (B, 4, h, w), unit variance, and time_ids (B, 6)."""

    scenes: list[Scene]
    latents: torch.Tensor
    time_ids: torch.Tensor


def any_view(rng: random.Random, width: int, height: int) -> View:
    """Draw how a scene is seen: mostly plain, else cropped, blurred or reduced."""
    draw = rng.random()
    if draw < 0.45:
        return View(
            width=width, height=height, canvas_width=width, canvas_height=height
        )
    if draw < 0.7:
        return View(
            width=width,
            height=height,
            canvas_width=width + rng.choice((0, 0, 16, 32, 48)),
            canvas_height=height + rng.choice((0, 0, 16, 32, 48)),
            left=rng.choice((0, rng.randint(0, 40))),
            top=rng.choice((0, rng.randint(0, 40))),
        )
    resolution = rng.uniform(0.12, 0.6) if draw < 0.92 else rng.uniform(1, 8)
    return View(
        width=width,
        height=height,
        canvas_width=width,
        canvas_height=height,
        resolution=resolution,
    )


def add_chunks(
    work: Path,
    vae: AutoencoderKL,
    count: int,
    *,
    hard: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Encode chunks until `work` has `count` of them; `hard` ones alone, if asked."""
    folder = work / "latents"
    folder.mkdir(exist_ok=True)
    there = [int(path.stem) for path in folder.glob("*.npz")]
    first = max(there, default=-1) + 1
    indices = range(first, first + count - len(there))

    def add(index: int) -> float:
        return add_chunk(folder, vae, index, hard=hard)

    with ThreadPoolExecutor(THREADS, "chunk", torch.set_num_threads, (1,)) as pool:
        for index, std in zip(indices, pool.map(add, indices), strict=True):
            if index % 8 == 7:
                say(f"latents {index + 1}/{indices.stop} chunks std {std:.3f}")


@torch.no_grad()
def add_chunk(folder: Path, vae: AutoencoderKL, index: int, *, hard: bool) -> float:
    """Draw and encode a chunk's pictures; return the latents' standard deviation."""
    width, height = ASPECTS[index % len(ASPECTS)]
    rng = random.Random(SEEDS_FROM + index)
    seeds = some_seeds(rng, hard=hard)
    views = [any_view(rng, width, height) for _ in seeds]
    pictures = np.stack(
        [pixels(draw_scene(s), v) for s, v in zip(seeds, views, strict=True)]
    )
    with torch.autocast("cpu", torch.bfloat16):
        means = [
            vae.encode(x).latent_dist.mean.float()
            for x in torch.from_numpy(pictures).split(16)
        ]
    latents = torch.cat(means) * vae.config.scaling_factor
    part = folder / f"{index:05d}.part"
    with part.open("wb") as file:
        np.savez(
            file,
            seeds=np.array(seeds, np.int64),
            latents=latents.numpy().astype(np.float16),
            time_ids=np.array([view.time_ids for view in views], np.float32),
        )
    part.replace(part.with_suffix(".npz"))
    return latents.std().item()


def some_seeds(rng: random.Random, *, hard: bool) -> list[int]:
    """Draw a chunk's seeds; if `hard`, half of pairs and half of patterns."""
    seeds: list[int] = []
    while len(seeds) < CHUNK:
        seed = rng.getrandbits(40)
        if not hard or is_hard(draw_scene(seed), pair=len(seeds) % 2 == 0):
            seeds.append(seed)
    return seeds


def is_hard(scene: Scene, *, pair: bool) -> bool:
    """Tell whether a scene is of the kinds that are learned last: pair, or pattern."""
    return scene.kind == "two" if pair else scene.things[0].texture is not None


class Latents:
    """Every chunk of a folder in memory (2 kB a picture); may grow while it is used."""

    def __init__(self, work: Path) -> None:
        self.folder = work / "latents"
        self.chunks: dict[Path, dict[str, np.ndarray]] = {}
        self.refresh()

    def refresh(self) -> None:
        for path in sorted(self.folder.glob("*.npz")):
            if path not in self.chunks:
                with np.load(path) as file:
                    self.chunks[path] = dict(file)
        shapes: dict[tuple[int, ...], list[dict[str, np.ndarray]]] = {}
        for chunk in self.chunks.values():
            shapes.setdefault(chunk["latents"].shape[2:], []).append(chunk)
        self.shapes = shapes

    def any_size(self, rng: random.Random) -> tuple[int, ...]:
        """Draw a size (h, w) of latents by its share of the data."""
        shares = [len(chunks) for chunks in self.shapes.values()]
        return rng.choices(list(self.shapes), shares)[0]

    def batch(
        self, rng: random.Random, count: int, size: tuple[int, ...] | None = None
    ) -> Batch:
        """Return `count` pictures of one size (h, w), of any when none is given."""
        chunks = self.shapes[size or self.any_size(rng)]
        picks = [(rng.choice(chunks), rng.randrange(CHUNK)) for _ in range(count)]
        latents = np.stack([chunk["latents"][i] for chunk, i in picks])
        time_ids = np.stack([chunk["time_ids"][i] for chunk, i in picks])
        return Batch(
            scenes=[draw_scene(int(chunk["seeds"][i])) for chunk, i in picks],
            latents=torch.from_numpy(latents).float(),
            time_ids=torch.from_numpy(time_ids),
        )


def softened(latents: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Keep a share (B,) of what stands out from the mean of a cell's neighbourhood."""
    mean = nn.functional.avg_pool2d(latents, 3, 1, 1, count_include_pad=False)
    return torch.lerp(mean, latents, kept[:, None, None, None])


def sharpened(pictures: torch.Tensor, amount: float) -> torch.Tensor:
    """Sharpen pictures (B, 3, H, W): an unsharp mask that adds no new colours.

    What a pixel differs by from the mean of its neighbourhood is added `amount` times,
    but never beyond the lightest and the darkest there.
    """
    wide = nn.functional.pad(pictures, (SHARP // 2,) * 4, mode="replicate")
    most = nn.functional.max_pool2d(wide, SHARP, 1)
    least = -nn.functional.max_pool2d(-wide, SHARP, 1)
    mean = nn.functional.avg_pool2d(wide, SHARP, 1)
    sharp = pictures + amount * (pictures - mean)
    return torch.maximum(torch.minimum(sharp, most), least)
