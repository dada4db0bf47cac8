"""One worker: a process that owns one device; leases in, published result rows out.

    lease ──> batch ──> encode ──> denoise ──> decode ──> writers ──> part ──> told
                                                          file, hash

The main thread keeps the device busy; a bounded pool of threads writes images while the
next batch is encoded and denoised. Rows become a part every `commit_every` images and
at the end of a lease, in a thread of their own, which waits for files and disk; only
then is the supervisor told. Nothing is shared with other workers but the
folder: one pipe each, so that a worker killed anywhere holds no lock that others need.
When the supervisor is gone the pipe says so, and the worker ends at once.

A call that fails is split in half until the task that breaks it stands alone.
"""

from __future__ import annotations

import os
import queue
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from jobs import images
from jobs.config import OutputSection
from jobs.failures import classify, log_trace, message_of
from jobs.mail import Outbox
from jobs.parts import result_schema
from jobs.records import (
    Batch,
    Shard,
    Task,
    failure_row,
    image_path,
    picture_settings,
    task_row,
)
from jobs.stages import Made, PipelineLike, make, make_all, memory_of
from jobs.store import Store, make_folder, publish

COMMIT_SECONDS = 30.0
Row = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerSpec:
    """Everything a worker must know, picklable. `pipeline` is `module:callable`."""

    name: str
    root: Path
    device_target: str
    device_id: int
    threads: int
    pipeline: str
    pipeline_options: dict[str, Any]
    batch_size: int
    writer_threads: int
    max_attempts: int
    batch_timeout: float | None = None
    init_folder: Path = Path()
    output: OutputSection
    extras: Any
    provenance: Row


