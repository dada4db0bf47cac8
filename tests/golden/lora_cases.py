"""LoRA files of seeded numbers over the tiny model, in the styles that are in use."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from sdxl.config import TINY
from sdxl.layouts import UNET_PREFIX, tensor_specs
from sdxl.random_weights import random_tensor

RANK, ALPHA = 4, 2.0
SCALES = (0.7, 1.0)
SAMPLES = 8
# Every kind of layer that trainers reach: attention, feed-forward, projections in and
# out of a transformer, convolutions, the time embedding's, and both text encoders'.
KINDS = (
    ".to_q",
    ".to_k",
    ".to_v",
    ".to_out.0",
    ".ff.net.0.proj",
    ".ff.net.2",
    ".proj_in",
    ".proj_out",
    ".conv1",
    ".conv2",
    ".conv_shortcut",
    "samplers.0.conv",
    ".time_emb_proj",
    ".q_proj",
    ".k_proj",
    ".v_proj",
    ".out_proj",
    ".fc1",
    ".fc2",
)
KOHYA = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
}
Pair = tuple[np.ndarray, np.ndarray]


def modules() -> dict[str, tuple[str, tuple[int, ...], str]]:
    """Map each module's diffusers name to (network, weight shape, original name)."""
    return {
        f"{spec.component}.{name.removesuffix('.weight')}": (
            spec.component,
            spec.shape_in("diffusers"),
            spec.name,
        )
        for spec in tensor_specs(TINY)
        if spec.component != "vae"
        for name in spec.diffusers
        if name.removesuffix(".weight").endswith(KINDS)
    }


def pair(module: str, shape: tuple[int, ...]) -> Pair:
    """Make (up, down) of one module."""
    up = random_tensor(f"{module}.up", (shape[0], RANK) + (1,) * (len(shape) - 2))
    return up, random_tensor(f"{module}.down", (RANK, *shape[1:]))


def peft_style(module: str, network: str, original: str, up, down) -> dict:
    return {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}


def older_style(module: str, network: str, original: str, up, down) -> dict:
    """Name as diffusers did before peft; attention had processors then."""
    if ".attn" in module and network == "unet":
        stem, _, last = module.partition(".to_")
        at = f"{stem}.processor.to_{last.removesuffix('.0')}_lora"
        return {f"{at}.down.weight": down, f"{at}.up.weight": up}
    inner = "lora" if network == "unet" else "lora_linear_layer"
    return {f"{module}.{inner}.down.weight": down, f"{module}.{inner}.up.weight": up}


def kohya_style(module: str, network: str, original: str, up, down) -> dict:
    flat = module.partition(".")[2]
    if network == "unet":
        flat = original.removeprefix(UNET_PREFIX).removesuffix(".weight")
    return _kohya(network, flat, up, down)


def kohya_diffusers_style(module: str, network: str, original: str, up, down) -> dict:
    return _kohya(network, module.partition(".")[2], up, down)


def _kohya(network: str, flat: str, up: np.ndarray, down: np.ndarray) -> dict:
    at = KOHYA[network] + flat.replace(".", "_")
    return {
        f"{at}.lora_down.weight": down,
        f"{at}.lora_up.weight": up,
        f"{at}.alpha": np.asarray(ALPHA, np.float32),
    }


STYLES: dict[str, Callable[..., dict]] = {
    "peft": peft_style,
    "older": older_style,
    "kohya": kohya_style,
    "kohya_diffusers": kohya_diffusers_style,
}


def write_lora(path: Path, style: str) -> Path:
    """Write one file over all modules."""
    tensors: dict[str, np.ndarray] = {}
    for module, (network, shape, original) in modules().items():
        tensors |= STYLES[style](module, network, original, *pair(module, shape))
    save_file(tensors, path, metadata={"format": "pt"})
    return path


def samples(array: np.ndarray) -> np.ndarray:
    """Pick a few numbers of a tensor, spread over it."""
    flat = array.reshape(-1)
    return flat[np.linspace(0, flat.size - 1, SAMPLES).astype(int)]
