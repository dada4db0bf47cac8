"""Merge LoRA files into a checkpoint's tensors while they stream by.

    W + scale * alpha / rank * up @ down        alpha is the rank where none is given

Design: a file's keys are settled against the model's names before anything is read: a
key that matches nothing is an error, never left out in silence. Two styles are known:
kohya's (flat names such as `lora_unet_input_blocks_4_1_proj_in`, of original or
diffusers modules) and diffusers' (dotted names, `lora_A` and `lora_B` or `down` and
`up`). Both name Hugging Face's text modules; OpenCLIP's fused projection gets its rows.

Source: Hu et al. 2021 (LoRA); kohya-ss sd-scripts and diffusers for the names; rank
stabilized scale: Kalajdzievski 2023, alpha / sqrt(rank).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from sdxl.checkpoint import count
from sdxl.config import ModelConfig
from sdxl.layouts import UNET_PREFIX, tensor_specs
from sdxl.safetensors_file import read_safetensors
from sdxl.stored import ITEMSIZE, CheckpointError, Stored
from sdxl.tensor_spec import TensorSpec

_ROLES = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "lora_linear_layer.down.weight": "down",
    "lora_linear_layer.up.weight": "up",
    "alpha": "alpha",
}
_ROLE = re.compile(rf"[._]({'|'.join(map(re.escape, _ROLES))})$")
_KOHYA = {
    "unet": "lora_unet_",
    "text_encoder": "lora_te1_",
    "text_encoder_2": "lora_te2_",
}
_UNSUPPORTED = re.compile(r"\.(hada_|lokr_|dora_scale|lora_mid|diff|oft_)")
# Modules as older diffusers files spell them.
_OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}
_BARE_TEXT = re.compile(r"^(text_encoder(?:_2)?)\.(?=encoder\.)")


@dataclass(frozen=True, slots=True, kw_only=True)
class Lora:
    """A LoRA file and how strongly it is merged; 0 leaves every tensor as it is."""

    path: Path
    scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class _Target:
    """A weight that a module's name means; `part` counts the rows of a fused one."""

    spec: TensorSpec
    part: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        return self.spec.shape_in("diffusers")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Delta:
    target: _Target
    up: Stored
    down: Stored
    factor: float

    def add_to(self, array: np.ndarray) -> None:
        """Add the product to the target's rows of `array`, float32, original form."""
        rank, shape = self.down.shape[0], self.target.shape
        up = self.up.read().astype(np.float32).reshape(shape[0], rank)
        down = self.down.read().astype(np.float32).reshape(rank, -1)
        delta = np.float32(self.factor) * (up @ down)
        if self.target.spec.form == "qkv":
            first = self.target.part * shape[0]
            array[first : first + shape[0]] += delta
        elif self.target.spec.form == "transposed":
            array += delta.T
        else:
            array += delta.reshape(array.shape)


class LoraSet:
    """Several LoRAs, settled against one model; `apply` is a patch for `load_into`."""

    def __init__(self, loras: Iterable[Lora], config: ModelConfig) -> None:
        """Read the headers. Raises `CheckpointError` on a key that matches nothing."""
        self._loras = tuple(loras)
        self._deltas: dict[str, list[_Delta]] = {}
        for lora in self._loras:
            for delta in _read_lora(lora, config):
                self._deltas.setdefault(delta.target.spec.name, []).append(delta)

    def apply(self, name: str, array: np.ndarray) -> np.ndarray:
        """Give the merged tensor, float32; the same object when nothing is merged."""
        deltas = [delta for delta in self._deltas.get(name, ()) if delta.factor]
        if not deltas:
            return array
        merged = array.astype(np.float32)
        for delta in deltas:
            delta.add_to(merged)
        return merged

    def files(self) -> list[Path]:
        """List the files, in the order they are merged."""
        return [lora.path for lora in self._loras]


def _read_lora(lora: Lora, config: ModelConfig) -> list[_Delta]:
    table, metadata = _read_table(lora.path)
    targets = _targets(config)
    modules, unknown = _group(table, targets)
    if unknown:
        odd = any(_UNSUPPORTED.search(f".{name}") for name in unknown)
        hint = (
            "LoHa, LoKr, DoRA and full differences are not supported"
            if odd
            else "is it an SDXL LoRA, of a checkpoint of this kind?"
        )
        what = count(unknown, "match nothing in the model")
        raise CheckpointError(f"{lora.path}: {what}; hint: {hint}")
    settings = _settings(lora.path, metadata)
    return [
        _delta(lora, module, parts, targets[module], settings)
        for module, parts in modules.items()
    ]


