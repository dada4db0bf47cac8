"""Read the header of a `.safetensors` file strictly, and write one in a stream.

The format: the header's length, 8 bytes, little-endian; the header, JSON, which maps
each name to dtype, shape and byte offsets; the data, without gaps. A header is trusted
in nothing: lengths are checked against the file before they are used, so that a hostile
one costs at most `MAX_HEADER` bytes.

Source: huggingface/safetensors README, "Format".
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np

from sdxl.stored import (
    DTYPES,
    ITEMSIZE,
    CheckpointError,
    Stored,
    expected_nbytes,
    to_bytes,
)

MAX_HEADER = 16 * 2**20
_OUR_DTYPE = {theirs: ours for ours, (theirs, _) in DTYPES.items()}


def read_safetensors(path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    """Read the table of tensors and the free metadata; no data.

    Raises `CheckpointError` when the header and the file disagree in any way.
    """
    header, start, size = _read_header(path)
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict):
        raise _damaged(path, "`__metadata__` is no object")
    table = {name: _stored(path, name, entry, start) for name, entry in header.items()}
    _check_tiling(path, table, start, size)
    return table, {str(key): str(value) for key, value in metadata.items()}


def _read_header(path: Path) -> tuple[dict[str, Any], int, int]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(0)
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= size - 8:
            raise _damaged(
                path, f"a header of {length} bytes in a file of {size} bytes"
            )
        if length > MAX_HEADER:
            raise _damaged(path, f"a header of {length} bytes, over {MAX_HEADER}")
        raw = file.read(length)
    try:
        header = json.loads(raw, object_pairs_hook=_without_duplicates)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"the header is not usable JSON: {error}") from None
    if not isinstance(header, dict):
        raise _damaged(path, "the header is no JSON object")
    return header, 8 + length, size


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in pairs:
        if name in result:
            raise ValueError(f"`{name}` twice")
        result[name] = value
    return result


def _stored(path: Path, name: str, entry: Any, start: int) -> Stored:
    match entry:
        case {"dtype": str(dtype), "shape": list(shape), "data_offsets": [begin, end]}:
            pass
        case _:
            raise _damaged(path, f"`{name}` lacks dtype, shape or data_offsets")
    numbers = (*shape, begin, end)
    if len(shape) > 8 or not all(type(n) is int and 0 <= n < 2**48 for n in numbers):
        raise _damaged(path, f"`{name}` has a size or an offset that cannot be")
    dtype = _OUR_DTYPE.get(dtype, dtype)
    if dtype in ITEMSIZE and end - begin != expected_nbytes(dtype, tuple(shape)):
        raise _damaged(path, f"`{name}` {shape} {dtype} has {end - begin} bytes")
    spans = ((start + begin, start + end),)
    return Stored(path=path, dtype=dtype, shape=tuple(shape), spans=spans)


def _check_tiling(path: Path, table: dict[str, Stored], start: int, size: int) -> None:
    """Hold every byte of data to belong to exactly one tensor."""
    at = start
    for name, stored in sorted(table.items(), key=lambda item: item[1].spans):
        ((begin, end),) = stored.spans
        if begin != at or end < begin:
            kind = "overlap" if begin < at else "a gap"
            raise _damaged(path, f"{kind} at `{name}`, byte {begin}")
        at = end
    if at > size:
        raise CheckpointError(
            f"{path}: truncated: {size} bytes of {at}; hint: download or copy it again"
        )
    if at < size:
        raise _damaged(path, f"{size - at} bytes after the last tensor")


def _damaged(path: Path, what: str) -> CheckpointError:
    return CheckpointError(f"{path}: not a sound safetensors file: {what}")


class SafetensorsWriter:
    """Write a file whose header is known beforehand, one tensor at a time.

    `plan` maps each name to (dtype, shape). Tensors may come in any order, each once.
    Leaving the `with` block without all of them raises `CheckpointError`. The caller
    publishes the file: this writes in place.
    """

    def __init__(
        self,
        path: Path,
        plan: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        self._plan = dict(plan)
        header, self._offsets = _lay_out(self._plan, metadata or {"format": "pt"})
        self._start = len(header)
        self._file: BinaryIO = path.open("wb")
        self._file.write(header)

    def add(self, name: str, array: np.ndarray) -> None:
        """Write one tensor, rounded to its planned dtype."""
        dtype, shape = self._plan[name]
        if array.shape != shape:
            raise CheckpointError(
                f"`{name}`: shape {array.shape}, planned {shape} in the header"
            )
        self._file.seek(self._start + self._offsets.pop(name))
        self._file.write(to_bytes(array, dtype, name).data)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if kind is None and self._offsets:
            missing = next(iter(self._offsets))
            raise CheckpointError(
                f"{len(self._offsets)} planned tensors never came, first `{missing}`"
            )


def _lay_out(
    plan: Mapping[str, tuple[str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int]]:
    """Give the header's bytes and each tensor's offset; wide types first, aligned."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offsets, at = {}, 0
    for name in sorted(plan, key=lambda name: -ITEMSIZE[plan[name][0]]):
        dtype, shape = plan[name]
        end = at + expected_nbytes(dtype, shape)
        header[name] = {
            "dtype": DTYPES[dtype][0],
            "shape": list(shape),
            "data_offsets": [at, end],
        }
        offsets[name], at = at, end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return struct.pack("<Q", len(raw)) + raw, offsets
