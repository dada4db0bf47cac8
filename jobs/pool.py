"""The supervisor of the workers: start, lease, notice death, hand on, stop.

    shards ──> waiting ──lease──> worker ──part──> done
                  ^                  │
                  └──── returned ────┘   its process died: what it had not published

Each worker has one pipe and one process sentinel; the loop waits on all of them. A dead
worker's parts are looked through for rows it had no time to tell of; the rest of its
lease is handed on. What it had begun was perhaps the cause: that is tried again batch
by batch, then task by task, so that a task which kills its worker is found, and ends as
a failed row (`worker_lost`). Nothing is given up that did not die alone.

A worker that hangs is killed and treated as dead: in a call that takes longer than
`runtime.batch_timeout` (`timeout`), or when its heartbeat stops.
"""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any, Protocol

from jobs.dispatch import Dispatch
from jobs.errors import OutputError, WorkerError
from jobs.leases import give_back
from jobs.parts import result_schema
from jobs.records import Shard, Task, failure_row
from jobs.signals import Stop
from jobs.slot import END_SECONDS, Slot, death, overdue
from jobs.store import MERGE_AT, Store
from jobs.worker import WorkerSpec

POLL_SECONDS = 0.2
LEASES_AHEAD = 2
MAX_LOSSES = 5
MAX_BLAMED = 20
BACK_OFF_SECONDS = 1.0
MAX_BACK_OFF_SECONDS = 30.0


