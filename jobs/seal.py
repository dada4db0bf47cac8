"""A file that can tell whether it is still what was written: its own SHA-256 inside.

The digest is of all the file's bytes, with its own 64 hex digits taken as zeros, so a
byte that changed anywhere is noticed, as is a cut. It stands where the format has room:

    .json     the last key, "sha256"
    .npz      the comment at the end of the archive
    .parquet  a value in the footer's metadata

It is a checksum, not a signature: whoever can write the file can also seal it anew.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

ZEROS = "0" * 64
PARQUET_KEY = "sdxl_jobs.sha256"
NPZ_COMMENT = "sdxl-jobs sha256 "
_MARKS = {
    ".json": b'"sha256": "',
    ".npz": NPZ_COMMENT.encode(),
    # A string of 64 bytes as Thrift's compact protocol writes it behind its key.
    ".parquet": PARQUET_KEY.encode() + b"\x18\x40",
}
_TAIL = 16 << 20
_BLOCK = 1 << 22


def seal(data: bytes, suffix: str) -> bytes:
    """Put the digest into the bytes of a whole file, in place of its zeros."""
    at = _place(data, suffix)
    digest = hashlib.sha256(data).hexdigest().encode()
    return b"".join((data[:at], digest, data[at + 64 :]))


def seal_file(path: Path) -> None:
    """Put the digest into a file on disk that was written with zeros."""
    at, _ = _find(path)
    digest = _digest(path, at)
    with path.open("rb+") as file:
        file.seek(at)
        file.write(digest.encode())


def broken(path: Path) -> str | None:
    """Say what is wrong with a sealed file, or None when it is what was written.

    Raises:
        OSError: it can't be read.
    """
    try:
        at, held = _find(path)
    except ValueError:
        return "is cut short or changed: its checksum is gone"
    if held != _digest(path, at).encode():
        return "is changed: its bytes do not give the checksum that it holds"
    return None


def _find(path: Path) -> tuple[int, bytes]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        start = max(0, size - _TAIL)
        file.seek(start)
        tail = file.read()
    at = _place(tail, path.suffix)
    return start + at, tail[at : at + 64]


def _place(data: bytes, suffix: str) -> int:
    mark = _MARKS[suffix]
    at = data.rindex(mark) + len(mark)
    if len(data) < at + 64:
        raise ValueError("no room for a digest")
    return at


def _digest(path: Path, at: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        left = at
        while left and (block := file.read(min(_BLOCK, left))):
            digest.update(block)
            left -= len(block)
        digest.update(ZEROS.encode())
        file.seek(at + 64)
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
