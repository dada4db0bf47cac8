"""Kill a job at every bad moment, resume it, and count what is lost: nothing may be.

    python tests/jobs/soak.py --runs 200 --report docs/reliability.md
    python tests/jobs/soak.py --first 40 --runs 40 --outcomes soak.jsonl    a part of it

Each run is a job of 60 tasks (of which three fail) and one invalid row, with the fake
pipeline on two workers, killed by SIGKILL: a worker, the supervisor or all of them, at
a random moment or at a named crash point. It is then resumed until it is done, and held
to the rows and pixels of a run that nobody killed.

A random moment is a place on the job's own scale: so many of its pictures are there,
and then a share of the time that the next one took in the run that nobody killed. Where
a run ends before it is struck (a point that it does not pass so often, a worker that
has gone), it is begun anew with the next aim, until one strikes. `--seed` and its
number decide what is aimed at.
"""

import argparse
import contextlib
import itertools
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import pyarrow.parquet as pq
from jobs_shared import run_job, write_csv
from report import put_into
from soak_job import HANG_SECONDS, Job
from soak_outcomes import Outcome, append, read, summary

from jobs import crash, pool, store
from jobs.errors import JobError
from jobs.verify import verify

TASKS = 60
PICTURES = TASKS - 3
AIMS = 20
TARGETS = ("worker", "supervisor", "all")
SETTINGS = ("runtime.batch_size=4", "output.commit_every=4", "runtime.shard_batches=2")
START, END = "<!-- soak -->", "<!-- /soak -->"


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
        self.spans = self.watch(folder / "reference")
        self.expected = read_rows(folder / "reference")
        assert len(self.expected) == TASKS + 1

    def watch(self, output):
        """Run undisturbed; give the seconds from each step of the scale to the next."""
        reached = []
        began = time.monotonic()
        job = self.launch(output)
        while job.wait_for(lambda: steps_done(output) >= len(reached)):
            reached.append(time.monotonic() - began)
        assert job.wait() == 4 and len(reached) == PICTURES + 2
        reached.append(time.monotonic() - began)
        return [b - a for a, b in itertools.pairwise(reached)]

    def launch(self, output, order=None):
        talk = self.folder / f"{output.name}.talk"
        return Job(lambda: self.work(output, order), talk)

    def work(self, output, order):
        crash.arm(order)
        pool.BACK_OFF_SECONDS = 0.02
        pool.MERGE_AT = store.MERGE_AT = 4
        summary = run_job(self.manifest, output, self.checkpoint, *SETTINGS, workers=2)
        return int(summary.exit_code)

    def run(self, number):
        began = time.monotonic()
        chance = random.Random(f"{self.seed}-{number}")
        output = self.folder / f"run-{number}"
        target = chance.choice(TARGETS)
        strike = self.at_a_point if chance.random() < 0.5 else self.at_a_moment
        hung = struck = False
        orphans = aims = 0
        while not (hung or struck) and aims < AIMS:
            aims += 1
            shutil.rmtree(output, ignore_errors=True)
            job, what, struck = strike(output, target, chance)
            hung = job.code is None
            orphans += job.sweep()
        launches = 1
        while not hung and job.code != 4 and launches < 6:
            job = self.launch(output)
            hung = job.wait(HANG_SECONDS) is None
            orphans += job.sweep()
            launches += 1
        return Outcome(
            seed=self.seed,
            number=number,
            what=what,
            struck=struck,
            aims=aims,
            hung=hung,
            orphans=orphans,
            launches=launches,
            **self.judge(output),
            seconds=time.monotonic() - began,
        )

    def at_a_point(self, output, target, chance):
        """Have a process die where it passes a named point for the n-th time."""
        struck = self.folder / f"{output.name}.struck"
        point, nth = chance.choice(crash.POINTS), chance.choice((1, 1, 2, 3))
        action = "KILLALL" if target == "all" else "KILL"
        job = self.launch(output, f"{point}:{nth}:{action}:{struck}")
        job.wait()
        return job, f"{point} {action}", struck.exists()

    def at_a_moment(self, output, target, chance):
        """Kill when so many pictures are there, and a share of a step later."""
        early, late = chance.choice((0, 1)), PICTURES + 1
        middle = chance.randrange(2, late)
        (step,) = chance.choices((early, middle, late), (2, 6, 2))
        share = chance.random()
        job = self.launch(output)
        if job.wait_for(lambda: steps_done(output) >= step):
            job.wait(share * self.spans[step])
        fired = job.kill(target, chance)
        job.wait()
        what = f"random {target} at step {step} of {late}, {share:.2f}"
        return job, what, fired and job.was_struck(target)

    def judge(self, output):
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
        return {
            "lost": len(set(self.expected) - set(rows)),
            "doubled": twice + len(set(rows) - set(self.expected)),
            "differ": sum(
                rows[k] != self.expected[k] for k in rows if k in self.expected
            ),
            "findings": findings,
        }


def steps_done(output):
    """Say how far a job is: 0 planning, 1 planned, then one more for each picture."""
    if not (output / "job.json").exists():
        return 0
    return 1 + sum(1 for _ in (output / "images").glob("*/[!.]*"))


def read_rows(folder):
    """Map each image id to what must be the same: status, error class, pixels."""
    columns = ["image_id", "status", "error_class", "pixel_sha256"]
    rows = pq.read_table(folder / "results.parquet", columns=columns).to_pylist()
    return {row.pop("image_id"): row for row in rows}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--first", type=int, default=0, help="number of the first run")
    parser.add_argument(
        "--outcomes", type=Path, help="add to this file, and report all of it"
    )
    parser.add_argument("--report", type=Path, help="document to put the report into")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        kept = asked.outcomes or folder / "outcomes.jsonl"
        soak = Soak(folder, asked.seed) if asked.runs else None
        for number in range(asked.first, asked.first + asked.runs):
            outcome = soak.run(number)
            append(kept, outcome)
            print(outcome.line(), flush=True)
        outcomes = read(kept, asked.seed)
    text = summary(outcomes, TASKS)
    print(text)
    if asked.report:
        put_into(asked.report, text, START, END)
    sys.exit(0 if all(outcome.clean for outcome in outcomes) else 1)


if __name__ == "__main__":
    main()