@dataclass
class Worker:
    """The loop of one worker, apart from its process so that a test can drive it."""

    spec: WorkerSpec
    pipeline: PipelineLike
    outbox: Outbox
    info: Row
    _inbox: queue.SimpleQueue[Shard | None] = field(default_factory=queue.SimpleQueue)
    _stop: threading.Event = field(default_factory=threading.Event)
    _pending: list[Future[Row]] = field(default_factory=list)
    _commits: deque[Future[None]] = field(default_factory=deque)
    _called: set[Any] = field(default_factory=set)
    _parts: int = 0
    _last_commit: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        self._store = Store(self.spec.root)
        self._schema = result_schema(self.spec.extras)
        self._writers = ThreadPoolExecutor(self.spec.writer_threads, "writer")
        self._committer = ThreadPoolExecutor(1, "committer")
        self._room = threading.Semaphore(4 * self.spec.batch_size + 4)

    def listen(self, pipe: Connection) -> None:
        """Read orders; a thread of its own, so that a stop is heard in mid-batch."""
        while True:
            try:
                order, shard = pipe.recv()
            except (EOFError, OSError):
                os._exit(1)  # the supervisor is gone; what is published stays
            if order == "stop":
                self._stop.set()
            self._inbox.put(shard if order == "shard" else None)

    def run(self) -> None:
        """Take leases until told to end; a stop is heeded after the batch in flight."""
        while not self._stop.is_set() and (shard := self._inbox.get()) is not None:
            if not self._make_together(shard):
                self._make_each(shard)
            self._commit(shard.number)
        self._heed_commits(wait=True)
        self._writers.shutdown()
        self._committer.shutdown()
        self.outbox.send("bye")

    def _make_each(self, shard: Shard) -> None:
        for batch in shard.batches:
            if self._stop.is_set():
                break
            tasks = list(batch.tasks)
            self._make(tasks, partial(self._attempt, tasks))
            if self._commit_is_due():
                self._commit()

    def _make_together(self, shard: Shard) -> bool:
        """Make a whole lease in one call, for a pipeline to which changing costs much.

        Tell whether that worked; if not, nothing is lost but time.
        """
        if not getattr(self.pipeline, "whole_leases", False) or len(shard.batches) < 2:
            return False
        try:
            self._make(shard.tasks, partial(self._call_all, shard.batches))
        except Exception:
            log_trace()
            return False
        return True

    def _make(self, tasks: list[Task], make: Callable[[], list[Made | Row]]) -> None:
        started = datetime.now(timezone.utc)
        before, prepared = time.perf_counter(), self._preparing()
        failed = 0
        for outcome in make():
            if isinstance(outcome, Made):
                failed += self._hand_to_writers(outcome, started)
            else:
                failed += 1
                self._keep(outcome)
        self.outbox.send(
            "batch",
            made=len(tasks) - failed,
            failed=failed,
            seconds=time.perf_counter() - before,
            preparing=self._preparing() - prepared,
            graph=tasks[0].graph,
            state=self._state(),
        )

    def _preparing(self) -> float:
        """Give the seconds that went into making graphs ready, in all."""
        return sum(self.pipeline.compile_ms.values()) / 1e3

    def _state(self) -> Row:
        """Say what became of the graphs, and how much memory it took."""
        return {
            "compiles": dict(self.pipeline.compiles),
            "compile_ms": dict(self.pipeline.compile_ms),
            "loads": dict(getattr(self.pipeline, "loads", {})),
        } | memory_of(self.pipeline)

    def _attempt(self, tasks: Sequence[Task]) -> list[Made | Row]:
        """Call the device; on failure split the batch, down to a single task."""
        tasks = tried(tasks)
        try:
            return [self._call(tasks)]
        except Exception as error:
            log_trace()
            if len(tasks) > 1:
                half = len(tasks) // 2
                return self._attempt(tasks[:half]) + self._attempt(tasks[half:])
            if tasks[0].tries < self.spec.max_attempts:
                return self._attempt(tasks)
            return [self._failure(tasks[0], classify(error), message_of(error))]

    def _call(self, tasks: list[Task]) -> Made:
        with self._calling(tasks):
            return make(
                self.pipeline, tasks, self.spec.batch_size, self.spec.init_folder
            )

    def _call_all(self, batches: Sequence[Batch]) -> list[Made | Row]:
        every = [tried(batch.tasks) for batch in batches]
        with self._calling([task for tasks in every for task in tasks]):
            size, folder = self.spec.batch_size, self.spec.init_folder
            return list(make_all(self.pipeline, every, size, folder))

    @contextmanager
    def _calling(self, tasks: list[Task]) -> Iterator[None]:
        """Say what the device is called for: if it hangs or kills, that is known.

        The first call of a graph compiles it, which takes its own time.
        """
        graph = tasks[0].graph
        ids = [task.image_id for task in tasks]
        self.outbox.send("begin", ids=ids, first=graph not in self._called)
        try:
            yield
        finally:
            self._called.add(graph)
            self.outbox.send("end")

    def _hand_to_writers(self, made: Made, started: datetime) -> int:
        failed = 0
        tokens = _token_counts([task.prompt for task in made.tasks])
        for slot, task in enumerate(made.tasks):
            pixels = made.pixels[slot]
            flags = images.flags(pixels)
            if not made.finite[slot] or "black" in flags:
                what = "black" if made.finite[slot] else "not a number"
                self._keep(self._failure(task, "nan", f"the model's output is {what}"))
                failed += 1
                continue
            row = (
                task_row(task, self.spec.extras.names)
                | made.measured
                | self._provenance()
            )
            row |= {
                "status": "ok",
                "started_at": started,
                "prompt_tokens": int(tokens[slot]),
                "prompt_truncated": bool(tokens[slot] > 77),
                "qc_flags": flags,
                "batch_size": self.spec.batch_size,
                "batch_slot": slot,
                "batch_valid": len(made.tasks),
            }
            self._room.acquire()
            base = None if made.base_pixels is None else made.base_pixels[slot]
            self._pending.append(self._writers.submit(self._write, row, pixels, base))
        return failed

    def _write(self, row: Row, pixels: np.ndarray, base: np.ndarray | None) -> Row:
        before = time.perf_counter()
        output = self.spec.output
        try:
            if base is not None:
                row["base_image_path"], _ = self._write_image(row, base, "-base")
            relative, encoded = self._write_image(row, pixels)
        finally:
            self._room.release()
        return row | {
            "image_path": relative,
            "image_format": output.format,
            "image_bytes": len(encoded.data),
            "image_sha256": encoded.image_sha256,
            "pixel_sha256": encoded.pixel_sha256,
            "pixel_mean": float(pixels.mean()),
            "pixel_std": float(pixels.std()),
            "write_ms": (time.perf_counter() - before) * 1e3,
            "finished_at": datetime.now(timezone.utc),
        }

    def _write_image(
        self, row: Row, pixels: np.ndarray, mark: str = ""
    ) -> tuple[str, images.Encoded]:
        output = self.spec.output
        encoded = images.encode(
            pixels,
            output.format,
            picture_settings(row),
            quality=output.quality,
            png_level=output.png_level,
        )
        extension = images.EXTENSIONS[output.format]
        relative = image_path(row["image_id"], extension, mark)
        path = self._store.root / relative
        make_folder(path.parent)
        publish(path, encoded.data, "image")
        return relative, encoded

    def _failure(self, task: Task, kind: str, message: str) -> Row:
        return (
            failure_row(task, self.spec.extras.names, kind, message)
            | self._provenance()
        )

    def _keep(self, row: Row) -> None:
        ready: Future[Row] = Future()
        ready.set_result(row)
        self._pending.append(ready)

    def _provenance(self) -> Row:
        return self.spec.provenance | {
            "device_id": self.spec.device_id,
            "host": socket.gethostname(),
            "mindspore_version": self.info["mindspore_version"],
        }

    def _commit_is_due(self) -> bool:
        waited = time.monotonic() - self._last_commit
        return (
            len(self._pending) >= self.spec.output.commit_every
            or waited > COMMIT_SECONDS
        )

    def _commit(self, shard: int | None = None) -> None:
        """Have the rows of what was made so far published, and the lease's end told.

        That waits for files and the disk, so it is done beside the device's work.
        """
        rows, self._pending = self._pending, []
        self._last_commit = time.monotonic()
        self._commits.append(self._committer.submit(self._publish, rows, shard))
        self._heed_commits(wait=False)

    def _heed_commits(self, *, wait: bool) -> None:
        """Raise what a commit raised: of those that are done, or of all."""
        while self._commits and (wait or self._commits[0].done()):
            self._commits.popleft().result()

    def _publish(self, pending: list[Future[Row]], shard: int | None) -> None:
        """Publish rows once their images are written, then tell the supervisor."""
        rows = [future.result() for future in pending]
        if rows:
            self._parts += 1
            name = f"{self.spec.name}-{self._parts:06d}"
            self._store.write_part(name, rows, self._schema)
            done = [(row["image_id"], row["status"]) for row in rows]
            self.outbox.send("part", name=name, done=done)
        if shard is not None:
            self.outbox.send("lease_done", shard=shard)


def tried(tasks: Sequence[Task]) -> list[Task]:
    """Count one more attempt."""
    return [replace(task, attempts=task.attempts + 1) for task in tasks]


def warm_up() -> None:
    """Load now what the first picture would wait for between two calls of a device."""
    _token_counts([""])
    images.encode(np.zeros((8, 8, 3), np.uint8), "png", {})


def _token_counts(prompts: Sequence[str]) -> np.ndarray:
    from sdxl.tokenizer import count_tokens

    return count_tokens(prompts)
