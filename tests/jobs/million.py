"""A job of a million tasks with the fake pipeline: what the runner itself costs.

    python tests/jobs/million.py --tasks 1000000 --report docs/reliability.md

It runs the job halfway, stops it, goes on to the end, and asks once more when nothing
is left; each in a process of its own, which reports its memory and its times. The
workers publish rows but no image files (`light_worker`); what those cost is measured on
fewer, with the worker as it is.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jobs_shared import FAKE, ROOT, order
from report import put_into

from jobs import process, run
from jobs.progress import duration
from jobs.store import Store

START, END = "<!-- million -->", "<!-- /million -->"
SETTINGS = ("runtime.batch_size=4", "sampling.width=64", "sampling.height=64")
HERE = Path(__file__).parent


def phase(asked):
    """Run the job once, in this process, and print what it cost."""
    if asked.light:
        import light_worker

        process.main = light_worker.main
    started = time.monotonic()
    times = {}

    def announce(self, found):
        times["planned"] = time.monotonic() - started
        times["pending"] = found.pending
        original_announce(self, found)

    def batch_made(self, made, failed):
        original_made(self, made, failed)
        times.setdefault("first", time.monotonic() - started)
        times["last"] = time.monotonic() - started
        if asked.stop_after and self.progress.done >= asked.stop_after:
            self.stop.asked = max(1, self.stop.asked)

    original_announce, original_made = run._Run._announce, run._Run.batch_made
    run._Run._announce, run._Run.batch_made = announce, batch_made
    folder = asked.folder
    job = order(
        folder / "m.csv",
        folder / "out",
        folder / "c.safetensors",
        *SETTINGS,
        workers=asked.workers,
    )
    summary = run.run(job, pipeline=FAKE)
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    times |= {
        "total": time.monotonic() - started,
        "made": summary.made,
        "counts": summary.counts,
        "rss_mb": own.ru_maxrss / 1024,
        "cpu": own.ru_utime + own.ru_stime,
        "workers_cpu": children.ru_utime + children.ru_stime,
    }
    print(json.dumps(times))


def launch(folder, workers, light, stop_after=0):
    words = [sys.executable, __file__, "--folder", folder, "--workers", workers]
    words += ["--stop-after", stop_after] + (["--light"] if light else [])
    done = subprocess.run(
        [str(word) for word in words],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{HERE}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout)


def prepare(folder, tasks):
    from sdxl.config import PRESETS
    from sdxl.random_weights import write_random

    write_random(folder / "c.safetensors", PRESETS["tiny"], "fp16")
    with (folder / "m.csv").open("w") as file:
        file.write("id,prompt\n")
        for i in range(tasks):
            file.write(f"row-{i},a picture of number {i} in watercolour\n")


def measure(tasks, workers, real):
    """Give the report's lines."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, tasks)
        half = launch(folder, workers, True, stop_after=tasks // 2)
        rest = launch(folder, workers, True)
        assert rest["counts"]["ok"] == tasks, rest
        nothing = launch(folder, workers, True)
        assert nothing["made"] == 0
        before = time.monotonic()
        Store(folder / "out").index()
        status = time.monotonic() - before
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, real)
        images = launch(folder, workers, False)
    made = half["made"] + rest["made"]
    both = duration(half["total"] + rest["total"])
    cpu = (half["cpu"] + rest["cpu"]) / made * 1e3
    work = (half["workers_cpu"] + rest["workers_cpu"]) / made * 1e3
    wall = half["last"] - half["first"] + rest["last"] - rest["first"]
    found = {
        "supervisor's memory, at most": f"{max(half['rss_mb'], rest['rss_mb']):.0f} MB",
        "planning: from start until the first lease": f"{half['planned']:.1f} s",
        f"resuming with {rest['pending']:,} left, until the first lease": (
            f"{rest['planned']:.1f} s"
        ),
        "the same with nothing left, the whole command": f"{nothing['total']:.1f} s",
        "reading what is done, as `status` does": f"{status:.1f} s",
        "supervisor's processor time per image": f"{cpu:.2f} ms",
        "a worker's processor time per image, no image files": f"{work:.2f} ms",
        "wall time per image, all workers together": f"{wall / made * 1e3:.2f} ms",
        f"a worker's processor time per image, 64x64 PNG files ({real:,} images)": (
            f"{images['workers_cpu'] / real * 1e3:.2f} ms"
        ),
    }
    return [
        f"{tasks:,} tasks, {workers} workers, stopped at {half['made']:,} and resumed, "
        f"on {os.cpu_count()} cores ({both} in all).",
        "",
        "| what | measured |",
        "|---|---|",
        *(f"| {name} | {value} |" for name, value in found.items()),
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--real", type=int, default=10_000)
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stop-after", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--light", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.folder:
        phase(asked)
        return
    text = "\n".join(measure(asked.tasks, asked.workers, asked.real))
    print(text)
    if asked.report:
        put_into(asked.report, text, START, END)


if __name__ == "__main__":
    main()
