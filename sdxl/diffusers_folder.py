"""Find and read the weights of a diffusers folder."""

from __future__ import annotations

from pathlib import Path

from sdxl.config import ModelConfig
from sdxl.stored import Stored


def read_folder(
    path: Path,
) -> tuple[ModelConfig, dict[str, Stored], dict[str, str], tuple[Path, ...]]:
    raise NotImplementedError
