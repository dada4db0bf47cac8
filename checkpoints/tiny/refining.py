"""Train the refiner: the last fifth of the process, told how good a picture should be.

Design: the base teaches it. What it is to predict is the noise that leaves the picture
that the guided base sees, with a share of its edges kept, by the aesthetic score: so it
changes nothing but the edges. It is run at a guidance of 5 between a score and 2.5,
which overshoots that share; the share therefore falls slowly at first, so that 6 gives
edges a thirtieth more than the base's at each step (of an eighth, colours and shapes
would take harm), and 1 little more than half of them. That guided prediction is held to
what it should be as well, as in `calibrating`, and more than the others: it is what
pictures are made of.

Most of the latents come out of guided steps of the base. The refiner reads the second
encoder alone, and has no zeroed branch: an empty text stands against the caption.
"""

from __future__ import annotations

import math
import random
from collections import deque
from dataclasses import dataclass
from pathlib import Path

import torch
from calibrating import STAIN
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
from latents import Latents, softened
from networks import make_refiner_unet, start_folder
from rollouts import GUIDANCE
from torch import nn
from training import LossOf, Stage, load_average, run_stage

BATCH, PARTS = 32, 2
EMPTY_SHARE = 0.1
HIGHEST_TIMESTEP = 200
NEGATIVE_SCORE = 2.5  # what the refiner is run with
BEST_SCORE, WORST_SCORE = 6.0, 1.0
SOFTEST, FALL = 0.1, 7  # what the worst score takes off edges; how late others follow
BASE_SHARE, BASE_GUIDANCE = 0.75, (4.0, 6.0)  # of latents, from steps of the base
NEW_SHARE, KEPT_BATCHES, LEAST_BATCHES = 0.33, 60, 4  # of what the base has seen
EACH_WEIGHT, STAIN_WEIGHT = 0.2, 4.0  # of unguided predictions; of what is off at once
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


@dataclass(frozen=True)
class Seen:
    """What the base makes of pictures: each tensor (B, ...), of one size of picture.

    x at `timesteps`, the clean latents that the guided base sees in it, the second
    encoder's context and pooled for the caption, and the size figures.
    """

    x: torch.Tensor
    timesteps: torch.Tensor
    clean: torch.Tensor
    context: torch.Tensor
    pooled: torch.Tensor
    time_ids: torch.Tensor


class Teaching:
    """What the base has seen of late, by size; asking it costs more than learning."""

    def __init__(self, base: Model, data: Latents, count: int) -> None:
        self.base, self.data, self.count = base, data, count
        self.seen: dict[tuple[int, ...], deque[Seen]] = {}

    @torch.no_grad()
    def next(self, rng: random.Random, source: torch.Generator) -> Seen:
        """Return pictures of one size: new ones, or, two in three times, older ones."""
        size = self.data.any_size(rng)
        kept = self.seen.setdefault(size, deque(maxlen=KEPT_BATCHES))
        if len(kept) < LEAST_BATCHES or rng.random() < NEW_SHARE:
            kept.append(self._look(size, rng, source))
            return kept[-1]
        picks = [
            (vars(rng.choice(kept)), rng.randrange(self.count))
            for _ in range(self.count)
        ]
        names = picks[0][0]
        return Seen(
            **{n: torch.stack([seen[n][i] for seen, i in picks]) for n in names}
        )

    def _look(
        self, size: tuple[int, ...], rng: random.Random, source: torch.Generator
    ) -> Seen:
        """Let the base come down to low noise, and look."""
        batch = self.data.batch(rng, self.count, size)
        texts = [caption(scene, rng) for scene in batch.scenes]
        told = ["" if rng.random() < EMPTY_SHARE else text for text in texts]
        timesteps = torch.randint(0, HIGHEST_TIMESTEP, (self.count,), generator=source)
        noise = torch.randn(batch.latents.shape, generator=source)
        x = noised(batch.latents, noise, timesteps)
        told_base = self.base.language(texts)
        n = math.ceil(BASE_SHARE * self.count)
        where = (batch, noise, timesteps, told_base, source, n)
        x[:n] = guided_steps(self.base, *where, guidance=BASE_GUIDANCE)
        u, c = self.base.both_noises_in(x, timesteps, *told_base, batch.time_ids)
        clean = noise_free(x, u + GUIDANCE * (c - u), timesteps)
        context, pooled = second_encoding(self.base.language, told)
        return Seen(x, timesteps, clean, context, pooled, batch.time_ids)


def refiner_loss(refiner: Refiner, base: Model, data: Latents) -> LossOf:
    """Return the loss of a step: of a score's prediction, 2.5's, and both guided."""
    teaching = [Teaching(base, data, BATCH // PARTS) for _ in range(PARTS)]
    with torch.no_grad():
        empty = second_encoding(base.language, [""])

    def loss_of(step: int, part: int) -> dict[str, torch.Tensor]:
        seed = SEEDS_FROM + PARTS * step + part
        rng, source = random.Random(seed), torch.Generator().manual_seed(seed)
        seen = teaching[part].next(rng, source)
        x, timesteps = seen.x, seen.timesteps
        scores = torch.rand(len(x), generator=source)
        scores = WORST_SCORE + (BEST_SCORE - WORST_SCORE) * scores
        scores[::2] = BEST_SCORE
        negative = torch.full_like(scores, NEGATIVE_SCORE)
        found, low = refiner.noise_in(
            torch.cat((x, x)),
            torch.cat((timesteps, timesteps)),
            torch.cat((seen.context, empty[0].expand_as(seen.context))),
            torch.cat((seen.pooled, empty[1].expand_as(seen.pooled))),
            torch.cat([refiner_ids(seen.time_ids, s) for s in (scores, negative)]),
        ).chunk(2)
        kept, least = edges_kept(scores), edges_kept(negative)
        wanted = [
            noise_of(x, softened(seen.clean, share), timesteps)
            for share in (kept, least, least + GUIDANCE * (kept - least))
        ]
        off = low + GUIDANCE * (found - low) - wanted[2]
        each = (found - wanted[0]).square() + (low - wanted[1]).square()
        stains = nn.functional.avg_pool2d(off, STAIN).square().mean((1, 2, 3))
        guided = off.square().mean((1, 2, 3))
        weights = (SIGMAS[timesteps] / CLEAR).square().clamp(max=1)
        errors = guided + EACH_WEIGHT * each.mean((1, 2, 3)) + STAIN_WEIGHT * stains
        return {"loss": (errors * weights).mean(), "guided": (guided * weights).mean()}

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


def refiner_ids(time_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
    """Return original size, crop and score (B, 5)."""
    return torch.cat((time_ids[:, :4], scores[:, None]), 1)
