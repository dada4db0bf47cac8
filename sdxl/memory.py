"""How much memory a process needed at most: of the host, and of its device."""

from __future__ import annotations

import resource
import sys

Peak = tuple[float, float | None]  # MB of the host, MB of the device if it has its own


def peak_memory() -> Peak:
    """Measure this process: the host's since it began, the device's since it ran."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    host = peak / 1024 if sys.platform == "linux" else peak / 1024**2
    return host, _device_memory()


def largest(one: Peak, other: Peak) -> Peak:
    """Give the larger of each; None where neither has a device of its own."""
    devices = [mb for mb in (one[1], other[1]) if mb is not None]
    return max(one[0], other[0]), max(devices, default=None)


def _device_memory() -> float | None:
    mindspore = sys.modules.get("mindspore")
    if mindspore is None or mindspore.get_context("device_target") == "CPU":
        return None
    return mindspore.runtime.max_memory_allocated() / 1024**2
