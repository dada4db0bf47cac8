"""Run the oracles of `sdxl.samplers`: k-diffusion and diffusers on a fake denoiser.

k-diffusion runs in double precision on noise that the test draws as well; diffusers
runs in its float32, drawing noise from torch's seeded CPU generator.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

import diffusers
import numpy as np
import torch

SHAPE = (2, 4, 8, 8)
SEED = 7
BETAS = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "timestep_spacing": "trailing",
}
CHURN = {"s_churn": 8.0, "s_noise": 1.003}
# k-diffusion's function, ours, options.
K_DIFFUSION = [
    ("sample_euler", "EulerEDMSampler", {}),
    ("sample_euler", "EulerEDMSampler", CHURN),
    ("sample_euler", "EulerEDMSampler", CHURN | {"s_tmin": 0.1, "s_tmax": 10.0}),
    ("sample_euler", "EulerEDMSampler", {"s_churn": 99.0}),
    ("sample_heun", "HeunEDMSampler", {}),
    ("sample_heun", "HeunEDMSampler", CHURN | {"s_tmin": 0.1, "s_tmax": 10.0}),
    ("sample_euler_ancestral", "EulerAncestralSampler", {}),
    ("sample_euler_ancestral", "EulerAncestralSampler", {"eta": 0.5, "s_noise": 1.01}),
    ("sample_dpmpp_2s_ancestral", "DPMPP2SAncestralSampler", {}),
    ("sample_dpmpp_2s_ancestral", "DPMPP2SAncestralSampler", {"eta": 0.5}),
    ("sample_dpmpp_2m", "DPMPP2MSampler", {}),
    ("sample_lms", "LinearMultistepSampler", {}),
]
# diffusers' scheduler, ours, the scheduler's settings.
DIFFUSERS = [
    ("EulerDiscreteScheduler", "EulerEDMSampler", {}),
    ("HeunDiscreteScheduler", "HeunEDMSampler", {}),
    ("EulerAncestralDiscreteScheduler", "EulerAncestralSampler", {}),
    ("DPMSolverMultistepScheduler", "DPMPP2MSampler", {}),
    ("DPMSolverMultistepScheduler", "DPMPP2MSampler", {"use_karras_sigmas": True}),
    ("LMSDiscreteScheduler", "LinearMultistepSampler", {}),
    ("LCMScheduler", "LCMSampler", {"timesteps": [999, 749, 499, 249]}),
    ("EDMEulerScheduler", "EulerEDMSampler", {}),
    ("EDMDPMSolverMultistepScheduler", "DPMPP2MSampler", {}),
]


def fake_denoise(x: np.ndarray, sigma: float) -> np.ndarray:
    """Answer with something smooth, bounded and far from linear."""
    mixed = x + 0.3 * np.roll(x, 1, axis=-1)
    return 0.6 * np.tanh(mixed / (1 + sigma**2) ** 0.5) + 0.05 * x / (1 + sigma)


def start(sigma: float) -> np.ndarray:
    """Draw the start at noise level `sigma`, float32."""
    draw = np.random.RandomState(SEED).randn(*SHAPE) * (1 + sigma**2) ** 0.5
    return draw.astype(np.float32)


def noises() -> Iterator[np.ndarray]:
    """Draw the noise that k-diffusion and the test add, float32."""
    state = np.random.RandomState(SEED + 1)
    while True:
        yield state.randn(*SHAPE).astype(np.float32)


def make() -> dict[str, np.ndarray]:
    """Run every case: `cases` as JSON, the levels and the end of each."""
    cases, arrays = [], {}
    for case, levels, end in [*_k_diffusion_runs(), *_diffusers_runs()]:
        arrays[f"levels_{len(cases)}"] = levels
        arrays[f"end_{len(cases)}"] = end
        cases.append(case)
    return {"cases": np.array(json.dumps(cases))} | arrays


Run = tuple[dict[str, object], np.ndarray, np.ndarray]


def _k_diffusion_runs() -> Iterator[Run]:
    sampling = import_k_diffusion()
    karras = sampling.get_sigmas_karras(12, 0.0291672, 14.6146412).numpy()
    for function, ours, options in K_DIFFUSION:
        for levels in (karras, _trailing(20)):
            end = _run_k_diffusion(sampling, function, levels, options)
            case = {"oracle": f"k-diffusion {function}", "sampler": ours}
            yield case | {"options": options}, levels, end


def _run_k_diffusion(
    sampling: types.ModuleType,
    function: str,
    levels: np.ndarray,
    options: dict[str, float],
) -> np.ndarray:
    stream, draws = noises(), iter(levels)

    def randn_like(x: torch.Tensor) -> torch.Tensor:
        # k-diffusion draws in steps without churn too; those draws are not ours.
        sigma = next(draws)
        idle = not options.get("s_tmin", 0) <= sigma <= options.get("s_tmax", 999)
        return torch.zeros_like(x) if idle else torch.from_numpy(next(stream)).double()

    sampling.torch = types.SimpleNamespace(**vars(torch) | {"randn_like": randn_like})
    end = getattr(sampling, function)(
        lambda x, sigma: torch.from_numpy(fake_denoise(x.numpy(), float(sigma[0]))),
        torch.from_numpy(start(levels[0])).double(),
        torch.from_numpy(levels).double(),
        disable=True,
        **options,
    )
    return end.numpy()


def _diffusers_runs() -> Iterator[Run]:
    diffusers.logging.set_verbosity_error()
    for name, ours, settings in DIFFUSERS:
        settings = dict(settings)
        timesteps = settings.pop("timesteps", None)
        fixed = {} if name.startswith("EDM") else BETAS
        scheduler = getattr(diffusers, name)(**fixed | settings)
        if timesteps:
            scheduler.set_timesteps(timesteps=timesteps)
        else:
            scheduler.set_timesteps(20)
        levels = _levels(scheduler)
        case = {"oracle": f"diffusers {name}", "sampler": ours, "options": {}}
        yield case, levels, _run_diffusers(scheduler, levels)


def _run_diffusers(
    scheduler: diffusers.SchedulerMixin, levels: np.ndarray
) -> np.ndarray:
    """Step through a scheduler; DPM-Solver and LCM keep x / sqrt(1 + sigma^2)."""
    name = type(scheduler).__name__
    scaled = name in ("DPMSolverMultistepScheduler", "LCMScheduler")
    options = {"return_dict": False}
    if name in ("EulerAncestralDiscreteScheduler", "LCMScheduler"):
        options["generator"] = torch.Generator().manual_seed(SEED)
    scheduler.is_scale_input_called = True  # the input is scaled in fake_denoise
    x = torch.from_numpy(start(levels[0]))
    x = x / (1 + levels[0] ** 2) ** 0.5 if scaled else x
    inner = _inner_levels(scheduler, levels)
    for t, sigma in zip(scheduler.timesteps, inner, strict=True):
        scale = (1 + sigma**2) ** 0.5 if scaled else 1.0
        x0 = torch.from_numpy(fake_denoise((x * scale).numpy(), sigma))
        output = (x * scale - x0) / sigma
        if name.startswith("EDM"):
            skip = scheduler.precondition_outputs(x, torch.zeros_like(x), sigma)
            unit = scheduler.precondition_outputs(x * 0, torch.ones_like(x), sigma)
            output = (x0 - skip) / unit
        x = scheduler.step(output, t, x, **options)[0]
    return x.numpy()


def _levels(scheduler: diffusers.SchedulerMixin) -> np.ndarray:
    """Read the falling levels, with the final 0, that the scheduler walks: float32."""
    if isinstance(scheduler, diffusers.LCMScheduler):
        alphas = scheduler.alphas_cumprod.numpy().astype(np.float64)
        sigmas = ((1 - alphas) / alphas) ** 0.5
        return np.append(sigmas[scheduler.timesteps.numpy()], 0).astype(np.float32)
    sigmas = scheduler.sigmas.numpy().astype(np.float32)
    if isinstance(scheduler, diffusers.HeunDiscreteScheduler):
        return np.append(sigmas[:1], sigmas[1::2])
    return sigmas


def _inner_levels(
    scheduler: diffusers.SchedulerMixin, levels: np.ndarray
) -> list[float]:
    """List the level of every evaluation: Heun's come in pairs after the first."""
    if isinstance(scheduler, diffusers.HeunDiscreteScheduler):
        return [float(sigma) for sigma in scheduler.sigmas[:-1]]
    return [float(sigma) for sigma in levels[:-1]]


def _trailing(steps: int) -> np.ndarray:
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS)
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.numpy()


@lru_cache
def import_k_diffusion() -> types.ModuleType:
    """Import k-diffusion's samplers alone: the rest of it needs torchvision."""
    spec = importlib.util.find_spec("k_diffusion")
    package = types.ModuleType("k_diffusion")
    package.__spec__ = spec
    package.__path__ = [str(Path(spec.origin).parent)]
    package.utils = types.ModuleType("k_diffusion.utils")
    package.utils.append_dims = lambda x, ndim: x[(...,) + (None,) * (ndim - x.ndim)]
    sys.modules |= {"k_diffusion": package, "k_diffusion.utils": package.utils}
    return importlib.import_module("k_diffusion.sampling")
