"""diffusers' pipelines, and k-diffusion's samplers over its networks: the oracle.

The weights are those of `networks_oracle`. k-diffusion stands in where diffusers has no
equal; its denoiser is then the one below, quantized as Stability's. Needs torch,
diffusers, transformers and k-diffusion.
"""

from __future__ import annotations

import tempfile
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from diffusers import StableDiffusionXLImg2ImgPipeline, StableDiffusionXLPipeline
from PIL import Image

from tests.golden.networks_cases import Case
from tests.golden.networks_oracle import build, build_tokenizer
from tests.golden.numerics_samplers import import_k_diffusion
from tests.golden.pipelines_cases import MODELS, RUNS, Run, init_pixels

BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
# Our start is noise times sqrt(1 + sigma^2); schedulers of other spacings use sigma.
START = {"timestep_spacing": "leading"}
SIGMA_MAX = 14.6146412
REFINER = "tiny-refiner"

# Beside MindSpore's threads in one process, torch's would wait for each other.
torch.set_num_threads(1)


@cache
def components(model: str) -> dict[str, Any]:
    """Build a model's networks and tokenizers, named as pipelines take them."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizers = {
            "tokenizer": build_tokenizer(Path(folder), "<|endoftext|>"),
            "tokenizer_2": build_tokenizer(Path(folder), "!"),
        }
    found = {"text_encoder": None} | build(MODELS[model]) | tokenizers
    if model == REFINER:
        found |= {
            "tokenizer": None,
            "requires_aesthetics_score": True,
            "force_zeros_for_empty_prompt": False,
        }
    return found


def pipeline_of(run: Run, kind: type, model: str) -> Any:
    """Build a diffusers pipeline with the run's scheduler."""
    fixed = {} if run.scheduler.startswith("EDM") else BETAS | START
    k_diffusion = run.scheduler.startswith("sample_")
    name = "EulerDiscreteScheduler" if k_diffusion else run.scheduler
    settings = {} if k_diffusion else run.settings
    scheduler = getattr(diffusers, name)(**fixed | settings)
    pipeline = kind(**components(model), scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def timesteps(steps: int) -> list[int]:
    """List LegacyDDPMDiscretization's indices, in whole numbers."""
    return [999 - -(-999 * i // steps) for i in range(steps)]


def arguments(run: Run, case: Case, model: str) -> dict[str, Any]:
    """Say the same of a picture in diffusers' words."""
    original = (case.original_height, case.original_width)
    crop = (case.crop_top, case.crop_left)
    target = (case.target_height, case.target_width)
    found = {
        "prompt": case.prompt,
        "negative_prompt": case.negative_prompt,
        "guidance_scale": case.guidance_scale,
        "original_size": original,
        "crops_coords_top_left": crop,
        "target_size": target,
        "negative_original_size": original,
        "negative_crops_coords_top_left": crop,
        "negative_target_size": target,
    }
    if case.guider == "IdentityGuider" and model != "consistency":
        found["guidance_scale"] = 1.0
    if run.listed:
        found["timesteps"] = timesteps(case.steps)
    else:
        found["num_inference_steps"] = case.steps
    if model == REFINER:
        scores = {
            "aesthetic_score": case.aesthetic_score,
            "negative_aesthetic_score": case.negative_aesthetic_score,
        }
        found |= {key: score for key, score in scores.items() if score is not None}
    return found


@torch.no_grad()
def pixels_of(name: str) -> np.ndarray:
    """Make both pictures of a run: (2, 64, 128, 3) uint8."""
    run = RUNS[name]
    return np.stack([_draw(run, i, case) for i, case in enumerate(run.cases)])


def _draw(run: Run, index: int, case: Case) -> np.ndarray:
    generator = torch.Generator("cpu").manual_seed(case.seed)
    if run.scheduler.startswith("sample_"):
        image = _k_diffuse(run, case, generator)
    elif run.refined:
        latents = _first_stage(run, case, generator, output_type="latent")
        ending = {"denoising_start": run.seam} if run.seam else {}
        image = _second_stage(run, case, REFINER, latents, generator, **ending)
    elif run.strength:
        start = Image.fromarray(init_pixels()[index])
        image = _second_stage(run, case, run.model, start, generator)
    else:
        image = _first_stage(run, case, generator)
    return np.asarray(image)


def _first_stage(
    run: Run, case: Case, generator: torch.Generator, **options: Any
) -> Any:
    """Start from noise; scaled as our start is where the scheduler's own is not."""
    pipeline = pipeline_of(run, StableDiffusionXLPipeline, run.model)
    shape = (1, 4, case.height // 8, case.width // 8)
    noise = torch.randn(shape, generator=generator)
    if pipeline.scheduler.config.get("timestep_spacing") in ("trailing", "linspace"):
        noise = noise * ((1 + SIGMA_MAX**2) ** 0.5 / SIGMA_MAX)
    return pipeline(
        **arguments(run, case, run.model),
        width=case.width,
        height=case.height,
        latents=noise,
        denoising_end=run.seam,
        generator=generator,
        **options,
    ).images[0 if not options else slice(None)]


def _second_stage(
    run: Run,
    case: Case,
    model: str,
    image: Any,
    generator: torch.Generator,
    **options: Any,
) -> Any:
    pipeline = pipeline_of(run, StableDiffusionXLImg2ImgPipeline, model)
    return pipeline(
        **arguments(run, case, model),
        image=image,
        strength=run.strength or 1.0,
        generator=generator,
        **options,
    ).images[0]


def _k_diffuse(run: Run, case: Case, generator: torch.Generator) -> Any:
    sampling = import_k_diffusion()
    pipeline = pipeline_of(replace(run, settings={}), StableDiffusionXLPipeline, "tiny")
    table = trained_sigmas()
    levels = torch.cat((table[timesteps(case.steps)], torch.zeros(1)))
    if case.discretization == "EDMDiscretization":
        levels = sampling.get_sigmas_karras(case.steps, case.sigma_min, case.sigma_max)
    levels = levels.float()
    shape = (1, 4, case.height // 8, case.width // 8)
    draws = _draws(shape, generator)
    x = next(draws) * (1 + levels[0] ** 2) ** 0.5
    with _noise_from(sampling, draws):
        x = getattr(sampling, run.scheduler)(
            _denoiser(pipeline, case, table), x, levels, disable=True, **run.settings
        )
    decoded = pipeline.vae.decode(x / pipeline.vae.config.scaling_factor).sample
    return pipeline.image_processor.postprocess(decoded)[0]


def trained_sigmas() -> torch.Tensor:
    """Compute the 1000 trained levels, rising: float64."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    kept = torch.cumprod(1 - betas, 0)
    return ((1 - kept) / kept) ** 0.5


def _draws(
    shape: tuple[int, ...], generator: torch.Generator
) -> Iterator[torch.Tensor]:
    while True:
        yield torch.randn(shape, generator=generator)


@contextmanager
def _noise_from(
    sampling: types.ModuleType, draws: Iterator[torch.Tensor]
) -> Iterator[None]:
    """Have k-diffusion take its noise from `draws`."""
    drawing = {"randn_like": lambda x: next(draws)}
    sampling.torch = types.SimpleNamespace(**vars(torch) | drawing)
    yield
    sampling.torch = torch


def _denoiser(
    pipeline: StableDiffusionXLPipeline, case: Case, table: torch.Tensor
) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """Build D(x, sigma), sigma quantized to the nearest trained level."""
    prompt, negative, pooled, negative_pooled = pipeline.encode_prompt(
        case.prompt, negative_prompt=case.negative_prompt
    )
    sizes = [
        *(case.original_height, case.original_width),
        *(case.crop_top, case.crop_left),
        *(case.target_height, case.target_width),
    ]
    known = {
        "text_embeds": torch.cat((negative_pooled, pooled)),
        "time_ids": torch.tensor([sizes] * 2, dtype=torch.float32),
    }

    def denoise(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        index = (table - sigma.double()).abs().argmin()
        level = float(table[index])
        scaled = torch.cat((x, x)) / (level**2 + 1) ** 0.5
        context = torch.cat((negative, prompt))
        noise = pipeline.unet(scaled, index, context, added_cond_kwargs=known).sample
        u, c = noise.chunk(2)
        return x - level * (u + case.guidance_scale * (c - u))

    return denoise
