"""The settings as asked: one frozen dataclass per section of a config file.

None means "the right default": of the model, of the method, or of the machine.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA file to merge while loading, and how strongly."""

    path: str
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelSection:
    """Which network. A preset is needed only where the file can't tell by itself.

    `vae_tile` bounds the pixels decoded at a time, as the side of a square; 0 does not.
    """

    preset: str | None = None
    checkpoint: str | None = None
    precision: Literal["auto", "fp32", "fp16"] = "auto"
    loras: tuple[Lora, ...] = ()
    scaling: Literal[
        "EpsScaling", "EDMScaling", "VScaling", "VScalingWithEDMcNoise"
    ] = "EpsScaling"
    quantize_sigma: bool = True
    vae_tile: int = 2048


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingSection:
    """What the pictures depend on; a manifest row may override each of them."""

    sampler: str = "EulerEDMSampler"
    discretization: str = "LegacyDDPMDiscretization"
    guider: str | None = None
    steps: int = 40
    guidance_scale: float = 5.0
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    num_images: int = 1
    seed: int = 42
    noise: Literal["numpy", "torch"] = "numpy"
    sigma_min: float | None = None
    sigma_max: float | None = None
    rho: float | None = None
    eta: float | None = None
    s_churn: float | None = None
    s_tmin: float | None = None
    s_tmax: float | None = None
    s_noise: float | None = None
    strength: float = 0.75
    aesthetic_score: float = 6.0
    negative_aesthetic_score: float = 2.5
    thresholding_ratio: float | None = None
    thresholding_maximum: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RefinerSection:
    """The second stage of base+refiner; without a checkpoint there is none.

    `stage2strength` is the share of the schedule that the refiner takes. With
    `finish_denoising` the base stops there and hands over its noisy latent; without it
    the base finishes, and the refiner adds noise again.
    """

    checkpoint: str | None = None
    preset: str | None = None
    stage2strength: float = 0.15
    finish_denoising: bool = True
    keep_base: bool = False
    resident: Literal["both", "one"] = "both"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSection:
    """Where and how it runs; nothing here changes what a picture shows.

    `compile_cache` is a folder, `auto` (the user's) or `off`.
    """

    device_target: Literal["auto", "Ascend", "CPU"] = "auto"
    devices: str = "auto"
    workers: int | None = None
    batch_size: int = 1
    jit_level: Literal["O0", "O1", "O2"] = "O2"
    flash_attention: bool | None = None
    shard_batches: int | None = None
    writer_threads: int = 2
    max_attempts: int = 3
    batch_timeout: float | None = None
    compile_cache: str = "auto"


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputSection:
    """How results are written. `commit_every` counts pictures between two parts."""

    format: Literal["png", "jpeg", "webp"] = "png"
    quality: int = 95
    png_level: int = 3
    commit_every: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class JobConfig:
    """A job's settings as asked."""

    model: ModelSection = field(default_factory=ModelSection)
    sampling: SamplingSection = field(default_factory=SamplingSection)
    refiner: RefinerSection = field(default_factory=RefinerSection)
    runtime: RuntimeSection = field(default_factory=RuntimeSection)
    output: OutputSection = field(default_factory=OutputSection)

    def as_dict(self) -> dict[str, dict[str, Any]]:
        return dataclasses.asdict(self)
