"""Train the base denoiser and its text encoders on noisy latents.

Design: SDXL's own process (scaled-linear betas, 1000 steps, the noise is predicted),
with steps drawn somewhat more often where the layout is decided. Losses are weighted by
min-SNR at low noise, and up to 16 times at high noise: a flat colour that is wrong by
its whole range is an error of 0.5 % in the noise at the first step, and would be
learned last. Captions are dropped to zeros, pooled vector included, as the base model's
unconditional branch has it; some are empty texts, which negative prompts start from.
Cells that hold a thing count more for most of the training: most of a picture is
background, which is learned first.

Three in eight pictures are not noised but come out of steps that the model itself made
at higher noise, guided as pictures are drawn. What it and its guidance have done wrong
there is then in the data, and what is to be predicted is what leads back to the drawing
(as DAgger has it: Ross et al. 2011).

Sources: Podell et al. 2023 (SDXL); Hang et al. 2023 (min-SNR); Guttenberg 2023 (offset
noise), Whitaker 2023 (at several resolutions).
"""

from __future__ import annotations

import math
import random
from pathlib import Path

import torch
from captions import caption
from diffusers import UNet2DConditionModel
from language import Language, load_language
from latents import Batch, Latents
from networks import make_unet, start_folder
from scenes import Scene
from torch import nn
from training import LossOf, Stage, load_average, run_stage
from transformers import CLIPTextModel, CLIPTextModelWithProjection

BATCH, PARTS = 32, 2
MIN_SNR = 5.0
ZERO_SHARE, EMPTY_SHARE = 0.1, 0.03
OFFSET = 0.1
OFFSET_GRIDS = (1, 2, 4)
THING_WEIGHT, THING_SHARE = 3.0, 0.7  # how much cells of things count, and how long
GUIDED_SHARE = 0.375
GUIDED_STEPS, GUIDED_STRIDE = 4, (40, 160)  # how many at most; timesteps of each
GUIDANCE = (1.2, 3.2)
SEEDS_FROM = 41_000_000
BETAS = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
KEPT = torch.cumprod(1 - BETAS, 0)  # share of the signal's power, alpha-bar
SIGMAS = ((1 - KEPT) / KEPT).sqrt().float()
WEIGHTS = (MIN_SNR * SIGMAS**2).clamp(max=1) * (1 + SIGMAS**2).sqrt().clamp(max=4) / 2


