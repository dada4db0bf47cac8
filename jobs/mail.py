"""Mail between the supervisor and a worker: orders one way, news the other.

A pipe takes only so much; a worker that is stopped or busy in a call that lets nothing
else run does not read it. The supervisor must not wait for such a one, so its orders
are sent by a thread of their own.
"""

from __future__ import annotations

import contextlib
import queue
import threading
from multiprocessing.connection import Connection
from typing import Any


class Mail:
    """Send messages in order, never blocking; a worker that is dead gets none."""

    def __init__(self, pipe: Connection) -> None:
        self._waiting: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._pipe = pipe
        threading.Thread(target=self._deliver, daemon=True).start()

    def send(self, order: str, content: Any = None) -> None:
        self._waiting.put((order, content))

    def close(self) -> None:
        """End the thread, once the worker's end of the pipe is closed."""
        self._waiting.put(None)

    def _deliver(self) -> None:
        # A pipe that is closed while it is written to raises more than OSError.
        with contextlib.suppress(OSError, TypeError, ValueError):
            while (message := self._waiting.get()) is not None:
                self._pipe.send(message)


class Outbox:
    """The pipe to the supervisor, safe to write from several threads."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe = pipe
        self._lock = threading.Lock()

    def send(self, kind: str, **content: Any) -> None:
        with self._lock:
            self._pipe.send((kind, content))
