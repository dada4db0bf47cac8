"""Geometries and inputs that the golden networks and the tests share; plain numpy.

`tiny` is our preset. `tall` differs from it wherever a geometry can: four levels, other
head widths, groups, depths and text widths, and pictures that are not square.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass, replace

import numpy as np

from sdxl.config import (
    TINY,
    ModelConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)

TALL = ModelConfig(
    kind="base",
    unet=UNetConfig(
        model_channels=64,
        channel_mult=(1, 2, 3, 3),
        transformer_depth=(0, 1, 2, 0),
        middle_depth=2,
        head_dim=16,
        context_dim=112,
        adm_in_channels=64 + 6 * 32,
    ),
    text_encoders=(
        TextEncoderConfig(
            kind="clip", width=48, layers=3, heads=3, mlp_width=96, pad_id=49_407
        ),
        TextEncoderConfig(
            kind="openclip", width=64, layers=5, heads=4, mlp_width=160, pad_id=0
        ),
    ),
    vae=VAEConfig(ch=32, ch_mult=(1, 2, 2, 3), norm_groups=16, scale_factor=0.2),
    size_embed_dim=32,
)
GEOMETRIES: dict[str, ModelConfig] = {"tiny": TINY, "tall": TALL}
# Two levels with nothing but a residual block between the halves.
SHORT = replace(
    TINY,
    unet=replace(
        TINY.unet, channel_mult=(1, 2), transformer_depth=(0, 1), middle_depth=None
    ),
)
# A consistency model: `tiny` with an input for the guidance scale.
CONSISTENCY = replace(TINY, unet=replace(TINY.unet, time_cond_proj_dim=24))
LATENT_SIZES = {"tiny": (16, 16), "tall": (24, 8)}

PROMPTS = ("a red circle on a blue square", "", "portrait of an owl; " * 20)
TIMESTEPS = (999.0, 500.0, 49.0, 0.0)
GUIDANCE = (1.0, 2.5, 8.0, 13.0)
STEPS, GUIDANCE_SCALE = 20, 5.0


@dataclass(frozen=True, kw_only=True)
class Case:
    """One picture for the whole pipeline; `Pipeline`'s `Picture` in plain fields."""

    prompt: str
    seed: int
    width: int
    height: int
    negative_prompt: str | None = None
    guidance_scale: float = GUIDANCE_SCALE
    steps: int = STEPS
    sampler: str = "EulerEDMSampler"
    discretization: str = "LegacyDDPMDiscretization"
    guider: str = "VanillaCFG"
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    eta: float | None = None
    s_churn: float | None = None
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: float | None = None
    original_width: int = 512
    original_height: int = 384
    crop_top: int = 16
    crop_left: int = 0
    target_width: int = 2300
    target_height: int = 1024
    strength: float | None = None
    aesthetic_score: float | None = None
    negative_aesthetic_score: float | None = None
    thresholding_ratio: float | None = None
    thresholding_maximum: float | None = None


def cases(geometry: str) -> list[Case]:
    """Two pictures without and one with a negative prompt."""
    h, w = LATENT_SIZES[geometry]
    size = {"width": 8 * w, "height": 8 * h}
    return [
        Case(prompt="a red circle on a blue square", seed=0, **size),
        Case(prompt="", seed=4_294_967_295, **size),
        Case(prompt="an owl", negative_prompt="a blurry cat", seed=7, **size),
    ]


def normals(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Draw the float32 input of that name."""
    state = np.random.RandomState(zlib.crc32(name.encode()))
    return state.randn(*shape).astype(np.float32)


def unet_inputs(config: ModelConfig, size: tuple[int, int]) -> dict[str, np.ndarray]:
    """Four latents with their own timesteps, contexts, pooled texts and sizes."""
    B, unet = len(TIMESTEPS), config.unet
    return {
        "x": normals("x", (B, unet.in_channels, *size)),
        "timestep": np.array(TIMESTEPS, np.float32),
        "context": normals("context", (B, 77, unet.context_dim)),
        "pooled": normals("pooled", (B, config.text_encoders[-1].width)),
        "sizes": np.array(
            [[1024, 1024, 0, 0, 1024, 1024]] * 3 + [[300, 2049, 7, 64, 768, 1344]]
        ),
    }


def vae_inputs(size: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """One latent to decode, and one picture in [-1, 1] to encode."""
    h, w = size
    return (
        normals("z", (1, 4, h, w)),
        normals("picture", (1, 3, 8 * h, 8 * w)).clip(-1, 1),
    )
