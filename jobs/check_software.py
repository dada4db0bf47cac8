"""Checks of versions: Python, the system, MindSpore and the packages it leans on.

Each takes (machine, asked) and gives a verdict. The limits are pyproject's, and those
that were met: MindSpore 2.8.0's own list of CANN versions, 2.9's deprecation of O2, and
a 3x3 convolution on the CPU that takes 55 ms in 2.8.0 and 10 s in 2.10.0.
"""

from __future__ import annotations

import re

from jobs.machine import Machine, numbers
from jobs.probe import Probe
from jobs.verdict import Asked, Verdict, failure, ok, warning

INSTALL = "`make` installs it; or `pip install -c requirements.lock -e .`"
GLIBC = (2, 28)  # what the wheels of pandas, pyarrow and Pillow are built for
# What an import says, and what helps.
REMEDIES = (
    (
        r"libge_runner|libascendcl|libgraph\.so|libruntime\.so|libhccl",
        "CANN's libraries are not found: `source "
        "/usr/local/Ascend/ascend-toolkit/set_env.sh` in this shell",
    ),
    (
        r"libascend_hal|libdcmi|libdrvdsmi",
        "the driver's libraries are not found: add "
        "/usr/local/Ascend/driver/lib64/driver and …/common to LD_LIBRARY_PATH",
    ),
    (
        r"static TLS block",
        "load that library first: `export LD_PRELOAD=` its path (libgomp, on aarch64)",
    ),
    (
        r"GLIBCXX_|CXXABI_",
        "the C++ library is too old: in conda, `conda install -c conda-forge "
        "libstdcxx-ng`; else a newer system",
    ),
    (r"GLIBC_", "the system's C library is too old for this wheel: a newer system"),
    (
        r"No module named '(te|tbe|hccl)",
        "CANN's Python packages are not found: `source "
        "/usr/local/Ascend/ascend-toolkit/set_env.sh` in this shell",
    ),
    (r"No module named", INSTALL),
    (
        r"(?i)numpy.*(1\.x|2\.\d|dtype size|_ARRAY_API)|multiarray",
        "MindSpore was built for NumPy 1: `pip install 'numpy<2'`",
    ),
    (r"SIGILL", "the processor lacks an instruction that the wheel uses (AVX)"),
    (
        r"Unsupported device target|backend is not available|set device",
        "`npu-smi info` must list the card, and CANN's set_env.sh be sourced",
    ),
    (r"no answer in", "the machine or the card is overloaded or hangs: look at both"),
)


def python(machine: Machine, asked: Asked) -> Verdict:
    version = ".".join(map(str, machine.python))
    if not (3, 10) <= machine.python < (3, 12):
        return failure(
            "Python",
            f"{version}; MindSpore 2.8 and this package need 3.10 or 3.11",
            "`make PYTHON=/path/to/python3.11`",
        )
    return ok("Python", version)


def system(machine: Machine, asked: Asked) -> Verdict:
    """Judge the system and the processor: are there wheels for them."""
    found = f"{machine.system} {machine.arch}"
    if machine.glibc:
        found += ", glibc " + ".".join(map(str, machine.glibc))
    if machine.system != "Linux" or machine.arch not in ("x86_64", "aarch64"):
        return warning(
            "system",
            f"{found}; tried on Linux x86_64 only",
            "a Linux host or container, x86_64 or aarch64",
        )
    if machine.glibc and machine.glibc < GLIBC:
        return warning(
            "system",
            f"{found}; the wheels of pandas, pyarrow and Pillow need 2.28",
            "a newer system or a container of one; pip would build from source",
        )
    return ok("system", found)


def packages(machine: Machine, asked: Asked) -> Verdict:
    """Tell whether every package is there."""
    missing = [name for name, version in machine.packages.items() if version is None]
    if missing:
        remedy = INSTALL
        if machine.arch == "aarch64":
            remedy += "; where pip finds no aarch64 wheel, use Python 3.10 or 3.11"
        return failure("packages", f"not installed: {', '.join(missing)}", remedy)
    shown = [f"{name} {version}" for name, version in machine.packages.items()]
    return ok("packages", ", ".join(shown[:5]))


def numpy(machine: Machine, asked: Asked) -> Verdict:
    version = machine.packages.get("numpy") or "not installed"
    if numbers(version) >= (2,):
        return failure(
            "NumPy",
            f"{version}; MindSpore is built for NumPy 1 and crashes with 2",
            "`pip install 'numpy<2'`",
        )
    return ok("NumPy", version)


def tables(machine: Machine, asked: Asked) -> Verdict:
    """Judge the packages that want NumPy 2 in their newest versions."""
    for name, limit in (("pandas", 3), ("pyarrow", 26)):
        version = machine.packages.get(name) or ""
        if numbers(version) >= (limit,):
            return warning(
                "tables",
                f"{name} {version}; it wants NumPy 2, MindSpore NumPy 1",
                f"`pip install '{name}<{limit}'`",
            )
    return ok("tables", "pandas and pyarrow go with NumPy 1")


def mindspore(machine: Machine, asked: Asked) -> Verdict:
    """Judge MindSpore's version for the device and the jit level asked for."""
    version = machine.packages.get("mindspore") or "not installed"
    found = numbers(version)
    install = "`pip install mindspore==2.8.0`"
    if found and found < (2, 7):
        return warning(
            "MindSpore", f"{version}; this was written for 2.7 and 2.8", install
        )
    if found >= (2, 10) and asked.target == "CPU":
        return warning(
            "MindSpore",
            f"{version}; from 2.10 a 3x3 convolution on the CPU is 180 times slower",
            install,
        )
    if found >= (2, 9) and asked.jit_level == "O2":
        return warning(
            "MindSpore",
            f"{version}; jit level O2 is deprecated from 2.9 on and may be gone",
            f"{install}, or `--set runtime.jit_level=O1`, which was not tried",
        )
    return ok("MindSpore", version)


def compiler(machine: Machine, asked: Asked) -> Verdict:
    """Tell whether the CPU gets kernels of our own, which a compiler makes there."""
    if asked.target != "CPU":
        return ok("C compiler", "not needed on a card")
    if machine.compiler is None:
        return warning(
            "C compiler",
            "none; the CPU's own kernels are left out, and a step takes a third longer",
            "install gcc or clang, or name one: `export CC=/path/to/cc`",
        )
    return ok("C compiler", machine.compiler)


def judge_probe(found: Probe, asked: Asked) -> Verdict:
    """Judge what came of a matrix product in a process of its own."""
    what = f"MindSpore on {asked.target}"
    if found.trouble:
        return failure(what, found.trouble, remedy_for(found.trouble))
    if not found.right:
        return failure(
            what,
            f"{found.version} multiplies two matrices wrongly",
            "reinstall MindSpore and NumPy; check OPENBLAS_CORETYPE is not set",
        )
    if found.seen != 1:
        return failure(
            what,
            f"{found.seen} devices are visible to a process bound to one",
            "ASCEND_RT_VISIBLE_DEVICES takes no effect: update CANN and the driver",
        )
    return ok(what, f"{found.version} computes")


def remedy_for(trouble: str) -> str:
    """Find what helps against an import's complaint."""
    for pattern, remedy in REMEDIES:
        if re.search(pattern, trouble):
            return remedy
    return "`python -c 'import mindspore'` shows the whole of it"
