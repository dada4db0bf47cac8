"""Run commands side by side: wall time from start to the last end, peak memory."""

from __future__ import annotations

import argparse
import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
SAMPLE_SECONDS = 0.5
STEADY = "steady.json"  # what mindone's side leaves beside its pictures


@dataclass(frozen=True, slots=True)
class Run:
    """What a run took. Memory is the sum of the processes' resident sets, sampled."""

    seconds: float
    peak_bytes: int

    def __str__(self) -> str:
        return f"{self.seconds:.1f} s, peak {self.peak_bytes / 1e9:.2f} GB"


def add_sampling(parser: argparse.ArgumentParser) -> None:
    """Add what each side of the job's comparison is asked to draw."""
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--guidance", type=float, default=5.0)


def timesteps(steps: int) -> list[int]:
    """List LegacyDDPMDiscretization's time steps: all sides walk the same levels."""
    return [999 - -(-999 * i // steps) for i in range(steps)]


def run_all(commands: Sequence[Sequence[str]], environment: Mapping[str, str]) -> Run:
    """Start all commands at once and wait for all.

    Raises RuntimeError with what it said when one fails.
    """
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        running = [
            subprocess.Popen(words, env=environment, cwd=ROOT, stdout=log, stderr=log)
            for words in commands
        ]
        peak = 0
        while any(process.poll() is None for process in running):
            peak = max(peak, sum(map(_resident, running)))
            _wait(running)
        seconds = time.perf_counter() - started
        if any(process.returncode for process in running):
            log.seek(0)
            raise RuntimeError(log.read().decode(errors="replace")[-4_000:])
    return Run(seconds, peak)


def _wait(running: Sequence[subprocess.Popen]) -> None:
    """Wait for a sample's time, or for the first process that still runs to end."""
    first = next((p for p in running if p.poll() is None), None)
    if first is not None:
        try:
            first.wait(SAMPLE_SECONDS)
        except subprocess.TimeoutExpired:
            return


def _resident(process: subprocess.Popen) -> int:
    """Add up the resident memory of a process and its descendants."""
    total = 0
    try:
        family = [psutil.Process(process.pid)]
        family += family[0].children(recursive=True)
    except psutil.Error:
        return 0
    for member in family:
        try:
            total += member.memory_info().rss
        except psutil.Error:
            continue
    return total


def threads_of(count: int) -> dict[str, str]:
    """Give an environment that bounds the threads of every library alike."""
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    return dict(os.environ) | dict.fromkeys(names, str(count))


def bind(threads: int) -> None:
    """Keep this process to as many processors as it has threads, as in a job."""
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
