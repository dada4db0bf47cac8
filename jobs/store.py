"""The output folder: what is in it, what is done, and how a file gets there.

    DIR/job.json            the resolved settings, the manifest and the fingerprint
    DIR/rows.npz            two hashes per manifest row: its id, its content
    DIR/images/ab/….png     the pictures
    DIR/parts/….parquet     result rows as they are committed, now and then merged
    DIR/results.parquet     all of them, compacted, one row per task
    DIR/status.json         what the runner last said of itself; a convenience
    DIR/lock, DIR/log.txt
    DIR/logs/….log, ….json  what each worker said; job.json as each run wrote it
    DIR/damaged/            what `verify --repair` put aside

Every file is published by rename: written beside its place, fsynced, moved. A task is
done if and only if a published part, or results.parquet, has its row.
"""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
import stat
import uuid
import zipfile
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from jobs import parts, seal
from jobs.crash import point
from jobs.errors import MismatchError, OutputError
from jobs.index import Index
from jobs.records import SCHEMA_VERSION

TEMPORARY = ".tmp-"
_OURS = re.compile(r"\.tmp-[0-9a-f]{32}(\.parquet)?")
_IMAGES = re.compile(r"[0-9a-f]{2}")
MERGE_AT = 512
REREADS = 10
FOLDERS = ("images", "parts", "logs")
_JOB_KEYS = {"run_id", "asked", "fingerprint", "fingerprint_fields", "rows", "tasks"}


def publish(path: Path, data: bytes, kind: str = "file") -> None:
    """Write a file so that it is there whole or not at all, whatever happens.

    `kind` names it for the points of `crash`.
    """
    temporary = path.with_name(f"{TEMPORARY}{uuid.uuid4().hex}")
    try:
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            point(kind, "written")
            os.fsync(file.fileno())
        point(kind, "synced")
        temporary.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise
    point(kind, "renamed")


