"""Convert a checkpoint from any layout to any other, and say what a checkpoint is.

    Checkpoint ──> tensors, one at a time ──> forms of the layout ──> writer ──> rename
    any layout     original form              names_in, to_layout     in a stream

Design: at most one tensor is in memory; the result appears whole, under its name, or
not at all. Values are rounded only when a smaller type is asked for.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from sdxl.checkpoint import Checkpoint
from sdxl.ckpt_file import CkptWriter
from sdxl.diffusers_folder import STEMS
from sdxl.diffusers_json import write_folder_files
from sdxl.safetensors_file import SafetensorsWriter
from sdxl.stored import (
    DTYPES,
    CheckpointError,
    expected_nbytes,
    from_bytes,
    to_bytes,
)
from sdxl.tensor_spec import Layout, TensorSpec
from sdxl.weights import open_checkpoint

# What a file of each layout is called; a diffusers folder has no suffix.
SUFFIX: dict[Layout, str] = {
    "original": ".safetensors",
    "mindspore": ".ckpt",
    "diffusers": "",
}
Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Inspection:
    """What a checkpoint is. `preset` is None for a geometry of its own.

    `tensors` and `parameters` count what the files hold; `missing`, `extra` and `unfit`
    are what keeps it from being whole, in the layout's own names.
    """

    path: Path
    layout: Layout
    kind: str
    preset: str | None
    dtypes: tuple[str, ...]
    tensors: int
    parameters: int
    nbytes: int
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    unfit: tuple[str, ...]

    @property
    def is_whole(self) -> bool:
        return not (self.missing or self.extra or self.unfit)


def inspect(path: Path, *, preset: str | None = None) -> Inspection:
    """Say what a checkpoint is, from its headers: `kind` is base, refiner or lcm.

    Raises `CheckpointError` when it is no SDXL checkpoint, or not a sound file.
    """
    found = open_checkpoint(path, preset=preset)
    return Inspection(
        path=found.path,
        layout=found.layout,
        kind="lcm" if found.is_lcm else found.config.kind,
        preset=found.preset,
        dtypes=found.dtypes,
        tensors=len(found.table),
        parameters=sum(math.prod(stored.shape) for stored in found.table.values()),
        nbytes=sum(stored.nbytes for stored in found.table.values()),
        missing=tuple(found.missing),
        extra=tuple(found.extra),
        unfit=tuple(found.unfit),
    )


def layout_of(path: Path) -> Layout:
    """Tell the layout that a name asks for: by its suffix, a folder when there is none.

    Raises `CheckpointError` for another suffix.
    """
    for layout, suffix in SUFFIX.items():
        if path.suffix == suffix:
            return layout
    raise CheckpointError(
        f"{path}: `{path.suffix}` names no layout; hint: .safetensors (original), "
        ".ckpt (MindSpore) or a folder's name (diffusers)"
    )


def convert(
    src: Path,
    dst: Path,
    *,
    layout: Layout | None = None,
    dtype: str | None = None,
    preset: str | None = None,
    progress: Progress | None = None,
) -> None:
    """Write the checkpoint `src` as `dst`, in the layout that `dst`'s name asks for.

    `dtype` is `fp32`, `fp16` or `bf16`; None keeps each tensor's own. `progress` is
    called with bytes done and bytes in all. Raises `CheckpointError` when `src` is not
    whole, when a value is too large for `dtype`, or when `dst` exists or does not fit.
    """
    src, dst = Path(src), Path(dst)
    layout = layout or layout_of(dst)
    if dtype not in (None, *DTYPES):
        raise CheckpointError(f"no dtype `{dtype}`; hint: one of {', '.join(DTYPES)}")
    if dst.suffix != SUFFIX[layout] and layout != "diffusers":
        raise CheckpointError(f"{dst}: a {layout} file ends in {SUFFIX[layout]}")
    if dst.exists():
        raise CheckpointError(f"{dst}: exists; hint: remove it or choose another name")
    checkpoint = open_checkpoint(src, preset=preset)
    checkpoint.check()
    job = _Conversion(checkpoint, layout, dtype, progress)
    job.check_space(dst.parent)
    with _published(dst, folder=layout == "diffusers") as unfinished:
        job.write(unfinished)


class _Conversion:
    """One conversion: the types its tensors get, and how far it is."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        layout: Layout,
        dtype: str | None,
        progress: Progress | None,
    ) -> None:
        self.checkpoint = checkpoint
        self.layout: Layout = layout
        self.dtypes = {
            spec.name: dtype or checkpoint.dtype_of(spec) for spec in checkpoint.specs
        }
        self.total = sum(map(self._nbytes, checkpoint.specs))
        self._done = 0
        self._progress = progress

    def check_space(self, folder: Path) -> None:
        free = shutil.disk_usage(folder).free if folder.is_dir() else None
        if free is None or free < self.total:
            what = "no such folder" if free is None else f"{free} bytes are free"
            raise CheckpointError(f"{folder}: {what}; {self.total} bytes to write")

    def write(self, path: Path) -> None:
        specs = self.checkpoint.specs
        if self.layout == "original":
            self._write_safetensors(path, specs, {"format": "pt"})
        elif self.layout == "mindspore":
            self._write_ckpt(path)
        else:
            self._write_folder(path)

    def _write_ckpt(self, path: Path) -> None:
        with CkptWriter(path) as writer:
            for spec in self.checkpoint.specs:
                dtype = self.dtypes[spec.name]
                writer.add(spec.mindspore, self.checkpoint.read(spec), dtype)
                self._advance(spec)

    def _write_folder(self, path: Path) -> None:
        write_folder_files(path, self.checkpoint.config)
        for component, specs in groupby(self.checkpoint.specs, lambda s: s.component):
            file = path / component / f"{STEMS[component]}.safetensors"
            group = tuple(specs)
            self._write_safetensors(file, group, self._metadata(group))

    def _metadata(self, specs: tuple[TensorSpec, ...]) -> dict[str, str]:
        """Keep the one value that diffusers has no tensor for, for the way back."""
        absent = next((spec for spec in specs if spec.form == "absent"), None)
        if absent is None:
            return {"format": "pt"}
        scale, dtype = self.checkpoint.read(absent), self.dtypes[absent.name]
        rounded = from_bytes(to_bytes(scale, dtype, absent.name), dtype)
        return {"format": "pt", "logit_scale": repr(float(rounded[0]))}

    def _write_safetensors(
        self, path: Path, specs: tuple[TensorSpec, ...], metadata: dict[str, str]
    ) -> None:
        names = {spec.name: self._names(spec) for spec in specs}
        plan = {
            name: (self.dtypes[spec.name], spec.shape_in(self.layout))
            for spec in specs
            for name in names[spec.name]
        }
        with SafetensorsWriter(path, plan, metadata) as writer:
            for spec in specs:
                arrays = spec.to_layout(self.layout, self.checkpoint.read(spec))
                for name, array in zip(names[spec.name], arrays, strict=True):
                    writer.add(name, array)
                self._advance(spec)

    def _names(self, spec: TensorSpec) -> tuple[str, ...]:
        return spec.diffusers if self.layout == "diffusers" else (spec.name,)

    def _nbytes(self, spec: TensorSpec) -> int:
        return expected_nbytes(self.dtypes[spec.name], spec.shape)

    def _advance(self, spec: TensorSpec) -> None:
        self._done += self._nbytes(spec)
        if self._progress is not None:
            self._progress(self._done, self.total)


@contextmanager
def _published(dst: Path, *, folder: bool) -> Iterator[Path]:
    """Give a path beside `dst` to write; move it there when all went well."""
    room = Path(tempfile.mkdtemp(prefix=f".{dst.name}.", dir=dst.parent))
    unfinished = room / dst.name
    if folder:
        unfinished.mkdir()
    try:
        yield unfinished
        for path in (unfinished, *unfinished.rglob("*")):
            _sync(path)
        if dst.exists():
            raise CheckpointError(f"{dst}: appeared while it was being written")
        unfinished.replace(dst)
        _sync(dst.parent)
    finally:
        shutil.rmtree(room, ignore_errors=True)


def _sync(path: Path) -> None:
    """Force a file or a folder's entries to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
