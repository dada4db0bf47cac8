"""diffusers' and transformers' networks with our seeded weights: the outside oracle.

The weights go in under the names that `layouts.tensor_specs` lists for diffusers, so an
agreement also proves that list. Needs torch, diffusers and transformers.
"""

from __future__ import annotations

import gzip
import json
import tempfile
from collections.abc import Iterator
from importlib import resources
from pathlib import Path

import numpy as np
import torch
from diffusers import (
    AutoencoderKL,
    EulerDiscreteScheduler,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from sdxl.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sdxl.layouts import tensor_specs
from sdxl.random_weights import random_tensor
from sdxl.tokenizer import Tokenizer
from tests.golden.networks_cases import (
    CONSISTENCY,
    GUIDANCE,
    LATENT_SIZES,
    PROMPTS,
    SHORT,
    STEPS,
    Case,
    cases,
    unet_inputs,
    vae_inputs,
)

torch.manual_seed(0)


def build_unet(config: ModelConfig) -> UNet2DConditionModel:
    unet: UNetConfig = config.unet
    levels = len(unet.channel_mult)
    widths = [mult * unet.model_channels for mult in unet.channel_mult]
    crossed = [depth > 0 for depth in unet.transformer_depth]
    return UNet2DConditionModel(
        block_out_channels=widths,
        down_block_types=[
            "CrossAttnDownBlock2D" if c else "DownBlock2D" for c in crossed
        ],
        up_block_types=[
            "CrossAttnUpBlock2D" if c else "UpBlock2D" for c in reversed(crossed)
        ],
        # The last entry is the middle block's too.
        transformer_layers_per_block=[
            *(max(depth, 1) for depth in unet.transformer_depth[: levels - 1]),
            unet.middle_depth or unet.transformer_depth[-1],
        ],
        mid_block_type=(
            "UNetMidBlock2D" if unet.middle_depth is None else "UNetMidBlock2DCrossAttn"
        ),
        attention_head_dim=[width // unet.head_dim for width in widths],
        cross_attention_dim=unet.context_dim,
        addition_embed_type="text_time",
        addition_time_embed_dim=config.size_embed_dim,
        projection_class_embeddings_input_dim=unet.adm_in_channels,
        use_linear_projection=True,
        norm_num_groups=unet.norm_groups,
        time_cond_proj_dim=unet.time_cond_proj_dim,
    )


def build_vae(vae: VAEConfig) -> AutoencoderKL:
    levels = len(vae.ch_mult)
    return AutoencoderKL(
        block_out_channels=[mult * vae.ch for mult in vae.ch_mult],
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        layers_per_block=vae.num_res_blocks,
        latent_channels=vae.z_channels,
        norm_num_groups=vae.norm_groups,
        scaling_factor=vae.scale_factor,
        force_upcast=False,
    )


def build_text_encoder(text: TextEncoderConfig) -> torch.nn.Module:
    kind = CLIPTextModel if text.kind == "clip" else CLIPTextModelWithProjection
    return kind(
        CLIPTextConfig(
            vocab_size=text.vocab_size,
            hidden_size=text.width,
            intermediate_size=text.mlp_width,
            num_hidden_layers=text.layers,
            num_attention_heads=text.heads,
            projection_dim=text.width,
            hidden_act="quick_gelu" if text.kind == "clip" else "gelu",
            pad_token_id=text.pad_id,
            bos_token_id=49_406,
            eos_token_id=49_407,
        )
    )


def build(config: ModelConfig) -> dict[str, torch.nn.Module]:
    """Build every network by its folder's name, with the seeded weights in float32."""
    names = {"clip": "text_encoder", "openclip": "text_encoder_2"}
    networks = {"unet": build_unet(config), "vae": build_vae(config.vae)}
    for text in config.text_encoders:
        networks[names[text.kind]] = build_text_encoder(text)
    for component, network in networks.items():
        state = state_of(config, component)
        if component == "text_encoder" and "final_layer_norm.weight" in (
            network.state_dict()
        ):  # transformers 5 has shorter names in memory than in files
            state = {k.removeprefix("text_model."): v for k, v in state.items()}
        network.load_state_dict(state, strict=True)
        network.eval().requires_grad_(False)
    return networks


def state_of(config: ModelConfig, component: str) -> dict[str, torch.Tensor]:
    """Make a network's seeded weights under diffusers' names, in diffusers' forms."""
    state = {}
    for spec in tensor_specs(config):
        if spec.component == component:
            tensor = random_tensor(spec.name, spec.shape)
            parts = spec.to_layout("diffusers", tensor)
            state |= {
                name: torch.from_numpy(np.ascontiguousarray(part))
                for name, part in zip(spec.diffusers, parts, strict=True)
            }
    return state


def build_tokenizer(folder: Path, pad_token: str) -> CLIPTokenizer:
    """Build the Hugging Face tokenizer from CLIP's published merges."""
    packed = resources.files("sdxl").joinpath("clip_bpe_merges.txt.gz").read_bytes()
    merges = gzip.decompress(packed).decode().split("\n")[1 : 49_152 - 256 - 2 + 1]
    symbols = [chr(code) for code in byte_symbols()]
    tokens = [*symbols, *(symbol + "</w>" for symbol in symbols)]
    tokens += ["".join(merge.split()) for merge in merges]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]))
    return CLIPTokenizer.from_pretrained(
        folder, pad_token=pad_token, model_max_length=77
    )


