"""Result rows in Parquet files: parts as they are committed, and results.parquet.

A row may stand in several files: a failure that was tried again, or the leavings of a
run that died between publishing a merged file and removing what went into it. One row
counts: an `ok` one first, else the one with the most attempts, else the latest.

Every file carries the CRC of each page and its own seal (see `seal`).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from jobs import seal
from jobs.errors import OutputError
from jobs.records import ERROR_CLASSES, RESULT_COLUMNS

STATUSES = ("ok", "failed", "invalid")
COMPACT_ROWS = 65_536
GROUP_ROWS = 8_192

_ARROW = {
    "string": pa.string(),
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "list<string>": pa.list_(pa.string()),
    "timestamp": pa.timestamp("us", tz="UTC"),
}
INDEX_COLUMNS = ["image_id", "status", "attempts", "error_class"]
_WRITING = {"compression": "zstd", "write_page_checksum": True}


def result_schema(extras: pa.Schema | None = None) -> pa.Schema:
    """Give the schema of result rows, with the manifest's own columns at the end."""
    schema = pa.schema([(name, _ARROW[kind]) for name, kind in RESULT_COLUMNS.items()])
    for column in extras or ():
        schema = schema.append(column)
    return schema


def encode(rows: list[dict[str, Any]], schema: pa.Schema) -> bytes:
    """Write rows as the bytes of a sealed Parquet file."""
    return encode_table(pa.Table.from_pylist(rows, schema=_sealable(schema)))


def encode_table(table: pa.Table) -> bytes:
    """Write a table as the bytes of a sealed Parquet file."""
    sink = pa.BufferOutputStream()
    schema = _sealable(table.schema)
    pq.write_table(table.replace_schema_metadata(schema.metadata), sink, **_WRITING)
    return seal.seal(sink.getvalue().to_pybytes(), ".parquet")


def write(path: Path, tables: Iterator[pa.Table], schema: pa.Schema) -> None:
    """Write tables, one after the other, to a sealed Parquet file."""
    with pq.ParquetWriter(path, _sealable(schema), **_WRITING) as writer:
        for table in tables:
            writer.write_table(table, row_group_size=GROUP_ROWS)
    seal.seal_file(path)


def read(
    path: Path, columns: list[str] | None = None, wanted: np.ndarray | None = None
) -> pa.Table:
    """Read columns of a file, or the rows of a mask, checking each page's CRC.

    Raises:
        FileNotFoundError: it is not there (any more).
        OutputError: it can't be read.
    """
    with _opened(path) as file:
        missing = [n for n in columns or () if n not in file.schema_arrow.names]
        if missing:
            raise ValueError(f"no column `{missing[0]}`")
        if wanted is not None:
            return _wanted_rows(file, wanted)
        return file.read(columns=columns)


