"""Named points of the commit protocol, where a test may kill the process or the disk.

    SDXL_JOBS_CRASH=part.renamed:2:KILL:/tmp/once

kills the process with SIGKILL when it passes `part.renamed` the second time, unless
`/tmp/once` exists; it is made first, so that of several processes one dies, once. In
place of KILL stand KILLALL (the whole process group), HANG, or the name of an error
that the system would give: ENOSPC, EIO, EROFS. Unset, a point costs one comparison.

Each file passes `<kind>.written`, `<kind>.synced` and `<kind>.renamed`; a folder that
is made durable passes `<kind>.durable`.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from collections import Counter

VARIABLE = "SDXL_JOBS_CRASH"
KINDS = ("image", "part", "merged", "results", "job", "rows", "status", "copy")
STEPS = ("written", "synced", "renamed")
POINTS = (
    *(f"{kind}.{step}" for kind in KINDS for step in STEPS),
    "image.durable",
    "part.durable",
    "merged.durable",
    "merged.swept",
    "results.durable",
    "results.swept",
)

_passed: Counter[str] = Counter()
_armed = os.environ.get(VARIABLE)


def arm(order: str | None) -> None:
    """Set what `VARIABLE` would have set, in this process and its children to come."""
    global _armed
    _armed = order
    _passed.clear()
    if order is None:
        os.environ.pop(VARIABLE, None)
    else:
        os.environ[VARIABLE] = order


def point(kind: str, step: str) -> None:
    """Pass the point `<kind>.<step>`, alive as a rule.

    Raises:
        OSError: a test asked for it.
    """
    if _armed is not None:
        _pass(f"{kind}.{step}", _armed)


def _pass(name: str, order: str) -> None:
    wanted, nth, action, once = [*order.split(":", 3), "", "", ""][:4]
    if name != wanted:
        return
    _passed[name] += 1
    if _passed[name] != int(nth or 1) or (once and not _first(once)):
        return
    _act(action or "KILL")


def _first(marker: str) -> bool:
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def _act(action: str) -> None:
    if action == "KILL":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "KILLALL":
        os.killpg(0, signal.SIGKILL)
    elif action == "HANG":
        time.sleep(1e6)
    else:
        number = getattr(errno, action)
        raise OSError(number, os.strerror(number))
