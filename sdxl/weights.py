"""Open a checkpoint, whatever its layout, and fill networks from it.

    path ──> open_checkpoint ──> Checkpoint ──> load_into ──> a Cell's parameters
             headers only        checked        one array at a time

Nothing is ever unpickled: pickled checkpoints are refused. MindSpore is imported by
`load_into` only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from sdxl.checkpoint import Checkpoint, count, with_guidance
from sdxl.ckpt_file import read_ckpt
from sdxl.config import PRESETS, ModelConfig
from sdxl.diffusers_folder import read_folder
from sdxl.layouts import LCM_NAME, tensor_specs
from sdxl.safetensors_file import read_safetensors
from sdxl.stored import CheckpointError, Stored, cast
from sdxl.tensor_spec import Layout

if TYPE_CHECKING:
    from mindspore import Parameter, nn

__all__ = ["Checkpoint", "CheckpointError", "load_into", "open_checkpoint"]

Patch = Callable[[str, np.ndarray], np.ndarray]


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
    names = _pair(parameters, checkpoint, prefix)
    for name, array in checkpoint.tensors(prefix):
        parameter = parameters[names[name]]
        if patch is not None:
            array = patch(name, array)
        if dtype is not None:
            parameter.set_dtype(types[dtype])
        own = "fp16" if parameter.dtype == ms_dtype.float16 else "fp32"
        parameter.set_data(Tensor.from_numpy(cast(array, own, name)))


def _open_folder(path: Path, preset: str | None) -> Checkpoint:
    folder = read_folder(path)
    found = Checkpoint(
        path=path,
        layout="diffusers",
        config=folder.config,
        table=folder.table,
        metadata=folder.metadata,
        config_files=folder.config_files,
    )
    if preset not in (None, found.preset):
        what = f"preset `{found.preset}`" if found.preset else "no preset's geometry"
        raise CheckpointError(f"{path}: has {what}, not that of `{preset}`")
    return found


def _open_file(path: Path, preset: str | None) -> Checkpoint:
    table, metadata = _read_file(path)
    marks = (".gamma", ".beta", ".embedding_table")
    mindspore = any(name.endswith(marks) for name in table)
    layout: Layout = "mindspore" if mindspore else "original"
    config = _recognise(path, table, layout, preset)
    return Checkpoint(
        path=path, layout=layout, config=config, table=table, metadata=metadata
    )


def _read_file(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Read a file's table with the reader its name or its first bytes ask for."""
    with path.open("rb") as file:
        head = file.read(16)
    if head.startswith(b"version https://"):
        raise CheckpointError(
            f"{path}: a Git LFS pointer, not the weights; hint: run `git lfs pull`"
        )
    # A safetensors file may begin with 0x80, the low byte of its header's length.
    zipped = head.startswith(b"PK\x03\x04")
    if zipped or (path.suffix != ".safetensors" and head.startswith(b"\x80")):
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
        name: _share_that_fits(with_guidance(config, width), table, layout)
        for name, config in PRESETS.items()
    }
    best = max(fits, key=lambda name: fits[name])
    if preset not in (None, best) and fits[best] == 1:
        raise _mistaken(path, table, layout, best, preset)
    if fits[best] < 0.5:
        presets, first = ", ".join(PRESETS), next(iter(table), "")
        raise CheckpointError(
            f"{path}: not an SDXL checkpoint: of its {len(table)} tensors (first "
            f"`{first}`) too few have the names and shapes of {presets}"
        )
    return with_guidance(PRESETS[preset or best], width)


def _share_that_fits(
    config: ModelConfig, table: Mapping[str, Stored], layout: Layout
) -> float:
    specs = tensor_specs(config)
    found = ((table.get(spec.names_in(layout)[0]), spec.shape) for spec in specs)
    fit = sum(stored is not None and stored.shape == shape for stored, shape in found)
    return fit / len(specs)


def _mistaken(
    path: Path, table: Mapping[str, Stored], layout: Layout, best: str, preset: str
) -> CheckpointError:
    """Say which shapes tell the preset that was asked for from the one it is."""
    shapes = {s.names_in(layout)[0]: s.shape for s in tensor_specs(PRESETS[preset])}
    unlike = [
        f"`{name}` is {list(stored.shape)}, expected {list(shapes[name])}"
        for name, stored in table.items()
        if name in shapes and stored.shape != shapes[name]
    ]
    what = count(unlike, f"unlike `{preset}`") or f"other names than `{preset}`"
    return CheckpointError(f"{path}: is a `{best}`: {what}; hint: preset `{best}`")


def _pair(
    parameters: Mapping[str, Parameter], checkpoint: Checkpoint, prefix: str
) -> dict[str, str]:
    """Pair original names with the Cell's; names and shapes must be the same."""
    specs = [spec for spec in checkpoint.specs if spec.name.startswith(prefix)]
    names = {spec.name: spec.mindspore.removeprefix(prefix) for spec in specs}
    missing = sorted(names.values() - parameters.keys())
    extra = sorted(parameters.keys() - names.values())
    unfit = [
        f"`{own}` is {list(parameters[own].shape)}, expected {list(spec.shape)}"
        for spec, own in zip(specs, names.values(), strict=True)
        if own in parameters and tuple(parameters[own].shape) != spec.shape
    ]
    if missing or extra or unfit:
        complaints = (
            count(missing, "not in the network"),
            count(extra, "not in the file"),
            count(unfit, "unfit"),
        )
        what = "; ".join(filter(None, complaints))
        raise CheckpointError(f"{checkpoint.path}: `{prefix}*`: {what}")
    return names
