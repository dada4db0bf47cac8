"""The checkpoint as the runner sees it: a path, a native size, a hash. No tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jobs.config import ModelSection
from jobs.errors import ModelError, nearest

BLOCK = 1 << 22


@dataclass(frozen=True, slots=True, kw_only=True)
class Model:
    """An opened checkpoint: what the fingerprint and the defaults need of it."""

    path: Path
    kind: str
    native_size: int
    sha256: str

    def describe(self) -> dict[str, Any]:
        return {"path": str(self.path), "kind": self.kind, "sha256": self.sha256}


def open_model(section: ModelSection) -> Model:
    """Check the checkpoint's names, shapes and length, and hash it.

    Raises:
        ModelError: none is given, it is not there, or it is not what it should be.
    """
    from sdxl.weights import CheckpointError, open_checkpoint

    if section.checkpoint is None:
        raise ModelError(
            "no checkpoint is given",
            hint="name one with --checkpoint PATH or `model.checkpoint` in the config",
        )
    path = Path(section.checkpoint)
    try:
        checkpoint = open_checkpoint(path, preset=section.preset)
        checkpoint.check()
        return Model(
            path=path,
            kind=checkpoint.config.kind,
            native_size=checkpoint.config.native_size,
            sha256=_sha256(checkpoint.files(), path),
        )
    except CheckpointError as error:
        raise ModelError(str(error)) from None
    except OSError as error:
        raise ModelError(f"can't read {path}: {error.strerror}") from None


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


def file_sha256(path: Path) -> str:
    """Hash a file, a block at a time."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()
