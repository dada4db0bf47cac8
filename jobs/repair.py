"""Put aside what `verify` found, so that `resume` makes it good.

    a damaged file of rows     moved to damaged/; row groups that still read whole are
                               published again, and held to their images and tasks
    a damaged job.json         moved; the copy that the last run left takes its place
    a damaged image            moved, and its row dropped
    a wrong row                dropped; what is dropped is kept in damaged/ as Parquet

Nothing is deleted. Whatever has no row any more is made again by `resume`, with the
same seed, and so with the same pixels.
"""

from __future__ import annotations

import contextlib
import json
import os
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from jobs import parts, seal
from jobs.errors import OutputError, folder_errors
from jobs.findings import Finding, Report
from jobs.lock import FolderLock
from jobs.store import FOLDERS, Store, make_folder, publish, sync_folder
from jobs.verify import Inspection, refuse_running

ROUNDS = 3


def repair(folder: Path) -> Report:
    """Verify a folder and put aside what is wrong, until nothing is.

    The report has the findings of all rounds: what was salvaged from a damaged file is
    looked at in the next.

    Raises:
        OutputError: it is no job's folder, a run is at work in it, or it can't be
            written.
    """
    store = Store(folder)
    refuse_running(store)
    with FolderLock(folder), folder_errors(folder):
        report = Inspection(store, None).report()
        latest = report
        for _ in range(ROUNDS):
            if latest.sound:
                break
            report.repaired += _Repair(store, latest).run()
            latest = Inspection(store, None).report()
            known = {(f.path, f.image_id) for f in report.findings}
            new = [f for f in latest.findings if (f.path, f.image_id) not in known]
            report.findings += new
        report.counts, report.strays = latest.counts, latest.strays
    return report


class _Repair:
    """One round: act on each finding of one report."""

    def __init__(self, store: Store, report: Report) -> None:
        now = datetime.now(timezone.utc)
        self._store = store
        self._findings = report.findings
        self._aside = store.root / "damaged" / f"{now:%Y%m%dT%H%M%S%f}"
        self._done: list[str] = []

    def run(self) -> list[str]:
        bad_ids: set[str] = set()
        self._refuse_links()
        for finding in self._findings:
            if finding.kind == "file":
                self._repair_file(finding)
            elif finding.kind == "image":
                self._move(finding.path)
            if finding.image_id:
                bad_ids.add(finding.image_id)
        for name in FOLDERS:
            make_folder(self._store.root / name)  # in place of what was moved
        if bad_ids:
            self._drop_rows(bad_ids)
        if self._done:
            self._say_unfinished()
        return self._done

    def _refuse_links(self) -> None:
        """Put nothing aside through a link: it would leave the folder."""
        try:
            make_folder(self._aside.parent)
        except OSError as error:
            raise OutputError(
                f"can't write {self._aside.parent}: {error.strerror}",
                hint="remove it, and repair again",
            ) from None

    def _say_unfinished(self) -> None:
        """A job that lost rows is no longer finished: it is there to be resumed."""
        status = {"state": "interrupted", "updated_at": self._aside.name}
        self._store.write_json(self._store.root / "status.json", status, "status")

    def _repair_file(self, finding: Finding) -> None:
        path = self._store.root / finding.path
        moved = self._move(finding.path)
        if path == self._store.job:
            self._restore_job()
        elif path.suffix == ".parquet" and moved and not moved.is_symlink():
            self._salvage(moved)

    def _move(self, relative: str) -> Path | None:
        """Move a file, or a symbolic link itself, to damaged/."""
        source, target = self._store.root / relative, self._aside / relative
        if ".." in Path(relative).parts or not os.path.lexists(source):
            return None
        target.parent.mkdir(parents=True, exist_ok=True)
        source.rename(target)
        self._say(f"moved {relative} to {target.relative_to(self._store.root)}")
        return target

    def _restore_job(self) -> None:
        for copy in sorted((self._store.root / "logs").glob("job-*.json"))[::-1]:
            with contextlib.suppress(OSError, ValueError):
                data = copy.read_bytes()
                if seal.broken(copy) is None and json.loads(data):
                    publish(self._store.job, data, "job")
                    sync_folder(self._store.root)
                    self._say(f"restored job.json from {copy.name}")
                    return
        self._say("job.json can't be restored: start again with the same `run` command")

    def _salvage(self, moved: Path) -> None:
        tables = list(parts.sound_groups(moved))
        if not tables:
            return
        name = f"salvaged-{moved.stem}-{self._aside.name}"
        path = self._store.root / "parts" / f"{name}.parquet"
        parts.publish_tables(path, tables, tables[0].schema)
        rows = sum(len(table) for table in tables)
        self._say(f"salvaged {rows} rows of {moved.name}")

    def _drop_rows(self, image_ids: set[str]) -> None:
        bad = np.array(sorted(int(name, 16) for name in image_ids), np.uint64)
        for path in self._store.sources():
            aside = self._aside / "rows" / path.name
            dropped = parts.drop(path, bad, aside)
            if dropped:
                where = aside.relative_to(self._store.root)
                self._say(f"moved {dropped} rows of {path.name} to {where}")
        sync_folder(self._store.root / "parts")

    def _say(self, line: str) -> None:
        self._done.append(line)
