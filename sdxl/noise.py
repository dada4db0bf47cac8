"""A task's noise, from its seed alone: never from batch, slot, worker or attempt.

Design: one `NoiseStream` per image. The first draw is the initial latent, later draws
feed the samplers that add noise as they go, and both continue one stream. Two kinds:

- `numpy`: the legacy `RandomState(seed).randn`, as the MindSpore reference draws it;
- `torch`: what `torch.randn` gives with a seeded CPU generator, which diffusers users
  know, without torch. Both are the Mersenne Twister seeded alike (Matsumoto and
  Nishimura 1998): numpy supplies the bits, only the way from bits to normals differs.

torch rounds in float32 on its way, numpy here only where it shows: they agree within
5e-7. torch reads the low 32 bits of a seed only, so one range of seeds serves both.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import numpy as np

NoiseKind = Literal["numpy", "torch"]
NOISE_KINDS: tuple[str, ...] = get_args(NoiseKind)
MAX_SEED = 2**32 - 1

_BLOCK = 16  # torch turns uniforms to normals in blocks of 16: 8 radii, 8 angles


class NoiseStream:
    """Standard normals from one seed; each draw goes on where the last one ended.

    Seeds run from 0 to `MAX_SEED`. Raises ValueError for an unknown kind or a seed out
    of range.
    """

    def __init__(self, kind: NoiseKind, seed: int) -> None:
        if kind not in NOISE_KINDS:
            raise ValueError(f"noise `{kind}` is unknown, hint: numpy or torch")
        if not 0 <= seed <= MAX_SEED:
            raise ValueError(f"seed `{seed}` is outside 0 to {MAX_SEED}")
        self._state = np.random.RandomState(seed)
        self._normals = self._legacy_normals if kind == "numpy" else self._torch_normals
        self._spare: float | None = None

    def draw(self, shape: tuple[int, ...]) -> np.ndarray:
        """Draw float32 normals; the stream is filled in C order, as one flat array."""
        return self._normals(math.prod(shape)).astype(np.float32).reshape(shape)

    def _legacy_normals(self, size: int) -> np.ndarray:
        return self._state.randn(size)

    def _torch_normals(self, size: int) -> np.ndarray:
        if size < _BLOCK:
            return np.array([self._single_normal() for _ in range(size)])
        normals = _box_muller(self._uniforms(size))
        if size % _BLOCK:
            # torch fills the ragged end by drawing the last 16 anew.
            normals = np.append(normals, np.zeros(size % _BLOCK))
            normals[-_BLOCK:] = _box_muller(self._uniforms(_BLOCK))
        return normals

    def _uniforms(self, size: int) -> np.ndarray:
        """Draw `size` multiples of 2^-24 in [0, 1), exact in float32."""
        return (self._bits(size) & 0xFFFFFF).astype(np.float32) * np.float32(2**-24)

    def _single_normal(self) -> float:
        """Draw one normal in double precision; every second one was kept back."""
        if self._spare is not None:
            normal, self._spare = self._spare, None
            return normal
        high_1, low_1, high_2, low_2 = (int(word) for word in self._bits(4))
        angle = 2 * math.pi * _double(high_1, low_1)
        radius = math.sqrt(-2 * math.log1p(-_double(high_2, low_2)))
        self._spare = radius * math.sin(angle)
        return radius * math.cos(angle)

    def _bits(self, size: int) -> np.ndarray:
        """Draw `size` raw 32-bit words of the Mersenne Twister."""
        return np.frombuffer(self._state.bytes(4 * size), dtype="<u4")


def _box_muller(uniforms: np.ndarray) -> np.ndarray:
    """Turn whole blocks of 16 uniforms into normals: 8 cosines, then 8 sines."""
    blocks = uniforms[: len(uniforms) // _BLOCK * _BLOCK].reshape(-1, 2, _BLOCK // 2)
    radius = np.sqrt(-2 * np.log(1 - blocks[:, 0].astype(np.float64)))
    # The angle is rounded as torch rounds it: it moves the normal by up to 1e-6.
    angle = (np.float32(2 * np.pi) * blocks[:, 1]).astype(np.float64)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1).ravel()


def _double(high: int, low: int) -> float:
    """Join two words to a multiple of 2^-53 in [0, 1)."""
    return ((high << 32 | low) & (2**53 - 1)) * 2.0**-53
