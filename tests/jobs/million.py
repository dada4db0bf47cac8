"""A job of a million tasks with the fake pipeline: what the runner itself costs.

    python tests/jobs/million.py --report docs/reliability.md

    plan     a new folder: from the start of the command to the first lease, and stop
    work     make so many of what is left, and stop
    fill     write the rows of so many more, as workers would have, without workers:
             for machines where hours are dear; the report says so
    resume   the same as `plan`, with what was made behind it
    nothing  the whole command, when nothing is left
    status   read what is done
    images   another, smaller job, whose workers write image files

Each step is a process of its own, which notes its memory and its times in
FOLDER/readings.jsonl; the report is made of these. Without `--step` all are done, one
after the other; with it one alone, so that those that must not share the machine can be
run apart from the long ones (`--alone` says that nothing else ran). The workers publish
rows but no image files (`light_worker`).
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from jobs_shared import FAKE, ROOT, order
from report import put_into

from jobs import process, run
from jobs.books import resolved_again
from jobs.manifest import open_manifest
from jobs.order import Order
from jobs.parts import result_schema
from jobs.plan import tasks_of
from jobs.progress import duration
from jobs.records import task_row
from jobs.store import Store

START, END = "<!-- million -->", "<!-- /million -->"
SETTINGS = ("runtime.batch_size=4", "sampling.width=64", "sampling.height=64")
HERE = Path(__file__).parent
STEPS = ("plan", "work", "resume", "nothing", "status", "images", "fill")
FILLED = 16_384  # rows of a part that was merged from 512 of 32


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", type=int, default=1_000_000)
    parser.add_argument("--real", type=int, default=10_000, help="of the step `images`")
    parser.add_argument("--workers", type=int, default=8)
    parser.add_argument("--report", type=Path)
    parser.add_argument("--folder", type=Path, help="where to work; kept")
    parser.add_argument("--step", choices=STEPS, help="this step alone, in --folder")
    parser.add_argument("--count", type=int, default=0, help="of `work` or `fill`")
    parser.add_argument("--alone", action="store_true", help="nothing else runs")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.inside:
        print(json.dumps(measure(asked)))
        return
    with tempfile.TemporaryDirectory() as name:
        asked.folder = asked.folder or Path(name)
        for step, count in [(asked.step, asked.count)] if asked.step else plan(asked):
            take(asked, step, count)
        lines = (asked.folder / "readings.jsonl").read_text().splitlines()
    text = report([json.loads(line) for line in lines], asked)
    print(text)
    if asked.report:
        put_into(asked.report, text, START, END)


def plan(asked):
    """List the steps of the whole, with their counts."""
    half = ("work", asked.tasks // 2)
    return [
        ("plan", 0),
        half,
        ("resume", 0),
        ("work", 0),
        *((s, 0) for s in STEPS[3:6]),
    ]


def take(asked, step, count):
    """Do one step in a process of its own, and keep its reading."""
    folder = asked.folder / ("real" if step == "images" else "many")
    if step in ("plan", "images"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        prepare(folder, asked.real if step == "images" else asked.tasks)
    words = [sys.executable, __file__, "--inside", "--folder", folder, "--step", step]
    words += ["--workers", asked.workers, "--count", count]
    done = subprocess.run(
        [str(word) for word in words],
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{HERE}"},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    reading = {"step": step, "alone": asked.alone} | json.loads(done.stdout)
    with (asked.folder / "readings.jsonl").open("a") as file:
        file.write(json.dumps(reading) + "\n")


def prepare(folder, tasks):
    from sdxl.config import PRESETS
    from sdxl.random_weights import write_random

    write_random(folder / "c.safetensors", PRESETS["tiny"], "fp16")
    with (folder / "m.csv").open("w") as file:
        file.write("id,prompt\n")
        for i in range(tasks):
            file.write(f"row-{i},a picture of number {i} in watercolour\n")


# Inside a step's own process ----------------------------------------------------------


def measure(asked):
    if asked.step == "fill":
        return fill(asked.folder, asked.count)
    if asked.step == "status":
        started = time.monotonic()
        Store(asked.folder / "out").index()
        return {"total": time.monotonic() - started}
    if asked.step != "images":
        import light_worker

        process.main = light_worker.main
    times = watch(1 if asked.step in ("plan", "resume") else asked.count)
    files = [asked.folder / name for name in ("m.csv", "out", "c.safetensors")]
    started = time.monotonic()
    summary = run.run(order(*files, *SETTINGS, workers=asked.workers), pipeline=FAKE)
    total = time.monotonic() - started
    own = resource.getrusage(resource.RUSAGE_SELF)
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "total": total,
        "planned": times["planned"] - started,
        "pending": times["pending"],
        "working": times.get("last", 0) - times.get("first", 0),
        "made": summary.made,
        "ok": summary.counts["ok"],
        "rss_mb": own.ru_maxrss / 1024,
        "cpu": own.ru_utime + own.ru_stime,
        "planning_cpu": times["planning_cpu"],
        "workers_cpu": children.ru_utime + children.ru_stime,
    }


def fill(folder, count):
    """Write the rows of the first `count` tasks that are still to make."""
    store = Store(folder / "out")
    job = Order.stored(store)
    resolved = resolved_again(job, store.read_job())
    index, rows, filled = store.index(), [], 0
    same = {
        **dict.fromkeys(("image_sha256", "pixel_sha256"), "0" * 64),
        "job_fingerprint": store.read_job()["fingerprint"],
        "status": "ok",
        "attempts": 1,
        "image_format": "png",
        "image_bytes": 0,
        "host": "filled",
    }
    for request in open_manifest(job.manifest).rows():
        if filled + len(rows) == count:
            break
        (task,) = tasks_of(request, resolved)
        if not index.is_done([task.image_id])[0]:
            rows.append(task_row(task, ()) | same)
        if len(rows) == FILLED:
            store.write_part(f"filled-{task.image_id}", rows, result_schema())
            filled, rows = filled + len(rows), []
    if rows:
        store.write_part(f"filled-{task.image_id}", rows, result_schema())
    return {"filled": filled + len(rows)}


def watch(stop_after):
    """Note when the run has planned, made its first and its last; stop where asked."""
    times = {}

    def announce(self, found):
        times["planned"] = time.monotonic()
        times["planning_cpu"] = time.process_time()
        times["pending"] = found.pending
        original_announce(self, found)

    def batch_made(self, made, failed):
        original_made(self, made, failed)
        times.setdefault("first", time.monotonic())
        times["last"] = time.monotonic()
        if stop_after and self.progress.done >= stop_after:
            self.stop.asked = max(1, self.stop.asked)

    original_announce, original_made = run._Run._announce, run._Run.batch_made
    run._Run._announce, run._Run.batch_made = announce, batch_made
    return times


# The report ---------------------------------------------------------------------------


def report(readings, asked):
    """Put the readings since the last `plan` into a table of Markdown."""
    begin = max(i for i, r in enumerate(readings) if r["step"] == "plan")
    readings = readings[begin:]
    of = {step: [r for r in readings if r["step"] == step] for step in STEPS}
    runs = [r for r in readings if r["step"] in STEPS[:4]]
    work, made = of["work"], sum(r["made"] for r in of["work"])
    left = runs[-1]["pending"] - runs[-1]["made"]
    found = {
        "supervisor's memory, at most, of all steps": (
            f"{max(r['rss_mb'] for r in runs):.0f} MB"
        ),
        "planning: from start until the first lease": _planned(of["plan"][-1]),
    }
    for one in of["resume"]:
        name = f"resuming with {one['pending']:,} left, until the first lease"
        found[name] = _planned(one)
    for one in of["nothing"]:
        name = "the same with nothing left, the whole command"
        found[name] = f"{one['total']:.1f} s{_where(one)}"
    for one in of["status"]:
        found["reading what is done, as `status` does"] = (
            f"{one['total']:.1f} s{_where(one)}"
        )
    if made:
        per_image = {
            "supervisor's processor time per image": sum(r["cpu"] for r in work),
            "a worker's processor time per image, no image files": (
                sum(r["workers_cpu"] for r in work)
            ),
            "wall time per image, all workers together": (
                sum(r["working"] for r in work)
            ),
        }
        found |= {k: f"{v / made * 1e3:.2f} ms" for k, v in per_image.items()}
    for one in of["images"]:
        name = f"a worker's processor time per image, 64x64 PNG files ({one['made']:,})"
        found[name] = f"{one['workers_cpu'] / one['made'] * 1e3:.2f} ms"
    filled = sum(r["filled"] for r in of["fill"])
    stops = f"in {len(work)} runs" if len(work) > 1 else "in one run"
    spent = duration(sum(r["total"] for r in work))
    if filled:
        stops += f"; the rows of {filled:,} were written without workers"
    return "\n".join(
        [
            f"{asked.tasks:,} tasks, {asked.workers} workers, {os.cpu_count()} cores: "
            f"{made:,} made in {spent}, {stops}; {left:,} left.",
            "",
            "| what | measured |",
            "|---|---|",
            *(f"| {name} | {value} |" for name, value in found.items()),
        ]
    )


def _planned(one):
    cpu = f"{one['planning_cpu']:.1f} s of processor time"
    return f"{one['planned']:.1f} s ({cpu}){_where(one)}"


def _where(one):
    return ", alone on the machine" if one["alone"] else ""


if __name__ == "__main__":
    main()
