"""The expected errors, and the exit codes.

JobError                 exit code 1, one line and perhaps a hint
├── ConfigError          a setting that is unknown, mistyped or impossible
├── ManifestError        the manifest as a whole can't be used
├── ModelError           the checkpoint is missing, torn or not what it should be
├── OutputError          the output folder can't be read or written
│   ├── LockedError      another run holds it
│   └── MismatchError    it belongs to another job
└── WorkerError          no worker could start, or all of them died alike

Anything else that reaches the command line is a bug: its trace goes to `log.txt`.
A row that can't be used is not an error but a result with the status `invalid`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from enum import IntEnum
from pathlib import Path


class ExitCode(IntEnum):
    """What the process returns."""

    OK = 0
    ERROR = 1
    USAGE = 2
    BUG = 3
    PARTIAL = 4
    INTERRUPTED = 130


class JobError(Exception):
    """Something a user can mend; `hint` says how."""

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.hint = hint


class ConfigError(JobError):
    pass


class ManifestError(JobError):
    pass


class ModelError(JobError):
    pass


class OutputError(JobError):
    pass


class LockedError(OutputError):
    pass


class MismatchError(OutputError):
    pass


class WorkerError(JobError):
    pass


@contextmanager
def folder_errors(root: Path) -> Iterator[None]:
    """Turn what a full, failing, read-only or vanished folder raises into one line."""
    try:
        yield
    except OSError as error:
        raise OutputError(
            f"can't go on in {root}: {error.strerror or error}",
            hint="make room or repair the folder, then `sdxl-jobs resume` it",
        ) from None


def nearest(word: str, known: Iterable[str]) -> str:
    """Say what the known words are, the likeliest first, for use in a message."""
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1, cutoff=0.5)
    folded = [name for name in names if name.lower() == word.lower()]
    if folded or close:
        return f"did you mean `{(folded or close)[0]}`?"
    return "known: " + ", ".join(f"`{name}`" for name in names)


def file_beside(path: Path, suffixes: Iterable[str], otherwise: str) -> str:
    """Say which file may have been meant instead of one that is not there."""
    kinds = set(suffixes)
    names = [p.name for p in path.parent.glob("*") if p.suffix.lower() in kinds]
    close = difflib.get_close_matches(path.name, names, n=1)
    return f"did you mean `{printable(close[0])}`?" if close else otherwise


def printable(text: str, limit: int = 80) -> str:
    """Make text safe for a terminal: control characters escaped, cut to `limit`."""
    safe = "".join(c if c.isprintable() else f"\\x{ord(c):02x}" for c in text[:limit])
    return safe + ("…" if len(text) > limit else "")