@contextmanager
def _opened(path: Path) -> Iterator[pq.ParquetFile]:
    """Open a file of rows, for as long as it is read; what fails is one error."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            yield file
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise OutputError(
            f"can't read {path}: {first}",
            hint="`sdxl-jobs verify --repair` puts it aside; `resume` makes it good",
        ) from None


def _wanted_rows(file: pq.ParquetFile, wanted: np.ndarray) -> pa.Table:
    """Read the rows of a mask, and only the row groups that hold some."""
    counts = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    masks = np.split(wanted, np.cumsum(counts)[:-1])
    chosen = [number for number, mask in enumerate(masks) if mask.any()]
    table = file.read_row_groups(chosen)
    return table.filter(pa.array(np.concatenate([masks[i] for i in chosen])))


def sound_groups(path: Path) -> Iterator[pa.Table]:
    """Yield what can still be trusted of a damaged file: row groups that read whole."""
    try:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            columns = file.schema_arrow.names
            numbers = range(file.num_row_groups)
    except (pa.ArrowException, OSError, ValueError, KeyError):
        return
    if not set(RESULT_COLUMNS) <= set(columns):
        return
    for number in numbers:
        try:
            with pq.ParquetFile(path, page_checksum_verification=True) as file:
                table = file.read_row_group(number).replace_schema_metadata()
            table.validate(full=True)
            _index_of(table)
        except (pa.ArrowException, OSError, ValueError, KeyError, TypeError):
            continue
        yield table


def drop(path: Path, image_ids: np.ndarray, aside: Path) -> int:
    """Take rows out of a file, keeping them in another; tell how many there were."""
    kept, dropped = [], []
    for table in groups(path):
        bad = np.isin(_index_of(table)[0], image_ids)
        kept.append(table.filter(pa.array(~bad)))
        dropped.append(table.filter(pa.array(bad)))
    count = sum(len(table) for table in dropped)
    if count:
        aside.parent.mkdir(parents=True, exist_ok=True)
        publish_tables(aside, dropped, dropped[0].schema)
        publish_tables(path, kept, kept[0].schema)
    return count


def publish_tables(path: Path, tables: list[pa.Table], schema: pa.Schema) -> None:
    """Write tables to a file that is there whole or not at all."""
    temporary = path.with_name(f".tmp-{uuid.uuid4().hex}.parquet")
    write(temporary, iter(tables), schema)
    with temporary.open("rb+") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def rows_of(path: Path, image_id: str) -> list[dict[str, Any]]:
    """Read the rows of one image."""
    found = []
    for table in groups(path):
        wanted = pc.equal(table["image_id"], image_id)
        found += table.filter(wanted).to_pylist()
    return found


def union_schema(paths: Sequence[Path]) -> pa.Schema:
    """Give the result columns and whatever others any of the files has, at the end."""
    schema = result_schema()
    for path in paths:
        for column in schema_of(path):
            if column.name not in schema.names:
                schema = schema.append(column)
    return schema


def groups(path: Path) -> Iterator[pa.Table]:
    """Read a file a row group at a time."""
    with _opened(path) as file:
        for group in range(file.num_row_groups):
            yield file.read_row_group(group)


def as_mask(keep: np.ndarray) -> pa.Array:
    """Make a boolean array fit to filter a table with."""
    return pa.array(keep)


def lookup(ordered: np.ndarray, asked: np.ndarray) -> np.ndarray:
    """Give the place of each of `asked` in a sorted array, -1 where it is not."""
    if not len(ordered):
        return np.full(len(asked), -1)
    at = np.minimum(np.searchsorted(ordered, asked), len(ordered) - 1)
    return np.where(ordered[at] == asked, at, -1)


def schema_of(path: Path) -> pa.Schema:
    """Read the columns of a file, without its metadata."""
    with _opened(path) as file:
        return file.schema_arrow.remove_metadata()


@dataclass(frozen=True, slots=True)
class Winners:
    """The rows that count: their ids in order (uint64), and a mask for each file."""

    ids: np.ndarray
    status: np.ndarray
    attempts: np.ndarray
    classes: np.ndarray
    masks: list[np.ndarray]


def winners(sources: Sequence[Path]) -> Winners:
    """Choose one row per image id of all files, given the oldest first."""
    columns = [_read_index(path) for path in sources]
    if not columns:
        return Winners(
            np.empty(0, np.uint64),
            np.empty(0, np.int8),
            np.empty(0, np.int32),
            np.empty(0, np.uint8),
            [],
        )
    ids, status, attempts, classes = map(np.concatenate, zip(*columns, strict=True))
    newest_first = -np.arange(len(ids))
    order = np.lexsort((newest_first, -attempts, status != 0, ids))
    first = np.ones(len(order), bool)
    first[1:] = ids[order][1:] != ids[order][:-1]
    chosen = order[first]
    keep = np.zeros(len(ids), bool)
    keep[chosen] = True
    ends = np.cumsum([len(found[0]) for found in columns])
    return Winners(
        ids[chosen],
        status[chosen],
        attempts[chosen],
        classes[chosen],
        np.split(keep, ends[:-1]),
    )


CLASSES = ("", "invalid_row", *ERROR_CLASSES)
OTHER = 255


def _read_index(path: Path) -> tuple[np.ndarray, ...]:
    try:
        return _index_of(read(path, INDEX_COLUMNS))
    except (TypeError, ValueError, OverflowError) as error:
        raise OutputError(
            f"can't read {path}: {error}",
            hint="`sdxl-jobs verify --repair` puts it aside; `resume` makes it good",
        ) from None


def _index_of(table: pa.Table) -> tuple[np.ndarray, ...]:
    """Give ids, statuses, attempts and error classes; ValueError where they are odd."""
    ids = np.fromiter((int(i, 16) for i in table["image_id"].to_pylist()), np.uint64)
    return (
        ids,
        _codes(table["status"], STATUSES),
        table["attempts"].to_numpy().astype(np.int32),
        _codes(table["error_class"], CLASSES),
    )


def _codes(column: pa.ChunkedArray, known: tuple[str, ...]) -> np.ndarray:
    """Number the words of a column by their place in `known`; null is the first."""
    words = column.combine_chunks().dictionary_encode()
    found = words.dictionary.to_pylist()
    if unknown := [w for w in found if w not in known and known is STATUSES]:
        raise ValueError(f"unknown status `{unknown[0][:40]}`")
    numbers = [known.index(w) if w in known else OTHER for w in found]
    codes = words.indices.fill_null(len(numbers)).to_numpy(zero_copy_only=False)
    return np.array([*numbers, 0], np.uint8)[codes]


def in_order(
    sources: Sequence[Path],
    keep: Sequence[np.ndarray],
    schema: pa.Schema,
    run_id: str | None,
    rows_read: int,
) -> Iterator[pa.Table]:
    """Yield the kept rows sorted by manifest row, a bounded number at a time.

    With a run id, `invalid` rows of other runs are left out, those of the manifest's
    first `rows_read` rows.
    """
    rows = [read(path, ["source_row"])["source_row"].to_numpy() for path in sources]
    kept = [r[k] for r, k in zip(rows, keep, strict=True)]
    every = np.sort(np.concatenate(kept)) if kept else np.empty(0, np.int64)
    starts = np.unique(every[::COMPACT_ROWS])
    if not len(starts):
        yield schema.empty_table()
        return
    for low, high in zip(starts, [*starts[1:], None], strict=True):
        tables = []
        for path, mask, source_row in zip(sources, keep, rows, strict=True):
            wanted = mask & (source_row >= low)
            if high is not None:
                wanted &= source_row < high
            if wanted.any():
                tables.append(conform(read(path, wanted=wanted), schema))
        table = pa.concat_tables(tables)
        if run_id is not None:
            stale = (table["status"].to_numpy() == "invalid") & (
                table["run_id"].to_numpy() != run_id
            )
            stale &= table["source_row"].to_numpy() < rows_read
            table = table.filter(pa.array(~stale))
        yield table.sort_by([("source_row", "ascending"), ("image_index", "ascending")])


def conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    """Bring a table to a schema: columns it lacks are null, others are dropped."""
    columns = [
        table[column.name].cast(column.type)
        if column.name in table.column_names
        else pa.nulls(len(table), column.type)
        for column in schema
    ]
    return pa.table(columns, schema=schema)


def _sealable(schema: pa.Schema) -> pa.Schema:
    metadata = {k.decode(): v.decode() for k, v in (schema.metadata or {}).items()}
    metadata.pop(seal.PARQUET_KEY, None)
    return schema.with_metadata({**metadata, seal.PARQUET_KEY: seal.ZEROS})
