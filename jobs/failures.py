"""What went wrong with a task: its class, one line of message, a trace in the log."""

from __future__ import annotations

import contextlib
import traceback


def classify(error: BaseException) -> str:
    """Name the class of a failure for the results."""
    text = str(error).lower()
    if (
        isinstance(error, MemoryError)
        or "out of memory" in text
        or "oom" in text.split()
    ):
        return "oom"
    if isinstance(error, OSError):
        return "io"
    if "device" in text or "ascend" in text or "acl" in text.split():
        return "device"
    return "bug"


def message_of(error: BaseException) -> str:
    """Put an exception into one line."""
    first = next((line for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {first.strip(' -')}"[:1_000]


def log_trace() -> None:
    """Write the trace to the worker's log, which may lie on a full disk."""
    with contextlib.suppress(OSError):
        traceback.print_exc()
