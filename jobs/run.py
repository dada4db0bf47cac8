"""The job as a whole, from settings to results.parquet.

    open manifest and checkpoint ──> lock folder ──> compare with the job it holds
        ──> survey ──> tasks not done yet ──> pool ──> compact ──> summary

Everything that can be refused is refused before the first worker starts.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jobs
from jobs import plan
from jobs.binding import fields_of, fingerprint, refuse_other_job
from jobs.devices import cores
from jobs.errors import JobError, ManifestError, folder_errors
from jobs.images import BYTES_PER_PIXEL
from jobs.index import Index
from jobs.lock import FolderLock
from jobs.manifest import Manifest, open_manifest
from jobs.model import Model, file_sha256, open_model, open_refiner
from jobs.order import Order, Retry, Summary
from jobs.parts import result_schema
from jobs.pool import Pool
from jobs.progress import Progress
from jobs.records import SCHEMA_VERSION, Rejected, Request, Task, invalid_row
from jobs.resolved import Resolved, resolve
from jobs.signals import Stop, interruptible, stopping
from jobs.stages import pipeline_name, pipeline_options
from jobs.store import Store
from jobs.survey import Survey, location_of, survey
from jobs.worker import WorkerSpec

CHUNK = 2_048
STATUS_SECONDS = 2.0


def run(
    order: Order, *, pipeline: str | None = None, retry: Retry | None = None
) -> Summary:
    """Make everything the manifest asks for that the output folder lacks.

    With `retry`, make the failed rows that it chooses, and nothing else.

    Raises:
        JobError: what is asked for can't be done, or the folder can't be written.
        KeyboardInterrupt: a signal came before or after the pictures were in work.
    """
    stop = Stop()
    with interruptible(stop):
        return _run(order, pipeline, retry, stop)


def _refuse_odd_names(*paths: str | Path | None) -> None:
    """Parquet opens no path that is not UTF-8: better said now than after the work."""
    for path in paths:
        try:
            str(Path(path or ".").absolute()).encode("utf-8")
        except UnicodeEncodeError:
            raise JobError(f"{path}: the path is not UTF-8") from None


def _run(
    order: Order, pipeline: str | None, retry: Retry | None, stop: Stop
) -> Summary:
    _refuse_odd_names(order.manifest, order.output, order.config.model.checkpoint)
    manifest = open_manifest(
        order.manifest, prompt_column=order.prompt_column, id_column=order.id_column
    )
    model = open_model(order.config.model)
    refiner = open_refiner(order.config.refiner)
    resolved = replace(
        resolve(order.config, native_size=model.native_size, kind=model.kind),
        init_folder=order.manifest.resolve().parent,
    )
    store = Store(order.output)
    store.prepare_root()
    with FolderLock(order.output) as lock, folder_errors(order.output):
        return _Run(
            order,
            manifest,
            model,
            refiner,
            resolved,
            store,
            pipeline,
            retry,
            lock,
            stop,
        ).execute()


@dataclass
class _Run:
    order: Order
    manifest: Manifest
    model: Model
    refiner: Model | None
    resolved: Resolved
    store: Store
    pipeline: str | None
    retry: Retry | None
    lock: FolderLock
    stop: Stop
    run_id: str = field(default_factory=lambda: _new_run_id())
    _invalid: list[Rejected] = field(default_factory=list)
    _invalid_parts: int = 0
    _workers: list[dict[str, Any]] = field(default_factory=list)
    _last_status: float = 0.0

    def execute(self) -> Summary:
        fields = fields_of(self.resolved, self.model, self.refiner)
        self.fingerprint = fingerprint(fields)
        refuse_other_job(self.store, fields)
        self.store.prepare()

        self.store.merge_leftovers()
        index = self.store.index()
        if self.retry:
            index = index.retrying(self.retry.only)
        found = survey(self.manifest, self.resolved, self.order.limit, index)
        self.stop.heed()
        whole = self.order.limit is None
        self.rows_read = found.rows
        self.store.check_rows(
            found.ids,
            found.contents,
            whole,
            lambda at: location_of(at, found, self.manifest, self.resolved),
        )
        self._write_job(fields, found)
        self.store.remember_rows(found.ids, found.contents)

        self.stop.heed()
        started = time.monotonic()
        with Progress(found.pending) as progress, stopping(self.stop):
            self.progress = progress
            self.counts = index.counts() | {"invalid": 0}
            if self.retry:
                self.counts = index.counts()
                self.counts["failed"] -= found.pending
            self._announce(found)
            self._work(found, index)
            seconds = time.monotonic() - started
            made = progress.done - progress.failed
        return self._finish(found, made, made / seconds if made else 0.0)

    def _announce(self, found: Survey) -> None:
        done = found.tasks - found.pending
        workers = len(self.resolved.devices)
        self.progress.say(
            f"{found.pending} images to make ({done} done, {found.invalid} rows "
            f"invalid) on {workers} {self.resolved.device_target} "
            f"worker{'s' if workers > 1 else ''}, into {self.store.root}"
        )

        for warning, rows in found.warnings.items():
            self.progress.say(f"warning: {warning} ({rows} rows)")
        self._warn_of_full_disk(found)

    def _warn_of_full_disk(self, found: Survey) -> None:
        pixels = sum(w * h * n for (w, h, _), n in found.image_steps.items())
        share = found.pending / found.tasks if found.tasks else 0
        need = pixels * share * BYTES_PER_PIXEL[self.resolved.output.format]
        free = shutil.disk_usage(self.store.root).free
        if need > free:
            self.progress.say(
                f"warning: the images may need {need / 1e9:.1f} GB, and "
                f"{free / 1e9:.1f} GB are free; a full disk stops the run, resumable"
            )

    def _write_job(self, fields: dict[str, Any], found: Survey) -> None:
        job = {
            "schema_version": SCHEMA_VERSION,
            "sdxl_jobs_version": jobs.__version__,
            "run_id": self.run_id,
            "asked": self.order.as_dict(),
            "fingerprint": self.fingerprint,
            "fingerprint_fields": fields,
            "model": self.model.describe(),
            "rows": found.rows,
            "tasks": found.tasks,
            "invalid": found.invalid,
        }
        self.store.write_json(self.store.copy_of_job(self.run_id), job, "copy")
        self.store.write_json(self.store.job, job, "job")

    def _work(self, found: Survey, index: Index) -> None:
        tasks = self._tasks(found, index)
        workers = min(len(self.resolved.devices), max(1, found.pending))
        specs = [self._spec(device) for device in self.resolved.devices[:workers]]
        if not found.pending:
            for _ in tasks:  # the invalid rows still want their results
                pass
            return
        size = plan.shard_size(
            found.pending,
            self.resolved.batch_size,
            workers,
            self.resolved.shard_batches,
        )
        batches = plan.batches(tasks, self.resolved.batch_size)
        Pool(specs, plan.shards(batches, size), self, self.stop).run()
        if not self.stop.asked:
            self._write_invalid()

    def _tasks(self, found: Survey, index: Index) -> Iterator[Task]:
        """Yield the tasks that have no result yet; note the invalid rows on the way."""
        waiting: list[Task] = []
        for row in self._rows_again(found):
            if isinstance(row, Rejected):
                self._invalid.append(row)
                if len(self._invalid) >= CHUNK:
                    self._write_invalid()
                continue
            waiting.extend(plan.tasks_of(row, self.resolved))
            if len(waiting) >= CHUNK:
                yield from _not_done(waiting, index)
                waiting = []
        yield from _not_done(waiting, index)
        self._write_invalid()

    def _rows_again(self, found: Survey) -> Iterator[Request | Rejected]:
        """Read the rows that the survey has seen once more, and hold them to it."""
        position = 0
        rows = plan.checked(
            self.manifest, self.resolved, found.repeated, self.order.limit
        )
        for row in itertools.islice(rows, found.rows):
            if isinstance(row, Request):
                if row.content != found.contents[position]:
                    raise self._changed(row.location)
                position += 1
            yield row
        if position < len(found.contents):
            raise self._changed("its end")

    def _changed(self, where: str) -> ManifestError:
        return ManifestError(
            f"{self.manifest.path} was changed while it was read: {where}",
            hint="put it back and `sdxl-jobs resume`; append rows between runs",
        )

    def _write_invalid(self) -> None:
        rejected, self._invalid = self._invalid, []
        if not rejected or self.retry:  # of a retry: what an earlier run said stands
            return
        names = list(self.manifest.extras)
        rows = [invalid_row(row, names) | self._provenance() for row in rejected]
        self._invalid_parts += 1
        name = f"invalid-{self.run_id}-{self._invalid_parts:06d}"
        self.store.write_part(name, rows, self._schema())
        self.counts["invalid"] += len(rows)

    def _schema(self) -> Any:
        return result_schema(self.manifest.extras_schema())

    def _provenance(self) -> dict[str, Any]:
        return {
            "run_id": self.run_id,
            "job_fingerprint": self.fingerprint,
            "model_sha256": self.model.sha256,
            "precision": self.resolved.precision,
            "device_target": self.resolved.device_target,
        }

    def _spec(self, device: int) -> WorkerSpec:
        resolved = self.resolved
        on_cpu = resolved.device_target == "CPU"
        threads = max(1, cores() // len(resolved.devices)) if on_cpu else cores()
        return WorkerSpec(
            name=f"w{device}-{self.run_id}",
            root=self.store.root,
            device_target=resolved.device_target,
            device_id=device,
            threads=threads,
            pipeline=self.pipeline or pipeline_name(resolved),
            init_folder=resolved.init_folder,
            pipeline_options=pipeline_options(resolved, threads),
            batch_size=resolved.batch_size,
            writer_threads=resolved.writer_threads,
            max_attempts=resolved.max_attempts,
            batch_timeout=resolved.batch_timeout,
            output=resolved.output,
            extras=self.manifest.extras_schema(),
            provenance=self._provenance(),
        )

    def _finish(self, found: Survey, made: int, rate: float) -> Summary:
        stopped = self.stop.asked > 0
        results = None
        if not stopped:
            self.lock.check(now=True)
            run_id = None if self.retry else self.run_id
            results = self.store.compact(
                self._schema(), self._metadata(), run_id, self.rows_read
            )
        summary = Summary(
            results=results,
            counts=self.store.index().counts(),
            made=made,
            images_per_s=rate,
            interrupted=stopped,
        )
        counts = summary.counts
        left = self.retry is not None and (
            counts["ok"] + counts["failed"] < found.tasks
            or counts["invalid"] < found.invalid
        )
        self._write_status([], "interrupted" if stopped or left else "finished")
        return summary

    def _metadata(self) -> dict[str, str]:
        return {
            "sdxl_jobs.job": self.store.job.read_text(encoding="utf-8"),
            "sdxl_jobs.manifest_sha256": file_sha256(self.manifest.path),
        }

    # Told by the pool -----------------------------------------------------------------

    def batch_made(self, made: int, failed: int) -> None:
        self.progress.add(made, failed)

    def committed(self, statuses: list[str]) -> None:
        for status in statuses:
            self.counts[status] += 1

    def say(self, line: str) -> None:
        self.progress.say(line)

    def tick(self, workers: list[dict[str, Any]]) -> None:
        self.lock.check()
        self._workers = workers
        if time.monotonic() - self._last_status > STATUS_SECONDS:
            self._last_status = time.monotonic()
            self._write_status(workers, "running")

    def _write_status(self, workers: list[dict[str, Any]], state: str) -> None:
        workers = workers or self._workers
        self.store.write_json(
            self.store.root / "status.json",
            {
                "state": state,
                "run_id": self.run_id,
                "pid": os.getpid(),
                "host": platform.node(),
                "updated_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "images_per_s": self.progress.rate,
                "eta_seconds": self.progress.eta_seconds,
                "workers": workers,
            },
            "status",
        )


def _not_done(tasks: list[Task], index: Index) -> Iterator[Task]:
    ids = [task.image_id for task in tasks]
    done, tried = index.is_done(ids), index.attempts_of(ids)
    for task, skip, before in zip(tasks, done, tried.tolist(), strict=True):
        if not skip:
            yield replace(task, attempts=before, earlier=before) if before else task


def _new_run_id() -> str:
    now = datetime.now(timezone.utc)
    return f"{now:%Y%m%dT%H%M%S}-{uuid.uuid4().hex[:6]}"
