"""A guided step of the UNet, ours against diffusers', on the same weights in one run.

    python -m tests.bench.unet_step [--preset base] [--sizes 256 512] [--rounds 5]

Design: the weights are made once, into memory that both processes map, so that a
full-size network is there once (10.3 GB in float32). Each process compiles and warms
up, then they take turns, one step each, the other idle; both have the same threads.
What is timed is a whole guided step: latents in numpy to the guided prediction in
numpy, two halves of one picture. Ours has the text's keys and values from its context
graph, which runs once per batch and is timed apart; diffusers computes them in the
step. Needs `make oracle`, and about 14 GB of memory per process, 10 of them shared.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import resource
import statistics
import time
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from sdxl.config import PRESETS, ModelConfig
from sdxl.layouts import tensor_specs
from tests.bench.unet_sides import (
    PREFIX,
    TOKENS,
    Ours,
    SharedWeights,
    Theirs,
    latents,
)

PAUSE = 0.2


def serve(pipe: Connection, side: type, weights: SharedWeights, threads: int) -> None:
    """Load, then answer orders: a size compiles, "go" runs one step, None ends."""
    network = side(weights, threads)
    step, x = None, None
    pipe.send("ready")
    while (order := pipe.recv()) is not None:
        if order != "go":
            x = latents(weights.config, order)
            step, facts = network.step(order)
            pipe.send(facts)
            continue
        start = time.perf_counter()
        out = step(x)
        seconds = time.perf_counter() - start
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        pipe.send((seconds, memory, out))


def compare(
    pipes: dict[str, Connection], config: ModelConfig, size: int, rounds: int
) -> dict[str, Any]:
    """Let both take turns at one size; return the figures."""
    facts: dict[str, float] = {}
    for pipe in pipes.values():
        pipe.send(size)
        facts |= pipe.recv()
    seconds: dict[str, list[float]] = {name: [] for name in pipes}
    memory, outputs = {}, {}
    for _ in range(rounds):
        for name, pipe in pipes.items():
            time.sleep(PAUSE)
            pipe.send("go")
            spent, memory[name], outputs[name] = pipe.recv()
            seconds[name].append(spent)
    ratios = [a / b for a, b in zip(seconds["ours"], seconds["diffusers"], strict=True)]
    error = np.abs(outputs["ours"] - outputs["diffusers"]).max()
    work = {
        "ours": facts["flop"] - context_flop(config),
        "diffusers": facts["flop"],
    }
    return {
        "size": size,
        "ratio": statistics.median(ratios),
        "ratio_spread": [min(ratios), max(ratios)],
        "seconds": {k: statistics.median(v) for k, v in seconds.items()},
        "tflop": {k: v / 1e12 for k, v in work.items()},
        "share_of_peak": {
            k: work[k] / statistics.median(v) / facts["peak"]
            for k, v in seconds.items()
        },
        "peak_gflops": facts["peak"] / 1e9,
        "memory_gb": {k: v / 1e9 for k, v in memory.items()},
        "compile_seconds": facts["compile"],
        "context_seconds": facts["context"],
        "error_over_rms": float(error / np.sqrt(np.mean(outputs["diffusers"] ** 2))),
    }


def context_flop(config: ModelConfig) -> int:
    """Count what our context graph spares the step: keys and values, the embedding."""
    matrices = (
        math.prod(spec.shape) * (TOKENS if "attn2" in spec.name else 1)
        for spec in tensor_specs(config)
        if spec.name.endswith(("attn2.to_k.weight", "attn2.to_v.weight"))
        or (spec.name.startswith(PREFIX + "label_emb") and len(spec.shape) == 2)
    )
    return 2 * 2 * sum(matrices)


def main() -> None:
    """Make the weights, start both sides, print what they took."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.unet_step")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="base")
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()

    weights = SharedWeights(asked.preset, os.memfd_create("weights"))
    weights.fill()
    context = multiprocessing.get_context("fork")
    for size in asked.sizes:  # each in fresh processes: memory is a peak
        pipes, processes = {}, []
        for name, side in (("ours", Ours), ("diffusers", Theirs)):
            pipes[name], other = context.Pipe()
            fresh = SharedWeights(asked.preset, weights.file)
            process = context.Process(
                target=serve, args=(other, side, fresh, asked.threads), daemon=True
            )
            process.start()
            other.close()
            processes.append(process)
            pipes[name].recv()
        found = compare(pipes, weights.config, size, asked.rounds)
        print(json.dumps(found) if asked.json else report(found), flush=True)
        for pipe, process in zip(pipes.values(), processes, strict=True):
            pipe.send(None)
            process.join()


def report(found: dict[str, Any]) -> str:
    """Say it in three lines."""
    low, high = found["ratio_spread"]
    size = found["size"]
    lines = [
        f"{size}x{size}: ours / diffusers {found['ratio']:.3f} ({low:.3f} to "
        f"{high:.3f}), error {found['error_over_rms']:.1e}, matrix product peak "
        f"{found['peak_gflops']:.0f} GFLOP/s"
    ]
    lines += [
        f"  {name}: {found['seconds'][name]:.2f} s, {found['tflop'][name]:.3f} TFLOP, "
        f"{found['share_of_peak'][name]:.0%} of the peak, "
        f"{found['memory_gb'][name]:.1f} GB"
        for name in ("ours", "diffusers")
    ]
    lines[1] += (
        f"; once: compiling {found['compile_seconds']:.0f} s, "
        f"a batch's context {found['context_seconds']:.2f} s"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
