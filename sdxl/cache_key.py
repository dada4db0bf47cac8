"""Where the compiled graphs of a model lie: a folder named after all they depend on.

Of a graph itself its key tells the rest: network, batch, size, precision, jit level,
device kind. Nothing heavy is imported here, so that a plan can look what is there.
"""

from __future__ import annotations

import hashlib
import os
import platform
import sys
from importlib import metadata
from pathlib import Path

from sdxl.config import ModelConfig

# The cache's own settings do not make another graph.
NOT_OF_THE_GRAPH = (
    "MS_COMPILER_CACHE_ENABLE",
    "MS_COMPILER_CACHE_PATH",
    "MS_DEV_FORCE_USE_COMPILE_CACHE",
)
CANN = ("version.cfg", "*/ascend_toolkit_install.info", "*/version.info")
CANN_HOMES = ("ASCEND_HOME_PATH", "ASCEND_TOOLKIT_HOME", "ASCEND_OPP_PATH")
USUAL_HOME = "/usr/local/Ascend/ascend-toolkit/latest"
DRIVER = Path("/usr/local/Ascend/driver/version.info")


def default_root() -> Path:
    """Give the user's folder for compiled graphs.

    Raises:
        RuntimeError: the user has no home.
    """
    cache = os.environ.get("XDG_CACHE_HOME")
    base = Path(cache) if cache and Path(cache).is_absolute() else None
    return (base or Path.home() / ".cache") / "sdxl-jobs" / "graphs"


def graphs_folder(root: Path, config: ModelConfig) -> Path:
    """Name the folder of a model's graphs under this software, on this kind of machine.

    Networks of the same geometry share their graphs, whatever their weights.
    """
    lines = [repr(config), *(f"{k}={v}" for k, v in software().items())]
    digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    return root / f"{config.kind}-mindspore{mindspore_version()}-{digest[:16]}"


def software() -> dict[str, str]:
    """List what a compiled graph depends on, beside the model and its own key."""
    here = Path(__file__).parent
    settings = {
        name: value
        for name, value in sorted(os.environ.items())
        if name.startswith("MS_") and name not in NOT_OF_THE_GRAPH
    }
    return {
        "mindspore": mindspore_version(),
        "python": ".".join(map(str, sys.version_info[:3])),
        "machine": platform.machine(),
        "cann": _hash_of(cann_files()),
        "code": _hash_of(sorted([*here.glob("*.py"), *here.glob("*.c")])),
    } | settings


def mindspore_version() -> str:
    """Read MindSpore's version without importing it."""
    try:
        return metadata.version("mindspore")
    except metadata.PackageNotFoundError:
        return "unknown"


def cann_files() -> list[Path]:
    """Find the files in which CANN and the driver tell their versions."""
    homes = {os.environ.get(name, USUAL_HOME) for name in CANN_HOMES}
    found = {p for home in homes for what in CANN for p in Path(home).glob(what)}
    return sorted(found | ({DRIVER} if DRIVER.exists() else set()))


def _hash_of(files: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.name.encode() + b"\0")
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()
