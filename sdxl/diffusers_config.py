"""Read a geometry from the `config.json` files of a diffusers folder.

Design: every field that the networks' arithmetic depends on is either read into the
geometry or held to the one value we run; the rest cannot change a picture. So a model
that would run wrongly is refused by the name of the field, not by its pictures.

Source: the signatures of diffusers 0.42 `UNet2DConditionModel` and `AutoencoderKL` and
of transformers `CLIPTextConfig`, whose defaults stand for absent fields.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl.config import (
    CONTEXT_LENGTH,
    LATENT_CHANNELS,
    VAE_FACTOR,
    VOCAB_SIZE,
    ModelConfig,
    TextEncoderConfig,
    UNetConfig,
    VAEConfig,
)
from sdxl.stored import CheckpointError

MAX_JSON = 16 * 2**20

# Fields held to one value. Of a pair, the first is diffusers' default, the second ours.
UNET_FIXED: dict[str, tuple[Any, Any]] = {
    "act_fn": ("silu", "silu"),
    "addition_embed_type": (None, "text_time"),
    "attention_type": ("default", "default"),
    "center_input_sample": (False, False),
    "class_embed_type": (None, None),
    "class_embeddings_concat": (False, False),
    "conv_in_kernel": (3, 3),
    "conv_out_kernel": (3, 3),
    "cross_attention_norm": (None, None),
    "downsample_padding": (1, 1),
    "dual_cross_attention": (False, False),
    "encoder_hid_dim": (None, None),
    "encoder_hid_dim_type": (None, None),
    "flip_sin_to_cos": (True, True),
    "freq_shift": (0, 0),
    "mid_block_scale_factor": (1, 1),
    "norm_eps": (1e-5, 1e-5),
    "num_class_embeds": (None, None),
    "only_cross_attention": (False, False),
    "resnet_out_scale_factor": (1.0, 1.0),
    "resnet_skip_time_act": (False, False),
    "resnet_time_scale_shift": ("default", "default"),
    "reverse_transformer_layers_per_block": (None, None),
    "time_embedding_act_fn": (None, None),
    "time_embedding_dim": (None, None),
    "time_embedding_type": ("positional", "positional"),
    "timestep_post_act": (None, None),
    "use_linear_projection": (False, True),
}
VAE_FIXED: dict[str, tuple[Any, Any]] = {
    "act_fn": ("silu", "silu"),
    "in_channels": (3, 3),
    "latent_channels": (4, LATENT_CHANNELS),
    "mid_block_add_attention": (True, True),
    "out_channels": (3, 3),
    "shift_factor": (None, None),
    "use_post_quant_conv": (True, True),
    "use_quant_conv": (True, True),
}
# The middle block's types, and whether it has attention between two residual blocks.
MIDDLES = {"UNetMidBlock2DCrossAttn": True, "UNetMidBlock2D": False}
_TEXT_FIXED: dict[str, tuple[Any, Any]] = {
    "layer_norm_eps": (1e-5, 1e-5),
    "max_position_embeddings": (77, CONTEXT_LENGTH),
    "vocab_size": (VOCAB_SIZE, VOCAB_SIZE),
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, of bounded size."""
    if path.stat().st_size > MAX_JSON:
        raise CheckpointError(f"{path}: over {MAX_JSON} bytes for a JSON file")
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not usable JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: no JSON object")
    return content


def read_config(paths: Mapping[str, Path]) -> ModelConfig:
    """Read the geometry from the `config.json` of each component.

    `text_encoder` is absent in a refiner. Raises `CheckpointError` naming the field of
    a geometry that we cannot run.
    """
    fields = {name: _Fields(path, read_json(path)) for name, path in paths.items()}
    unet = _unet(fields["unet"])
    encoders = [_text(fields["text_encoder_2"], "openclip")]
    if "text_encoder" in fields:
        encoders.insert(0, _text(fields["text_encoder"], "clip"))
    config = ModelConfig(
        kind="base" if len(encoders) == 2 else "refiner",
        unet=unet,
        text_encoders=tuple(encoders),
        vae=_vae(fields["vae"]),
        size_embed_dim=fields["unet"].integer("addition_time_embed_dim"),
        native_size=VAE_FACTOR * fields["unet"].integer("sample_size", 128),
    )
    _check_conditioning(fields["unet"], config)
    return config


