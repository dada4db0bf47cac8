"""The output folder: what is in it, what is done, and how a file gets there.

    DIR/job.json            the resolved settings, the manifest and the fingerprint
    DIR/rows.npz            two hashes per manifest row: its id, its content
    DIR/images/ab/….png     the pictures
    DIR/parts/….parquet     result rows as they are committed
    DIR/results.parquet     all of them, compacted, one row per task
    DIR/status.json         what the runner last said of itself; a convenience
    DIR/lock, DIR/log.txt, DIR/logs/worker-0.log

Every file is published by rename: written beside its place, fsynced, moved. A task is
done if and only if a published part, or results.parquet, has its row.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from jobs.errors import MismatchError, OutputError
from jobs.records import RESULT_COLUMNS, SCHEMA_VERSION

TEMPORARY = ".tmp-"
STATUSES = ("ok", "failed", "invalid")
COMPACT_ROWS = 250_000

_ARROW = {
    "string": pa.string(),
    "bool": pa.bool_(),
    "int32": pa.int32(),
    "int64": pa.int64(),
    "float32": pa.float32(),
    "list<string>": pa.list_(pa.string()),
    "timestamp": pa.timestamp("us", tz="UTC"),
}


def result_schema(extras: pa.Schema | None = None) -> pa.Schema:
    """Give the schema of result rows, with the manifest's own columns at the end."""
    schema = pa.schema([(name, _ARROW[kind]) for name, kind in RESULT_COLUMNS.items()])
    for column in extras or ():
        schema = schema.append(column)
    return schema


