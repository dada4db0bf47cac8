"""Read and check a manifest in a stream: csv, tsv, jsonl or Parquet -> rows.

    file ──> cells (strings or typed values, with their line) ──> Request | Rejected

A manifest that can't be understood as a whole (no prompt column, not Parquet at all) is
an error. A row that can't be used is a `Rejected` with file, line and reason, and the
rows around it are made. Memory does not grow with the number of rows.

CSV is read to RFC 4180, strictly: a quote that opens and never closes rejects its own
line, not the rest of the file. A bare empty cell means "not given"; a quoted empty cell
(`""`) is empty text. TSV is the same with tabs, except that a quote which does not
enclose the whole cell is an ordinary character, as files without any quoting want it.
"""

from __future__ import annotations

import codecs
import csv
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import settings
from jobs.errors import ManifestError, nearest, printable
from jobs.records import RESULT_COLUMNS, Rejected, Request, hash64

MAX_LINE = 4 << 20
MAX_RECORD_LINES = 2_000
MAX_ID = 512
MAX_PROMPT = 100_000
FORMATS = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".pq": "parquet",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
}
DELIMITERS = {"csv": ",", "tsv": "\t"}
csv.field_size_limit(MAX_LINE)


@dataclass(frozen=True, slots=True)
class Cells:
    """One row before it is checked: its values, or why it has none."""

    number: int
    values: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """An open manifest. `rows` may be called again: each call reads from the start."""

    path: Path
    format: str
    columns: tuple[str, ...] | None
    prompt_column: str
    id_column: str

    def rows(self) -> Iterator[Request | Rejected]:
        """Yield every row of the file, checked, in its order."""
        for source_row, cells in enumerate(_READERS[self.format](self.path)):
            yield self._check(source_row, cells)

    @cached_property
    def extras(self) -> dict[str, str]:
        """Name the columns that pass through, with their arrow types.

        JSON lines have no header, so this reads such a file once.

        Raises:
            ManifestError: a name collides with a column of the results.
        """
        if self.format == "parquet":
            schema = _parquet_schema(self.path)
            found = {n: str(_plain(schema.field(n).type)) for n in schema.names}
        elif self.columns is not None:
            found = dict.fromkeys(self.columns, "string")
        else:
            names: dict[str, str] = {}
            for cells in _jsonl_cells(self.path):
                names.update(dict.fromkeys(cells.values, "string"))
            found = names
        extras = {n: t for n, t in found.items() if n not in self._known}
        for name in extras:
            if name in RESULT_COLUMNS:
                raise ManifestError(
                    f"{self.path}: column `{name}` has the name of a result column",
                    hint="rename it: unknown columns pass through to the results",
                )
        return extras

    def extras_schema(self) -> pa.Schema:
        """Give the columns that pass through as arrow fields."""
        if self.format == "parquet":
            schema = _parquet_schema(self.path)
            return pa.schema([(n, _plain(schema.field(n).type)) for n in self.extras])
        return pa.schema([(name, pa.string()) for name in self.extras])

    @cached_property
    def _known(self) -> set[str]:
        return {self.id_column, self.prompt_column, *settings.parsers()}

    def _location(self, number: int) -> str:
        unit = "row" if self.format == "parquet" else "line"
        return f"{self.path.name} {unit} {number}"

    def _check(self, source_row: int, cells: Cells) -> Request | Rejected:
        values = cells.values
        extras = tuple(self._passed(values.get(name)) for name in self.extras)
        content = _content_hash(values) if values else hash64(f"row {source_row}")
        location = self._location(cells.number)
        asked = values.get(self.id_column)
        try:
            if cells.problem:
                raise ValueError(cells.problem)
            prompt_id = f"{content:016x}" if asked is None else _checked_id(asked)
            prompt = _checked_prompt(values.get(self.prompt_column))
            given = self._settings(values)
        except ValueError as error:
            prompt = values.get(self.prompt_column)
            return Rejected(
                source_row=source_row,
                location=location,
                reason=str(error),
                prompt_id=f"{content:016x}" if asked is None else _safe_id(asked),
                content=content,
                prompt=_writable(prompt[:MAX_PROMPT])
                if isinstance(prompt, str)
                else None,
                extras=extras,
            )
        return Request(
            source_row=source_row,
            location=location,
            prompt_id=prompt_id,
            content=content,
            prompt=prompt,
            extras=extras,
            **given,
        )

    def _settings(self, values: dict[str, Any]) -> dict[str, Any]:
        given = {}
        for name, parse in settings.parsers().items():
            value = values.get(name)
            if value is None:
                continue
            try:
                given[name] = parse(value)
            except ValueError as error:
                raise ValueError(f"{name}: {error}") from None
        return given

    def _passed(self, value: Any) -> Any:
        if self.format == "parquet" or value is None:
            return value
        if isinstance(value, str):
            return _writable(value)
        return _writable(json.dumps(value, ensure_ascii=False))


