"""Record names and shapes of diffusers' and transformers' full-size SDXL networks.

    python tests/golden/make_layouts.py

Builds them without memory, from the published settings, and hashes each state dict.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from accelerate import init_empty_weights
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

BASE_UNET = {
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "attention_head_dim": (5, 10, 20),
    "block_out_channels": (320, 640, 1280),
    "cross_attention_dim": 2048,
    "down_block_types": ("DownBlock2D", *["CrossAttnDownBlock2D"] * 2),
    "projection_class_embeddings_input_dim": 2816,
    "transformer_layers_per_block": (1, 2, 10),
    "up_block_types": (*["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
    "use_linear_projection": True,
}
REFINER_UNET = {
    **BASE_UNET,
    "attention_head_dim": (6, 12, 24, 24),
    "block_out_channels": (384, 768, 1536, 1536),
    "cross_attention_dim": 1280,
    "down_block_types": (
        "DownBlock2D",
        *["CrossAttnDownBlock2D"] * 2,
        "DownBlock2D",
    ),
    "projection_class_embeddings_input_dim": 2560,
    "transformer_layers_per_block": 4,
    "up_block_types": ("UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"),
}
TINY_UNET = {
    **BASE_UNET,
    "addition_time_embed_dim": 64,
    "attention_head_dim": (1, 2, 4),
    "block_out_channels": (32, 64, 128),
    "cross_attention_dim": 64,
    "norm_num_groups": 8,
    "projection_class_embeddings_input_dim": 416,
    "transformer_layers_per_block": (1, 1, 2),
}
VAE = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "layers_per_block": 2,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
TINY_VAE = {**VAE, "block_out_channels": (32, 32, 64, 64), "norm_num_groups": 8}
CLIP_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12}
BIGG = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_attention_heads": 20,
    "num_hidden_layers": 32,
    "projection_dim": 1280,
}
TINY_TEXT = {
    "hidden_size": 32,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "num_hidden_layers": 4,
    "projection_dim": 32,
}

MODELS: dict[str, tuple[dict, dict, dict | None, dict]] = {
    "base": (BASE_UNET, VAE, CLIP_L, BIGG),
    "refiner": (REFINER_UNET, VAE, None, BIGG),
    "lcm": ({**BASE_UNET, "time_cond_proj_dim": 256}, VAE, CLIP_L, BIGG),
    "tiny": (TINY_UNET, TINY_VAE, TINY_TEXT, TINY_TEXT),
}


def networks(
    unet: dict[str, Any], vae: dict[str, Any], clip: dict | None, openclip: dict
) -> dict[str, Any]:
    """Build the networks of one model without memory."""
    with init_empty_weights():
        built = {
            "unet": UNet2DConditionModel(**unet),
            "vae": AutoencoderKL(**vae),
            "text_encoder_2": CLIPTextModelWithProjection(CLIPTextConfig(**openclip)),
        }
        if clip is not None:
            built["text_encoder"] = CLIPTextModel(CLIPTextConfig(**clip))
    return built


def digest(component: str, network: Any) -> dict[str, Any]:
    """Hash one state dict; transformers 5 drops a prefix that the files still have."""
    prefix = "text_model." if component == "text_encoder" else ""
    state = network.state_dict()
    lines = sorted(f"{prefix}{name} {list(t.shape)}\n" for name, t in state.items())
    text = "".join(lines)
    return {"tensors": len(lines), "sha256": hashlib.sha256(text.encode()).hexdigest()}


def main() -> None:
    record = {
        kind: {name: digest(name, net) for name, net in networks(*parts).items()}
        for kind, parts in MODELS.items()
    }
    path = Path(__file__).with_name("layouts_diffusers.json")
    path.write_text(json.dumps(record, indent=2) + "\n")


if __name__ == "__main__":
    main()