def byte_symbols() -> Iterator[int]:
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    yield from visible
    yield from range(0x100, 0x100 + 256 - len(visible))


def build_pipeline(config: ModelConfig) -> StableDiffusionXLPipeline:
    """Build diffusers' pipeline; our start of noise needs its `leading` spacing."""
    networks = build(config)
    with tempfile.TemporaryDirectory() as folder:
        first = build_tokenizer(Path(folder), "<|endoftext|>")
        second = build_tokenizer(Path(folder), "!")
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        timestep_spacing="leading",
    )
    pipeline = StableDiffusionXLPipeline(
        **networks, tokenizer=first, tokenizer_2=second, scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline: StableDiffusionXLPipeline, case: Case) -> np.ndarray:
    """Make one picture: (H, W, 3) uint8."""
    image = pipeline(
        prompt=case.prompt,
        negative_prompt=case.negative_prompt,
        guidance_scale=case.guidance_scale,
        timesteps=[
            999 - 999 * i // STEPS - (999 * i % STEPS > 0) for i in range(STEPS)
        ],
        width=case.width,
        height=case.height,
        original_size=(case.original_height, case.original_width),
        crops_coords_top_left=(case.crop_top, case.crop_left),
        target_size=(case.target_height, case.target_width),
        negative_original_size=(case.original_height, case.original_width),
        negative_crops_coords_top_left=(case.crop_top, case.crop_left),
        negative_target_size=(case.target_height, case.target_width),
        generator=torch.Generator("cpu").manual_seed(case.seed),
        output_type="pil",
    ).images[0]
    return np.asarray(image)


@torch.no_grad()
def outputs(geometry: str, config: ModelConfig) -> dict[str, np.ndarray]:
    """Run every network once on the shared inputs, and the pipeline on its cases."""
    pipeline = build_pipeline(config)
    size = LATENT_SIZES[geometry]
    found = text_outputs(config, pipeline) | unet_outputs(config, pipeline, size)
    found |= vae_outputs(pipeline.vae, size)
    found["pixels"] = np.stack([draw(pipeline, case) for case in cases(geometry)])
    return found


def text_outputs(
    config: ModelConfig, pipeline: StableDiffusionXLPipeline
) -> dict[str, np.ndarray]:
    first, second = (
        torch.from_numpy(Tokenizer(text.pad_id)(PROMPTS)[0]).long()
        for text in config.text_encoders
    )
    one = pipeline.text_encoder(first, output_hidden_states=True)
    two = pipeline.text_encoder_2(second, output_hidden_states=True)
    return {
        "hidden": one.hidden_states[-2].numpy(),
        "hidden_2": two.hidden_states[-2].numpy(),
        "pooled": two.text_embeds.numpy(),
    }


def unet_outputs(
    config: ModelConfig, pipeline: StableDiffusionXLPipeline, size: tuple[int, int]
) -> dict[str, np.ndarray]:
    unet = pipeline.unet
    inputs = {key: torch.from_numpy(x) for key, x in unet_inputs(config, size).items()}
    vectors = []
    unet.add_embedding.register_forward_pre_hook(
        lambda _, args: vectors.append(args[0])
    )
    predicted = unet(
        inputs["x"],
        inputs["timestep"],
        inputs["context"],
        added_cond_kwargs={
            "text_embeds": inputs["pooled"],
            "time_ids": inputs["sizes"],
        },
    ).sample
    unet.add_embedding._forward_pre_hooks.clear()
    return {"vector": vectors[0].numpy(), "predicted": predicted.numpy()}


@torch.no_grad()
def short_outputs() -> dict[str, np.ndarray]:
    """Run the UNet whose middle is a residual block."""
    made = unet_outputs(SHORT, build_pipeline(SHORT), LATENT_SIZES["tiny"])
    return {"predicted": made["predicted"]}


@torch.no_grad()
def consistency_outputs() -> dict[str, np.ndarray]:
    """Run the UNet that takes its guidance scale as an input."""
    pipeline = build_pipeline(CONSISTENCY)
    width = CONSISTENCY.unet.time_cond_proj_dim
    inputs = {
        key: torch.from_numpy(x)
        for key, x in unet_inputs(CONSISTENCY, LATENT_SIZES["tiny"]).items()
    }
    w = pipeline.get_guidance_scale_embedding(torch.tensor(GUIDANCE) - 1, width)
    predicted = pipeline.unet(
        inputs["x"],
        inputs["timestep"],
        inputs["context"],
        timestep_cond=w,
        added_cond_kwargs={
            "text_embeds": inputs["pooled"],
            "time_ids": inputs["sizes"],
        },
    ).sample
    return {"predicted": predicted.numpy()}


def vae_outputs(vae: AutoencoderKL, size: tuple[int, int]) -> dict[str, np.ndarray]:
    z, x = (torch.from_numpy(array) for array in vae_inputs(size))
    posterior = vae.encode(x).latent_dist
    return {
        "decoded": vae.decode(z).sample.numpy(),
        "mean": posterior.mean.numpy(),
        "logvar": posterior.logvar.numpy(),
    }
