"""Compiled graphs kept on disk: what one process compiled, others of the host load.

    key ──> entry there and whole? ──yes─────────────────> shown to MindSpore: loaded
              │ no                             ▲
              └──> lock ──> there now? ──yes───┘
                              └──no──> MindSpore compiles ──> entry, by rename

MindSpore has a cache, but numbers its files in the order of compiling and looks at
nothing else: a process that compiles in another order gets another graph, and says
nothing. So it never sees a shared folder. Each process shows it a stage of its own,
which holds the one file that it is about to ask for, or none.

An entry is a folder: MindSpore's files and `entry.json`, with their checksums, the
shapes of the graph's inputs and parameters, and how long it took to compile. One that
is torn, stale or altered is thrown away. Weights are not in it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from sdxl.stage import Files, Stage

WAIT_SECONDS = 1800.0
POLL_SECONDS = 0.1
KEPT_DAYS = 30
LEFTOVER_SECONDS = 86_400.0
ENTRY = "entry.json"
log = logging.getLogger("sdxl")


class CompileCache:
    """The graphs of one model under one version of the software, in `folder`.

    `wait_seconds` is how long another process may take over a graph before this one
    compiles it for itself. No trouble with the disk is an error: it costs a compilation
    and a line in the log.
    """

    def __init__(self, folder: Path, *, wait_seconds: float = WAIT_SECONDS) -> None:
        self.folder = folder
        self.wait_seconds = wait_seconds

    def ready(self, key: str, shapes: str, compile_it: Callable[[], None]) -> bool:
        """Make a graph ready by `compile_it`; tell whether its front half was loaded.

        `shapes` describes inputs and parameters: an entry of others does not count.
        """
        stage = Stage.of_this_process()
        if stage is None or not self._usable():
            uncached(compile_it)
            return False
        files = self._read(key, shapes)
        if files is None:
            with self._lock(key):
                files = self._read(key, shapes)
                if files is None:
                    self._compile(stage, key, shapes, compile_it, None)
                    return False
        return self._compile(stage, key, shapes, compile_it, files)

    def entries(self) -> dict[str, dict[str, Any]]:
        """List what is there: what is written of each key, unchecked."""
        found = {}
        for path in self.folder.glob(f"*/{ENTRY}"):
            with suppress(OSError, ValueError):
                found[path.parent.name] = json.loads(path.read_bytes())
        return found

    def _compile(
        self,
        stage: Stage,
        key: str,
        shapes: str,
        compile_it: Callable[[], None],
        files: Files | None,
    ) -> bool:
        start = time.perf_counter()
        written = stage.run(compile_it, files)
        if written:
            self._publish(key, shapes, written, time.perf_counter() - start)
        if written and files:
            log.warning("compile cache: MindSpore refused %s; compiled anew", key)
        return files is not None and not written

    def _usable(self) -> bool:
        """Make the folder, for this user alone; it may hold what runs in our name."""
        try:
            for folder in (self.folder.parent, self.folder):
                folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            found = self.folder.stat()
            ours = os.getuid() in (found.st_uid, 0)
            if ours and not found.st_mode & 0o022:
                return True
            reason = "others may write to it"
        except OSError as error:
            reason = error.strerror or str(error)
        log.warning("compile cache: %s is not used: %s", self.folder, reason)
        return False

    def _read(self, key: str, shapes: str) -> Files | None:
        """Read an entry; None when there is none or it is not what it should be."""
        entry = self.folder / key
        try:
            about = json.loads((entry / ENTRY).read_bytes())
            if about["shapes"] != shapes:
                raise ValueError("it is of other shapes")
            files = {name: (entry / name).read_bytes() for name in about["files"]}
            for name, data in files.items():
                if _sha256(data) != about["files"][name]:
                    raise ValueError(f"{name} is not what was written")
        except FileNotFoundError:
            if not entry.exists():
                return None
            reason = "a file is missing"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = str(error)
        else:
            with suppress(OSError):
                os.utime(self.folder)  # in use: not to be swept
            return files
        log.warning("compile cache: %s is thrown away: %s", entry, reason)
        self._throw_away(entry)
        return None

    def _publish(self, key: str, shapes: str, files: Files, seconds: float) -> None:
        about = {
            "shapes": shapes,
            "seconds": round(seconds, 3),
            "files": {name: _sha256(data) for name, data in files.items()},
        }
        try:
            new = Path(tempfile.mkdtemp(prefix=".new-", dir=self.folder))
            for name, data in files.items():
                _write(new / name, data)
            _write(new / ENTRY, json.dumps(about, indent=1).encode())
            self._throw_away(self.folder / key)
            new.rename(self.folder / key)
            sweep(self.folder.parent)
        except OSError as error:  # a full disk, or another was faster
            log.warning("compile cache: %s is not kept: %s", key, error)

    def _throw_away(self, entry: Path) -> None:
        with suppress(OSError):
            aside = Path(tempfile.mkdtemp(prefix=".old-", dir=self.folder))
            if entry.exists():
                entry.rename(aside / entry.name)
            shutil.rmtree(aside)

    @contextmanager
    def _lock(self, key: str) -> Iterator[None]:
        """Hold a key's lock, or go on without it when it takes too long to come by.

        The kernel frees the lock of a process that died.
        """
        deadline = time.monotonic() + self.wait_seconds
        try:
            file = (self.folder / f".{key}.lock").open("ab")
        except OSError:
            yield
            return
        with file:
            while not _locked(file.fileno()):
                if time.monotonic() > deadline:
                    log.warning("compile cache: waited too long for %s", key)
                    break
                time.sleep(POLL_SECONDS)
            yield


def uncached(compile_it: Callable[[], None]) -> None:
    """Compile with MindSpore's own cache off, whatever the environment asks for.

    It would hand out graphs in the order in which they are asked for.
    """
    with Stage.environment("0", None):
        compile_it()


def sweep(root: Path) -> None:
    """Remove what versions that are no longer used left, and what a crash left."""
    _remove(root.glob("*" + "[0-9a-f]" * 16), KEPT_DAYS * 86_400.0)
    _remove(root.glob("*/.new-*"), LEFTOVER_SECONDS)
    _remove(root.glob("*/.old-*"), LEFTOVER_SECONDS)


def _remove(folders: Iterable[Path], seconds: float) -> None:
    """Remove those that nobody has touched for so long."""
    for folder in folders:
        with suppress(OSError):
            if time.time() - folder.stat().st_mtime > seconds:
                shutil.rmtree(folder)


def _locked(descriptor: int) -> bool:
    """Try to take a lock; a filesystem without locks gives it to everyone."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _write(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
