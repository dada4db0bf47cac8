"""The supervisor of the workers: start, lease, notice death, hand on, stop.

    shards ──> waiting ──lease──> worker ──part──> done
                  ^                  │
                  └──── returned ────┘   its process died: what it had not published

Each worker has one pipe and one process sentinel; the loop waits on all of them. A dead
worker's parts are looked through for rows it had no time to tell of; the rest of its
lease is handed on, batch by batch the second time and task by task the third, so that a
task which kills its worker is found, and ends as a failed row: `worker_lost`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any, Protocol

from jobs import worker
from jobs.errors import OutputError, WorkerError
from jobs.parts import result_schema
from jobs.records import Batch, Shard, Task, failure_row
from jobs.store import Store
from jobs.worker import WorkerSpec

POLL_SECONDS = 0.2
LEASES_AHEAD = 2
MAX_LOSSES = 5
BACK_OFF_SECONDS = 1.0


class Observer(Protocol):
    """Who is told of progress."""

    def batch_made(self, made: int, failed: int) -> None: ...

    def committed(self, statuses: list[str]) -> None: ...

    def tick(self, workers: list[dict[str, Any]]) -> None: ...

    def say(self, line: str) -> None: ...


@dataclass(slots=True)
class Stop:
    """How often the user has asked to stop: once to finish the batch, twice for now."""

    asked: int = 0


@dataclass(slots=True, eq=False)
class Slot:
    """One worker's place: a device, and the process that has it at the moment."""

    spec: WorkerSpec
    process: BaseProcess | None = None
    pipe: Connection | None = None
    state: str = "waiting"
    start_at: float = 0.0
    pending: dict[str, Task] = field(default_factory=dict)
    leases: set[int] = field(default_factory=set)
    careful: bool = False
    announced: set[str] = field(default_factory=set)
    generation: int = 0
    losses: int = 0
    reason: str = ""
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.spec.name}-{self.generation}"

    def describe(self) -> dict[str, Any]:
        made, seconds = self.stats.get("made", 0), self.stats.get("seconds", 0.0)
        return {
            "worker": self.spec.name.split("-")[0],
            "device": f"{self.spec.device_target}:{self.spec.device_id}",
            "pid": self.process.pid if self.process else None,
            "state": self.state,
            "starts": self.generation,
            "made": made,
            "failed": self.stats.get("failed", 0),
            "images_per_s": made / seconds if seconds else None,
            "compiles": self.stats.get("compiles", {}),
            "compile_ms": self.stats.get("compile_ms", {}),
        }


