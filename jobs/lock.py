"""One running job per output folder: a lock file that names its holder.

The file is created exclusively (atomic on local disks and on NFS alike; `flock` is not
relied on) and its modification time is renewed while the holder lives. A lock is dead
when its process is gone from this host, or when it belongs to another host and has not
been renewed for `STALE_SECONDS`. A dead lock is renamed away before a new one is made,
and what was renamed is looked at again, so that two heirs can't both win.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

import psutil

from jobs.errors import LockedError, OutputError

STALE_SECONDS = 60.0
RENEW_SECONDS = 5.0


class FolderLock:
    """Hold `folder/lock` for the time of a `with` block.

    Raises:
        LockedError: a living process holds it; says which.
        OutputError: the folder can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / "lock"
        self._token = uuid.uuid4().hex
        self._stop = threading.Event()

    def __enter__(self) -> FolderLock:
        for _ in range(3):
            if self._create():
                threading.Thread(target=self._renew, daemon=True).start()
                return self
            self._take_over()
        raise LockedError(f"{self._path} changes hands too fast", hint="try again")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        holder = read_holder(self._path)
        if holder and holder.get("token") == self._token:
            with contextlib.suppress(OSError):
                self._path.unlink()

    def _create(self) -> bool:
        text = json.dumps(
            {
                "host": socket.gethostname(),
                "pid": os.getpid(),
                "process_started": psutil.Process().create_time(),
                "started_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
                "token": self._token,
            }
        )
        draft = self._path.with_name(f".tmp-lock-{self._token}")
        try:
            draft.write_text(text, encoding="utf-8")
            try:
                os.link(draft, self._path)  # appears whole, or not at all
            finally:
                draft.unlink()
        except FileExistsError:
            return False
        except OSError as error:
            raise OutputError(
                f"can't lock {self._path.parent}: {error.strerror}"
            ) from None
        return True

    def _take_over(self) -> None:
        holder = read_holder(self._path)
        if holder is None:
            return
        if is_alive(self._path, holder):
            raise LockedError(
                f"{self._path.parent} is in use by pid {holder.get('pid')} on "
                f"{holder.get('host')} since {holder.get('started_at')}",
                hint="wait for it, or stop it with SIGTERM: it can be resumed",
            )
        aside = self._path.with_name(f".tmp-lock-dead-{self._token}")
        with contextlib.suppress(FileNotFoundError):
            self._path.rename(aside)
            moved = read_holder(aside)
            if moved and moved.get("token") != holder.get("token"):
                with contextlib.suppress(FileExistsError):
                    os.link(aside, self._path)  # a new holder's: give it back
            aside.unlink()

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            with contextlib.suppress(OSError):
                os.utime(self._path)


def read_holder(path: Path) -> dict[str, object] | None:
    """Read who holds a lock: None when there is none, {} when the file is torn."""
    try:
        holder = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def is_alive(path: Path, holder: dict[str, object]) -> bool:
    """Tell whether a lock's holder still runs."""
    if holder.get("host") == socket.gethostname():
        try:
            process = psutil.Process(int(str(holder["pid"])))
            started = float(str(holder["process_started"]))
            return (
                abs(process.create_time() - started) < 2
                and process.status() != psutil.STATUS_ZOMBIE
            )
        except (psutil.NoSuchProcess, KeyError, ValueError):
            return False
    if not holder:
        return False
    try:
        return time.time() - path.stat().st_mtime < STALE_SECONDS
    except OSError:
        return False
