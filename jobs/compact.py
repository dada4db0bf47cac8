"""Merge the parts of a job that does not run, finished or not, into results.parquet."""

from __future__ import annotations

from pathlib import Path

from jobs import parts
from jobs.errors import OutputError, folder_errors
from jobs.lock import FolderLock
from jobs.model import file_sha256
from jobs.order import Order
from jobs.store import Store


def compact(folder: Path) -> Path:
    """Write results.parquet from all rows that are committed; no row is lost by it.

    Raises:
        OutputError: it is no job's folder, a run is at work, or there are no rows.
    """
    store = Store(folder)
    job = store.read_job()
    with FolderLock(folder), folder_errors(folder):
        store.prepare()
        sources = store.sources()
        if not sources:
            raise OutputError(f"{folder} has no rows yet")
        schema = parts.union_schema(sources)
        metadata = {"sdxl_jobs.job": store.job.read_text(encoding="utf-8")}
        manifest = Order.stored(store).manifest
        if job["rows"] and manifest.is_file():
            metadata["sdxl_jobs.manifest_sha256"] = file_sha256(manifest)
        return store.compact(schema, metadata, None)
