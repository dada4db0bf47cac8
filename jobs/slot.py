"""A worker's place in the pool: what it holds, what it said last, whether it hangs."""

from __future__ import annotations

import signal
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnContext
from multiprocessing.process import BaseProcess
from typing import Any

from jobs import process
from jobs.mail import Mail
from jobs.records import Shard, Task
from jobs.signals import STOP_SIGNALS
from jobs.worker import WorkerSpec

END_SECONDS = 30.0
FIRST_CALL_SECONDS = 3600.0
SILENT_SECONDS = 300.0
SILENT_IN_CALL_SECONDS = 3600.0


@dataclass(slots=True, eq=False)
class Slot:
    """A device, and the process that has it at the moment.

    `begun` names the tasks that a call had in hand and no part has yet: what a death
    may be blamed on. `losses` and `blamed` count deaths without and with such tasks
    since the last batch that was made. `untold` counts by status what was made and is
    in no part yet.
    """

    spec: WorkerSpec
    process: BaseProcess | None = None
    pipe: Connection | None = None
    mail: Mail | None = None
    state: str = "waiting"
    start_at: float = 0.0
    pending: dict[str, Task] = field(default_factory=dict)
    leases: set[int] = field(default_factory=set)
    careful: bool = False
    announced: set[str] = field(default_factory=set)
    begun: set[str] = field(default_factory=set)
    heard_at: float = 0.0
    call_since: float | None = None
    first_call: bool = True
    killed_at: float | None = None
    generation: int = 0
    losses: int = 0
    blamed: int = 0
    reason: str = ""
    kind: str = "worker_lost"
    untold: Counter[str] = field(default_factory=Counter)
    stats: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        return f"{self.spec.name}-{self.generation}"

    def start(self, context: SpawnContext) -> None:
        """Start a process of the next generation on this place's device."""
        self.generation += 1
        self.announced = set()
        spec = replace(self.spec, name=self.name)
        ours, theirs = context.Pipe()
        self.process = context.Process(
            target=process.main, args=(spec, theirs), name=self.name
        )
        # Blocked at birth: a signal to the whole group is for the supervisor alone.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self.process.start()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        theirs.close()
        self.pipe, self.mail, self.state = ours, Mail(ours), "starting"
        self.heard_at = self.call_since = time.monotonic()
        self.first_call, self.killed_at = True, None

    def lease(self, shard: Shard) -> None:
        """Give the worker a shard; its tasks are pending until a part has them."""
        assert self.mail is not None
        self.pending.update((task.image_id, task) for task in shard.tasks)
        self.leases.add(shard.number)
        self.careful = any(task.tries for task in shard.tasks)
        self.mail.send("shard", shard)

    def kill(self) -> None:
        if self.process:
            self.process.kill()
            self.process.join(timeout=END_SECONDS)
        self.close()
        self.state = "ended"

    def close(self) -> None:
        """Let go of a process that has ended."""
        if self.mail:
            self.mail.close()
        if self.pipe:
            self.pipe.close()
        self.process = self.pipe = self.mail = None

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
            "loads": self.stats.get("loads", {}),
            "peak_memory_mb": self.stats.get("peak_memory_mb"),
            "peak_device_memory_mb": self.stats.get("peak_device_memory_mb"),
        }


def overdue(slot: Slot, now: float) -> tuple[str, str] | None:
    """Tell whether a worker hangs: the error class and the reason."""
    limit = slot.spec.batch_timeout
    if slot.call_since is not None and limit is not None:
        allowed = limit + (FIRST_CALL_SECONDS if slot.first_call else 0.0)
        if now - slot.call_since > allowed:
            what = "it did not start" if slot.state == "starting" else "a call ran"
            return "timeout", f"{what} for over {allowed:g} s (runtime.batch_timeout)"
    silence = now - slot.heard_at
    busy = slot.call_since is not None
    if silence > (SILENT_IN_CALL_SECONDS if busy else SILENT_SECONDS):
        return "worker_lost", f"not a word from it for {silence:.0f} s"
    return None


def death(code: int | None) -> str:
    if code is not None and code < 0:
        return f"killed by signal {-code}"
    return f"its process ended with code {code}"