def open_manifest(
    path: Path, *, prompt_column: str = "prompt", id_column: str = "id"
) -> Manifest:
    """Open a manifest, told by its suffix, and check its columns.

    Raises:
        ManifestError: missing file, unknown suffix, not what its suffix says, no prompt
            column, a column that would collide with the results.
    """
    kind = FORMATS.get(path.suffix.lower())
    if kind is None:
        raise ManifestError(
            f"{path}: unknown kind of manifest `{path.suffix}`",
            hint="use .csv, .tsv, .parquet or .jsonl",
        )
    if not path.is_file():
        raise ManifestError(f"{path}: no such file")
    columns = _columns(path, kind)
    manifest = Manifest(
        path=path,
        format=kind,
        columns=columns,
        prompt_column=prompt_column,
        id_column=id_column,
    )
    present = columns if columns is not None else _first_keys(path)
    if prompt_column not in present:
        raise ManifestError(
            f"{path}: no column `{prompt_column}`",
            hint=f"name it with --prompt-column; {nearest(prompt_column, present)}",
        )
    if id_column != "id" and id_column not in present:
        raise ManifestError(
            f"{path}: no column `{id_column}`", hint=nearest(id_column, present)
        )
    if columns is not None:
        manifest.extras  # noqa: B018  a collision is an error before anything runs
    return manifest


def _columns(path: Path, kind: str) -> tuple[str, ...] | None:
    if kind == "jsonl":
        return None
    if kind == "parquet":
        return tuple(_parquet_schema(path).names)
    with _opened(path) as stream:
        header = next(_delimited(stream, DELIMITERS[kind]), None)
    if header is None:
        raise ManifestError(f"{path}: empty file")
    _, fields, problem = header
    if problem:
        raise ManifestError(f"{path} line 1: {problem}")
    names = tuple(name.strip() for name in fields if name is not None)
    if len(names) != len(fields) or len(set(names)) != len(names):
        raise ManifestError(
            f"{path} line 1: the header has an empty or repeated column name",
            hint="the first line must name every column once",
        )
    return names


def _checked_id(value: Any) -> str:
    text = str(value)
    if isinstance(value, bool | float) or not text.strip():
        raise ValueError(f"id: `{printable(text, 40)}` can't be an id")
    if len(text) > MAX_ID:
        raise ValueError(f"id: {len(text)} characters, at most {MAX_ID} are allowed")
    settings.text(text)
    if not text.isprintable():
        raise ValueError(f"id: `{printable(text, 40)}` holds control characters")
    parts = text.replace("\\", "/").split("/")
    if parts[0] == "" or ".." in parts:
        raise ValueError(f"id: `{printable(text, 40)}` reads as a path out of a folder")
    return text


def _safe_id(value: Any) -> str:
    return _writable(str(value)[:MAX_ID])


def _checked_prompt(value: Any) -> str:
    if value is None:
        raise ValueError('prompt: missing (write "" for an empty prompt)')
    try:
        text = settings.text(value)
    except ValueError as error:
        raise ValueError(f"prompt: {error}") from None
    if len(text) > MAX_PROMPT:
        raise ValueError(f"prompt: {len(text)} characters, at most {MAX_PROMPT}")
    return text


