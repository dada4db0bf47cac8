"""Read and check a manifest in a stream: csv, tsv, jsonl or Parquet -> rows.

    file ──> cells (strings or typed values, with their line) ──> Request | Rejected

A manifest that can't be understood as a whole (no prompt column, not Parquet at all) is
an error. A row that can't be used is a `Rejected` with file, line and reason, and the
rows around it are made. Memory does not grow with the number of rows.

A bare empty cell of a CSV or TSV means "not given"; a quoted one (`""`) is empty text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import settings
from jobs.delimited import Lines, decoded, opened, records
from jobs.errors import ManifestError, nearest, printable
from jobs.records import RESULT_COLUMNS, Rejected, Request, hash64

PARQUET_ROWS = 1_024
MAX_DEPTH = 64
MAX_EXTRAS = 1_000
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
                if len(names) > MAX_EXTRAS:
                    raise ManifestError(
                        f"{self.path}: its lines have over {MAX_EXTRAS} different keys",
                        hint="put what is not a setting under one key",
                    )
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
    with opened(path) as stream:
        header = next(records(stream, DELIMITERS[kind]), None)
    if header is None:
        raise ManifestError(f"{path}: empty file")
    number, fields, problem = header
    if problem:
        raise ManifestError(f"{path} line {number}: {problem}")
    names = tuple(name.strip() for name in fields if name is not None)
    if len(names) != len(fields) or len(set(names)) != len(names):
        raise ManifestError(
            f"{path} line {number}: the header has an empty or repeated column name",
            hint="the first line must name every column once",
        )
    return names


def _checked_id(value: Any) -> str:
    text = str(value)
    plain = isinstance(value, str | int) and not isinstance(value, bool)
    if not plain or not text.strip():
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
    with opened(path) as stream:
        found = records(stream, delimiter)
        _, header, _ = next(found)
        names = [name.strip() for name in header if name is not None]
        for number, fields, problem in found:
            if problem is None and len(fields) != len(names):
                problem = f"{len(fields)} cells where the header has {len(names)}"
            if problem:
                yield Cells(number, problem=problem)
            else:
                yield Cells(number, dict(zip(names, fields, strict=True)))


def _jsonl_cells(path: Path) -> Iterator[Cells]:
    with opened(path) as stream:
        for number, raw in Lines(stream):
            if not raw.strip():
                continue
            try:
                yield Cells(number, _json_row(raw))
            except RecursionError:
                yield Cells(number, problem="not a line of JSON: nested too deeply")
            except ValueError as error:
                yield Cells(number, problem=f"not a line of JSON: {error}")


def _json_row(raw: bytes) -> dict[str, Any]:
    row = json.loads(
        decoded(raw),
        parse_constant=_refuse_constant,
        object_pairs_hook=_refuse_repeated_keys,
    )
    if not isinstance(row, dict):
        raise ValueError("expected a JSON object")
    for key, value in row.items():
        settings.text(key)
        _check_depth(value, MAX_DEPTH)
    return row


def _check_depth(value: Any, levels: int) -> None:
    """Refuse what could not be written again without running out of stack."""
    if isinstance(value, dict | list):
        if not levels:
            raise ValueError(f"nested over {MAX_DEPTH} levels deep")
        for inner in value.values() if isinstance(value, dict) else value:
            _check_depth(inner, levels - 1)


def _refuse_repeated_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key stands twice in one object")
    return found


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
            for batch in file.iter_batches(batch_size=PARQUET_ROWS):
                names = batch.schema.names
                columns = [_values(name, batch[name]) for name in names]
                for values in zip(*columns, strict=True):
                    number += 1
                    yield Cells(number, dict(zip(names, values, strict=True)))
    except (pa.ArrowException, OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ManifestError(
            f"{path}: can't be read beyond row {number} ({first})"
        ) from None


def _values(name: str, column: pa.Array) -> list[Any]:
    try:
        return column.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError, LookupError) as error:
        # A date of the year 12000, an unknown time zone, bytes that are no UTF-8.
        raise ValueError(f"column `{name}`: {str(error).splitlines()[0]}") from None


def _plain(kind: pa.DataType) -> pa.DataType:
    """Give the type in which a column passes through: one that can be sorted."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    return {"string_view": pa.string(), "binary_view": pa.binary()}.get(str(kind), kind)


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