def sync_folder(folder: Path) -> None:
    """Make the renames within a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(path: Path) -> None:
    """Make a folder unless it is there; one that leads elsewhere is refused."""
    path.mkdir(exist_ok=True)
    if not stat.S_ISDIR(path.lstat().st_mode):
        raise OSError(errno.ELOOP, "it is a symbolic link", str(path))


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

    @property
    def rows(self) -> Path:
        return self.root / "rows.npz"

    def copy_of_job(self, run_id: str) -> Path:
        return self.root / "logs" / f"job-{run_id}.json"

    def prepare_root(self) -> None:
        """Make the output folder itself, so that it can be locked."""
        try:
            self.root.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"can't make {self.root}: {error.strerror}") from None

    def prepare(self) -> None:
        """Make the folders, and clear away what a killed run left half-written."""
        try:
            for name in FOLDERS:
                make_folder(self.root / name)
            inside = (self.root / "images").iterdir()
            inner = [folder for folder in inside if _IMAGES.fullmatch(folder.name)]
            for folder in inner:
                make_folder(folder)
            for folder in (self.root, self.root / "parts", *inner):
                for leftover in folder.glob(f"{TEMPORARY}*"):
                    if _OURS.fullmatch(leftover.name):
                        leftover.unlink(missing_ok=True)
        except OSError as error:
            raise OutputError(
                f"can't write {error.filename or self.root}: {error.strerror}"
            ) from None

    def read_job(self) -> dict[str, Any]:
        """Read what the folder's job is.

        Raises:
            OutputError: there is none, or it is not what was written.
        """
        try:
            wrong = seal.broken(self.job)
            job = json.loads(self.job.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise OutputError(
                f"{self.root} holds no job (no job.json)",
                hint="start one with `sdxl-jobs run MANIFEST --output DIR`",
            ) from None
        except (OSError, ValueError, RecursionError) as error:
            wrong, job = f"can't be read: {error}", None
        if wrong is None and not (isinstance(job, dict) and set(job) >= _JOB_KEYS):
            wrong = "is not a job's"
        if wrong or job is None:
            raise OutputError(
                f"{self.job} {wrong}",
                hint="`sdxl-jobs verify --repair` restores it from its copy",
            )
        return job

    def write_json(self, path: Path, value: dict[str, Any], kind: str) -> None:
        """Publish a mapping as a sealed JSON file."""
        text = json.dumps(
            value | {"sha256": seal.ZEROS}, indent=2, ensure_ascii=False, default=str
        )
        publish(path, seal.seal(text.encode() + b"\n", ".json"), kind)

    def write_part(
        self, name: str, rows: list[dict[str, Any]], schema: pa.Schema
    ) -> Path:
        """Publish result rows as `parts/<name>.parquet`, after the images they name."""
        path = self.root / "parts" / f"{name}.parquet"
        folders = {Path(r["image_path"]).parent for r in rows if r["image_path"]}
        for folder in sorted(folders):
            sync_folder(self.root / folder)
        if folders:
            sync_folder(self.root / "images")
        point("image", "durable")
        publish(path, parts.encode(rows, schema), "part")
        sync_folder(path.parent)
        point("part", "durable")
        return path

    def part_ids(self, path: Path) -> list[tuple[str, str]]:
        """Read (image id, status) of a part."""
        table = parts.read(path, ["image_id", "status"])
        return list(
            zip(table["image_id"].to_pylist(), table["status"].to_pylist(), strict=True)
        )

    def merge(self, names: Sequence[str]) -> None:
        """Put several parts into one, so that a long job has few files.

        Whoever dies between publishing it and removing them leaves rows twice, which
        `parts.winners` counts once.
        """
        sources = [self.root / "parts" / f"{name}.parquet" for name in names]
        tables = [parts.read(path).replace_schema_metadata() for path in sources]
        table = pa.concat_tables(tables, promote_options="default")
        path = self.root / "parts" / f"merged-{uuid.uuid4().hex}.parquet"
        publish(path, parts.encode_table(table), "merged")
        sync_folder(path.parent)
        point("merged", "durable")
        for part in sources:
            part.unlink(missing_ok=True)
            point("merged", "swept")

    def merge_leftovers(self) -> None:
        """Merge the parts that earlier runs left, where they are many."""
        left = [path.stem for path in self.sources() if path != self.results]
        while len(left) > MERGE_AT:
            names, left = left[:MERGE_AT], left[MERGE_AT:]
            self.merge(names)

    def sources(self, run_id: str | None = None) -> list[Path]:
        """List the files that hold result rows, oldest first, a run's own the last."""

        def age(path: Path) -> tuple[bool, int, str]:
            own = run_id is not None and run_id in path.name
            return own, path.stat().st_mtime_ns, path.name

        found = sorted((self.root / "parts").glob("*.parquet"), key=age)
        return [self.results, *found] if self.results.exists() else found

    def fingerprints(self) -> set[str]:
        """Read which jobs the rows are of: one, as a rule."""
        found: set[str] = set()
        for path in self.sources():
            column = parts.read(path, ["job_fingerprint"])["job_fingerprint"]
            found.update(word for word in column.unique().to_pylist() if word)
        return found

    def index(self) -> Index:
        """Read which tasks have a row. A run may go on: its files come and go."""
        for _ in range(REREADS):
            with contextlib.suppress(FileNotFoundError):
                best = parts.winners(self.sources())
                return Index(best.ids, best.status, best.attempts, best.classes)
        raise self._too_fast()

    def rows_of(self, image_id: str) -> list[dict[str, Any]]:
        """Read the rows of one image. A run may go on: its files come and go."""
        for _ in range(REREADS):
            with contextlib.suppress(FileNotFoundError):
                sources = self.sources()
                return [
                    row for path in sources for row in parts.rows_of(path, image_id)
                ]
        raise self._too_fast()

    def _too_fast(self) -> OutputError:
        return OutputError(
            f"the parts in {self.root} change too fast", hint="try again"
        )

    def compact(
        self,
        schema: pa.Schema,
        metadata: dict[str, str],
        run_id: str | None,
        rows_read: int = 0,
    ) -> Path:
        """Merge all parts into results.parquet, one row per task, in manifest order.

        With a run id, `invalid` rows of other runs are dropped: this run has read that
        many rows of the manifest and said anew which of them are. Memory is bounded by
        `COMPACT_ROWS`.
        """
        sources = self.sources(run_id)
        masks = parts.winners(sources).masks
        schema = schema.with_metadata(
            {**metadata, "sdxl_jobs.schema_version": str(SCHEMA_VERSION)}
        )
        temporary = self.root / f"{TEMPORARY}{uuid.uuid4().hex}.parquet"
        try:
            tables = parts.in_order(sources, masks, schema, run_id, rows_read)
            parts.write(temporary, tables, schema)
            point("results", "written")
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            point("results", "synced")
            temporary.replace(self.results)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        point("results", "renamed")
        sync_folder(self.root)
        point("results", "durable")
        for part in sources:
            if part != self.results:
                part.unlink(missing_ok=True)
                point("results", "swept")
        return self.results

    # Which manifest this folder has seen ----------------------------------------------

    def check_rows(
        self,
        ids: np.ndarray,
        contents: np.ndarray,
        whole: bool,
        place: Callable[[int], str],
    ) -> int:
        """Compare the manifest with the one seen before; count the rows that are new.

        Args:
            ids, contents: uint64, one entry per row, as the survey found them.
            whole: the manifest was read to its end, so that a row can be missing.
            place: says where the row at a position of the two stands.

        Raises:
            MismatchError: a row seen before has changed or is gone.
        """
        known = self._known_rows()
        if known is None:
            return len(ids)
        order = np.argsort(ids, kind="stable")
        at = parts.lookup(ids[order], known["ids"])
        found = at >= 0
        changed = np.zeros(len(at), bool)
        changed[found] = contents[order][at[found]] != known["contents"][found]
        if changed.any():
            rows = order[at[changed]]
            shown = ", ".join(place(row) for row in sorted(rows.tolist())[:5])
            more = ", …" if len(rows) > 5 else ""
            raise MismatchError(
                f"{int(changed.sum())} rows of the manifest have changed since "
                f"{self.root} was started: {shown}{more}",
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
            fresh = parts.lookup(np.sort(known["ids"]), ids) < 0
            ids = np.concatenate([known["ids"], ids[fresh]])
            contents = np.concatenate([known["contents"], contents[fresh]])
        sink = io.BytesIO()
        np.savez(sink, ids=ids, contents=contents)
        with zipfile.ZipFile(sink, "a") as archive:
            archive.comment = (seal.NPZ_COMMENT + seal.ZEROS).encode()
        publish(self.rows, seal.seal(sink.getvalue(), ".npz"), "rows")

    def _known_rows(self) -> dict[str, np.ndarray] | None:
        try:
            wrong = seal.broken(self.rows)
            whole = io.BytesIO(self.rows.read_bytes())  # np.load leaves a bad file open
            with np.load(whole, allow_pickle=False) as stored:
                known = {name: stored[name] for name in ("ids", "contents")}
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, EOFError, *_ZIP_ERRORS) as error:
            wrong = f"can't be read: {error}"
        if wrong:
            raise OutputError(
                f"{self.rows} {wrong}",
                hint="`sdxl-jobs verify --repair` puts it aside; `resume` goes on",
            )
        return known


_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, NotImplementedError)
