"""Is the output folder what the job wrote? Every file, every row, and the books.

    seals ──> rows ──> images ──> books ──> strays

A finding names one file or one row. What was found is not believed further: the rows of
a damaged file count as not there, so that `resume` would make them again once
`--repair` (see `repair`) has put the file aside. Nothing is followed through a symbolic
link. Strays (a picture without a row, a half-written file) harm nothing: they are what
a killed run leaves, and are counted apart.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import stat
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from jobs import images, parts, seal
from jobs.books import Asked, read_manifest, settings_hash
from jobs.devices import cores
from jobs.errors import JobError, LockedError, MismatchError, OutputError, printable
from jobs.findings import Finding, Report
from jobs.lock import is_alive, read_holder
from jobs.order import Order
from jobs.parts import STATUSES
from jobs.progress import tracked
from jobs.records import RESULT_COLUMNS, image_path
from jobs.settings import MAX_SIDE
from jobs.store import FOLDERS, TEMPORARY, Store

Row = dict[str, Any]
AHEAD = 256
OK, FAILED, INVALID = range(len(STATUSES))


def verify(folder: Path, *, sample: int | None = None) -> Report:
    """Look at everything in a job's folder; with `sample`, hash only so many images.

    Raises:
        OutputError: it is no job's folder, or a run is at work in it.
    """
    store = Store(folder)
    refuse_running(store)
    return Inspection(store, sample).report()


def refuse_running(store: Store) -> None:
    """Raise where a run is at work, or where no job ever was."""
    holder = read_holder(store.root / "lock")
    if holder is not None and is_alive(store.root / "lock", holder):
        raise LockedError(
            f"{store.root} is in use by pid {holder.get('pid')} on "
            f"{holder.get('host')}",
            hint="verify it when it has ended; `sdxl-jobs status` looks at it now",
        )
    if not store.job.exists() and not any((store.root / "logs").glob("job-*.json")):
        store.read_job()


class Inspection:
    """One look at a folder, in the order of the module's diagram."""

    def __init__(self, store: Store, sample: int | None) -> None:
        self._store = store
        self._sample = sample
        self._report = Report(folder=store.root)
        self._named: set[str] = set()

    def report(self) -> Report:
        sound = list(self.sound_sources())
        winners = parts.winners(sound)
        self._look_for_doubles(sound)
        asked = self._asked()
        self._check_rows(sound, winners, asked)
        if asked is not None:
            self._balance(winners, asked)
        else:
            for code, status in enumerate(STATUSES):
                self._report.counts[status] = int((winners.status == code).sum())
        self._find_strays()
        return self._report

    # Seals ----------------------------------------------------------------------------

    def sound_sources(self) -> Iterator[Path]:
        """Check every file that has a seal; give the sound ones that hold rows."""
        store = self._store
        sources = set(store.sources())
        own = [store.job, store.rows, store.root / "status.json"]
        copies = sorted((store.root / "logs").glob("job-*.json"))
        for name in FOLDERS:
            if (store.root / name).is_symlink():
                self._find("file", store.root / name, "is a symbolic link")
        for path in (*own, *copies, *store.sources()):
            if self._is_sound(path) and path in sources:
                yield path

    def _is_sound(self, path: Path) -> bool:
        self._report.files += 1
        store = self._store
        wrong = _not_plain(path)
        if wrong == "is missing" and path in (store.rows, store.root / "status.json"):
            return True  # the first run may have died before them; the next writes them
        if wrong is None:
            try:
                wrong = seal.broken(path)
                if wrong is None and path.suffix == ".parquet":
                    parts.winners([path])
            except (OSError, OutputError) as error:
                wrong = f"can't be read: {error}"
        if wrong:
            self._find("file", path, wrong)
        return wrong is None

    # Rows -----------------------------------------------------------------------------

    def _look_for_doubles(self, sources: list[Path]) -> None:
        """Name tasks that were made twice; the same row in two files is none."""
        seen: dict[str, Any] = {}
        for path in sources:
            inside: set[str] = set()
            columns = ["image_id", "status", "finished_at"]
            for row in parts.read(path, columns).to_pylist():
                name = row["image_id"]
                if name in inside:
                    self._find("row", path, "has the image twice", name)
                inside.add(name)
                if row["status"] == "ok":
                    made = seen.setdefault(name, row["finished_at"])
                    if made != row["finished_at"]:
                        self._find("row", path, "was made twice", name)

    def _asked(self) -> Asked | None:
        try:
            job = self._store.read_job()
            whole = all(f.path != self._store.rows.name for f in self._report.findings)
            known = self._store if whole else None
            return read_manifest(Order.stored(self._store), job, known)
        except MismatchError as error:
            # No row is held to a manifest that is not the one it was made from.
            self._find("manifest", self._store.job, f"can't be balanced: {error}")
            return None
        except OutputError:
            return None  # job.json is among the findings
        except (JobError, KeyError, TypeError, ValueError) as error:
            self._find("manifest", self._store.job, f"can't be balanced: {error}")
            return None

    def _check_rows(
        self, sources: list[Path], winners: parts.Winners, asked: Asked | None
    ) -> None:
        total = int((winners.status == OK).sum())
        chosen = None
        if self._sample is not None and self._sample < total:
            chosen = set(random.sample(range(total), self._sample))
        rows = self._winning_rows(sources, winners, asked)
        with ThreadPoolExecutor(cores()) as pool:
            jobs = (
                (row, path, chosen is None or number in chosen)
                for number, (row, path) in enumerate(rows)
            )
            checked = _ahead(pool, jobs, self._check_image)
            for row, path, wrong in tracked(checked, total, "checking images"):
                if wrong:
                    kind = "row" if wrong.startswith("its row") else "image"
                    where = path if kind == "row" else Path(row["image_path"] or "")
                    self._find(kind, where, wrong, row["image_id"])

    def _winning_rows(
        self, sources: list[Path], winners: parts.Winners, asked: Asked | None
    ) -> Iterator[tuple[Row, Path]]:
        """Hold the rows that count to the manifest; give those that have an image."""
        for path, mask in zip(sources, winners.masks, strict=True):
            for row in _selected(path, mask):
                wrong = None if asked is None else _unlike(row, asked)
                if wrong:
                    self._find("row", path, wrong, row["image_id"])
                if row["status"] == "ok":
                    self._named |= {row["image_path"], row["base_image_path"]}
                    yield row, path

    def _check_image(self, row: Row, thorough: bool) -> str | None:
        self._report.images += thorough
        extension = images.EXTENSIONS.get(str(row["image_format"]), "")
        if row["image_path"] != image_path(row["image_id"], extension):
            return "its row names another path"
        path = self._store.root / row["image_path"]
        if path.parent.is_symlink():
            return "lies behind a symbolic link"
        wrong = _not_plain(path)
        if wrong is None and path.stat().st_size != row["image_bytes"]:
            found = path.stat().st_size
            wrong = f"has {found} bytes where its row has {row['image_bytes']}"
        try:
            wrong = wrong or self._check_base(row, extension, thorough)
            if wrong or not thorough:
                return wrong
            return _differs(path.read_bytes(), row)
        except OSError as error:
            return f"can't be read: {error.strerror or error}"

    def _check_base(self, row: Row, extension: str, thorough: bool) -> str | None:
        """Look at the base's picture, where it was kept; the row has no hash of it."""
        named = row["base_image_path"]
        if named is None:
            return None
        if named != image_path(row["image_id"], extension, "-base"):
            return "its row names another path for the base's picture"
        path = self._store.root / named
        wrong = _not_plain(path)
        if wrong is None and thorough:
            pixels = _pixels(path.read_bytes())
            wrong = pixels if isinstance(pixels, str) else None
        return wrong and f"the base's picture {wrong}"

    # Books ----------------------------------------------------------------------------

    def _balance(self, winners: parts.Winners, asked: Asked) -> None:
        report = self._report
        at = parts.lookup(winners.ids, asked.ids)
        status = np.where(at >= 0, winners.status[at], -1) if len(winners.ids) else at
        report.tasks = asked.tasks
        report.counts["ok"] = int((status == OK).sum())
        report.counts["failed"] = int((status == FAILED).sum())
        report.counts["invalid"] = len(asked.invalid)
        pending = asked.wanted & (status != OK) & (status != FAILED)
        report.counts["pending"] = int(pending.sum())
        if self._ended() and not report.findings:
            without = int((parts.lookup(winners.ids, asked.invalid) < 0).sum())
            if int(pending.sum()) + without and asked.rows == self._rows_seen():
                self._find(
                    "books",
                    self._store.results,
                    f"{int(pending.sum()) + without} rows are lost of a finished job",
                )

    def _ended(self) -> bool:
        """Tell whether the last run said that nothing was left to make."""
        try:
            text = (self._store.root / "status.json").read_text(encoding="utf-8")
            return json.loads(text)["state"] == "finished"
        except (OSError, ValueError, KeyError, TypeError):
            return False

    def _rows_seen(self) -> int:
        return int(self._store.read_job()["rows"])

    def _find_strays(self) -> None:
        root = self._store.root
        for folder in (root, root / "parts"):
            for path in folder.glob(f"{TEMPORARY}*"):
                self._report.strays.append(str(path.relative_to(root)))
        for parent, folders, files in os.walk(root / "images", followlinks=False):
            for name in [f for f in folders if (Path(parent) / f).is_symlink()]:
                self._find("file", Path(parent) / name, "is a symbolic link")
            for name in files:
                path = (Path(parent) / name).relative_to(root).as_posix()
                if path not in self._named:
                    self._report.strays.append(path)

    def _find(
        self, kind: str, path: Path, what: str, image_id: str | None = None
    ) -> None:
        if path.is_absolute() or path.is_relative_to(self._store.root):
            path = Path(os.path.relpath(path, self._store.root))
        self._report.findings.append(
            Finding(kind=kind, path=path.as_posix(), what=what, image_id=image_id)
        )