class Model(nn.Module):
    """The denoiser and the text encoders, trained together."""

    def __init__(self) -> None:
        super().__init__()
        self.unet = make_unet()
        self.language = Language()

    def groups(self, rate: float) -> list[dict]:
        """Return the optimizer's groups: words learn slower and are not decayed."""
        return [
            {"params": list(self.unet.parameters()), "lr": rate},
            {
                "params": list(self.language.parameters()),
                "lr": rate / 5,
                "weight_decay": 0.0,
            },
        ]

    def noise_in(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> torch.Tensor:
        """Predict the noise in latents x (B, 4, h, w)."""
        added = {"text_embeds": pooled, "time_ids": time_ids}
        return self.unet(x, timesteps, context, added_cond_kwargs=added).sample

    def both_noises_in(
        self,
        x: torch.Tensor,
        timesteps: torch.Tensor,
        context: torch.Tensor,
        pooled: torch.Tensor,
        time_ids: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Predict the noise without a caption and with it, both (B, 4, h, w)."""
        without, with_ = self.noise_in(
            torch.cat((x, x)),
            torch.cat((timesteps, timesteps)),
            torch.cat((torch.zeros_like(context), context)),
            torch.cat((torch.zeros_like(pooled), pooled)),
            torch.cat((time_ids, time_ids)),
        ).chunk(2)
        return without, with_


def train_base(
    work: Path, *, steps: int, rate: float = 1e-3, bf16: bool = False, **running: object
) -> Model:
    """Train (or resume) the stage `base`, from the encoders of `language`."""
    torch.manual_seed(3)
    model = start_model(work)
    stage = Stage(
        model,
        base_loss(model, Latents(work), steps, bf16=bf16),
        steps=steps,
        rate=rate,
        groups=model.groups(rate),
        threads=PARTS,
        state_file=base_file(work),
    )
    run_stage(stage, **running)
    return model


def start_model(work: Path) -> Model:
    """Return what `work` starts from: unpacked weights, or what `language` left."""
    model, folder = Model(), start_folder(work, "base")
    if not folder.exists():
        model.language.load_state_dict(load_language(work).state_dict())
        return model
    model.unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    first = CLIPTextModel.from_pretrained(folder / "text_encoder")
    second = CLIPTextModelWithProjection.from_pretrained(folder / "text_encoder_2")
    model.language.first = first.float().train()
    model.language.second = second.float().train()
    model.unet.train()
    return model


def load_base(work: Path) -> Model:
    """Return the averaged model that the last of the base's stages has reached."""
    return load_first(work, mended_file(work), calibrated_file(work), base_file(work))


def load_calibrated(work: Path) -> Model:
    """Return the averaged base before the stage `mend`."""
    return load_first(work, calibrated_file(work), base_file(work))


def load_uncalibrated(work: Path) -> Model:
    """Return the averaged model that the stage `base` has reached."""
    model = Model()
    load_average(base_file(work), model)
    return model


def load_first(work: Path, *states: Path) -> Model:
    """Return the averaged model of the first state there is, or else the start."""
    for path in states:
        if path.exists():
            model = Model()
            load_average(path, model)
            return model
    return start_model(work)


def base_file(work: Path) -> Path:
    """Name the state of the stage `base`."""
    return work / "base.pt"


def calibrated_file(work: Path) -> Path:
    """Name the state of the stage `calibrate`."""
    return work / "calibrated.pt"


def mended_file(work: Path) -> Path:
    """Name the state of the stage `mend`."""
    return work / "mended.pt"


def base_loss(
    model: Model, data: Latents, steps: int, *, bf16: bool = False, count: int = BATCH
) -> LossOf:
    """Return the loss of a step; the text encoders learn on every fourth."""

    def loss_of(step: int, part: int) -> dict[str, torch.Tensor]:
        if step % 200 == part == 0:
            data.refresh()
        seed = SEEDS_FROM + PARTS * step + part
        rng, source = random.Random(seed), torch.Generator().manual_seed(seed)
        batch = data.batch(rng, count // PARTS)
        with torch.set_grad_enabled(step % 4 == 0):
            told = conditions(model.language, batch.scenes, rng)
            context, pooled = dropped(*told, rng)
        timesteps = any_timesteps(len(batch.scenes), source)
        noise = offset_noise(batch.latents.shape, source)
        x = noised(batch.latents, noise, timesteps)
        guided = math.ceil(GUIDED_SHARE * len(x))
        x[:guided] = guided_steps(model, batch, noise, timesteps, told, source, guided)
        noise = noise_of(x, batch.latents, timesteps)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            found = model.noise_in(x, timesteps, context, pooled, batch.time_ids)
        errors = (found.float() - noise).square()
        if step < THING_SHARE * steps:
            errors = errors * thing_weights(batch.latents)
        errors = errors.mean((1, 2, 3))
        late = (errors * SIGMAS[timesteps] ** 2)[timesteps >= 700].mean()
        return {"loss": (errors * WEIGHTS[timesteps]).mean(), "late": late}

    return loss_of


def conditions(
    language: Language, scenes: list[Scene], rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return context and pooled of captions, some of which are empty."""
    return language(some_captions(scenes, rng))


def some_captions(scenes: list[Scene], rng: random.Random) -> list[str]:
    """Describe scenes; some get an empty text."""
    return [
        "" if rng.random() < EMPTY_SHARE else caption(scene, rng) for scene in scenes
    ]


def dropped(
    context: torch.Tensor, pooled: torch.Tensor, rng: random.Random
) -> tuple[torch.Tensor, torch.Tensor]:
    """Drop some of the captions to zero."""
    keep = torch.tensor([float(rng.random() >= ZERO_SHARE) for _ in context])
    return context * keep[:, None, None], pooled * keep[:, None]


def any_timesteps(count: int, source: torch.Generator) -> torch.Tensor:
    """Draw steps: seven of ten anywhere, three where the layout is decided."""
    anywhere = torch.randint(0, 1000, (count,), generator=source)
    early = torch.randint(600, 1000, (count,), generator=source)
    pick = torch.rand(count, generator=source) < 0.7
    return torch.where(pick, anywhere, early)


def thing_weights(latents: torch.Tensor) -> torch.Tensor:
    """Return (B, 1, h, w) of mean 1: more in and beside what is not the background."""
    ground = latents.flatten(2).median(-1).values[..., None, None]
    thing = ((latents - ground).abs().amax(1, keepdim=True) > 0.5).float()
    thing = nn.functional.max_pool2d(thing, 3, stride=1, padding=1)
    weights = 1 + (THING_WEIGHT - 1) * thing
    return weights / weights.mean()


def offset_noise(shape: torch.Size, source: torch.Generator) -> torch.Tensor:
    """Draw noise (B, C, h, w) whose means per channel vary by `OFFSET` more than usual.

    Means of the whole, of its quarters and of its sixteenths, each. So the mean of what
    is seen tells less of the mean that is wanted; guidance, which overshoots the mean
    first of all, is then corrected on the way.
    """
    noise = torch.randn(shape, generator=source)
    for grid in OFFSET_GRIDS:
        means = torch.randn(*shape[:2], grid, grid, generator=source)
        noise += OFFSET * nn.functional.interpolate(means, shape[2:], mode="nearest")
    return noise


def noised(
    latents: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Return latents of variance about 1 at the given steps of the process."""
    kept = KEPT.float()[timesteps][:, None, None, None]
    return latents * kept.sqrt() + noise * (1 - kept).sqrt()


def noise_of(
    x: torch.Tensor, latents: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Return what `noised` must have added to get x."""
    kept = KEPT.float()[timesteps][:, None, None, None]
    return (x - latents * kept.sqrt()) / (1 - kept).sqrt()


@torch.no_grad()
def guided_steps(
    model: Model,
    batch: Batch,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    told: tuple[torch.Tensor, torch.Tensor],
    source: torch.Generator,
    count: int,
    guidance: tuple[float, float] = GUIDANCE,
) -> torch.Tensor:
    """Come down to `timesteps` in a few guided steps, for the first `count`."""
    steps = int(torch.randint(GUIDED_STEPS, (), generator=source)) + 1
    stride = torch.randint(*GUIDED_STRIDE, (count,), generator=source)
    scale = torch.rand(count, 1, 1, 1, generator=source)
    scale = guidance[0] + (guidance[1] - guidance[0]) * scale
    context, pooled = told[0][:count], told[1][:count]
    lows = [(timesteps[:count] + stride * n).clamp(max=999) for n in range(steps + 1)]
    x = noised(batch.latents[:count], noise[:count], lows[-1])
    for n in reversed(range(steps)):
        without, with_ = model.both_noises_in(
            x, lows[n + 1], context, pooled, batch.time_ids[:count]
        )
        found = without + scale * (with_ - without)
        x = noised(noise_free(x, found, lows[n + 1]), found, lows[n])
    return x


def noise_free(
    x: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """Take the noise out of x."""
    kept = KEPT.float()[timesteps][:, None, None, None]
    return (x - (1 - kept).sqrt() * noise) / kept.sqrt()