class Observer(Protocol):
    """Who is told of progress."""

    def batch_made(self, made: int, failed: int) -> None: ...

    def committed(self, statuses: list[str]) -> None: ...

    def tick(self, workers: list[dict[str, Any]]) -> None: ...

    def say(self, line: str) -> None: ...


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
        self._dispatch = Dispatch(shards)
        self._returned: deque[Shard] = deque()
        self._observer = observer
        self._stop = stop
        self._store = Store(specs[0].root)
        self._lost_parts = 0
        self._unmerged: list[str] = []
        self._told_to_stop = False
        self._ever_ready = self._any_died = False

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
                self._kill_overdue()
                self._merge()
                self._observer.tick([slot.describe() for slot in self._slots])
            self._end_all()
        finally:
            self._kill_all()
        if self._any_died:
            self._store.prepare()  # a worker that died may have left half a file
        self._observer.tick([slot.describe() for slot in self._slots])

    # The loop's parts -----------------------------------------------------------------

    def _finished(self) -> bool:
        if self._stop.asked:
            return not any(slot.process for slot in self._slots)
        return self._dispatch.exhausted and not self._returned and not self._busy()

    def _busy(self) -> bool:
        return any(slot.leases for slot in self._slots)

    def _start_due(self) -> None:
        if self._stop.asked:
            return
        for slot in self._slots:
            if slot.state == "waiting" and time.monotonic() >= slot.start_at:
                slot.start(self._context)

    def _feed(self) -> None:
        if self._stop.asked:
            return
        for ahead in range(1, LEASES_AHEAD + 1):
            for slot in self._slots:
                if slot.state != "ready" or len(slot.leases) >= ahead or slot.careful:
                    continue
                if shard := self._next_shard(slot):
                    slot.lease(shard)

    def _next_shard(self, slot: Slot) -> Shard | None:
        if self._returned and not slot.leases:
            return self._returned.popleft()
        return self._dispatch.take(slot, idle=not slot.leases)

    def _heed_stop(self) -> None:
        if self._stop.asked >= 2:
            self._kill_all()
        elif self._stop.asked and not self._told_to_stop:
            self._told_to_stop = True
            self._observer.say("stopping: finishing the batches in flight")
            for slot in self._slots:
                if slot.state == "starting":
                    slot.kill()
                elif slot.mail:
                    slot.mail.send("stop")

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

    def _kill_overdue(self) -> None:
        """Kill workers that hang; their death is then dealt with like any other."""
        now = time.monotonic()
        for slot in self._slots:
            if slot.process is None:
                continue
            if slot.killed_at is not None:
                if now - slot.killed_at > END_SECONDS:  # it can't even be killed
                    self._gone(slot)
                continue
            found = overdue(slot, now)
            if found:
                slot.kind, slot.reason = found
                slot.killed_at = now
                slot.process.kill()

    def _merge(self) -> None:
        if len(self._unmerged) >= MERGE_AT:
            self._store.merge(self._unmerged)
            self._unmerged.clear()

    # What workers say -----------------------------------------------------------------

    def _drain(self, slot: Slot) -> None:
        """Read all messages that wait in a worker's pipe."""
        assert slot.pipe is not None
        try:
            while slot.pipe.poll():
                kind, content = slot.pipe.recv()
                slot.heard_at = time.monotonic()
                getattr(self, f"_on_{kind}")(slot, **content)
        except (EOFError, OSError):
            pass  # its end is closed; the sentinel tells the rest

    def _on_ready(self, slot: Slot, **info: Any) -> None:
        slot.state = "ready"
        slot.call_since = None
        slot.stats["info"] = info
        self._ever_ready = True

    def _on_beat(self, slot: Slot) -> None:
        pass  # to be heard is all

    def _on_begin(self, slot: Slot, ids: list[str], first: bool) -> None:
        slot.begun.update(ids)
        slot.call_since, slot.first_call = slot.heard_at, first

    def _on_end(self, slot: Slot) -> None:
        slot.call_since = None

    def _on_batch(
        self,
        slot: Slot,
        made: int,
        failed: int,
        seconds: float,
        preparing: float,
        graph: tuple[Any, ...],
        state: dict[str, Any],
    ) -> None:
        if made:
            slot.losses = slot.blamed = 0
        stats = slot.stats
        stats["made"] = stats.get("made", 0) + made
        stats["failed"] = stats.get("failed", 0) + failed
        stats["seconds"] = stats.get("seconds", 0.0) + seconds
        stats |= state
        self._dispatch.measured(graph, made, seconds, preparing)
        slot.untold.update(ok=made, failed=failed)
        self._observer.batch_made(made, failed)

    def _on_part(self, slot: Slot, name: str, done: list[tuple[str, str]]) -> None:
        slot.announced.add(name)
        self._unmerged.append(name)
        for image_id, _ in done:
            slot.pending.pop(image_id, None)
            slot.begun.discard(image_id)
        slot.untold.subtract(status for _, status in done)
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
        assert slot.process is not None
        slot.process.join(timeout=1)
        code = slot.process.exitcode
        slot.close()
        if slot.state == "ended" or self._stop.asked:
            slot.state = "ended"
            return
        self._dispatch.forget(slot)
        self._any_died = True
        self._find_unannounced(slot)
        # What it made and did not publish is made again, and counted then.
        self._observer.batch_made(-slot.untold["ok"], -slot.untold["failed"])
        slot.untold.clear()
        reason = slot.reason or death(code)
        self._observer.say(f"worker {slot.spec.name} is lost: {reason}")
        if self._hand_on(slot, reason):
            slot.blamed += 1  # perhaps the task's fault, unless it is every task's
        else:
            slot.losses += 1
        back_off = BACK_OFF_SECONDS * 2 ** (slot.losses + slot.blamed - 1)
        slot.start_at = time.monotonic() + min(back_off, MAX_BACK_OFF_SECONDS)
        hopeless = (
            slot.losses >= MAX_LOSSES
            or slot.blamed >= MAX_BLAMED
            or (slot.state == "starting" and slot.reason and not self._ever_ready)
        )
        slot.state = "quarantined" if hopeless else "waiting"
        if hopeless:
            self._observer.say(f"worker {slot.spec.name} is quarantined")
        slot.reason, slot.kind = "", "worker_lost"
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

    def _hand_on(self, slot: Slot, reason: str) -> bool:
        """Give back what a dead worker had leased; tell whether it had begun any."""
        back = give_back(
            list(slot.pending.values()),
            slot.begun,
            most=slot.spec.max_attempts,
            batch_size=slot.spec.batch_size,
        )
        suspect = not slot.begun.isdisjoint(slot.pending)
        if back.given_up:
            self._fail(slot, [back.given_up], reason)
        for batch in back.batches:
            self._returned.append(Shard(number=self._new_number(), batches=(batch,)))
        slot.pending.clear()
        slot.begun.clear()
        slot.leases.clear()
        slot.careful = False
        return suspect

    def _new_number(self) -> int:
        self._lost_parts += 1
        return -self._lost_parts

    def _fail(self, slot: Slot, tasks: list[Task], reason: str) -> None:
        names = slot.spec.extras.names
        message = f"its worker was lost each time it had this task: {reason}"
        rows = [
            failure_row(task, names, slot.kind, message) | slot.spec.provenance
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
                slot.kill()
            elif slot.mail:
                slot.mail.send("end")
        deadline = time.monotonic() + END_SECONDS
        for slot in self._slots:
            if slot.process:
                slot.process.join(max(0.0, deadline - time.monotonic()))
                self._drain(slot)

    def _kill_all(self) -> None:
        for slot in self._slots:
            slot.kill()
