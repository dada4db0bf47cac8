"""Write the files of a diffusers folder that hold no weights.

    model_index.json               which class loads each part
    unet/ vae/ text_encoder*/      config.json, the geometry
    tokenizer*/                    vocabulary, merges and settings
    scheduler/                     the noise schedule SDXL was trained with

They are what `StableDiffusionXLPipeline.from_pretrained` needs (of a refiner, the
Img2Img one), and no more. Source: the published SDXL-Base and SDXL-Refiner folders.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdxl.config import VAE_FACTOR, ModelConfig, TextEncoderConfig
from sdxl.diffusers_config import MIDDLES, UNET_FIXED, VAE_FIXED
from sdxl.stored import CheckpointError
from sdxl.tokenizer import CONTEXT_LENGTH, read_merges, vocabulary_of

_SCHEDULE = {
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
_START, _END, _ZERO = "<|startoftext|>", "<|endoftext|>", "!"


def write_folder_files(folder: Path, config: ModelConfig) -> None:
    """Write every file of a diffusers folder but the weights."""
    files: dict[str, dict[str, Any]] = {
        "model_index.json": index_json(config),
        "unet/config.json": unet_json(config),
        "vae/config.json": vae_json(config),
        "scheduler/scheduler_config.json": scheduler_json(config),
    }
    for text in config.text_encoders:
        suffix = "" if text.kind == "clip" else "_2"
        files[f"text_encoder{suffix}/config.json"] = text_json(text)
        pad = _END if text.kind == "clip" else _ZERO
        _write_tokenizer(folder / f"tokenizer{suffix}", pad)
    for name, content in files.items():
        _write_json(folder / name, content)


def index_json(config: ModelConfig) -> dict[str, Any]:
    """Name the class that loads each part."""
    base = config.kind == "base"
    nothing = [None, None]
    name = "StableDiffusionXLPipeline" if base else "StableDiffusionXLImg2ImgPipeline"
    index: dict[str, Any] = {
        "_class_name": name,
        "force_zeros_for_empty_prompt": base,
        "feature_extractor": nothing,
        "image_encoder": nothing,
        "scheduler": ["diffusers", scheduler_json(config)["_class_name"]],
        "text_encoder": ["transformers", "CLIPTextModel"] if base else nothing,
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"] if base else nothing,
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    return index if base else {**index, "requires_aesthetics_score": True}


def scheduler_json(config: ModelConfig) -> dict[str, Any]:
    """Name the default scheduler: Euler, or LCM for a UNet with guidance embedding."""
    lcm = config.unet.time_cond_proj_dim is not None
    return {"_class_name": f"{'LCM' if lcm else 'EulerDiscrete'}Scheduler", **_SCHEDULE}


def unet_json(config: ModelConfig) -> dict[str, Any]:
    """Write the UNet's geometry as diffusers reads it."""
    unet = config.unet
    widths = [unet.model_channels * mult for mult in unet.channel_mult]
    depths = [depth or 1 for depth in unet.transformer_depth]
    attends = unet.middle_depth is not None
    if attends:
        if unet.transformer_depth[-1] not in (0, unet.middle_depth):
            why = "diffusers gives the middle block the last level's depth"
            raise CheckpointError(why)
        depths[-1] = unet.middle_depth
    middle = next(kind for kind, attended in MIDDLES.items() if attended == attends)
    down = [f"{'CrossAttn' if d else ''}DownBlock2D" for d in unet.transformer_depth]
    return {
        "_class_name": "UNet2DConditionModel",
        **{name: ours for name, (_, ours) in UNET_FIXED.items()},
        "addition_time_embed_dim": config.size_embed_dim,
        "attention_head_dim": [width // unet.head_dim for width in widths],
        "block_out_channels": widths,
        "cross_attention_dim": unet.context_dim,
        "down_block_types": down,
        "in_channels": unet.in_channels,
        "layers_per_block": unet.num_res_blocks,
        "mid_block_type": middle,
        "norm_num_groups": unet.norm_groups,
        "out_channels": unet.out_channels,
        "projection_class_embeddings_input_dim": unet.adm_in_channels,
        "sample_size": config.native_size // VAE_FACTOR,
        "time_cond_proj_dim": unet.time_cond_proj_dim,
        "transformer_layers_per_block": depths,
        "up_block_types": [block.replace("Down", "Up") for block in reversed(down)],
    }


def vae_json(config: ModelConfig) -> dict[str, Any]:
    """Write the autoencoder's geometry as diffusers reads it."""
    vae = config.vae
    levels = len(vae.ch_mult)
    return {
        "_class_name": "AutoencoderKL",
        **{name: ours for name, (_, ours) in VAE_FIXED.items()},
        "block_out_channels": [vae.ch * mult for mult in vae.ch_mult],
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "force_upcast": True,
        "latents_mean": vae.latents_mean and list(vae.latents_mean),
        "latents_std": vae.latents_std and list(vae.latents_std),
        "layers_per_block": vae.num_res_blocks,
        "norm_num_groups": vae.norm_groups,
        "sample_size": config.native_size,
        "scaling_factor": vae.scale_factor,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
    }


def text_json(text: TextEncoderConfig) -> dict[str, Any]:
    """Write a text encoder's geometry as transformers reads it.

    `eos_token_id` 2 makes transformers pool at the highest id, as the published files
    do and as OpenCLIP does.
    """
    clip = text.kind == "clip"
    name = "CLIPTextModel" if clip else "CLIPTextModelWithProjection"
    return {
        "architectures": [name],
        "attention_dropout": 0.0,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "hidden_act": "quick_gelu" if clip else "gelu",
        "hidden_size": text.width,
        "intermediate_size": text.mlp_width,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": text.context_length,
        "model_type": "clip_text_model",
        "num_attention_heads": text.heads,
        "num_hidden_layers": text.layers,
        "pad_token_id": 1,
        "projection_dim": text.width,
        "vocab_size": text.vocab_size,
    }


def _write_tokenizer(folder: Path, pad: str) -> None:
    merges = read_merges()
    vocabulary = vocabulary_of(merges)
    _write_json(folder / "vocab.json", vocabulary)
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokens = {
        "bos_token": _START,
        "eos_token": _END,
        "pad_token": pad,
        "unk_token": _END,
    }
    _write_json(folder / "special_tokens_map.json", tokens)
    settings = {
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": CONTEXT_LENGTH,
        "tokenizer_class": "CLIPTokenizer",
    }
    _write_json(folder / "tokenizer_config.json", {**settings, **tokens})


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