def _writable(text: str) -> str:
    """Replace what UTF-8 can't hold, so that a bad row can still be written down."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _content_hash(values: dict[str, Any]) -> int:
    """Hash a row by its names and values, whatever the order of its columns."""
    given = sorted((k, str(v)) for k, v in values.items() if v is not None)
    return hash64("\x1e".join(f"{k}\x1f{v}" for k, v in given))


# Cells of each format -------------------------------------------------------------


def _delimited_cells(path: Path, delimiter: str) -> Iterator[Cells]:
    with _opened(path) as stream:
        records = _delimited(stream, delimiter)
        _, header, _ = next(records)
        names = [name.strip() for name in header]
        for number, fields, problem in records:
            if problem is None and len(fields) != len(names):
                problem = f"{len(fields)} cells where the header has {len(names)}"
            if problem:
                yield Cells(number, problem=problem)
            else:
                yield Cells(number, dict(zip(names, fields, strict=True)))


def _delimited(
    stream: BinaryIO, delimiter: str
) -> Iterator[tuple[int, list[str | None], str | None]]:
    """Yield (line number, cells, problem) per record; a bare empty cell is None."""
    lines = _Lines(stream)
    for number, raw in lines:
        if not raw.strip(b"\r\n"):
            continue
        try:
            line = _decoded(raw)
            if '"' in line:
                fields = _quoted(line, delimiter, lines)
            else:
                fields = [cell or None for cell in line.split(delimiter)]
        except ValueError as error:
            yield number, [], str(error)
            continue
        yield number, fields, None


def _quoted(line: str, delimiter: str, lines: _Lines) -> list[str | None]:
    """Split a record that holds quotes, taking further lines while one is open."""
    if delimiter == "\t":
        try:
            return _split(line, delimiter)
        except csv.Error:
            return [cell or None for cell in line.split(delimiter)]
    taken: list[bytes] = []
    text = line
    while True:
        try:
            return _split(text, delimiter)
        except csv.Error as error:
            unclosed = "unexpected end of data" in str(error)
            more = lines.take() if unclosed and len(taken) < MAX_RECORD_LINES else None
            if more is None:
                lines.put_back(taken)
                reason = "never closes" if unclosed else "inside a cell is not doubled"
                raise ValueError(f"a quote {reason}") from None
        taken.append(more)
        if sum(map(len, taken)) > MAX_LINE:
            lines.put_back(taken)
            raise ValueError("a quote never closes")
        try:
            text += "\n" + _decoded(more)
        except ValueError:
            lines.put_back(taken)
            raise


def _split(text: str, delimiter: str) -> list[str | None]:
    (fields,) = csv.reader([text], delimiter=delimiter, strict=True)
    if "" not in fields:
        return list(fields)
    bare = _bare_empties(text, fields, delimiter)
    return [None if i in bare else cell for i, cell in enumerate(fields)]


def _bare_empties(text: str, fields: list[str], delimiter: str) -> set[int]:
    """Find the cells that are empty without quotes: outside quotes, nothing between."""
    if '""' not in text:
        return {i for i, cell in enumerate(fields) if not cell}
    found, index, start, inside = set(), 0, 0, False
    for position, char in enumerate(text + delimiter):
        if char == '"':
            inside = not inside
        elif char == delimiter and not inside:
            if position == start:
                found.add(index)
            index, start = index + 1, position + 1
    return found


class _Lines:
    """Numbered physical lines of bounded length, with room to put some back."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._waiting: list[bytes] = []
        self._number = 0

    def __iter__(self) -> Iterator[tuple[int, bytes]]:
        while (line := self.take()) is not None:
            yield self._number, line

    def take(self) -> bytes | None:
        line = self._waiting.pop() if self._waiting else self._stream.readline(MAX_LINE)
        if not line:
            return None
        if len(line) >= MAX_LINE and not line.endswith(b"\n"):
            while (rest := self._stream.readline(MAX_LINE)) and rest[-1:] != b"\n":
                pass
        self._number += 1
        return line

    def put_back(self, lines: list[bytes]) -> None:
        self._waiting.extend(reversed(lines))
        self._number -= len(lines)


def _decoded(raw: bytes) -> str:
    if len(raw) >= MAX_LINE:
        raise ValueError(f"a line of over {MAX_LINE >> 20} MB")
    try:
        return raw.rstrip(b"\r\n").decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 at byte {error.start + 1} of the line") from None


def _opened(path: Path) -> BinaryIO:
    stream = path.open("rb", buffering=1 << 20)
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


def _jsonl_cells(path: Path) -> Iterator[Cells]:
    with _opened(path) as stream:
        for number, raw in _Lines(stream):
            if not raw.strip():
                continue
            try:
                row = json.loads(_decoded(raw), parse_constant=_refuse_constant)
            except (ValueError, RecursionError) as error:
                yield Cells(number, problem=f"not a line of JSON: {error}")
                continue
            if isinstance(row, dict):
                yield Cells(number, row)
            else:
                yield Cells(number, problem="expected a JSON object")


def _refuse_constant(name: str) -> None:
    raise ValueError(f"`{name}` is not JSON")


def _first_keys(path: Path) -> list[str]:
    """Collect the keys of the first readable objects, to check the prompt column by."""
    found: dict[str, None] = {}
    any_row = False
    for cells, _ in zip(_jsonl_cells(path), range(1_000), strict=False):
        any_row = True
        found.update(dict.fromkeys(cells.values))
    if not any_row:
        raise ManifestError(f"{path}: empty file")
    if not found:
        raise ManifestError(f"{path}: no line of it is a JSON object")
    return list(found)


def _parquet_schema(path: Path) -> pa.Schema:
    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ManifestError(f"{path}: not a readable Parquet file ({first})") from None
    if len(set(schema.names)) != len(schema.names):
        raise ManifestError(f"{path}: a column name stands twice")
    return schema


def _parquet_cells(path: Path) -> Iterator[Cells]:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=4096):
                names = batch.schema.names
                columns = [column.to_pylist() for column in batch.columns]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield Cells(number, dict(zip(names, values, strict=True)))
    except (pa.ArrowException, OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ManifestError(
            f"{path}: can't be read beyond row {number} ({first})"
        ) from None


def _plain(kind: pa.DataType) -> pa.DataType:
    return kind.value_type if pa.types.is_dictionary(kind) else kind


def _csv_cells(path: Path) -> Iterable[Cells]:
    return _delimited_cells(path, ",")


def _tsv_cells(path: Path) -> Iterable[Cells]:
    return _delimited_cells(path, "\t")


_READERS: dict[str, Callable[[Path], Iterable[Cells]]] = {
    "csv": _csv_cells,
    "tsv": _tsv_cells,
    "jsonl": _jsonl_cells,
    "parquet": _parquet_cells,
}
