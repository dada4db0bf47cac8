"""The small SDXL's networks as diffusers and transformers classes, and their geometry.

The figures are those of the preset `tiny` in `sdxl/config.py`; a test compares them.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

SCALE_FACTOR = 0.13025
NORM_GROUPS = 8  # 32 of them over 32 channels would hide every flat colour
TEXT_WIDTH = 32
SIZE_EMBED_DIM = 64
VOCAB_SIZE = 49_408
CONTEXT_LENGTH = 77
END_ID = 49_407


def start_folder(work: Path, model: str) -> Path:
    """Name the unpacked weights of a model that `work` starts from."""
    return work / "start" / model


def start_vae(work: Path) -> AutoencoderKL:
    """Return the autoencoder that `work` starts from: unpacked weights, or new ones."""
    folder = start_folder(work, "base") / "vae"
    return AutoencoderKL.from_pretrained(folder) if folder.exists() else make_vae()


def make_vae() -> AutoencoderKL:
    """Return the f=8 autoencoder; its 1x1 convolutions are rescaled after training."""
    return AutoencoderKL(
        block_out_channels=(32, 32, 64, 64),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=NORM_GROUPS,
        latent_channels=4,
        sample_size=128,
        scaling_factor=SCALE_FACTOR,
        force_upcast=False,
    )


def make_unet(*, guidance_embed_dim: int | None = None) -> UNet2DConditionModel:
    """Return the denoiser; `guidance_embed_dim` gives it LCM's projection of w."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64, 128),
        down_block_types=(
            "DownBlock2D",
            "CrossAttnDownBlock2D",
            "CrossAttnDownBlock2D",
        ),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        attention_head_dim=(1, 2, 4),  # diffusers' name for the number of heads
        cross_attention_dim=2 * TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_EMBED_DIM,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * SIZE_EMBED_DIM,
        use_linear_projection=True,
        norm_num_groups=NORM_GROUPS,
        time_cond_proj_dim=guidance_embed_dim,
    )


def make_refiner_unet() -> UNet2DConditionModel:
    """Return the refiner's denoiser (preset `tiny-refiner`)."""
    return UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        mid_block_type="UNetMidBlock2D",  # a single ResBlock
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(1, 2),
        cross_attention_dim=TEXT_WIDTH,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_EMBED_DIM,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 5 * SIZE_EMBED_DIM,
        use_linear_projection=True,
        norm_num_groups=NORM_GROUPS,
    )


@torch.no_grad()
def upper_levels(base: UNet2DConditionModel) -> UNet2DConditionModel:
    """Return a refiner's denoiser that has the base's levels but its lowest.

    What comes up from below, and the score, have no effect as yet. Of what the base is
    told, the second encoder's context stays, the pooled vector, and all sizes but the
    target's.
    """
    refiner = make_refiner_unet()
    weights = base.state_dict()
    for name, ours in refiner.state_dict().items():
        if name.startswith("mid_block"):
            continue
        theirs = weights[re.sub(r"^up_blocks\.(\d)", _level_above, name)]
        if theirs.shape == ours.shape:
            ours.copy_(theirs)
        elif name.startswith("add_embedding"):
            known = TEXT_WIDTH + 4 * SIZE_EMBED_DIM
            ours.zero_()[:, :known] = theirs[:, :known]
        elif ".attn2." in name:
            ours.copy_(theirs[:, -TEXT_WIDTH:])
        elif ours.ndim > 1:  # reads what comes up from below, then the way down's
            half = ours.shape[1] // 2
            ours.zero_()[:, half:] = theirs[:, -half:]
        else:  # the norm before that
            half = len(ours) // 2
            ours[half:] = theirs[-half:]
    return refiner


def _level_above(found: re.Match[str]) -> str:
    return f"up_blocks.{int(found[1]) + 1}"


def make_text_encoders() -> tuple[CLIPTextModel, CLIPTextModelWithProjection]:
    """Return the CLIP-like and the OpenCLIP-like encoder."""

    def config(activation: str, pad_id: int) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=VOCAB_SIZE,
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT_LENGTH,
            projection_dim=TEXT_WIDTH,
            hidden_act=activation,
            pad_token_id=pad_id,
            bos_token_id=END_ID - 1,
            eos_token_id=END_ID,
        )

    first = CLIPTextModel(config("quick_gelu", END_ID))
    second = CLIPTextModelWithProjection(config("gelu", 0))
    return first, second


def encode_text(
    first: CLIPTextModel,
    second: CLIPTextModelWithProjection,
    first_ids: torch.Tensor,
    second_ids: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return context (B, 77, 64) and pooled (B, 32) for padded ids (B, 77) of each."""
    one = first(first_ids, output_hidden_states=True).hidden_states[-2]
    two = second(second_ids, output_hidden_states=True)
    return torch.cat((one, two.hidden_states[-2]), -1), two.text_embeds
