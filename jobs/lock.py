"""One running job per output folder: a lock file that names its holder.

The file appears by `os.link`, whole or not at all, on local disks and on NFS alike;
`flock` is not relied on. Its modification time is renewed while the holder lives.

Whether a holder is dead is seen directly where it can be: same host, same boot, same
process namespace, and no process of that number and start. Elsewhere the lock is
watched: it is dead when it was not renewed for `STALE_SECONDS` by the clock of its own
file system, and then not for `WATCH_SECONDS` more, whatever the clocks say.

A dead lock is removed by one heir at a time, who holds `lock.heir`, made in the same
way, and looks again before removing it. So no living holder's lock is ever moved. A
holder that was taken for dead (a machine that slept) notices, and stops.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from types import TracebackType

import psutil

from jobs.errors import LockedError, OutputError

STALE_SECONDS = 60.0
WATCH_SECONDS = 12.0
RENEW_SECONDS = 5.0
Holder = dict[str, object]


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
        self._lost = False

    def __enter__(self) -> FolderLock:
        try:
            for _ in range(3):
                if self._create(self._path):
                    threading.Thread(target=self._renew, daemon=True).start()
                    return self
                self._refuse_if_alive()
                self._remove_dead()
        except OSError as error:
            raise OutputError(
                f"can't lock {self._path.parent}: {error.strerror}"
            ) from None
        raise LockedError(f"{self._path} changes hands too fast", hint="try again")

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._stop.set()
        if self._is_ours(self._path):
            with contextlib.suppress(OSError):
                self._path.unlink()

    def check(self, *, now: bool = False) -> None:
        """Raise LockedError when another run took this one for dead.

        It is noticed within `RENEW_SECONDS`; with `now`, the lock is looked at.
        """
        if self._lost or (now and not self._is_ours(self._path)):
            raise LockedError(
                f"{self._path.parent} was taken over by another run",
                hint="this one was silent for too long; let the other go on",
            )

    def _create(self, path: Path) -> bool:
        draft = path.with_name(f".tmp-lock-{self._token}")
        draft.write_text(json.dumps(_identity() | {"token": self._token}))
        try:
            os.link(draft, path)
        except FileExistsError:
            return self._is_ours(path)  # NFS may do it and lose the answer
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK):
                raise
            return _create_without_link(path, draft.read_bytes())
        finally:
            draft.unlink(missing_ok=True)
        return True

    def _is_ours(self, path: Path) -> bool:
        holder = read_holder(path)
        return bool(holder) and holder.get("token") == self._token

    def _refuse_if_alive(self) -> None:
        holder = read_holder(self._path)
        if holder is not None and is_alive(self._path, holder):
            raise LockedError(
                f"{self._path.parent} is in use by pid {holder.get('pid')} on "
                f"{holder.get('host')} since {holder.get('started_at')}",
                hint="wait for it, or stop it with SIGTERM: it can be resumed",
            )

    def _remove_dead(self) -> None:
        with self._sole_heir() as sole:
            holder = read_holder(self._path)
            if sole and holder is not None and not is_alive(self._path, holder):
                self._path.unlink(missing_ok=True)

    @contextmanager
    def _sole_heir(self) -> Iterator[bool]:
        path = self._path.with_name("lock.heir")
        if not self._create(path):
            holder = read_holder(path)
            if holder is not None and not is_alive(path, holder):
                path.unlink(missing_ok=True)
            time.sleep(0.1)
            yield False
            return
        try:
            yield True
        finally:
            path.unlink(missing_ok=True)

    def _renew(self) -> None:
        while not self._stop.wait(RENEW_SECONDS):
            holder = read_holder(self._path)
            if holder and holder.get("token") != self._token:
                self._lost = True
                return
            with contextlib.suppress(OSError):
                os.utime(self._path)


def read_holder(path: Path) -> Holder | None:
    """Read who holds a lock: None when there is none, {} when the file is torn."""
    try:
        holder = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError):
        return {}
    return holder if isinstance(holder, dict) else {}


def is_alive(path: Path, holder: Holder) -> bool:
    """Tell whether a lock's holder still runs; may take `WATCH_SECONDS`."""
    here = _place()
    if all(holder.get(key) == value for key, value in here.items()):
        return _runs(holder)
    return _is_fresh(path) or _is_renewed(path)


def _identity() -> Holder:
    started = datetime.now(timezone.utc).isoformat(timespec="seconds")
    return _place() | {
        "pid": os.getpid(),
        "process_started": _start_of(os.getpid()),
        "started_at": started,
    }


def _place() -> Holder:
    """Name the space in which a process number means something."""
    place: Holder = {"host": socket.gethostname()}
    with contextlib.suppress(OSError):
        place["boot"] = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        place["pid_space"] = Path("/proc/self/ns/pid").stat().st_ino
    return place


def _runs(holder: Holder) -> bool:
    try:
        pid = int(str(holder["pid"]))
        status = psutil.Process(pid).status()
        return (
            status != psutil.STATUS_ZOMBIE
            and abs(_start_of(pid) - float(str(holder["process_started"]))) < 1
        )
    except (psutil.Error, OSError, KeyError, ValueError, OverflowError):
        return False


def _start_of(pid: int) -> float:
    """Say when a process started, by a clock that no one can set where there is one."""
    with contextlib.suppress(OSError):
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
        return float(stat.rpartition(")")[2].split()[19])  # ticks since boot
    return psutil.Process(pid).create_time()


def _is_fresh(path: Path) -> bool:
    """Compare with the file system's own clock, which may not be this machine's."""
    try:
        probe = path.with_name(f".tmp-clock-{uuid.uuid4().hex}")
        probe.touch()
        now = probe.stat().st_mtime
        probe.unlink()
    except OSError:
        now = time.time()
    with contextlib.suppress(OSError):
        return abs(now - path.stat().st_mtime) < STALE_SECONDS
    return False


def _is_renewed(path: Path) -> bool:
    """Watch whether anybody renews it: clocks jump, but a living holder goes on."""
    try:
        before = path.stat().st_mtime_ns
        deadline = time.monotonic() + WATCH_SECONDS
        while time.monotonic() < deadline:
            time.sleep(min(0.5, WATCH_SECONDS))
            if path.stat().st_mtime_ns != before:
                return True
    except OSError:
        return False
    return False


def _create_without_link(path: Path, data: bytes) -> bool:
    """Create a lock where there are no hard links: exclusively, then its content."""
    try:
        with path.open("xb") as file:
            file.write(data)
            os.fsync(file.fileno())
    except FileExistsError:
        return False
    return True
