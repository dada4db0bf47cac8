"""Lines of text, and the cells of CSV and TSV records, in a stream.

    file ──> numbered lines of bounded length ──> (line number, cells, problem)

A line that can't be read is a problem of its own record, not of the file. CSV follows
RFC 4180: a cell that opens with a quote runs to the closing one, over line ends if need
be; a quote that never closes spoils its own line, and the lines after it are read anew.
A TSV record is one line: a quote that does not enclose a whole cell is an ordinary
character, as files without any quoting want it. In both a bare empty cell is None and a
quoted one (`""`) is empty text. Every character is looked at a bounded number of times.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jobs.errors import ManifestError

MAX_LINE = 4 << 20
MAX_RECORD_LINES = 2_000
_INSIDE = re.compile(r'[^"]*(?:""[^"]*)*')

Record = tuple[int, list[str | None], str | None]


class Lines:
    """Numbered physical lines of bounded length; a record's further ones can go back.

    Iterating gives the first line of each record, `take` the ones it goes on with.
    """

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._waiting: list[bytes] = []
        self._number = 0
        self.taken: list[bytes] = []

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        while (line := self._next()) is not None:
            self.taken.clear()
            yield self._number, line

    def take(self) -> bytes | None:
        if len(self.taken) >= MAX_RECORD_LINES:
            return None
        line = self._next()
        if line is not None:
            self.taken.append(line)
        return line

    def put_back(self) -> None:
        """Undo all `take` of this record."""
        self._waiting.extend(reversed(self.taken))
        self._number -= len(self.taken)
        self.taken.clear()

    def _next(self) -> bytes | None:
        line = self._waiting.pop() if self._waiting else self._read()
        self._number += bool(line)
        return line or None

    def _read(self) -> bytes:
        line = self._stream.readline(MAX_LINE)
        if len(line) >= MAX_LINE and not line.endswith(b"\n"):
            while (rest := self._stream.readline(MAX_LINE)) and rest[-1:] != b"\n":
                pass
        return line


def opened(path: Path) -> BinaryIO:
    """Open a text file behind its byte order mark.

    Raises:
        ManifestError: it can't be opened, or it is not UTF-8 text at first sight.
    """
    try:
        stream = path.open("rb", buffering=1 << 20)
    except OSError as error:
        raise ManifestError(f"can't read {path}: {error.strerror}") from None
    start = stream.peek(4)[:4]
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        stream.close()
        raise ManifestError(f"{path}: UTF-16 text", hint="save it as UTF-8")
    if start.startswith((b"PAR1", b"PK\x03\x04", b"\x1f\x8b")):
        stream.close()
        raise ManifestError(f"{path}: not text, whatever its suffix says")
    if start.startswith(codecs.BOM_UTF8):
        stream.read(len(codecs.BOM_UTF8))
    return stream


def decoded(raw: bytes) -> str:
    """Decode one line, its end included; ValueError says why it can't be."""
    if len(raw) >= MAX_LINE:
        raise ValueError(f"a line of over {MAX_LINE >> 20} MB")
    if b"\0" in raw:
        raise ValueError(f"a NUL at byte {raw.index(0) + 1} of the line")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1} of the line") from None


def records(stream: BinaryIO, delimiter: str) -> Iterator[Record]:
    """Yield (number of the first line, cells, problem) per record; skip empty lines."""
    lines = Lines(stream)
    for number, raw in lines:
        if not raw.strip(b"\r\n"):
            continue
        try:
            cells = _cells(decoded(raw), delimiter, lines)
        except ValueError as error:
            lines.put_back()
            yield number, [], str(error)
            continue
        yield number, cells, None


def _cells(text: str, delimiter: str, lines: Lines) -> list[str | None]:
    if '"' not in text:
        return [cell or None for cell in text.rstrip("\r\n").split(delimiter)]
    cells: list[str | None] = []
    start, end = 0, len(text.rstrip("\r\n"))
    while True:
        if text.startswith('"', start):
            if delimiter == "\t":
                cell, start = _perhaps_quoted(text, start, end)
            else:
                cell, text, start = _quoted(text, start + 1, lines)
                end = len(text.rstrip("\r\n"))
        else:
            cell, start = _bare(text, delimiter, start, end)
        cells.append(cell)
        if start >= end:
            return cells
        if text[start] != delimiter:
            raise ValueError(
                "a quote never closes"
                if lines.taken
                else "a quote inside a cell is not doubled"
            )
        start += 1


def _bare(text: str, delimiter: str, start: int, end: int) -> tuple[str | None, int]:
    stop = text.find(delimiter, start, end)
    stop = end if stop < 0 else stop
    return text[start:stop] or None, stop


def _perhaps_quoted(text: str, start: int, end: int) -> tuple[str | None, int]:
    """Take a cell of a TSV whose first character is a quote, meant as one or not."""
    inside = _INSIDE.match(text, start + 1, end)
    assert inside
    stop = inside.end() + 1
    if inside.end() < end and (stop == end or text[stop] == "\t"):
        return inside[0].replace('""', '"'), stop
    return _bare(text, "\t", start, end)


def _quoted(text: str, start: int, lines: Lines) -> tuple[str, str, int]:
    """Read a cell to its closing quote, on further lines while there is none.

    Returns the cell, the line it ends on and the place behind the closing quote.
    """
    pieces: list[str] = []
    length = 0
    while True:
        inside = _INSIDE.match(text, start)
        assert inside
        pieces.append(inside[0])
        length += len(inside[0])
        if inside.end() < len(text):
            return "".join(pieces).replace('""', '"'), text, inside.end() + 1
        more = lines.take()
        if more is None or length + len(more) > MAX_LINE:
            raise ValueError("a quote never closes")
        text, start = decoded(more), 0
