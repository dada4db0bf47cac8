"""What this machine is, gathered once: versions, devices, memory, folders, environment.

Design: looking is apart from judging. `look` reads files, runs `npu-smi` and tries
MindSpore in a process of its own, since an import that crashes must not take `doctor`
with it; the checks are pure functions of what it found. Where each thing is read is in
`Places`, so that a test can show it another machine.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

from jobs import devices, npu_smi

# What the package needs; the first of them are told with their versions.
PACKAGES = (
    "mindspore",
    "numpy",
    "pandas",
    "pyarrow",
    "pillow",
    "pyyaml",
    "click",
    "tqdm",
    "tokenizers",
    "ftfy",
    "safetensors",
    "psutil",
)
SMI_SECONDS = 30
# Device nodes that a container needs beside /dev/davinciN.
MANAGERS = ("davinci_manager", "devmm_svm", "hisi_hdc")


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Where the facts are found."""

    environ: Mapping[str, str] = field(default_factory=lambda: dict(os.environ))
    dev: Path = field(default_factory=lambda: devices.NODES)
    proc: Path = Path("/proc")
    cgroup: Path = Path("/sys/fs/cgroup")
    ascend: Path = Path("/usr/local/Ascend")
    npu_smi: str = "npu-smi"
    current: Path = field(default_factory=Path.cwd)
    temporary: Path = field(default_factory=lambda: Path(tempfile.gettempdir()))


@dataclass(frozen=True, slots=True, kw_only=True)
class Folder:
    """A folder that a run writes to: its nearest parent that exists, and its disk."""

    path: Path
    free: int
    kind: str
    writable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What was found. None stands for what isn't there or can't be told."""

    python: tuple[int, int, int]
    system: str
    arch: str
    glibc: tuple[int, ...] | None
    packages: Mapping[str, str | None]
    environ: Mapping[str, str]
    nodes: tuple[str, ...]
    unusable_nodes: tuple[str, ...]
    smi: npu_smi.Table | None
    smi_trouble: str
    driver: str | None
    cann: str | None
    cores: int
    compiler: str | None
    open_files: int | None
    memory_total: int | None
    memory_free: int | None
    output: Folder
    cache: Folder | None
    current: Folder
    temporary: Folder


def look(places: Places, output: Path, cache: Path | None = None) -> Machine:
    """Gather the facts; nothing is imported that a broken machine could choke on.

    `output` and `cache` are where results and compiled graphs would go.
    """
    nodes = _nodes(places.dev)
    smi, trouble = _npu_smi(places)
    total, free = _memory(places)
    return Machine(
        python=sys.version_info[:3],
        system=platform.system(),
        arch=platform.machine(),
        glibc=_glibc(),
        packages={name: _version(name) for name in PACKAGES},
        environ=places.environ,
        nodes=tuple(path.name for path in nodes),
        unusable_nodes=_unusable(places.dev, nodes),
        smi=smi,
        smi_trouble=trouble,
        driver=_stated(places.ascend / "driver" / "version.info"),
        cann=_cann(places),
        cores=devices.cores(),
        compiler=_compiler(),
        open_files=_open_files(),
        memory_total=total,
        memory_free=free,
        output=folder(places, output),
        cache=folder(places, cache) if cache else None,
        current=folder(places, places.current),
        temporary=folder(places, places.temporary),
    )


def _compiler() -> str | None:
    from sdxl.cpu_kernels import compiler

    found = compiler()
    return found[0] if found else None


def _nodes(dev: Path) -> list[Path]:
    """List /dev/davinci0 and so on, in the order of their numbers."""
    found = [p for p in dev.glob("davinci*") if devices.DAVINCI.fullmatch(p.name)]
    return sorted(found, key=lambda path: int(path.name.removeprefix("davinci")))


def _unusable(dev: Path, nodes: list[Path]) -> tuple[str, ...]:
    """Name the device nodes that are missing or that this user may not open."""
    wanted = [*nodes, *(dev / name for name in MANAGERS)] if nodes else []
    return tuple(str(p) for p in wanted if not os.access(p, os.R_OK | os.W_OK))


def _npu_smi(places: Places) -> tuple[npu_smi.Table | None, str]:
    try:
        done = subprocess.run(
            [places.npu_smi, "info"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=SMI_SECONDS,
        )
    except FileNotFoundError:
        return None, "not installed"
    except OSError as error:
        return None, str(error.strerror)
    except subprocess.TimeoutExpired:
        return None, f"no answer in {SMI_SECONDS} s"
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()
        last = f": {said[-1]}" if said else ""
        return None, f"ended with code {done.returncode}{last}"
    return npu_smi.parse(done.stdout), ""


def _cann(places: Places) -> str | None:
    """Read the toolkit's version where MindSpore does, then where else it stands."""
    home = places.environ.get("ASCEND_HOME_PATH")
    root = Path(home) if home else places.ascend / "ascend-toolkit" / "latest"
    candidates = [root / "compiler" / "version.info", root / "version.cfg"]
    candidates += sorted(root.glob("*-linux/ascend_toolkit_install.info"))
    return next((v for path in candidates if (v := _stated(path))), None)


def _stated(path: Path) -> str | None:
    """Find `Version=8.3.0` in a small file, or `x_running_version=[…:8.3.0]`."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")[:10_000]
    except OSError:
        return None
    plain = re.search(r"(?im)^\s*version\s*=\s*([^\s\]]+)", text)
    listed = re.search(r"_running_version\s*=\s*\[(?:[^\]:]*:)?([^\]:]+)\]", text)
    found = plain or listed
    return found[1] if found else None


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _glibc() -> tuple[int, ...] | None:
    name, version = platform.libc_ver()
    return numbers(version) if name == "glibc" else None


def numbers(version: str) -> tuple[int, ...]:
    """Read the leading numbers of a version: `2.10.0rc1` is (2, 10, 0)."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _open_files() -> int | None:
    try:
        import resource
    except ImportError:
        return None
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]


def _memory(places: Places) -> tuple[int | None, int | None]:
    """Read total and available bytes, within the limit of a container."""
    try:
        text = (places.proc / "meminfo").read_text()
    except OSError:
        return None, None
    total, free = (
        int(found[1]) * 1024
        if (found := re.search(rf"{name}:\s+(\d+)", text))
        else None
        for name in ("MemTotal", "MemAvailable")
    )
    limit, used = (_number(places.cgroup / f"memory.{n}") for n in ("max", "current"))
    if limit is None or total is None or limit >= total:
        return total, free
    left = limit - (used or 0)
    return limit, left if free is None else min(free, left)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):
        return None


def folder(places: Places, path: Path) -> Folder:
    """Look at a folder, or at what it will be made in."""
    found = path.absolute()
    while not found.is_dir() and found != found.parent:
        found = found.parent
    return Folder(
        path=found,
        free=shutil.disk_usage(found).free,
        kind=_file_system(places, found),
        writable=os.access(found, os.W_OK | os.X_OK),
    )


def _file_system(places: Places, path: Path) -> str:
    """Name the type of the file system that a folder lies in."""
    try:
        lines = (places.proc / "self" / "mounts").read_text().splitlines()
    except OSError:
        return ""
    best, kind = -1, ""
    for line in lines:
        _, point, found, *_ = line.split(" ")
        point = point.replace("\\040", " ")
        inside = path == Path(point) or Path(point) in path.parents
        if inside and len(point) >= best:
            best, kind = len(point), found
    return kind