class Pool:
    """Run shards on workers until none is left, or until told to stop."""

    def __init__(
        self,
        specs: list[WorkerSpec],
        shards: Iterator[Shard],
        observer: Observer,
        stop: Stop,
    ) -> None:
        self._context = multiprocessing.get_context("spawn")
        self._slots = [Slot(spec) for spec in specs]
        self._shards = shards
        self._returned: deque[Shard] = deque()
        self._observer = observer
        self._stop = stop
        self._store = Store(specs[0].root)
        self._lost_parts = 0
        self._exhausted = False
        self._told_to_stop = False
        self._ever_ready = False

    def run(self) -> None:
        """Work until every shard is done.

        Raises:
            WorkerError: no worker can start, or all are lost.
            OutputError: a worker could not write.
        """
        try:
            while not self._finished():
                self._start_due()
                self._feed()
                self._heed_stop()
                self._listen()
                self._observer.tick([slot.describe() for slot in self._slots])
            self._end_all()
        finally:
            self._kill_all()
        self._observer.tick([slot.describe() for slot in self._slots])

    # The loop's four parts ------------------------------------------------------------

    def _finished(self) -> bool:
        if self._stop.asked:
            return not any(slot.process for slot in self._slots)
        return self._exhausted and not self._returned and not self._busy()

    def _busy(self) -> bool:
        return any(slot.leases for slot in self._slots)

    def _start_due(self) -> None:
        if self._stop.asked:
            return
        for slot in self._slots:
            if slot.state == "waiting" and time.monotonic() >= slot.start_at:
                self._start(slot)

    def _start(self, slot: Slot) -> None:
        slot.generation += 1
        slot.announced = set()
        spec = dataclasses.replace(slot.spec, name=slot.name)
        ours, theirs = self._context.Pipe()
        slot.process = self._context.Process(
            target=worker.main, args=(spec, theirs), name=slot.name
        )
        slot.process.start()
        theirs.close()
        slot.pipe, slot.state = ours, "starting"

    def _feed(self) -> None:
        if self._stop.asked:
            return
        for ahead in range(1, LEASES_AHEAD + 1):
            for slot in self._slots:
                if slot.state != "ready" or len(slot.leases) >= ahead or slot.careful:
                    continue
                shard = self._next_shard(careful_fits=not slot.leases)
                if shard is None:
                    return
                self._lease(slot, shard)

    def _next_shard(self, careful_fits: bool) -> Shard | None:
        if self._returned and careful_fits:
            return self._returned.popleft()
        if not self._exhausted:
            shard = next(self._shards, None)
            if shard is not None:
                return shard
            self._exhausted = True
        return None

    def _lease(self, slot: Slot, shard: Shard) -> None:
        assert slot.pipe is not None
        slot.pending.update((task.image_id, task) for task in shard.tasks)
        slot.leases.add(shard.number)
        slot.careful = any(task.attempts for task in shard.tasks)
        with contextlib.suppress(OSError):  # a dead worker is noticed by its sentinel
            slot.pipe.send(("shard", shard))

    def _heed_stop(self) -> None:
        if self._stop.asked >= 2:
            self._kill_all()
        elif self._stop.asked and not self._told_to_stop:
            self._told_to_stop = True
            self._observer.say("stopping: finishing the batches in flight")
            for slot in self._slots:
                if slot.state == "starting":
                    self._kill(slot)
                elif slot.pipe:
                    with contextlib.suppress(OSError):
                        slot.pipe.send(("stop", None))

    def _listen(self) -> None:
        by_handle: dict[Any, Slot] = {}
        for slot in self._slots:
            if slot.process and slot.pipe:
                by_handle[slot.pipe] = by_handle[slot.process.sentinel] = slot
        if not by_handle:
            time.sleep(POLL_SECONDS)
            return
        heard = {by_handle[h] for h in wait(list(by_handle), timeout=POLL_SECONDS)}
        for slot in heard:
            alive = slot.process is not None and slot.process.is_alive()
            self._drain(slot)
            if not alive and slot.process is not None:
                self._gone(slot)

    # What workers say -----------------------------------------------------------------

    def _drain(self, slot: Slot) -> None:
        """Read all messages that wait in a worker's pipe."""
        assert slot.pipe is not None
        try:
            while slot.pipe.poll():
                kind, content = slot.pipe.recv()
                getattr(self, f"_on_{kind}")(slot, **content)
        except (EOFError, OSError):
            pass  # its end is closed; the sentinel tells the rest

    def _on_ready(self, slot: Slot, **info: Any) -> None:
        slot.state = "ready"
        slot.stats["info"] = info
        self._ever_ready = True

    def _on_batch(
        self,
        slot: Slot,
        made: int,
        failed: int,
        seconds: float,
        compiles: dict[str, int],
        compile_ms: dict[str, float],
    ) -> None:
        slot.losses = 0
        stats = slot.stats
        stats["made"] = stats.get("made", 0) + made
        stats["failed"] = stats.get("failed", 0) + failed
        stats["seconds"] = stats.get("seconds", 0.0) + seconds
        stats["compiles"], stats["compile_ms"] = compiles, compile_ms
        self._observer.batch_made(made, failed)

    def _on_part(self, slot: Slot, name: str, done: list[tuple[str, str]]) -> None:
        slot.announced.add(name)
        for image_id, _ in done:
            slot.pending.pop(image_id, None)
        self._observer.committed([status for _, status in done])

    def _on_lease_done(self, slot: Slot, shard: int) -> None:
        slot.leases.discard(shard)
        slot.careful = slot.careful and bool(slot.leases)

    def _on_failed(self, slot: Slot, error: str) -> None:
        slot.reason = error

    def _on_fatal(self, slot: Slot, error: str) -> None:
        raise OutputError(
            f"worker {slot.spec.name} can't write to {self._store.root}: {error}",
            hint="make room or repair the folder, then `sdxl-jobs resume` it",
        )

    def _on_bye(self, slot: Slot) -> None:
        slot.state = "ended"

    # Death ----------------------------------------------------------------------------

    def _gone(self, slot: Slot) -> None:
        """Deal with a worker whose process has ended, as told or otherwise."""
        assert slot.process is not None and slot.pipe is not None
        slot.process.join()
        code = slot.process.exitcode
        slot.pipe.close()
        slot.process = slot.pipe = None
        if slot.state == "ended" or self._stop.asked:
            slot.state = "ended"
            return
        self._find_unannounced(slot)
        slot.losses += 1
        reason = slot.reason or _death(code)
        self._observer.say(f"worker {slot.spec.name} is lost: {reason}")
        self._hand_on(slot, reason)
        slot.start_at = time.monotonic() + BACK_OFF_SECONDS * 2 ** (slot.losses - 1)
        hopeless = slot.losses >= MAX_LOSSES or (slot.reason and not self._ever_ready)
        slot.state = "quarantined" if hopeless else "waiting"
        slot.reason = ""
        if all(s.state == "quarantined" for s in self._slots):
            raise WorkerError(
                f"no worker is left; the last one said: {reason}",
                hint=f"its log is {self._store.root / 'logs' / (slot.name + '.log')}",
            )

    def _find_unannounced(self, slot: Slot) -> None:
        """Count what a worker published but had no time to tell."""
        for path in (self._store.root / "parts").glob(f"{slot.name}-*.parquet"):
            if path.stem not in slot.announced:
                self._on_part(slot, path.stem, self._store.part_ids(path))

    def _hand_on(self, slot: Slot, reason: str) -> None:
        left = [
            dataclasses.replace(t, attempts=t.attempts + 1)
            for t in slot.pending.values()
        ]
        most = slot.spec.max_attempts
        given_up = [task for task in left if task.attempts >= most]
        if given_up:
            self._fail(slot, given_up, reason)
        again = [task for task in left if task.attempts < most]
        size = slot.spec.batch_size if again and again[0].attempts == 1 else 1
        for batch in _regroup(again, size):
            self._returned.append(Shard(number=self._new_number(), batches=(batch,)))
        slot.pending.clear()
        slot.leases.clear()
        slot.careful = False

    def _new_number(self) -> int:
        self._lost_parts += 1
        return -self._lost_parts

    def _fail(self, slot: Slot, tasks: list[Task], reason: str) -> None:
        names = slot.spec.extras.names
        message = f"the worker died each time it had this task: {reason}"
        rows = [
            failure_row(task, names, "worker_lost", message) | slot.spec.provenance
            for task in tasks
        ]
        schema = result_schema(slot.spec.extras)
        self._store.write_part(f"{slot.name}-lost-{-self._new_number()}", rows, schema)
        self._observer.batch_made(0, len(rows))
        self._observer.committed(["failed"] * len(rows))

    # Ends -----------------------------------------------------------------------------

    def _end_all(self) -> None:
        """Tell all workers that there is no more, and wait for them."""
        for slot in self._slots:
            if slot.state == "starting":
                self._kill(slot)
            elif slot.pipe:
                with contextlib.suppress(OSError):
                    slot.pipe.send(("end", None))
        deadline = time.monotonic() + 30
        for slot in self._slots:
            if slot.process:
                slot.process.join(max(0.0, deadline - time.monotonic()))
                self._drain(slot)

    def _kill_all(self) -> None:
        for slot in self._slots:
            self._kill(slot)

    def _kill(self, slot: Slot) -> None:
        if slot.process:
            slot.process.kill()
            slot.process.join()
            slot.process = None
        if slot.pipe:
            slot.pipe.close()
            slot.pipe = None
        slot.state = "ended"


def _regroup(tasks: list[Task], size: int) -> list[Batch]:
    from jobs.plan import batches

    return list(batches(tasks, size))


def _death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by signal {-code}"
    return f"its process ended with code {code}"