def _not_plain(path: Path) -> str | None:
    try:
        mode = path.lstat().st_mode
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"can't be read: {error.strerror}"
    if stat.S_ISLNK(mode):
        return "is a symbolic link"
    return None if stat.S_ISREG(mode) else "is not a file"


def _selected(path: Path, mask: np.ndarray) -> Iterator[Row]:
    """Read the rows of a file that count, a bounded number at a time."""
    start = 0
    for table in parts.groups(path):
        keep = mask[start : start + len(table)]
        start += len(table)
        present = set(table.column_names)
        lacking = dict.fromkeys(c for c in RESULT_COLUMNS if c not in present)
        for row in table.filter(parts.as_mask(keep)).to_pylist():
            yield row | lacking


def _unlike(row: Row, asked: Asked) -> str | None:
    """Say how a row differs from the task of its image."""
    if row["status"] == "invalid":
        return None  # the next run reads the manifest anew, and drops what is stale
    name = np.uint64(int(row["image_id"], 16))
    at = int(np.searchsorted(asked.ids, name))
    if at == len(asked.ids) or asked.ids[at] != name:
        return "its row is of an image that the manifest does not ask for"
    try:
        same = settings_hash(row) == int(asked.settings[at])
    except (TypeError, OverflowError):
        same = False
    return None if same else "its row differs from what the manifest asks for"


