"""A bug's report: the trace goes to log.txt, one line to the terminal."""

from __future__ import annotations

import itertools
import os
import sys
import traceback
from pathlib import Path

from jobs import __version__
from jobs.errors import printable

COMMANDS = {"resume", "retry", "verify", "replay", "compact", "status"}


def report_bug(error: Exception, arguments: list[str] | None) -> None:
    """Write the trace to log.txt, in the job's folder where there is one."""
    words = sys.argv[1:] if arguments is None else arguments
    log = _folder_of(words) / "log.txt"
    text = "".join(traceback.format_exception(error))
    try:
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW
        with os.fdopen(os.open(log, flags, 0o644), "a", encoding="utf-8") as file:
            file.write(
                f"sdxl-jobs {__version__} {' '.join(map(repr, words))}\n{text}\n"
            )
        place = f"the trace is in {log}"
    except OSError:
        place = "\n".join(printable(line, 500) for line in text.splitlines())
    line = printable(f"{type(error).__name__}: {error}", 500)
    print(f"bug: {line}\nhint: please report it; {place}", file=sys.stderr)


def _folder_of(words: list[str]) -> Path:
    """Guess the job's folder from a command line; the current one where none is."""
    for before, word in itertools.pairwise(words):
        is_folder = before == "--output" or before in COMMANDS
        if is_folder and (Path(word) / "job.json").exists():
            return Path(word)
    return Path()
