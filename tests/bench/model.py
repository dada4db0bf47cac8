"""The small SDXL that both sides of a comparison run: its geometry, written to disk.

Widths 64, 128, 256 with the depths of SDXL's pattern (none, 2, 4 blocks), text encoders
of 256 and 384, and an autoencoder of a quarter of SDXL's width: eight steps of the
network are four fifths of the arithmetic, as they are more in a real job. Its weights
are random and written once, as a diffusers folder.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from sdxl.config import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from sdxl.diffusers_json import write_folder_files
from sdxl.layouts import tensor_specs
from sdxl.random_weights import random_tensor
from sdxl.safetensors_file import SafetensorsWriter

SMALL = ModelConfig(
    kind="base",
    unet=UNetConfig(
        model_channels=64,
        channel_mult=(1, 2, 4),
        transformer_depth=(0, 2, 4),
        middle_depth=4,
        head_dim=32,
        context_dim=256 + 384,
        adm_in_channels=384 + 6 * 256,
    ),
    text_encoders=(
        TextEncoderConfig(
            kind="clip", width=256, layers=12, heads=4, mlp_width=1024, pad_id=49_407
        ),
        TextEncoderConfig(
            kind="openclip", width=384, layers=16, heads=6, mlp_width=1536, pad_id=0
        ),
    ),
    vae=VAEConfig(ch=32, ch_mult=(1, 2, 4, 4), norm_groups=16),
    native_size=256,
)
STEMS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model"}


def write_model(folder: Path, config: ModelConfig = SMALL) -> Path:
    """Write the model as a diffusers folder, unless it is there already."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as room:
        unfinished = Path(room) / folder.name
        write_folder_files(unfinished, config)
        for component in ("unet", "vae", "text_encoder", "text_encoder_2"):
            _write_network(unfinished / component, config, component)
        unfinished.replace(folder)
    return folder


def _write_network(folder: Path, config: ModelConfig, component: str) -> None:
    """Write one network's weights under diffusers' names."""
    specs = [spec for spec in tensor_specs(config) if spec.component == component]
    plan, arrays = {}, {}
    for spec in specs:
        parts = spec.to_layout("diffusers", random_tensor(spec.name, spec.shape))
        for name, part in zip(spec.diffusers, parts, strict=True):
            plan[name], arrays[name] = ("fp32", part.shape), part
    file = folder / f"{STEMS.get(component, 'model')}.safetensors"
    with SafetensorsWriter(file, plan, {"format": "pt"}) as writer:
        for name, array in arrays.items():
            writer.add(name, array)
