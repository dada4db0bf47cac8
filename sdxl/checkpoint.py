"""A checkpoint of any layout as named arrays, read strictly and in a stream.

Design: names, shapes and types found in the headers are compared with those of the
geometry, both ways, before a number is read; arrays then come one at a time under their
original names and in their original forms, whatever the files call them. So nothing
downstream knows of layouts, and no second copy of a model is held.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from sdxl.ckpt_file import check_crc
from sdxl.config import PRESETS, ModelConfig
from sdxl.layouts import tensor_specs
from sdxl.stored import ITEMSIZE, CheckpointError, Stored, cast
from sdxl.tensor_spec import Layout, TensorSpec

# OpenCLIP's initial value. Sampling never uses the scale, Hugging Face's encoder has
# none, and many published files lost it: it alone may be absent.
DEFAULT_LOGIT_SCALE = math.log(1 / 0.07)
# Buffers and tables that some published files hold beside the weights.
TOLERATED = (".position_ids", ".attn_mask", "denoiser.sigmas")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """A checkpoint whose headers are read: what it is, and where its tensors lie.

    `table` has the names found in the files, a diffusers name preceded by its folder;
    `metadata` is the files' free text; `config_files` are what the geometry was read
    from, if not a preset.
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
        plain = with_guidance(self.config, None)
        for name, config in PRESETS.items():
            if replace(plain, native_size=config.native_size) == config:
                return name
        return None

    @property
    def is_lcm(self) -> bool:
        return self.config.unet.time_cond_proj_dim is not None

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The element types of the weights: `fp32`, `fp16`, `bf16`; usually one."""
        return tuple(sorted({self.dtype_of(spec) for spec in self.specs}))

    def dtype_of(self, spec: TensorSpec) -> str:
        """Give the type a tensor is stored in; that of the first when it is absent."""
        found = {stored.dtype for stored in self._stored(spec)}
        if not found:
            found = {stored.dtype for stored in self._stored(self.specs[0])}
        return found.pop() if len(found) == 1 else "fp32"

    @cached_property
    def missing(self) -> list[str]:
        """Names that are asked for and not there."""
        return [
            name
            for spec in self.specs
            if spec.form != "absent"
            for name in spec.names_in(self.layout)
            if name not in self.table
        ]

    @cached_property
    def extra(self) -> list[str]:
        """Names that are there and not asked for, the tolerated ones left out."""
        wanted = {name for spec in self.specs for name in spec.names_in(self.layout)}
        return [
            name
            for name in self.table
            if name not in wanted and not name.endswith(TOLERATED)
        ]

    @cached_property
    def unfit(self) -> list[str]:
        """Tensors of another shape or of a type we do not read, each described."""
        return [
            f"`{name}` is {list(stored.shape)} {stored.dtype}, expected {list(shape)}"
            for spec in self.specs
            for name in spec.names_in(self.layout)
            if (stored := self.table.get(name))
            and not _fits(stored, shape := spec.shape_in(self.layout))
        ]

    def files(self) -> list[Path]:
        """List the files whose bytes make this checkpoint, in a fixed order."""
        return sorted({*self.config_files, *(s.path for s in self.table.values())})

    def check(self) -> None:
        """Hold the checkpoint to be whole: every tensor there, none beside, all fit.

        A MindSpore file's checksum, where it has one, is verified: a full read.
        Raises `CheckpointError`: one line naming the first offenders and their counts.
        """
        self.check_headers()
        for path in self.files():
            if path.suffix == ".ckpt":
                check_crc(path)

    def check_headers(self) -> None:
        """Do what `check` does, but read no data."""
        complaints = [
            count(self.missing, "missing"),
            count(self.extra, "not known"),
            count(self.unfit, "unfit"),
        ]
        if any(complaints):
            what = "; ".join(filter(None, complaints))
            raise CheckpointError(
                f"{self.path}: not a whole {self.preset or 'SDXL'} checkpoint in "
                f"{self.layout} layout: {what}"
            )

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
        """Read the tensors whose original name begins with `prefix`, one at a time.

        Names, shapes and orientation are the original layout's; float32 or float16 as
        stored, bfloat16 widened to float32.
        """
        self.check_headers()
        for spec in self.specs:
            if spec.name.startswith(prefix):
                yield spec.name, self.read(spec)

    def read(self, spec: TensorSpec) -> np.ndarray:
        """Read one tensor in its original form."""
        parts = [stored.read() for stored in self._stored(spec)]
        if parts:
            return spec.from_layout(self.layout, parts)
        value = float(self.metadata.get("logit_scale", DEFAULT_LOGIT_SCALE))
        dtype = "fp16" if self.dtype_of(spec) == "fp16" else "fp32"
        return cast(np.asarray(value), dtype, spec.name)

    def _stored(self, spec: TensorSpec) -> list[Stored]:
        names = spec.names_in(self.layout)
        return [self.table[name] for name in names if name in self.table]


def with_guidance(config: ModelConfig, width: int | None) -> ModelConfig:
    """Give the geometry with LCM's guidance embedding of that width, or without."""
    return replace(config, unet=replace(config.unet, time_cond_proj_dim=width))


def count(items: list[str], what: str) -> str:
    """Describe a list of offenders by its length and its first three."""
    if not items:
        return ""
    first = ", ".join(item if "`" in item else f"`{item}`" for item in items[:3])
    more = ", …" if len(items) > 3 else ""
    return f"{len(items)} tensors {what} ({first}{more})"


def _fits(stored: Stored, shape: tuple[int, ...]) -> bool:
    return stored.shape == shape and stored.dtype in ITEMSIZE
