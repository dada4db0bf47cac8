"""The cells of each manifest format, in a stream: csv, tsv, jsonl, Parquet.

    file ──> rows of values, each with its line, or with what is wrong with it

A bare empty cell of a CSV or TSV means "not given"; a quoted one (`""`) is empty text.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from jobs import settings
from jobs.delimited import Lines, decoded, opened, records
from jobs.errors import ManifestError

PARQUET_ROWS = 1_024
MAX_DEPTH = 64
DELIMITERS = {"csv": ",", "tsv": "\t"}


@dataclass(frozen=True, slots=True)
class Cells:
    """One row before it is checked: its values, or why it has none."""

    number: int
    values: dict[str, Any] = field(default_factory=dict)
    problem: str | None = None


def columns_of(path: Path, kind: str) -> tuple[str, ...] | None:
    if kind == "jsonl":
        return None
    if kind == "parquet":
        return tuple(parquet_schema(path).names)
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


def jsonl_cells(path: Path) -> Iterator[Cells]:
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


def first_keys(path: Path) -> list[str]:
    """Collect the keys of the first readable objects, to check the prompt column by."""
    found: dict[str, None] = {}
    any_row = False
    for cells, _ in zip(jsonl_cells(path), range(1_000), strict=False):
        any_row = True
        found.update(dict.fromkeys(cells.values))
    if not any_row:
        raise ManifestError(f"{path}: empty file")
    if not found:
        raise ManifestError(f"{path}: no line of it is a JSON object")
    return list(found)


def parquet_schema(path: Path) -> pa.Schema:
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


def plain_type(kind: pa.DataType) -> pa.DataType:
    """Give the type in which a column passes through: one that can be sorted."""
    if pa.types.is_dictionary(kind):
        return kind.value_type
    return {"string_view": pa.string(), "binary_view": pa.binary()}.get(str(kind), kind)


def _csv_cells(path: Path) -> Iterable[Cells]:
    return _delimited_cells(path, ",")


def _tsv_cells(path: Path) -> Iterable[Cells]:
    return _delimited_cells(path, "\t")


READERS: dict[str, Callable[[Path], Iterable[Cells]]] = {
    "csv": _csv_cells,
    "tsv": _tsv_cells,
    "jsonl": jsonl_cells,
    "parquet": _parquet_cells,
}
