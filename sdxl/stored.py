"""Tensors as they lie in a file: where their bytes are, and how to read them.

Design: a header becomes a table of `Stored`, checked against the file's size before a
byte of data is read; an array is then read on its own with plain reads. Not mapped
memory: a file cut short under us is an error line instead of a bus error, and pages
already read do not count as ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

# Our name of each element type, as checkpoints spell it: safetensors, MindSpore.
DTYPES = {
    "fp32": ("F32", "Float32"),
    "fp16": ("F16", "Float16"),
    "bf16": ("BF16", "BFloat16"),
}
ITEMSIZE = {"fp32": 4, "fp16": 2, "bf16": 2}


class CheckpointError(ValueError):
    """A checkpoint that cannot be used: one line that says what, where, and a hint.

    Names come from files: what could move a cursor or flood a screen is taken out.
    """

    def __init__(self, message: str) -> None:
        line = "".join(c if c.isprintable() else "\ufffd" for c in message[:2000])
        super().__init__(line)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stored:
    """A tensor in a file; `spans` are the byte ranges that follow each other in it.

    `dtype` is a key of `DTYPES`, or the file's own word for a type we do not read.
    """

    path: Path
    dtype: str
    shape: tuple[int, ...]
    spans: tuple[tuple[int, int], ...]

    @property
    def nbytes(self) -> int:
        return sum(end - begin for begin, end in self.spans)

    def read(self) -> np.ndarray:
        """Read the array: float32 or float16; bfloat16 is widened to float32."""
        raw = np.empty(self.nbytes, np.uint8)
        self._fill(memoryview(raw))
        return from_bytes(raw, self.dtype).reshape(self.shape)

    def _fill(self, target: memoryview) -> None:
        with self.path.open("rb", buffering=0) as file:
            at = 0
            for begin, end in self.spans:
                file.seek(begin)
                while begin < end:
                    got = file.readinto(target[at : at + end - begin])
                    if not got:
                        raise CheckpointError(
                            f"{self.path}: file ends at byte {begin}, inside a tensor; "
                            "hint: it changed while it was read, or is damaged"
                        )
                    begin, at = begin + got, at + got


def expected_nbytes(dtype: str, shape: tuple[int, ...]) -> int:
    """Count the bytes of an array of this type and shape."""
    return ITEMSIZE[dtype] * math.prod(shape)


def from_bytes(raw: np.ndarray, dtype: str) -> np.ndarray:
    """View little-endian bytes as values, flat; bfloat16 becomes float32, exactly."""
    if dtype == "bf16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return raw.view("<f4" if dtype == "fp32" else "<f2")


def to_bytes(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Round an array to `dtype` and give its little-endian bytes, uint8, flat.

    Raises `CheckpointError` with `name` when a finite value does not fit.
    """
    if dtype == "bf16":
        bits = _round_to_bfloat16(array.astype(np.float32, copy=False))
        return _flat_bytes(bits.astype("<u2", copy=False))
    return _flat_bytes(cast(array, dtype, name))


def cast(array: np.ndarray, dtype: str, name: str) -> np.ndarray:
    """Give the array as fp32 or fp16; the same object when nothing changes.

    Raises `CheckpointError` with `name` when a finite value does not fit.
    """
    target = np.dtype("<f4" if dtype == "fp32" else "<f2")
    if array.dtype == target:
        return array
    with np.errstate(over="ignore"):
        result = array.astype(target)
    if target.itemsize < array.dtype.itemsize:
        lost = int(np.isinf(result).sum() - np.isinf(array).sum())
        if lost:
            raise CheckpointError(
                f"`{name}`: {lost} values are too large for {dtype}; "
                "hint: convert with fp32 or bf16"
            )
    return result


def _flat_bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _round_to_bfloat16(array: np.ndarray) -> np.ndarray:
    """Round float32 to the upper 16 bits, ties to even; a NaN stays a NaN. uint16."""
    bits = np.ascontiguousarray(array).view(np.uint32).reshape(array.shape)
    rounded = (bits + (0x7FFF + ((bits >> 16) & 1))) >> 16
    nan = (bits >> 16) | 0x40
    return np.where(np.isnan(array), nan, rounded).astype(np.uint16)
