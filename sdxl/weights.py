"""Open a checkpoint of any layout and read it as named arrays, strictly.

Design: opening reads headers only and settles the geometry; `check` then compares
names, shapes and types with it, both ways, before a number is read; `tensors` streams
arrays under their original names and forms, whatever the file calls them, one at a
time. So nothing downstream knows of layouts, and no second copy of a model is held.

Nothing is ever unpickled: pickled checkpoints are refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from sdxl.ckpt_file import check_crc, read_ckpt
from sdxl.config import PRESETS, ModelConfig
from sdxl.diffusers_folder import read_folder
from sdxl.layouts import LCM_NAME, TensorSpec, tensor_specs
from sdxl.safetensors_file import read_safetensors
from sdxl.stored import ITEMSIZE, CheckpointError, Stored, cast

if TYPE_CHECKING:
    from mindspore import nn

__all__ = ["Checkpoint", "CheckpointError", "load_into", "open_checkpoint"]

Layout = Literal["original", "mindspore", "diffusers"]
Patch = Callable[[str, np.ndarray], np.ndarray]

# OpenCLIP's initial value. Sampling never uses the scale, Hugging Face's encoder has
# none, and many published files lost it: it alone may be absent.
DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)
# Buffers and tables that some published files hold beside the weights.
TOLERATED = (".position_ids", ".attn_mask", "denoiser.sigmas")


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose headers are read: what it is, and where its tensors lie.

    `table` has the names found in the files, a diffusers name preceded by its folder;
    `metadata` is the files' free text.
    """

    path: Path
    layout: Layout
    config: ModelConfig
    table: Mapping[str, Stored]
    metadata: Mapping[str, str]
    config_files: tuple[Path, ...] = ()

    @cached_property
    def specs(self) -> tuple[TensorSpec, ...]:
        """Every tensor the geometry asks for, in module order."""
        return tensor_specs(self.config)

    @property
    def preset(self) -> str | None:
        """The preset with this geometry, LCM's guidance embedding aside."""
        plain = _with_guidance(self.config, None)
        return next((name for name in PRESETS if PRESETS[name] == plain), None)

    @property
    def is_lcm(self) -> bool:
        return self.config.unet.time_cond_proj_dim is not None

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The element types of the weights: `fp32`, `fp16`, `bf16`; usually one."""
        return tuple(sorted({self.dtype_of(spec) for spec in self.specs}))

    def dtype_of(self, spec: TensorSpec) -> str:
        """The type one tensor is stored in; fp32 when it is made from unlike parts."""
        names = stored_names(spec, self.layout)
        found = {self.table[name].dtype for name in names if name in self.table}
        return found.pop() if len(found) == 1 else "fp32"

    @cached_property
    def missing(self) -> list[str]:
        """Names that are asked for and not there."""
        return [
            name
            for spec in self.specs
            if not _is_logit_scale(spec)
            for name in stored_names(spec, self.layout)
            if name not in self.table
        ]

    @cached_property
    def extra(self) -> list[str]:
        """Names that are there and not asked for, the tolerated ones left out."""
        wanted = {
            name for spec in self.specs for name in stored_names(spec, self.layout)
        }
        return [
            name
            for name in self.table
            if name not in wanted and not name.endswith(TOLERATED)
        ]

    @cached_property
    def unfit(self) -> list[str]:
        """Tensors of another shape or of a type we do not read, each described."""
        return [
            f"`{name}` is {_describe(self.table[name])}, expected {list(shape)}"
            for spec in self.specs
            for name in stored_names(spec, self.layout)
            if name in self.table
            and not _fits(self.table[name], shape := _shape_in(spec, self.layout))
        ]

    def files(self) -> list[Path]:
        """List the files whose bytes make this checkpoint, in a fixed order."""
        return sorted({*self.config_files, *(s.path for s in self.table.values())})

    def check(self) -> None:
        """Hold the checkpoint to be whole: every tensor there, none beside, all fit.

        A MindSpore file's checksum, where it has one, is verified: a full read.
        Raises `CheckpointError`: one line naming the first offenders and their counts.
        """
        self._check_headers()
        for path in self.files():
            if path.suffix == ".ckpt":
                check_crc(path)

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
        """Read the tensors whose original name begins with `prefix`, one at a time.

        Names, shapes and orientation are the original layout's; float32 or float16 as
        stored, bfloat16 widened to float32.
        """
        self._check_headers()
        for spec in self.specs:
            if spec.name.startswith(prefix):
                yield spec.name, self.read(spec)

    def read(self, spec: TensorSpec) -> np.ndarray:
        """Read one tensor in its original form."""
        names = stored_names(spec, self.layout)
        parts = [self.table[name].read() for name in names if name in self.table]
        if not parts:
            value = float(self.metadata.get("logit_scale", DEFAULT_LOGIT_SCALE))
            return np.asarray(value, np.float32)
        if self.layout == "diffusers":
            return to_original(spec, parts)
        return parts[0].reshape(spec.shape)

    def _check_headers(self) -> None:
        complaints = [
            _count(self.missing, "missing"),
            _count(self.extra, "not known"),
            _count(self.unfit, "unfit"),
        ]
        if any(complaints):
            what = "; ".join(filter(None, complaints))
            name = self.preset or "this geometry"
            raise CheckpointError(
                f"{self.path}: no whole `{name}` in {self.layout} layout: {what}"
            )


def open_checkpoint(path: Path, *, preset: str | None = None) -> Checkpoint:
    """Read what a checkpoint is, from its headers.

    A folder is a diffusers model and brings its geometry. A file's geometry is the
    preset whose shapes it fits best, or `preset`, which then is what it must be; with
    LCM's guidance embedding when it has the weight. Nothing more is checked here.
    Raises `CheckpointError` when it is nothing of the kind.
    """
    path = Path(path)
    if preset is not None and preset not in PRESETS:
        raise CheckpointError(
            f"no preset `{preset}`; hint: one of {', '.join(PRESETS)}"
        )
    try:
        if path.is_dir():
            return _open_folder(path, preset)
        return _open_file(path, preset)
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror or error}") from None


def load_into(
    cell: nn.Cell,
    checkpoint: Checkpoint,
    prefix: str,
    dtype: str | None = None,
    *,
    patch: Patch | None = None,
) -> None:
    """Fill a Cell with the tensors under `prefix`, which must be all it has, and fit.

    Each array is read, patched (a LoRA), cast to `dtype` (`fp32`, `fp16`; by default
    each parameter's own type), and becomes the parameter's memory without a copy.
    Raises `CheckpointError` on any difference of names or shapes.
    """
    from mindspore import Tensor
    from mindspore import dtype as ms_dtype

    types = {"fp32": ms_dtype.float32, "fp16": ms_dtype.float16}
    parameters = dict(cell.parameters_and_names())
    names = _match(parameters, checkpoint, prefix)
    for name, array in checkpoint.tensors(prefix):
        parameter = parameters[names[name]]
        if patch is not None:
            array = patch(name, array)
        if dtype is not None:
            parameter.set_dtype(types[dtype])
        own = "fp16" if parameter.dtype == ms_dtype.float16 else "fp32"
        parameter.set_data(Tensor.from_numpy(cast(array, own, name)))


def stored_names(spec: TensorSpec, layout: Layout) -> tuple[str, ...]:
    """Give the names one tensor has in a layout's table."""
    match layout:
        case "original":
            return (spec.name,)
        case "mindspore":
            return (spec.mindspore,)
    return tuple(f"{spec.component}/{name}" for name in spec.diffusers)


def to_original(spec: TensorSpec, parts: list[np.ndarray]) -> np.ndarray:
    """Bring one tensor from its diffusers form to the original one."""
    match spec.form:
        case "qkv":
            return np.concatenate(parts)
        case "transposed":
            return np.ascontiguousarray(parts[0].T)
    return parts[0].reshape(spec.shape)


def to_diffusers(spec: TensorSpec, array: np.ndarray) -> list[np.ndarray]:
    """Bring one tensor from its original form to the diffusers ones."""
    match spec.form:
        case "qkv":
            return np.split(array, 3)
        case "transposed":
            return [np.ascontiguousarray(array.T)]
        case "absent":
            return []
    return [array.reshape(spec.diffusers_shape)]


def _open_folder(path: Path, preset: str | None) -> Checkpoint:
    folder = read_folder(path)
    found = Checkpoint(path, "diffusers", *folder)
    if preset not in (None, found.preset):
        fits = f"preset `{found.preset}`" if found.preset else "no preset"
        raise CheckpointError(
            f"{path}: asked for preset `{preset}`, the folder is of {fits}"
        )
    return found


def _open_file(path: Path, preset: str | None) -> Checkpoint:
    table, metadata = _read_file(path)
    marks = (".gamma", ".beta", ".embedding_table")
    mindspore = any(name.endswith(marks) for name in table)
    layout: Layout = "mindspore" if mindspore else "original"
    config = _recognise(path, table, layout, preset)
    return Checkpoint(path, layout, config, table, metadata)


def _read_file(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Read a file's table with the reader its first bytes ask for."""
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"version https://"):
        raise CheckpointError(
            f"{path}: a Git LFS pointer, not the weights; hint: run `git lfs pull`"
        )
    if head.startswith(b"PK\x03\x04") or (
        path.suffix != ".safetensors" and head.startswith(b"\x80")
    ):
        raise CheckpointError(
            f"{path}: a pickled PyTorch checkpoint, which could run any code when "
            "loaded; hint: get or save it as .safetensors"
        )
    if path.suffix == ".safetensors" or head[8:9] == b"{":
        return read_safetensors(path)
    if path.suffix == ".ckpt" or head.startswith(b"\n"):
        return read_ckpt(path), {}
    raise CheckpointError(
        f"{path}: neither safetensors nor MindSpore ckpt; "
        "hint: give a .safetensors or .ckpt file or a diffusers folder"
    )


def _recognise(
    path: Path, table: Mapping[str, Stored], layout: Layout, preset: str | None
) -> ModelConfig:
    """Choose the preset that most of the shapes fit."""
    guidance = table.get(LCM_NAME)
    width = guidance.shape[-1] if guidance and guidance.shape else None
    fits = {
        name: _share_that_fits(_with_guidance(config, width), table, layout)
        for name, config in PRESETS.items()
    }
    best = max(fits, key=lambda name: fits[name])
    if fits[best] < 0.5:
        presets, first = ", ".join(PRESETS), next(iter(table), "")
        raise CheckpointError(
            f"{path}: not an SDXL checkpoint: of its {len(table)} tensors (first "
            f"`{first}`) too few have the names and shapes of {presets}"
        )
    return _with_guidance(PRESETS[preset or best], width)


def _share_that_fits(
    config: ModelConfig, table: Mapping[str, Stored], layout: Layout
) -> float:
    specs = tensor_specs(config)
    names = ((stored_names(spec, layout)[0], spec.shape) for spec in specs)
    return sum(
        name in table and table[name].shape == shape for name, shape in names
    ) / len(specs)


def _with_guidance(config: ModelConfig, width: int | None) -> ModelConfig:
    return replace(config, unet=replace(config.unet, time_cond_proj_dim=width))


def _match(
    parameters: Mapping[str, object], checkpoint: Checkpoint, prefix: str
) -> dict[str, str]:
    """Pair original names with the Cell's, and hold both lists and shapes equal."""
    specs = [spec for spec in checkpoint.specs if spec.name.startswith(prefix)]
    names = {spec.name: spec.mindspore.removeprefix(prefix) for spec in specs}
    missing = sorted(names.values() - parameters.keys())
    extra = sorted(parameters.keys() - names.values())
    unfit = [
        f"`{names[spec.name]}` is {list(parameters[names[spec.name]].shape)}, "
        f"not {list(spec.shape)}"
        for spec in specs
        if names[spec.name] in parameters
        and tuple(parameters[names[spec.name]].shape) != spec.shape
    ]
    if missing or extra or unfit:
        lists = (
            (missing, "not in the network"),
            (extra, "not in the file"),
            (unfit, "unfit"),
        )
        what = "; ".join(filter(None, (_count(*pair) for pair in lists)))
        raise CheckpointError(f"{checkpoint.path}: `{prefix}*`: {what}")
    return names


def _fits(stored: Stored, shape: tuple[int, ...]) -> bool:
    return stored.shape == shape and stored.dtype in ITEMSIZE


def _shape_in(spec: TensorSpec, layout: Layout) -> tuple[int, ...]:
    return spec.diffusers_shape if layout == "diffusers" else spec.shape


def _describe(stored: Stored) -> str:
    return f"{list(stored.shape)} {stored.dtype}"


def _is_logit_scale(spec: TensorSpec) -> bool:
    return spec.form == "absent"


def _count(items: list[str], what: str) -> str:
    if not items:
        return ""
    first = ", ".join(item if "`" in item else f"`{item}`" for item in items[:3])
    more = ", …" if len(items) > 3 else ""
    return f"{len(items)} tensors {what} ({first}{more})"
