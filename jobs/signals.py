"""Signals that ask a run to stop: SIGINT, SIGTERM and Slurm's SIGUSR1.

While pictures are in work, the first finishes the batches in flight and the second
stops at once. Before and after, one is enough: what is being written then is published
whole or not at all.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


@dataclass(slots=True)
class Stop:
    """How often the user has asked to stop: once to finish the batch, twice for now."""

    asked: int = 0

    def heed(self) -> None:
        """Raise KeyboardInterrupt if it was asked for and got lost."""
        if self.asked:
            raise KeyboardInterrupt


@contextmanager
def stopping(stop: Stop) -> Iterator[None]:
    """Turn the signals to stop into a request to the pool."""

    def ask(number: int, frame: Any) -> None:
        stop.asked += 1

    before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def interruptible(stop: Stop) -> Iterator[None]:
    """Let the signals to stop end planning and compacting as SIGINT does.

    Both leave the folder as it was: what they write is published whole or not at all.
    `stop` counts them too: an exception that comes up inside a callback of a library
    can be lost there, and `heed` then raises it.
    """

    def interrupt(number: int, frame: Any) -> None:
        stop.asked += 1
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
