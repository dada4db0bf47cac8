"""Geometries with every tensor name of the published models, and narrow ones' widths.

Their checkpoints have the full key lists (2,514, 1,858 and 2,515 tensors) and are small
enough to write, convert and read in a test.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from sdxl.config import BASE, REFINER, ModelConfig
from sdxl.layouts import tensor_specs
from sdxl.random_weights import random_tensor
from sdxl.safetensors_file import SafetensorsWriter

WIDTHS = {"clip": 32, "openclip": 64}


def _narrow(config: ModelConfig, scalars: int) -> ModelConfig:
    """Give both encoders widths of their own: diffusers tells them apart by these."""
    text = tuple(
        replace(encoder, width=WIDTHS[encoder.kind], heads=2, mlp_width=64)
        for encoder in config.text_encoders
    )
    unet = replace(
        config.unet,
        model_channels=32,
        head_dim=32,
        context_dim=sum(encoder.width for encoder in text),
        adm_in_channels=64 + scalars * 16,
    )
    return replace(
        config,
        unet=unet,
        text_encoders=text,
        vae=replace(config.vae, ch=32),
        size_embed_dim=16,
    )


NARROW_BASE = _narrow(BASE, 6)
NARROW_REFINER = _narrow(REFINER, 5)
NARROW_LCM = replace(
    NARROW_BASE, unet=replace(NARROW_BASE.unet, time_cond_proj_dim=256)
)
NARROW = {"base": NARROW_BASE, "refiner": NARROW_REFINER, "lcm": NARROW_LCM}


def numbers(config: ModelConfig, dtype: str = "fp32") -> dict[str, np.ndarray]:
    """Make seeded values for every tensor, of the precision of `dtype`."""
    made = {s.name: random_tensor(s.name, s.shape) for s in tensor_specs(config)}
    if dtype == "fp16":
        return {name: array.astype(np.float16) for name, array in made.items()}
    return made


def write(path: Path, arrays: dict[str, np.ndarray], dtype: str = "fp32") -> Path:
    """Write the arrays as a safetensors file."""
    plan = {name: (dtype, array.shape) for name, array in arrays.items()}
    with SafetensorsWriter(path, plan) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
    return path
