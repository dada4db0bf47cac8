"""Read and write MindSpore's `.ckpt` files in a stream, without MindSpore.

The format is protocol buffers, with the messages of all parameters one after the other:

    Checkpoint  { repeated Value value = 1; }
    Value       { string tag = 1; TensorProto tensor = 2; MapTensorProto map = 3; }
    TensorProto { repeated int64 dims = 1; string type = 2; bytes content = 3; }

A long array is cut in slices: values that follow each other with one tag, each with the
dims of the whole. A file may end with `crc_num` and the CRC-32 of all before it, in 10
bytes, big-endian. Only the frame is read here; contents are stepped over.

Source: MindSpore 2.8, `checkpoint.proto` and `train/serialization.py`.
"""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np

from sdxl.stored import (
    DTYPES,
    ITEMSIZE,
    CheckpointError,
    Stored,
    expected_nbytes,
    to_bytes,
)

_OUR_DTYPE = {theirs: ours for ours, (_, theirs) in DTYPES.items()}
_SLICE = 512 * 2**20
_CRC_MARK, _CRC_TAIL = b"crc_num", len(b"crc_num") + 10
_VARINT, _BYTES = 0, 2
_FIXED = {1: 8, 5: 4}
# Names, type names and dims are short; a longer one would only be there to do harm.
_MAX_TEXT = 4096
_MAX_RANK = 8

Span = tuple[int, int]


def read_ckpt(path: Path) -> dict[str, Stored]:
    """Read the table of tensors; no data.

    Raises `CheckpointError` when the file is cut short or is not of this format.
    """
    table: dict[str, Stored] = {}
    with path.open("rb") as file:
        frame, last = _Frame(path, file), None
        for field, value in frame.fields((0, _data_end(file))):
            if field != 1:
                raise frame.damaged(value[0], f"field {field} among the parameters")
            tag, piece = frame.parameter(value)
            if tag == last:
                piece = replace(piece, spans=table[tag].spans + piece.spans)
            elif tag in table:
                raise frame.damaged(value[0], f"`{tag}` twice")
            table[tag], last = piece, tag
        if not table:
            raise frame.damaged(0, "no parameters")
        return {tag: _sized(frame, tag, stored) for tag, stored in table.items()}


def check_crc(path: Path) -> None:
    """Verify the checksum a file ends with, if it does, by reading it through."""
    with path.open("rb") as file:
        end = _data_end(file)
        file.seek(end)
        tail = file.read()
        if not tail:
            return
        file.seek(0)
        crc = 0
        while end:
            chunk = file.read(min(end, 2**24))
            crc, end = zlib.crc32(chunk, crc), end - len(chunk)
    if crc != int.from_bytes(tail[len(_CRC_MARK) :], "big"):
        raise CheckpointError(
            f"{path}: its checksum is wrong; hint: damaged, download or copy it again"
        )


def _data_end(file: BinaryIO) -> int:
    """Give the size of the parameters: the file's, without a checksum at its end."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - _CRC_TAIL))
    return size - _CRC_TAIL if file.read(len(_CRC_MARK)) == _CRC_MARK else size


def _sized(frame: _Frame, tag: str, stored: Stored) -> Stored:
    """Hold bytes and shape to agree. MindSpore may write a scalar's dims as [0]."""
    if stored.dtype not in ITEMSIZE:
        return stored
    if stored.shape == (0,) and stored.nbytes == ITEMSIZE[stored.dtype]:
        stored = replace(stored, shape=())
    if stored.nbytes != expected_nbytes(stored.dtype, stored.shape):
        what = f"`{tag}` {list(stored.shape)} {stored.dtype} has {stored.nbytes} bytes"
        raise frame.damaged(stored.spans[0][0], what)
    return stored


