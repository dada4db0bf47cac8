"""Seeded random weights of any geometry: the same numbers on every machine.

Design: a tensor depends on its name, its shape and a seed alone, never on the order of
writing, so that a test in another framework can make the same network from the names.
The raw stream of a numpy bit generator is used, which numpy promises not to change. The
scales keep activations near 1: uniform with deviation 1/sqrt(fan in), norms near 1.

    python -m sdxl.random_weights --preset tiny --dtype fp16 OUT.safetensors
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from sdxl.config import PRESETS, ModelConfig
from sdxl.layouts import TensorSpec, tensor_specs
from sdxl.safetensors_file import SafetensorsWriter

Shape = tuple[int, ...]
CHUNK = 2**18


def random_tensor(name: str, shape: Shape, seed: int = 0) -> np.ndarray:
    """Return the float32 tensor of that name in the original layout."""
    mean, deviation = moments(name, shape)
    digest = hashlib.blake2b(f"{seed} {name}".encode(), digest_size=16).digest()
    stream = np.random.SFC64(int.from_bytes(digest, "little"))
    spread = deviation * math.sqrt(3)
    out = np.empty(math.prod(shape), np.float32)
    for part in chunks(out):
        raw = stream.random_raw((part.size + 1) // 2).view(np.uint32)[: part.size]
        part[:] = raw >> 8  # 24 bits: exact in float32
        part *= np.float32(2 * spread / 2**24)
        part -= np.float32(spread)
        part += np.float32(mean)
    return out.reshape(shape)


def moments(name: str, shape: Shape) -> tuple[float, float]:
    """Return mean and standard deviation by the tensor's role."""
    if name.endswith("logit_scale"):
        return 4.6, 0.0
    if "embedding" in name:
        return 0.0, 0.02
    if name.endswith("text_projection"):
        return 0.0, shape[0] ** -0.5
    if len(shape) > 1:
        return 0.0, math.prod(shape[1:]) ** -0.5
    return (0.0, 0.02) if name.endswith("bias") else (1.0, 0.1)


def chunks(flat: np.ndarray) -> Iterator[np.ndarray]:
    """Views of even length, so that every chunk starts at a whole raw number."""
    for start in range(0, flat.size, CHUNK):
        yield flat[start : start + CHUNK]


@dataclass(frozen=True)
class RandomCheckpoint:
    """What a loader needs of a `Checkpoint`; its tensors are made as they are read."""

    config: ModelConfig
    seed: int = 0
    path: Path = Path("random weights")

    @property
    def specs(self) -> tuple[TensorSpec, ...]:
        return tensor_specs(self.config)

    def check(self) -> None:
        """Find nothing wrong."""

    def tensors(self, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
        """Make the tensors whose original name begins with `prefix`, one at a time."""
        for spec in self.specs:
            if spec.name.startswith(prefix):
                yield spec.name, random_tensor(spec.name, spec.shape, self.seed)


def write_random(path: Path, config: ModelConfig, dtype: str, seed: int = 0) -> None:
    """Write one safetensors file, a tensor at a time, and move it into place."""
    temporary = path.with_name(path.name + ".part")
    source = RandomCheckpoint(config, seed)
    plan = {spec.name: (dtype, spec.shape) for spec in source.specs}
    with SafetensorsWriter(temporary, plan) as writer:
        for name, tensor in source.tensors():
            writer.add(name, tensor)
    temporary.replace(path)


def main() -> None:
    """Parse the command line and write the file."""
    parser = argparse.ArgumentParser(prog="python -m sdxl.random_weights")
    parser.add_argument("out", type=Path)
    parser.add_argument("--preset", choices=sorted(PRESETS), default="tiny")
    parser.add_argument("--dtype", choices=("fp32", "fp16", "bf16"), default="fp16")
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    write_random(asked.out, PRESETS[asked.preset], asked.dtype, asked.seed)


if __name__ == "__main__":
    main()