def _differs(data: bytes, row: Row) -> str | None:
    """Hold an image file's bytes, size and pixels to its row."""
    if hashlib.sha256(data).hexdigest() != row["image_sha256"]:
        return "is changed: its SHA-256 is not its row's"
    pixels = _pixels(data)
    if isinstance(pixels, str):
        return pixels
    if pixels.shape[:2] != (row["height"], row["width"]):
        return "its row has another size"
    if images.pixel_sha256(pixels) != row["pixel_sha256"]:
        return "its row has other pixels"
    return None


def _pixels(data: bytes) -> np.ndarray | str:
    """Decode an image file, or say why it can't be; its claims are not believed."""
    try:
        width, height = images.size(data)
        if max(width, height) > MAX_SIDE:
            return f"claims to be {width}x{height} pixels"
        return images.decode(data)
    except Exception as error:  # what a decoder raises has no common root
        return f"can't be decoded: {printable(str(error))}"


def _ahead(
    pool: ThreadPoolExecutor, jobs: Iterable[tuple[Row, Path, bool]], call: Any
) -> Iterator[tuple[Row, Path, str | None]]:
    """Check images in threads, a bounded number ahead, in order."""
    waiting: list[tuple[Row, Path, Any]] = []
    for row, path, thorough in jobs:
        waiting.append((row, path, pool.submit(call, row, thorough)))
        if len(waiting) >= AHEAD:
            first, where, result = waiting.pop(0)
            yield first, where, result.result()
    for row, path, result in waiting:
        yield row, path, result.result()
