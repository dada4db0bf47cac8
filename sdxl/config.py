"""Geometry of every network, as frozen dataclasses, and the presets that name them.

Design: a geometry holds exactly what the shapes and the head counts depend on. It never
holds a path, a precision or a sampling setting, so that it can be compared, hashed into
a graph key, and read from a diffusers folder as well as named by a preset.

Figures: Podell et al. 2023 (SDXL), the published configs of SDXL-Base and SDXL-Refiner.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

VOCAB_SIZE = 49_408
CONTEXT_LENGTH = 77
LATENT_CHANNELS = 4
VAE_FACTOR = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class UNetConfig:
    """The denoising network.

    `transformer_depth` has one entry per level; 0 means no attention at that level. The
    middle block has a depth of its own, `middle_depth`; None makes it a residual block
    and nothing else, as in SSD-1B (Gupta et al. 2024). `time_cond_proj_dim` is the
    width of LCM's guidance embedding, None when the network has none. `norm_groups` is
    the number of groups of every group norm: narrow networks need fewer, or a group is
    one channel and a flat colour is normalized away.
    """

    model_channels: int
    channel_mult: tuple[int, ...]
    transformer_depth: tuple[int, ...]
    middle_depth: int | None
    head_dim: int
    context_dim: int
    adm_in_channels: int
    num_res_blocks: int = 2
    in_channels: int = LATENT_CHANNELS
    out_channels: int = LATENT_CHANNELS
    time_cond_proj_dim: int | None = None
    norm_groups: int = 32

    @property
    def time_embed_dim(self) -> int:
        return 4 * self.model_channels


@dataclass(frozen=True, slots=True, kw_only=True)
class TextEncoderConfig:
    """A causal CLIP text transformer.

    `kind` is the checkpoint's naming: `clip` (Hugging Face names, quick-GELU, hidden
    state only) or `openclip` (fused in_proj, exact GELU, hidden and pooled states).
    """

    kind: Literal["clip", "openclip"]
    width: int
    layers: int
    heads: int
    mlp_width: int
    pad_id: int
    vocab_size: int = VOCAB_SIZE
    context_length: int = CONTEXT_LENGTH


@dataclass(frozen=True, slots=True, kw_only=True)
class VAEConfig:
    """The KL autoencoder, and how its latents z become the network's.

    They are `(z - latents_mean) * scale_factor / latents_std`, per channel; SDXL has no
    mean and deviation, Playground v2.5 has.
    """

    ch: int
    ch_mult: tuple[int, ...]
    num_res_blocks: int = 2
    z_channels: int = LATENT_CHANNELS
    scale_factor: float = 0.13025
    latents_mean: tuple[float, ...] | None = None
    latents_std: tuple[float, ...] | None = None
    norm_groups: int = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A whole SDXL: text encoders in the order their hidden states are concatenated.

    `kind` decides the conditioning vector (base: original, crop, target size; refiner:
    original, crop, aesthetic score) and the unconditional branch (base: zeros when no
    negative prompt is given; refiner: always encoded). `native_size` is the width and
    height in pixels that the weights were trained for: the default of a job.
    """

    kind: Literal["base", "refiner"]
    unet: UNetConfig
    text_encoders: tuple[TextEncoderConfig, ...]
    vae: VAEConfig
    size_embed_dim: int = 256
    native_size: int = 1024


CLIP_L = TextEncoderConfig(
    kind="clip", width=768, layers=12, heads=12, mlp_width=3072, pad_id=49_407
)
OPENCLIP_BIGG = TextEncoderConfig(
    kind="openclip", width=1280, layers=32, heads=20, mlp_width=5120, pad_id=0
)
SDXL_VAE = VAEConfig(ch=128, ch_mult=(1, 2, 4, 4))

BASE = ModelConfig(
    kind="base",
    unet=UNetConfig(
        model_channels=320,
        channel_mult=(1, 2, 4),
        transformer_depth=(0, 2, 10),
        middle_depth=10,
        head_dim=64,
        context_dim=2048,
        adm_in_channels=2816,
    ),
    text_encoders=(CLIP_L, OPENCLIP_BIGG),
    vae=SDXL_VAE,
)

PLAYGROUND = replace(
    BASE,
    vae=replace(
        SDXL_VAE,
        scale_factor=0.5,
        latents_mean=(-1.6574, 1.886, -1.383, 2.5155),
        latents_std=(8.4927, 5.9022, 6.5498, 5.2299),
    ),
)

REFINER = ModelConfig(
    kind="refiner",
    unet=UNetConfig(
        model_channels=384,
        channel_mult=(1, 2, 4, 4),
        transformer_depth=(0, 4, 4, 0),
        middle_depth=4,
        head_dim=64,
        context_dim=1280,
        adm_in_channels=2560,
    ),
    text_encoders=(OPENCLIP_BIGG,),
    vae=SDXL_VAE,
)

TINY_CLIP = TextEncoderConfig(
    kind="clip", width=32, layers=4, heads=2, mlp_width=128, pad_id=49_407
)
TINY_OPENCLIP = TextEncoderConfig(
    kind="openclip", width=32, layers=4, heads=2, mlp_width=128, pad_id=0
)
TINY_VAE = VAEConfig(ch=32, ch_mult=(1, 1, 2, 2), norm_groups=8)

TINY = ModelConfig(
    kind="base",
    unet=UNetConfig(
        model_channels=32,
        channel_mult=(1, 2, 4),
        transformer_depth=(0, 1, 2),
        middle_depth=2,
        head_dim=32,
        context_dim=64,
        adm_in_channels=32 + 6 * 64,
        norm_groups=8,
    ),
    text_encoders=(TINY_CLIP, TINY_OPENCLIP),
    vae=TINY_VAE,
    size_embed_dim=64,
    native_size=128,
)

TINY_REFINER = ModelConfig(
    kind="refiner",
    unet=UNetConfig(
        model_channels=32,
        channel_mult=(1, 2),
        transformer_depth=(0, 1),
        middle_depth=None,
        head_dim=32,
        context_dim=32,
        adm_in_channels=32 + 5 * 64,
        norm_groups=8,
    ),
    text_encoders=(TINY_OPENCLIP,),
    vae=TINY_VAE,
    size_embed_dim=64,
    native_size=128,
)

PRESETS: dict[str, ModelConfig] = {
    "base": BASE,
    "refiner": REFINER,
    "tiny": TINY,
    "tiny-refiner": TINY_REFINER,
    "playground": PLAYGROUND,
}