def _read_table(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    if path.suffix != ".safetensors":
        raise CheckpointError(f"{path}: a LoRA must be a .safetensors file")
    try:
        return read_safetensors(path)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def _group(
    table: Mapping[str, Stored], targets: Mapping[str, _Target]
) -> tuple[dict[str, dict[str, Stored]], list[str]]:
    """Gather each module's `up`, `down`, `alpha`; list the names that fit nothing."""
    modules: dict[str, dict[str, Stored]] = {}
    unknown = []
    for name, stored in table.items():
        found = _ROLE.search(name)
        module = _modern_module(name[: found.start()]) if found else ""
        if found is None or module not in targets:
            unknown.append(name)
            continue
        parts = modules.setdefault(module, {})
        if (role := _ROLES[found[1]]) in parts:
            raise CheckpointError(f"{stored.path}: `{module}` has two `{role}`")
        parts[role] = stored
    return modules, unknown


def _delta(
    lora: Lora,
    module: str,
    parts: Mapping[str, Stored],
    target: _Target,
    settings: Mapping[str, Any],
) -> _Delta:
    if not {"up", "down"} <= parts.keys():
        lacks = "down" if "up" in parts else "up"
        raise CheckpointError(f"{lora.path}: `{module}` has no `{lacks}` weight")
    up, down = parts["up"], parts["down"]
    if not _multiply(up, down, target.shape):
        raise CheckpointError(
            f"{lora.path}: `{module}`: {list(up.shape)} {up.dtype} times "
            f"{list(down.shape)} {down.dtype} does not fit {list(target.shape)}"
        )
    factor = lora.scale * _own_scale(module, parts.get("alpha"), down, settings)
    if not math.isfinite(factor):
        raise CheckpointError(f"{lora.path}: `{module}`: its scale is {factor}")
    return _Delta(target=target, up=up, down=down, factor=factor)


def _multiply(up: Stored, down: Stored, shape: tuple[int, ...]) -> bool:
    """Tell whether (out, rank, 1…) times (rank, in…) has the weight's shape."""
    if not {up.dtype, down.dtype} <= ITEMSIZE.keys():
        return False
    if min(len(up.shape), len(down.shape)) < 2 or not down.shape[0]:
        return False
    return (
        up.shape[:2] == (shape[0], down.shape[0])
        and math.prod(up.shape[2:]) == 1
        and math.prod(down.shape[1:]) == math.prod(shape[1:])
    )


def _own_scale(
    module: str, alpha: Stored | None, down: Stored, settings: Mapping[str, Any]
) -> float:
    """Give the file's own scale: alpha / rank, or as its training settings say."""
    rank = down.shape[0]
    if alpha is not None:
        if math.prod(alpha.shape) != 1 or alpha.dtype not in ITEMSIZE:
            raise CheckpointError(f"{alpha.path}: `{module}`: alpha is no number")
        return float(alpha.read().reshape(())) / rank
    component, _, inner = module.partition(".")
    value = settings.get(f"{component}.lora_alpha", rank)
    for pattern, special in (settings.get(f"{component}.alpha_pattern") or {}).items():
        if inner == pattern or inner.endswith(f".{pattern}"):
            value = special
    root = settings.get(f"{component}.use_rslora", False)
    return value / (math.sqrt(rank) if root else rank)


def _settings(path: Path, metadata: Mapping[str, str]) -> dict[str, Any]:
    """Read the training settings that diffusers keeps in the file, if any."""
    try:
        settings = json.loads(metadata.get("lora_adapter_metadata", "{}"))
    except (ValueError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise CheckpointError(f"{path}: `lora_adapter_metadata` is no JSON object")
    for name, value in settings.items():
        field = name.rpartition(".")[2]
        numbers = value.values() if isinstance(value, dict) else [value]
        if field in ("use_dora", "lora_bias") and value:
            raise CheckpointError(f"{path}: `{name}` is not supported")
        if field in ("lora_alpha", "alpha_pattern") and not all(map(_number, numbers)):
            raise CheckpointError(f"{path}: `{name}` is {value!r}, no number")
    return settings


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) < 1e9


def _modern_module(module: str) -> str:
    """Give a module's name as the targets have it."""
    component = module.partition(".")[0]
    if component == "unet":
        module = module.replace(".processor.", ".")
        return f"{module}.0" if module.endswith(".to_out") else module
    if component in _KOHYA:
        module = _BARE_TEXT.sub(r"\1.text_model.", module)
        stem, _, last = module.rpartition(".")
        return f"{stem}.{_OLD_TEXT.get(last, last)}"
    return module


@lru_cache(maxsize=4)
def _targets(config: ModelConfig) -> dict[str, _Target]:
    """Map every name a LoRA may give a module to the weight it means."""
    targets: dict[str, _Target] = {}
    for spec in tensor_specs(config):
        if spec.component not in _KOHYA or len(spec.shape) < 2 or spec.kind != "plain":
            continue
        for part, name in enumerate(spec.diffusers):
            target = _Target(spec=spec, part=part)
            for module in _module_names(spec, name):
                targets[module] = target
    return targets


def _module_names(spec: TensorSpec, diffusers: str) -> Sequence[str]:
    module = diffusers.removesuffix(".weight")
    kohya = _KOHYA[spec.component]
    names = [f"{spec.component}.{module}", kohya + module.replace(".", "_")]
    if spec.component == "unet":
        original = spec.name.removeprefix(UNET_PREFIX).removesuffix(".weight")
        names.append(kohya + original.replace(".", "_"))
    return names
