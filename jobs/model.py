"""The checkpoint as the runner sees it: a path, a native size, a hash. No tensors.

`sdxl` has its own errors, which carry their hint in the same line (`…; hint: …`); here
they become the runner's.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.errors import ModelError, nearest
from jobs.progress import ByteBar
from jobs.sections import ModelSection, RefinerSection

BLOCK = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """An opened checkpoint: what the fingerprint and the defaults need of it.

    `kind` is `base`, `refiner` or `lcm`; `sha256` also covers the LoRAs merged into it.
    """

    path: Path
    kind: str
    native_size: int
    sha256: str

    def describe(self) -> dict[str, Any]:
        return {"path": str(self.path), "kind": self.kind, "sha256": self.sha256}


def open_refiner(section: RefinerSection) -> Model | None:
    """Check and hash the second stage's checkpoint, where there is one."""
    if section.checkpoint is None:
        return None
    found = open_model(
        ModelSection(checkpoint=section.checkpoint, preset=section.preset)
    )
    if found.kind != "refiner":
        raise ModelError(
            f"{found.path} is no refiner but a {found.kind} model",
            hint="refiner.checkpoint wants SDXL-Refiner weights",
        )
    return found


def open_model(section: ModelSection) -> Model:
    """Check the checkpoint's names, shapes and length, and hash it.

    Raises:
        ModelError: none is given, it is not there, or it is not what it should be.
    """
    from sdxl.lora import Lora, LoraSet
    from sdxl.weights import open_checkpoint

    if section.checkpoint is None:
        raise ModelError(
            "no checkpoint is given",
            hint="name one with --checkpoint PATH or `model.checkpoint` in the config",
        )
    path = Path(section.checkpoint)
    with model_errors(path):
        checkpoint = open_checkpoint(path, preset=section.preset)
        checkpoint.check()
        sha256 = _sha256(checkpoint.files(), path)
    loras = [Lora(path=Path(lora.path), scale=lora.scale) for lora in section.loras]
    for lora in loras:
        with model_errors(lora.path):
            LoraSet([lora], checkpoint.config)
            sha256 = _joined(sha256, file_sha256(lora.path), lora.scale)
    return Model(
        path=path,
        kind="lcm" if checkpoint.is_lcm else checkpoint.config.kind,
        native_size=checkpoint.config.native_size,
        sha256=sha256,
    )


@contextmanager
def model_errors(path: Path) -> Iterator[None]:
    """Turn what reading a checkpoint can raise into a ModelError."""
    from sdxl.weights import CheckpointError

    try:
        yield
    except CheckpointError as error:
        message, _, hint = str(error).partition("; hint: ")
        raise ModelError(message, hint=hint or None) from None
    except OSError as error:
        name = error.filename or path
        raise ModelError(f"{name}: {error.strerror or error}") from None


def convert_checkpoint(
    source: Path, destination: Path, *, dtype: str | None, preset: str | None
) -> None:
    """Convert between layouts with a progress bar."""
    from sdxl.convert import convert

    with model_errors(source), ByteBar(f"writing {destination.name}") as bar:
        convert(source, destination, dtype=dtype, preset=preset, progress=bar)


def inspect_checkpoint(path: Path, *, preset: str | None) -> dict[str, Any]:
    """Say what a checkpoint is, from its headers."""
    from sdxl.convert import inspect

    with model_errors(path):
        found = dataclasses.asdict(inspect(path, preset=preset))
    return found | {"path": str(path)}


def describe_inspection(report: dict[str, Any]) -> str:
    """Put an inspection into lines for people."""
    preset = f" ({report['preset']})" if report["preset"] else ""
    lines = [
        f"{report['path']}: {report['kind']}{preset}, {report['layout']} layout, "
        f"{', '.join(report['dtypes'])}",
        f"  {report['tensors']:,} tensors, {report['parameters']:,} parameters, "
        f"{report['nbytes'] / 1e9:.3g} GB",
    ]
    for what in ("missing", "extra", "unfit"):
        names = report[what]
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"  {what}: {', '.join(names[:3])}{more}")
    return "\n".join(lines)


def native_size(section: ModelSection) -> int:
    """Tell the size of a picture from the preset, or else from the checkpoint."""
    from sdxl.config import PRESETS

    if section.preset is None:
        return open_model(section).native_size
    if section.preset not in PRESETS:
        raise ModelError(
            f"unknown preset `{section.preset}`", hint=nearest(section.preset, PRESETS)
        )
    return PRESETS[section.preset].native_size


def _sha256(files: Sequence[Path], root: Path) -> str:
    """Hash a file; for a folder, the names and hashes of its files."""
    if len(files) == 1 and files[0] == root:
        return file_sha256(root)
    lines = [f"{file_sha256(f)}  {f.relative_to(root)}\n" for f in sorted(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def _joined(*parts: object) -> str:
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def file_sha256(path: Path) -> str:
    """Hash a file, a block at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
