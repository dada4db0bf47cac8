"""What compiling a job's graphs will cost, by what they cost on this host before.

Only the step graphs count, one for each size and guider: the others are small. Of the
workers of a host one compiles a graph, and the others load it (see `dispatch` for who
gets which).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

from jobs.model import model_errors
from jobs.progress import duration
from jobs.resolved import Resolved
from jobs.sections import ModelSection

Graph = tuple[int, int, str]  # width, height, guider


def compilation(
    graphs: Collection[Graph], resolved: Resolved, section: ModelSection
) -> dict[str, Any]:
    """Count the graphs to make ready and those in the compile cache; price the rest.

    `seconds` is None where none of this model was compiled on this host yet, and for
    one host: of several, each compiles for itself.
    """
    there = _entries(resolved, section)
    cached = sum(any(_is_of(key, g, resolved) for key in there) for g in graphs)
    compiled = len(graphs) - cached
    if resolved.compile_cache is None:  # help with another's graph compiles it again
        workers = len(resolved.devices)
        compiled = min(len(graphs) * workers, len(graphs) + workers - 1)
    known = [about["seconds"] for key, about in there.items() if _is_step(key)]
    each = mean(known) if known else None
    return {
        "graphs": len(graphs),
        "cached": cached,
        "compilations": compiled,
        "seconds_each": each,
        "seconds": 0.0 if not compiled else None if each is None else compiled * each,
    }


def describe_compilation(priced: Mapping[str, Any]) -> str:
    """Put it into a line for people."""
    line = f"compile: {priced['graphs']} step graphs, {priced['cached']} in the cache"
    if not priced["compilations"]:
        return line
    times = f"{priced['compilations']} compilation(s)"
    if priced["seconds"] is None:
        return f"{line}; {times} of a length that this host has not measured yet"
    each = duration(priced["seconds_each"])
    total = duration(priced["seconds"])
    return f"{line}; {times}, about {total} if each takes {each} as before on this host"


def _entries(resolved: Resolved, section: ModelSection) -> dict[str, dict[str, Any]]:
    from sdxl.cache_key import graphs_folder
    from sdxl.compile_cache import CompileCache
    from sdxl.config import PRESETS
    from sdxl.weights import open_checkpoint

    if resolved.compile_cache is None:
        return {}
    path = Path(section.checkpoint) if section.checkpoint else None
    if path is not None and path.exists():
        with model_errors(path):
            config = open_checkpoint(path, preset=section.preset).config
    elif section.preset is not None:
        config = PRESETS[section.preset]
    else:
        return {}
    return CompileCache(graphs_folder(resolved.compile_cache, config)).entries()


def _is_step(key: str) -> bool:
    return key.startswith("unet-")


def _is_of(key: str, graph: Graph, resolved: Resolved) -> bool:
    """Tell whether a key is that of a size's and guider's step graph."""
    width, height, guider = graph
    modes = ("guided",) if guider == "VanillaCFG" else ("plain", "embedded")
    size = f"unet-b{resolved.batch_size}-{height // 8}x{width // 8}"
    device = resolved.device_target.lower()
    how = f"{resolved.precision}-{resolved.jit_level}-{device}"
    return any(key.startswith(f"{size}-{mode}-{how}") for mode in modes)
