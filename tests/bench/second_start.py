"""How long the UNet's graphs take to be made ready, from nothing and from the cache.

    python -m tests.bench.second_start [--preset base] [--size 256] [--rounds 2]

Two processes after each other, with one compile cache, empty at first; what is timed is
what `Graphs` notes as compilation, of a guided step's graph and of its batch's context
graph. The weights are random and lie in memory that both map: loading is not timed.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from sdxl.config import PRESETS
from tests.bench.unet_sides import Ours, SharedWeights, latents

LIMIT = 0.25


def start(pipe: Connection, weights: SharedWeights, size: int, folder: Path) -> None:
    """Make the graphs ready in this process, run one step, say what it took."""
    from sdxl.compile_cache import CompileCache

    side = Ours(weights, os.cpu_count() or 1, cache=CompileCache(folder))
    step, facts = side.step(size)
    out = step(latents(weights.config, size))
    loads = sum(side.graphs.loads.values())
    pipe.send((facts["compile"], loads, len(side.graphs.compiles), out))


def main() -> int:
    """Start twice as often as there are rounds; print the ratios."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.second_start")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="base")
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()

    weights = SharedWeights(asked.preset, os.memfd_create("weights"))
    weights.fill()
    context = multiprocessing.get_context("fork")
    readings = []
    for _ in range(asked.rounds):
        with tempfile.TemporaryDirectory(prefix="sdxl-bench-") as folder:
            found = []
            for _ in ("first", "second"):
                ours, theirs = context.Pipe()
                fresh = SharedWeights(asked.preset, weights.file)
                given = (theirs, fresh, asked.size, Path(folder))
                process = context.Process(target=start, args=given)
                process.start()
                found.append(ours.recv())
                process.join()
        (first, _, _, one), (second, loads, graphs, two) = found
        if loads != graphs or not np.array_equal(one, two):
            print(f"{loads} of {graphs} graphs were loaded, or a loaded one differs")
            return 1
        readings.append({"first": first, "second": second, "ratio": second / first})
    ratio = statistics.median(reading["ratio"] for reading in readings)
    if asked.json:
        print(json.dumps({"size": asked.size, "rounds": readings}))
    else:
        for reading in readings:
            print("first {first:.1f} s, second {second:.1f} s".format(**reading))
        print(f"second start / first: {ratio:.3f}, at most {LIMIT} is wanted")
    return 0 if ratio <= LIMIT else 1


if __name__ == "__main__":
    sys.exit(main())
