"""Operators of our own for the CPU: `cpu_kernels.c`, compiled where it runs.

Design: MindSpore's CPU backend runs elementary operations one by one, some of them
slowly; fused in C they take a tenth of the time (docs/performance.md). The C compiler
that a machine has makes the library, once for its kind of processor, in the user's
cache, under a name that hashes all that went into it. Where there is no compiler,
nothing is lost but time: `ops` has a plain form of everything. A card never gets here.

`SDXL_CPU_KERNELS=off` does without; `CC` names another compiler.
"""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sdxl.cache_key import default_root

if TYPE_CHECKING:
    from mindspore.ops import Custom

SOURCE = Path(__file__).with_suffix(".c")
COMPILERS = ("cc", "gcc", "clang")
FLAGS = ("-O3", "-std=c11", "-fno-math-errno", "-fno-trapping-math")
FLAGS += ("-ffp-contract=fast", "-shared", "-fPIC", "-pthread")
THIS_PROCESSOR = (("-march=native",), ("-mcpu=native",), ())
COMPILE_SECONDS = 120
ShapeOf = Callable[..., list[int]]
log = logging.getLogger("sdxl")


class _KernelError(Exception):
    """There can be none here; says why."""


@cache
def library() -> str:
    """Return the library's path, compiling it if need be; "" where there can't be one.

    That it can't be is not an error, but a line in the log.
    """
    if os.environ.get("SDXL_CPU_KERNELS", "").lower() in ("off", "0", "false", "no"):
        return ""
    try:
        path = str(_library())
        ctypes.CDLL(path)  # a folder may forbid to run what is in it
        return path
    except (_KernelError, OSError, subprocess.SubprocessError) as error:
        log.warning("CPU kernels: MindSpore's are used, which are slower: %s", error)
        return ""


def set_threads(count: int) -> None:
    """Have the library's operators use so many threads from now on."""
    if library():
        ctypes.CDLL(library()).set_threads(count)


def operator(path: str, name: str, shape_of: ShapeOf | None = None) -> Custom:
    """Return the library's operator `name` on float32 tensors.

    `shape_of` gives the output's shape from those of the inputs: the first one's, if it
    is left out.
    """
    from mindspore.ops import Custom

    return Custom(f"{path}:{name}", shape_of or _first, _first, "aot")


def compiler() -> list[str] | None:
    """Give the command of this machine's C compiler, if it has one."""
    asked = shlex.split(os.environ.get("CC", ""))
    if asked:
        return asked if shutil.which(asked[0]) else None
    return next(([name] for name in COMPILERS if shutil.which(name)), None)


def _first(first: object, *others: object) -> object:
    return first


def _library() -> Path:
    command = compiler()
    if command is None:
        raise _KernelError("there is no C compiler")
    folder, name = _folder(), f"cpu-{_digest(command)}"
    for path in folder.glob(f"{name}-*.so"):
        if _is_ours(path) and path == _named(name, path):
            return path
        path.unlink(missing_ok=True)  # another process may have been faster
    return _compile(command, folder, name)


def _named(name: str, path: Path) -> Path:
    """Give the path of this content: a torn or altered library belies its name."""
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return path.parent / f"{name}-{digest[:16]}.so"


def _folder() -> Path:
    """Make the folder of libraries, for this user alone: they run in its name."""
    try:
        folder = default_root().parent / "kernels"
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if _is_ours(folder) and os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):  # no home, or none that can be written
        pass
    folder = Path(tempfile.mkdtemp(prefix="sdxl-kernels-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder


def _is_ours(path: Path) -> bool:
    """Say that no other user can have made it or can change it."""
    try:
        found = path.lstat()
    except OSError:
        return False
    writable = found.st_mode & (stat.S_IWGRP | stat.S_IWOTH)
    return not (stat.S_ISLNK(found.st_mode) or writable) and found.st_uid == os.getuid()


def _compile(command: list[str], folder: Path, name: str) -> Path:
    """Compile into place, by rename: others may be doing the same."""
    with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as scratch:
        new = Path(scratch) / f"{name}.so"
        said = ""
        for processor in THIS_PROCESSOR:
            words = [*command, *FLAGS, *processor, str(SOURCE), "-o", str(new), "-lm"]
            done = subprocess.run(
                words,
                capture_output=True,
                text=True,
                timeout=COMPILE_SECONDS,
                check=False,
            )
            if done.returncode == 0 and new.exists():
                new.chmod(0o700)
                return new.replace(folder / _named(name, new).name)
            said = (done.stderr.strip().splitlines() or ["it says nothing"])[0]
        raise _KernelError(f"`{command[0]}` failed: {said}")


def _digest(command: list[str]) -> str:
    """Hash what makes a library: the source, the compiler, the kind of processor."""
    version = subprocess.run(
        [*command, "--version"], capture_output=True, text=True, check=False, timeout=30
    )
    parts = [SOURCE.read_text(), shlex.join(command), version.stdout, *FLAGS]
    parts += [platform.machine(), _processor()]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


def _processor() -> str:
    """Name the processor and what it can do, as far as Linux tells."""
    wanted = ("model name", "flags", "Features", "CPU part", "CPU implementer")
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(sorted({line for line in lines if line.startswith(wanted)}))