def publish(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all, whatever happens."""
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise


def sync_folder(folder: Path) -> None:
    """Make the renames within a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@dataclass(frozen=True, slots=True)
class Index:
    """Which tasks have a row: sorted image ids (uint64), and the status of each."""

    ids: np.ndarray
    status: np.ndarray
    attempts: np.ndarray

    def counts(self) -> dict[str, int]:
        return {s: int((self.status == i).sum()) for i, s in enumerate(STATUSES)}

    def find(self, image_ids: Sequence[str]) -> np.ndarray:
        """Give each image's position in the index, -1 where it has no row."""
        asked = np.array([int(i, 16) for i in image_ids], np.uint64)
        if not len(self.ids):
            return np.full(len(asked), -1)
        at = np.minimum(np.searchsorted(self.ids, asked), len(self.ids) - 1)
        return np.where(self.ids[at] == asked, at, -1)

    def is_done(self, image_ids: Sequence[str]) -> np.ndarray:
        """Tell which images are made or failed for good; an invalid row is neither."""
        at = self.find(image_ids)
        if not len(self.ids):
            return at >= 0
        return (at >= 0) & (self.status[at] != STATUSES.index("invalid"))


@dataclass(frozen=True, slots=True)
class Store:
    """An output folder."""

    root: Path

    @property
    def results(self) -> Path:
        return self.root / "results.parquet"

    @property
    def job(self) -> Path:
        return self.root / "job.json"

    def prepare_root(self) -> None:
        """Make the output folder itself, so that it can be locked."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"can't make {self.root}: {error.strerror}") from None

    def prepare(self) -> None:
        """Make the folders, and clear away what a killed run left half-written."""
        try:
            for folder in ("images", "parts", "logs"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            for folder in (self.root, self.root / "parts"):
                for leftover in folder.glob(f"{TEMPORARY}*"):
                    leftover.unlink(missing_ok=True)
            for leftover in (self.root / "images").glob(f"*/{TEMPORARY}*"):
                leftover.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(f"can't write {self.root}: {error.strerror}") from None

    def read_job(self) -> dict[str, Any]:
        """Read what the folder's job is.

        Raises:
            OutputError: there is none, or it can't be read.
        """
        try:
            job = json.loads(self.job.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise OutputError(
                f"{self.root} holds no job (no job.json)",
                hint="start one with `sdxl-jobs run MANIFEST --output DIR`",
            ) from None
        except (OSError, ValueError) as error:
            raise OutputError(f"can't read {self.job}: {error}") from None
        return job

    def write_json(self, path: Path, value: Any) -> None:
        text = json.dumps(value, indent=2, ensure_ascii=False, default=str)
        publish(path, text.encode() + b"\n")

    def write_part(
        self, name: str, rows: list[dict[str, Any]], schema: pa.Schema
    ) -> Path:
        """Publish result rows as `parts/<name>.parquet`, after the images they name."""
        path = self.root / "parts" / f"{name}.parquet"
        for folder in {Path(r["image_path"]).parent for r in rows if r["image_path"]}:
            sync_folder(self.root / folder)
        sink = pa.BufferOutputStream()
        pq.write_table(
            pa.Table.from_pylist(rows, schema=schema), sink, compression="zstd"
        )
        publish(path, sink.getvalue().to_pybytes())
        sync_folder(path.parent)
        return path

    def part_ids(self, path: Path) -> list[tuple[str, str]]:
        """Read (image id, status) of a part."""
        table = _read(path, ["image_id", "status"])
        return list(
            zip(table["image_id"].to_pylist(), table["status"].to_pylist(), strict=True)
        )

    def sources(self) -> list[Path]:
        """List the files that hold result rows, oldest first."""
        parts = sorted((self.root / "parts").glob("*.parquet"), key=_age)
        return [self.results, *parts] if self.results.exists() else parts

    def index(self) -> Index:
        """Read which tasks have a row: an `ok` one first, else the latest."""
        ids, status, attempts, _ = _winners(self.sources())
        return Index(ids, status, attempts)

    def compact(self, schema: pa.Schema, metadata: dict[str, str], run_id: str) -> Path:
        """Merge all parts into results.parquet, one row per task, in manifest order.

        An `ok` row beats a later failure. `invalid` rows of earlier runs are dropped:
        this run has read the manifest and said anew which rows are. Memory is bounded
        by `COMPACT_ROWS` rows.
        """
        sources = self.sources()
        *_, places = _winners(sources)
        schema = schema.with_metadata(
            {**metadata, "sdxl_jobs.schema_version": str(SCHEMA_VERSION)}
        )
        temporary = self.root / f"{TEMPORARY}{uuid.uuid4().hex}"
        try:
            with pq.ParquetWriter(temporary, schema, compression="zstd") as writer:
                for table in _in_order(sources, places, schema, run_id):
                    writer.write_table(table)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.replace(self.results)
            sync_folder(self.root)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        for part in sources:
            if part != self.results:
                part.unlink(missing_ok=True)
        return self.results

    # Which manifest this folder has seen ----------------------------------------------

    def check_rows(self, ids: np.ndarray, contents: np.ndarray, whole: bool) -> int:
        """Compare the manifest with the one seen before; count the rows that are new.

        Args:
            ids, contents: uint64, one entry per row, as the survey found them.
            whole: the manifest was read to its end, so that a row can be missing.

        Raises:
            MismatchError: a row seen before has changed or is gone.
        """
        known = self._known_rows()
        if known is None:
            return len(ids)
        order = np.argsort(ids, kind="stable")
        at = _lookup(ids[order], known["ids"])
        found = at >= 0
        changed = np.zeros(len(at), bool)
        changed[found] = contents[order][at[found]] != known["contents"][found]
        if changed.any():
            rows = order[at[changed]] + 1
            shown = ", ".join(str(row) for row in sorted(rows.tolist())[:5])
            more = ", …" if len(rows) > 5 else ""
            raise MismatchError(
                f"{int(changed.sum())} rows of the manifest have changed since "
                f"{self.root} was started: row {shown}{more}",
                hint="use a new output folder, or give the changed rows new ids",
            )
        if whole and not found.all():
            raise MismatchError(
                f"{int((~found).sum())} rows that {self.root} was started with are "
                "gone from the manifest",
                hint="use a new output folder, or put the rows back",
            )
        return len(ids) - int(found.sum())

    def remember_rows(self, ids: np.ndarray, contents: np.ndarray) -> None:
        """Store the hashes of the rows seen, adding to those of earlier runs."""
        known = self._known_rows()
        if known is not None:
            fresh = _lookup(np.sort(known["ids"]), ids) < 0
            ids = np.concatenate([known["ids"], ids[fresh]])
            contents = np.concatenate([known["contents"], contents[fresh]])
        sink = io.BytesIO()
        np.savez(sink, ids=ids, contents=contents)
        publish(self.root / "rows.npz", sink.getvalue())

    def _known_rows(self) -> dict[str, np.ndarray] | None:
        path = self.root / "rows.npz"
        if not path.exists():
            return None
        try:
            with np.load(path, allow_pickle=False) as stored:
                return {name: stored[name] for name in ("ids", "contents")}
        except (OSError, ValueError, KeyError) as error:
            raise OutputError(f"can't read {path}: {error}") from None


def _lookup(ordered: np.ndarray, asked: np.ndarray) -> np.ndarray:
    if not len(ordered):
        return np.full(len(asked), -1)
    at = np.minimum(np.searchsorted(ordered, asked), len(ordered) - 1)
    return np.where(ordered[at] == asked, at, -1)


def _age(path: Path) -> tuple[int, str]:
    return (path.stat().st_mtime_ns, path.name)


def _read(path: Path, columns: list[str]) -> pa.Table:
    try:
        return pq.read_table(path, columns=columns)
    except (pa.ArrowException, OSError, ValueError, KeyError) as error:
        first = str(error).splitlines()[0]
        raise OutputError(
            f"can't read {path}: {first}",
            hint="if it is damaged, move it away: its tasks are made again by `resume`",
        ) from None


Winners = tuple[np.ndarray, np.ndarray, np.ndarray, list[np.ndarray]]


def _winners(sources: Sequence[Path]) -> Winners:
    """Choose one row per image id: ids, statuses, attempts, and a mask per file."""
    ids, status, attempts, lengths = [], [], [], []
    for path in sources:
        table = _read(path, ["image_id", "status", "attempts"])
        ids.append(
            np.fromiter((int(i, 16) for i in table["image_id"].to_pylist()), np.uint64)
        )
        known = {name: number for number, name in enumerate(STATUSES)}
        status.append(
            np.array([known[s] for s in table["status"].to_pylist()], np.int8)
        )
        attempts.append(table["attempts"].to_numpy().astype(np.int32))
        lengths.append(len(table))
    if not ids:
        empty = np.empty(0, np.int8)
        return np.empty(0, np.uint64), empty, np.empty(0, np.int32), []
    all_ids, all_status = np.concatenate(ids), np.concatenate(status)
    newest_first = -np.arange(len(all_ids))
    order = np.lexsort((newest_first, all_status != 0, all_ids))
    first = np.ones(len(order), bool)
    first[1:] = all_ids[order][1:] != all_ids[order][:-1]
    chosen = order[first]
    keep = np.zeros(len(all_ids), bool)
    keep[chosen] = True
    by_file = np.split(keep, np.cumsum(lengths)[:-1])
    return (
        all_ids[chosen],
        all_status[chosen],
        np.concatenate(attempts)[chosen],
        by_file,
    )


def _in_order(
    sources: Sequence[Path], keep: Sequence[np.ndarray], schema: pa.Schema, run_id: str
) -> Iterator[pa.Table]:
    """Yield the kept rows sorted by manifest row, a bounded number at a time."""
    rows = [_read(path, ["source_row"])["source_row"].to_numpy() for path in sources]
    kept = [r[k] for r, k in zip(rows, keep, strict=True)]
    every = np.sort(np.concatenate(kept)) if kept else np.empty(0, np.int64)
    starts = np.unique(every[::COMPACT_ROWS])
    for low, high in zip(starts, [*starts[1:], None], strict=True):
        tables = []
        for path, mask, source_row in zip(sources, keep, rows, strict=True):
            wanted = mask & (source_row >= low)
            if high is not None:
                wanted &= source_row < high
            if wanted.any():
                table = _read(path, pq.read_schema(path).names)
                tables.append(_conform(table.filter(pa.array(wanted)), schema))
        table = pa.concat_tables(tables)
        stale = (table["status"].to_numpy() == "invalid") & (
            table["run_id"].to_numpy() != run_id
        )
        table = table.filter(pa.array(~stale))
        yield table.sort_by([("source_row", "ascending"), ("image_index", "ascending")])
    if not len(starts):
        yield schema.empty_table()


def _conform(table: pa.Table, schema: pa.Schema) -> pa.Table:
    columns = [
        table[column.name].cast(column.type)
        if column.name in table.column_names
        else pa.nulls(len(table), column.type)
        for column in schema
    ]
    return pa.table(columns, schema=schema)
