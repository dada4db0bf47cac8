"""Checks of the host: processors, threads, memory, disks, open files."""

from __future__ import annotations

from jobs.machine import Folder, Machine
from jobs.verdict import Asked, Verdict, failure, ok, warning

GB = 10**9
OPEN_FILES = 1024
OUTPUT_FREE = 10 * GB
TEMPORARY_FREE = 1 * GB
CACHE_FREE = 1 * GB
NETWORK = ("nfs", "nfs4", "cifs", "smb3", "fuse.sshfs", "9p", "lustre", "ceph")
VOLATILE = ("tmpfs", "ramfs")
# On the CPU a full-size base in float32 peaked at 1.35 times its weights.
ROOM = 1.35


def processors(machine: Machine, asked: Asked) -> Verdict:
    workers = len(asked.devices)
    found = f"{machine.cores} for {workers} worker{'s' if workers > 1 else ''}"
    if workers > machine.cores:
        where = "--workers" if asked.target == "CPU" else "--devices"
        return warning(
            "processors",
            f"{found}: they would wait for each other",
            f"`{where}` of at most {machine.cores}, or more processors",
        )
    return ok("processors", found)


def threads(machine: Machine, asked: Asked) -> Verdict:
    """Notice a number of threads set by hand that a worker would take over."""
    name = "OMP_NUM_THREADS"
    text = machine.environ.get(name, "")
    if asked.target != "CPU" or not text.isdigit():
        return ok("threads", "shared out among the workers")
    share = max(1, machine.cores // len(asked.devices))
    if int(text) != share:
        return warning(
            "threads",
            f"{name} is {text}; a worker's share of the processors is {share}",
            f"`unset {name}`",
        )
    return ok("threads", f"{name} is {text}")


def blas(machine: Machine, asked: Asked) -> Verdict:
    """Notice a kernel of OpenBLAS chosen by hand: it may not be this processor's."""
    kernel = machine.environ.get("OPENBLAS_CORETYPE")
    if kernel:
        return warning(
            "OpenBLAS",
            f"OPENBLAS_CORETYPE is {kernel}: NumPy uses that kernel, right or wrong",
            "`unset OPENBLAS_CORETYPE`, unless it mends a wrong one",
        )
    return ok("OpenBLAS", "chooses its kernel itself")


def memory(machine: Machine, asked: Asked) -> Verdict:
    """Compare free memory with the weights of all workers, where they lie in it."""
    if machine.memory_free is None or machine.memory_total is None:
        return ok("memory", "can't be told on this system")
    found = f"{_gb(machine.memory_free)} of {_gb(machine.memory_total)} GB free"
    if asked.weights is None or asked.target != "CPU":
        return ok("memory", found)
    workers = len(asked.devices)
    need = round(asked.weights * ROOM) * workers
    each = f" in each of {workers} workers" if workers > 1 else ""
    found += f"; the weights take about {_gb(need // workers)} GB{each}"
    if asked.weights * workers > machine.memory_total:
        return failure("memory", found, "fewer `--workers`, or more memory")
    if need > machine.memory_free:
        return warning("memory", found, "fewer `--workers`, or end other programs")
    return ok("memory", found)


def output(machine: Machine, asked: Asked) -> Verdict:
    """Judge the folder of the results: may it be written, is there room, which disk."""
    folder = machine.output
    found = f"{folder.path}: {_gb(folder.free)} GB free" + _kind(folder)
    if not folder.writable:
        return failure(
            "output", f"{folder.path} can't be written", "another `--output`"
        )
    if folder.free < GB // 10:
        return failure("output", found, "make room, or another `--output`")
    if folder.free < OUTPUT_FREE:
        return warning("output", found, "`sdxl-jobs plan` says what the job needs")
    if folder.kind in VOLATILE:
        return warning("output", f"{found}: gone at the next boot", "a disk's folder")
    if folder.kind in NETWORK:
        return warning(
            "output",
            f"{found}: every picture is synced, which a network makes slow",
            "a local `--output`, copied at the end; or more `runtime.writer_threads`",
        )
    return ok("output", found)


def compile_cache(machine: Machine, asked: Asked) -> Verdict:
    """Judge the folder of compiled graphs: without it each worker compiles anew."""
    what, folder = "compile cache", machine.cache
    if folder is None:
        return ok(what, "off")
    found = f"{asked.compile_cache}: {_gb(folder.free)} GB free" + _kind(folder)
    elsewhere = "`--set runtime.compile_cache=DIR`, or make room"
    if not folder.writable:
        return warning(what, f"{folder.path} can't be written", elsewhere)
    if folder.free < CACHE_FREE:
        return warning(what, found, elsewhere)
    return ok(what, found)


def temporary(machine: Machine, asked: Asked) -> Verdict:
    folder = machine.temporary
    found = f"{folder.path}: {_gb(folder.free)} GB free" + _kind(folder)
    if not folder.writable:
        return failure("temporary", f"{folder.path} can't be written", "set TMPDIR")
    if folder.free < TEMPORARY_FREE:
        return warning("temporary", found, "make room, or set TMPDIR")
    return ok("temporary", found)


def current(machine: Machine, asked: Asked) -> Verdict:
    """Judge the current folder: MindSpore and CANN leave files of their own there."""
    folder = machine.current
    if not folder.writable:
        found = f"{folder.path} can't be written, where CANN puts its kernels"
        kind = failure if asked.target == "Ascend" else warning
        return kind("current folder", found, "start from a folder of your own")
    return ok("current folder", str(folder.path))


def open_files(machine: Machine, asked: Asked) -> Verdict:
    limit = machine.open_files
    if limit is not None and 0 <= limit < OPEN_FILES:
        return warning("open files", f"at most {limit}", f"`ulimit -n {OPEN_FILES}`")
    return ok("open files", "no limit" if limit in (None, -1) else f"at most {limit}")


def _gb(count: int) -> str:
    return f"{count / GB:.3g}"


def _kind(folder: Folder) -> str:
    return f" ({folder.kind})" if folder.kind else ""


CHECKS = (
    processors,
    threads,
    blas,
    memory,
    output,
    compile_cache,
    temporary,
    current,
    open_files,
)
