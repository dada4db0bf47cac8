"""Try MindSpore in a process of its own: import it, compute, say what came of it."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass

from jobs.devices import binding

PROBE_SECONDS = 300
STEP, FOUND = "step:", "found:"
# Runs in the child: a matrix product on the device that a run would use.
PROGRAM = f"""
import importlib, json, sys
target = sys.argv[1]
for name in sys.argv[2:]:
    print("{STEP}importing", name, flush=True)
    importlib.import_module(name)
import mindspore as ms
import numpy as np
print("{STEP}computing", flush=True)
ms.set_device(target, 0)
x = ms.Tensor(np.eye(16, dtype=np.float32))
right = bool((ms.ops.matmul(x, x).asnumpy() == x.asnumpy()).all())
seen = ms.hal.device_count(target) if target == "Ascend" else 1
found = {{"version": ms.__version__, "right": right, "seen": seen}}
print("{FOUND}" + json.dumps(found))
"""
MODULES = ("numpy", "pyarrow.parquet", "PIL.Image", "tokenizers", "mindspore")


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe:
    """What came of it: a trouble in one line, or the version and what it computed."""

    trouble: str = ""
    version: str = ""
    right: bool = True
    seen: int = 1


def probe(
    target: str,
    environ: Mapping[str, str],
    *,
    device: int | None = None,
    python: str = sys.executable,
    seconds: float = PROBE_SECONDS,
) -> Probe:
    """Import MindSpore and multiply two matrices on `target`, bound to one device."""
    environment = {**environ, "GLOG_v": "4"}
    if device is not None:
        environment |= binding(device)
    try:
        done = subprocess.run(
            [python, "-c", PROGRAM, target, *MODULES],
            env=environment,
            capture_output=True,
            timeout=seconds,
        )
    except subprocess.TimeoutExpired as late:
        step = _steps(late.stdout)[0]
        return Probe(trouble=f"{step}no answer in {seconds:g} s")
    except OSError as error:
        return Probe(trouble=f"{python}: {error.strerror}")
    step, found = _steps(done.stdout)
    if found:
        return Probe(**json.loads(found))
    return Probe(trouble=step + _why(done.returncode, _text(done.stderr)))


def _steps(stdout: bytes | None) -> tuple[str, str]:
    """Find the last step that was begun, as `importing numpy: `, and what was found."""
    step = found = ""
    for line in _text(stdout).splitlines():
        if line.startswith(STEP):
            step = line.removeprefix(STEP) + ": "
        elif line.startswith(FOUND):
            found = line.removeprefix(FOUND)
    return step, found


def _text(data: bytes | None) -> str:
    return (data or b"").decode(errors="replace")


def _why(code: int, stderr: str) -> str:
    """Put a failed try into one line: the library it lacked, the signal, the error."""
    lines = [line.strip(" -") for line in stderr.splitlines() if line.strip(" -")]
    lacking = [line for line in lines if "cannot open shared object" in line]
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    raised = [line for line in lines if _raises(line)]
    for found in (lacking, raised[::-1], lines[::-1]):
        if found:
            return found[0][:400]
    return f"its process ended with code {code}"


def _raises(line: str) -> bool:
    """Tell a trace's last line, such as `ImportError: no module`."""
    name, colon, _ = line.partition(": ")
    return bool(colon) and name.split(".")[-1].endswith(("Error", "Exception"))
