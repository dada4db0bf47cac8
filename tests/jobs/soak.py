"""Kill a job at every bad moment, resume it, and count what is lost: nothing may be.

    python tests/jobs/soak.py --runs 200 --report docs/reliability.md

Each run is a job of 60 tasks (of which three fail) and one invalid row, with the fake
pipeline on two workers, killed by SIGKILL: a worker, the supervisor or all of them, at
a random moment or at a named crash point. It is then resumed until it is done, and held
to the rows and pixels of a run that nobody killed. Every run can be repeated: `--seed`
and its number decide what happens to it.
"""

import argparse
import contextlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from jobs_shared import run_job, write_csv

from jobs import crash, pool, store
from jobs.errors import JobError
from jobs.verify import verify

TASKS = 60
HANG_SECONDS = 120
TARGETS = ("worker", "supervisor", "all")
SETTINGS = ("runtime.batch_size=4", "output.commit_every=4", "runtime.shard_batches=2")
START, END = "<!-- soak -->", "<!-- /soak -->"


@dataclass(frozen=True)
class Outcome:
    """What became of one run."""

    number: int
    what: str
    struck: bool
    lost: int
    doubled: int
    differ: int
    hung: bool
    orphans: int
    findings: int
    launches: int

    @property
    def clean(self):
        return not (
            self.lost
            or self.doubled
            or self.differ
            or self.hung
            or self.orphans
            or self.findings
        )


class Soak:
    """Runs of one small job, each in a folder of its own."""

    def __init__(self, folder, seed):
        from sdxl.config import PRESETS
        from sdxl.random_weights import write_random

        self.folder = folder
        self.seed = seed
        self.checkpoint = folder / "tiny.safetensors"
        write_random(self.checkpoint, PRESETS["tiny"], "fp16")
        words = {7: "make-nan", 23: "raise=broken", 41: "make-black"}
        prompts = [f"a picture {words.get(i, '')} sleep=0.02" for i in range(TASKS)]
        rows = [(f"r{i}", prompt, None) for i, prompt in enumerate(prompts)]
        rows.insert(30, ("bad", "its width can't be", "65"))
        self.manifest = write_csv(folder / "m.csv", rows, ("id", "prompt", "width"))
        started = time.monotonic()
        assert self.launch(folder / "reference").wait() == 4
        self.seconds = time.monotonic() - started
        self.expected = read_rows(folder / "reference")
        assert len(self.expected) == TASKS + 1

    def launch(self, output, order=None):
        return Job(lambda: self.work(output, order))

    def work(self, output, order):
        crash.arm(order)
        pool.BACK_OFF_SECONDS = 0.02
        pool.MERGE_AT = store.MERGE_AT = 4
        summary = run_job(self.manifest, output, self.checkpoint, *SETTINGS, workers=2)
        return int(summary.exit_code)

    def run(self, number):
        chance = random.Random(f"{self.seed}-{number}")
        output = self.folder / f"run-{number}"
        target = chance.choice(TARGETS)
        struck = self.folder / f"struck-{number}"
        if chance.random() < 0.5:
            point = chance.choice(crash.POINTS)
            action = "KILLALL" if target == "all" else "KILL"
            what = f"{point} {action}"
            order = f"{point}:{chance.choice((1, 1, 2, 3))}:{action}:{struck}"
            job = self.launch(output, order)
        else:
            what = f"random {target}"
            job = self.launch(output)
            if job.wait(chance.uniform(0.1, self.seconds)) is None:
                job.kill(target, chance)
                struck.touch()
        hung = job.wait(HANG_SECONDS) is None
        orphans = job.sweep()
        launches = 1
        while not hung and job.code != 4 and launches < 6:
            job = self.launch(output)
            hung = job.wait(HANG_SECONDS) is None
            orphans += job.sweep()
            launches += 1
        return self.judge(
            number, what, output, struck.exists(), hung, orphans, launches
        )

    def judge(self, number, what, output, struck, hung, orphans, launches):
        rows = {}
        twice = 0
        with contextlib.suppress(OSError):
            rows = read_rows(output)
            twice = pq.read_metadata(output / "results.parquet").num_rows - len(rows)
        try:
            findings = len(verify(output).findings)
        except JobError:
            findings = 1
        shutil.rmtree(output, ignore_errors=True)
        return Outcome(
            number=number,
            what=what,
            struck=struck,
            lost=len(set(self.expected) - set(rows)),
            doubled=twice + len(set(rows) - set(self.expected)),
            differ=sum(rows[k] != self.expected[k] for k in rows if k in self.expected),
            hung=hung,
            orphans=orphans,
            findings=findings,
            launches=launches,
        )