class _Frame:
    """The tags and lengths of a protocol buffer, read with small reads at offsets."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path = path
        self._file = file.fileno()

    def damaged(self, at: int, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: not a sound ckpt: byte {at}: {what}")

    def parameter(self, value: Span) -> tuple[str, Stored]:
        """Read one `Value` message: its tag and its tensor, or slice of one."""
        tag, tensor = None, None
        for field, found in self.fields(value):
            if field == 1:
                tag = self._text(found)
            elif field == 2:
                tensor = self._tensor(found)
            else:
                raise self.damaged(value[0], f"field {field}, such as a map parameter")
        if tag is None or tensor is None:
            raise self.damaged(value[0], "a parameter without name or tensor")
        return tag, tensor

    def _tensor(self, message: Span) -> Stored:
        dims: list[int] = []
        kind, content = None, None
        for field, found in self.fields(message):
            if field == 1:
                dims += self._dims(found)
            elif field == 2:
                kind = self._text(found)
            elif field == 3:
                content = found
        if kind is None or content is None:
            raise self.damaged(message[0], "a tensor without type or content")
        if len(dims) > _MAX_RANK or any(dim >= 2**48 for dim in dims):
            raise self.damaged(message[0], "dims that cannot be")
        dtype = _OUR_DTYPE.get(kind, kind)
        return Stored(path=self.path, dtype=dtype, shape=tuple(dims), spans=(content,))

    def _dims(self, found: Span) -> list[int]:
        """Read a varint, or the packed varints of a bytes field, that lie in a span."""
        at, end = found
        if end - at > _MAX_TEXT:
            raise self.damaged(at, "too many dims")
        dims = []
        while at < end:
            dim, at = self._varint(at, end)
            dims.append(dim)
        return dims

    def fields(self, message: Span) -> Iterator[tuple[int, Span]]:
        """Yield each field's number and the bytes its value lies in."""
        at, end = message
        while at < end:
            key, begin = self._varint(at, end)
            field, wire = key >> 3, key & 7
            if wire == _BYTES:
                length, begin = self._varint(begin, end)
                stop = begin + length
            elif wire == _VARINT:
                _, stop = self._varint(begin, end)
            elif wire in _FIXED:
                stop = begin + _FIXED[wire]
            else:
                raise self.damaged(at, f"wire type {wire}: not a MindSpore checkpoint")
            if stop > end:
                what = f"truncated: {stop - end} bytes short; hint: copy it again"
                raise self.damaged(at, what)
            yield field, (begin, stop)
            at = stop

    def _varint(self, at: int, end: int) -> tuple[int, int]:
        """Read a varint; give its value and where the next thing begins."""
        value = 0
        for i, byte in enumerate(os.pread(self._file, min(10, end - at), at)):
            value |= (byte & 0x7F) << (7 * i)
            if byte < 0x80:
                return value, at + i + 1
        raise self.damaged(at, "truncated, or a number that does not end")

    def _text(self, span: Span) -> str:
        begin, end = span
        if end - begin > _MAX_TEXT:
            raise self.damaged(begin, f"a name of {end - begin} bytes")
        try:
            return os.pread(self._file, end - begin, begin).decode()
        except UnicodeDecodeError:
            raise self.damaged(begin, "a name that is no UTF-8") from None


class CkptWriter:
    """Write a file MindSpore loads, one parameter after the other, in any order.

    The caller publishes the file: this writes in place.
    """

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb")

    def add(self, name: str, array: np.ndarray, dtype: str) -> None:
        """Write one tensor, rounded to `dtype`; in slices as MindSpore does."""
        content = to_bytes(array, dtype, name)
        dims = b"".join(b"\x08" + _encode_varint(dim) for dim in array.shape)
        head = (
            dims + _bytes_header(2, len(DTYPES[dtype][1])) + DTYPES[dtype][1].encode()
        )
        for begin in range(0, len(content), _SLICE):
            self._add_slice(name, head, content[begin : begin + _SLICE].data)

    def _add_slice(self, name: str, head: bytes, content: memoryview) -> None:
        tensor = head + _bytes_header(3, len(content))
        tag = name.encode()
        value = _bytes_header(1, len(tag)) + tag
        value += _bytes_header(2, len(tensor) + len(content)) + tensor
        self._file.write(_bytes_header(1, len(value) + len(content)) + value)
        self._file.write(content)

    def __enter__(self) -> CkptWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()


def _bytes_header(field: int, length: int) -> bytes:
    return _encode_varint(field << 3 | _BYTES) + _encode_varint(length)


def _encode_varint(value: int) -> bytes:
    out = bytearray()
    while value >= 0x80:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)