@dataclass(frozen=True, slots=True)
class _Fields:
    """One `config.json`; every complaint names the file and the field."""

    path: Path
    content: dict[str, Any]

    def refuse(self, name: str, why: str) -> CheckpointError:
        value = json.dumps(self.content.get(name))
        return CheckpointError(f"{self.path}: `{name}` is {value[:200]}: {why}")

    def fixed(self, values: Mapping[str, tuple[Any, Any]]) -> None:
        for name, (default, ours) in values.items():
            if self.content.get(name, default) != ours:
                raise self.refuse(name, f"only {json.dumps(ours)} is supported")

    def integer(self, name: str, default: int | None = None) -> int:
        value = self.content.get(name)
        value = default if value is None else value
        if type(value) is not int or not 0 < value < 2**20:
            raise self.refuse(name, "expected a positive whole number")
        return value

    def integers(self, name: str, count: int | None = None) -> tuple[int, ...]:
        """Read a list; one number stands for `count` equal ones."""
        value = self.content.get(name)
        if type(value) is int and count is not None:
            value = [value] * count
        if not isinstance(value, list) or not 0 < len(value) < 9:
            raise self.refuse(name, "expected a list of whole numbers")
        if not all(type(n) is int and 0 < n < 2**20 for n in value):
            raise self.refuse(name, "expected positive whole numbers")
        if count not in (None, len(value)):
            raise self.refuse(name, f"expected {count} of them")
        return tuple(value)

    def multiples(self, name: str) -> tuple[int, tuple[int, ...]]:
        """Read widths as the first one and each one's multiple of it."""
        widths = self.integers(name)
        if any(width % widths[0] for width in widths):
            raise self.refuse(name, "expected multiples of the first")
        return widths[0], tuple(width // widths[0] for width in widths)


def _unet(fields: _Fields) -> UNetConfig:
    fields.fixed(UNET_FIXED)
    width, mult = fields.multiples("block_out_channels")
    layers = fields.integers("transformer_layers_per_block", len(mult))
    attended = _attended(fields, len(mult))
    groups = fields.integer("norm_num_groups", 32)
    if width % groups:
        raise fields.refuse("norm_num_groups", f"does not divide {width} channels")
    guidance = fields.content.get("time_cond_proj_dim")
    return UNetConfig(
        model_channels=width,
        channel_mult=mult,
        transformer_depth=tuple(
            depth if attends else 0
            for depth, attends in zip(layers, attended, strict=True)
        ),
        middle_depth=layers[-1] if _middle_attends(fields) else None,
        head_dim=_head_dim(fields, width, mult, attended),
        context_dim=fields.integer("cross_attention_dim"),
        adm_in_channels=fields.integer("projection_class_embeddings_input_dim"),
        num_res_blocks=fields.integer("layers_per_block", 2),
        in_channels=fields.integer("in_channels", LATENT_CHANNELS),
        out_channels=fields.integer("out_channels", LATENT_CHANNELS),
        time_cond_proj_dim=guidance and fields.integer("time_cond_proj_dim"),
        norm_groups=groups,
    )


def _middle_attends(fields: _Fields) -> bool:
    """Tell whether the middle block is more than a residual block."""
    kind = fields.content.get("mid_block_type", next(iter(MIDDLES)))
    if not isinstance(kind, str) or kind not in MIDDLES:
        raise fields.refuse("mid_block_type", f"expected one of {list(MIDDLES)}")
    return MIDDLES[kind]


def _attended(fields: _Fields, levels: int) -> list[bool]:
    """Tell which levels have attention; the up path must mirror the down path."""
    kinds = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
    down = fields.content.get("down_block_types")
    if not isinstance(down, list) or len(down) != levels or not {*down} <= {*kinds}:
        raise fields.refuse("down_block_types", f"expected {levels} of {list(kinds)}")
    mirror = [block.replace("Down", "Up") for block in reversed(down)]
    if fields.content.get("up_block_types") != mirror:
        raise fields.refuse("up_block_types", f"only {mirror} is supported")
    return [kinds[block] for block in down]


def _head_dim(
    fields: _Fields, width: int, mult: tuple[int, ...], attended: list[bool]
) -> int:
    """Read the width of a head; diffusers' `attention_head_dim` counts heads."""
    many = fields.content.get("num_attention_heads")
    name = "attention_head_dim" if many is None else "num_attention_heads"
    heads = fields.integers(name, len(mult))
    # The middle block is the last level's, attended or not.
    levels = [i for i, attends in enumerate(attended) if attends] + [len(mult) - 1]
    sizes = {width * mult[i] / heads[i] for i in levels}
    if len(sizes) != 1 or not (size := sizes.pop()).is_integer():
        raise fields.refuse(name, "heads of different widths are not supported")
    return int(size)


def _text(fields: _Fields, kind: str) -> TextEncoderConfig:
    activation = "quick_gelu" if kind == "clip" else "gelu"
    fields.fixed({**_TEXT_FIXED, "hidden_act": ("quick_gelu", activation)})
    width, heads = fields.integer("hidden_size"), fields.integer("num_attention_heads")
    if width % heads:
        raise fields.refuse("num_attention_heads", f"does not divide {width}")
    if kind == "openclip" and fields.integer("projection_dim", 512) != width:
        raise fields.refuse("projection_dim", f"only hidden_size {width} is supported")
    return TextEncoderConfig(
        kind=kind,
        width=width,
        layers=fields.integer("num_hidden_layers", 12),
        heads=heads,
        mlp_width=fields.integer("intermediate_size"),
        pad_id=49_407 if kind == "clip" else 0,
    )


def _vae(fields: _Fields) -> VAEConfig:
    fields.fixed(VAE_FIXED)
    width, mult = fields.multiples("block_out_channels")
    levels = len(mult)
    if 2 ** (levels - 1) != VAE_FACTOR:
        raise fields.refuse("block_out_channels", f"only factor {VAE_FACTOR} is known")
    for name, block in (
        ("down_block_types", "DownEncoderBlock2D"),
        ("up_block_types", "UpDecoderBlock2D"),
    ):
        if fields.content.get(name) != [block] * levels:
            raise fields.refuse(name, f"only {levels} `{block}` are supported")
    groups = fields.integer("norm_num_groups", 32)
    if width % groups:
        raise fields.refuse("norm_num_groups", f"does not divide {width} channels")
    scale = fields.content.get("scaling_factor", 0.18215)
    if not isinstance(scale, int | float) or not 0 < scale < 100:
        raise fields.refuse("scaling_factor", "expected a positive number")
    mean, deviation = (_statistics(fields, n) for n in ("latents_mean", "latents_std"))
    if deviation is not None and min(deviation) <= 0:
        raise fields.refuse("latents_std", "expected positive numbers")
    return VAEConfig(
        ch=width,
        ch_mult=mult,
        num_res_blocks=fields.integer("layers_per_block", 1),
        scale_factor=float(scale),
        latents_mean=mean,
        latents_std=deviation,
        norm_groups=groups,
    )


def _statistics(fields: _Fields, name: str) -> tuple[float, ...] | None:
    """Read a number per latent channel, where there are any."""
    values = fields.content.get(name)
    if values is None:
        return None
    sound = isinstance(values, list) and len(values) == LATENT_CHANNELS
    if not sound or not all(type(v) in (int, float) and abs(v) < 1e6 for v in values):
        raise fields.refuse(name, f"expected {LATENT_CHANNELS} numbers")
    return tuple(map(float, values))


def _check_conditioning(fields: _Fields, config: ModelConfig) -> None:
    """Hold the widths that one network hands to the other to agree."""
    context = sum(encoder.width for encoder in config.text_encoders)
    if config.unet.context_dim != context:
        raise fields.refuse("cross_attention_dim", f"the text encoders give {context}")
    scalars = 6 if config.kind == "base" else 5
    vector = config.text_encoders[-1].width + scalars * config.size_embed_dim
    if config.unet.adm_in_channels != vector:
        name = "projection_class_embeddings_input_dim"
        raise fields.refuse(name, f"pooled text and {scalars} scalars give {vector}")