class Job:
    """A supervisor in a forked process, in a process group of its own."""

    def __init__(self, work):
        self.code = None
        self._children = []
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            code = 70
            try:
                os.setsid()
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                code = work()
            finally:
                os._exit(code)
        self._process = psutil.Process(self.pid)

    def wait(self, seconds=HANG_SECONDS):
        """Wait for the end: the exit code, or None when it still runs."""
        deadline = time.monotonic() + seconds
        while self.code is None and time.monotonic() < deadline:
            with contextlib.suppress(psutil.Error):
                self._children += [
                    c for c in self._process.children() if c not in self._children
                ]
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        return self.code

    def kill(self, target, chance):
        if target == "all":
            os.killpg(self.pid, signal.SIGKILL)
        elif target == "supervisor":
            os.kill(self.pid, signal.SIGKILL)
        else:
            workers = [c for c in self._children if is_worker(c)]
            for worker in chance.sample(workers, min(1, len(workers))):
                with contextlib.suppress(psutil.Error):
                    worker.kill()

    def sweep(self):
        """Count the workers that outlived their supervisor, and end what is left."""
        if self.code is None:
            os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        _, alive = psutil.wait_procs(self._children, timeout=10)
        for process in alive:
            with contextlib.suppress(psutil.Error):
                process.kill()
        return len(alive)


def is_worker(process):
    try:
        return any("spawn_main" in word for word in process.cmdline())
    except psutil.Error:
        return False


def read_rows(folder):
    """Map each image id to what must be the same: status, error class, pixels."""
    columns = ["image_id", "status", "error_class", "pixel_sha256"]
    rows = pq.read_table(folder / "results.parquet", columns=columns).to_pylist()
    return {row.pop("image_id"): row for row in rows}


def summary(outcomes, seed, seconds):
    """Write the report as Markdown."""
    total = Counter()
    by_way = Counter()
    for outcome in outcomes:
        for name in ("lost", "doubled", "differ", "hung", "orphans", "findings"):
            total[name] += int(getattr(outcome, name))
        way = outcome.what if outcome.what.startswith("random") else "crash point"
        by_way[way] += 1
    struck = sum(outcome.struck for outcome in outcomes)
    points = {o.what.split()[0] for o in outcomes if o.struck and "." in o.what}
    lines = [
        f"{len(outcomes)} runs of {TASKS} tasks (seed {seed}, {seconds:.0f} s): "
        f"{struck} struck by SIGKILL before they ended, "
        f"{sum(o.launches for o in outcomes)} launches in all.",
        "",
        "| lost rows | doubled rows | pixel or status differences | hangs "
        "| workers that outlived their supervisor | findings of `verify` |",
        "|---|---|---|---|---|---|",
        f"| {total['lost']} | {total['doubled']} | {total['differ']} | {total['hung']} "
        f"| {total['orphans']} | {total['findings']} |",
        "",
        "Ways: " + ", ".join(f"{n} {way}" for way, n in sorted(by_way.items())) + ".",
        f"Crash points that struck, {len(points)} of {len(crash.POINTS)}: "
        + ", ".join(f"`{p}`" for p in sorted(points))
        + ".",
    ]
    bad = [o for o in outcomes if not o.clean]
    lines += [f"- not clean: {outcome}" for outcome in bad]
    return "\n".join(lines)


def put_into(path, text, start=START, end=END):
    """Replace what stands between the markers of a document."""
    document = path.read_text(encoding="utf-8")
    before, _, rest = document.partition(start)
    _, _, after = rest.partition(end)
    path.write_text(f"{before}{start}\n{text}\n{end}{after}", encoding="utf-8")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument("--report", type=Path, help="document to put the report into")
    asked = parser.parse_args()
    started = time.monotonic()
    outcomes = []
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(Path(folder), asked.seed)
        for number in range(asked.first, asked.first + asked.runs):
            outcomes.append(soak.run(number))
            last = outcomes[-1]
            mark = "ok" if last.clean else f"NOT CLEAN {last}"
            print(f"{number} {last.what} struck={last.struck} {mark}", flush=True)
    text = summary(outcomes, asked.seed, time.monotonic() - started)
    print(text)
    if asked.report:
        put_into(asked.report, text)
    sys.exit(0 if all(outcome.clean for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
