"""Short ways to say what most tests of the runner need: a job, a command, its rows."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq

from jobs.config import load
from jobs.order import Order
from jobs.run import run

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
FAKE = "fake_pipeline:FakePipeline"
SMALL = ("sampling.width=64", "sampling.height=64", "sampling.steps=2")


def write_csv(path, rows, names=("id", "prompt")):
    """Write rows of cells under a header; None becomes a bare empty cell."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(names)
        writer.writerows(rows)
    return path


def numbered(count, prompt="a picture {}"):
    return [(f"r{i}", prompt.format(i)) for i in range(count)]


def order(manifest, output, checkpoint, *settings, workers=1, **options):
    config = load(
        None,
        [
            f"model.checkpoint={json.dumps(str(checkpoint), ensure_ascii=False)}",
            f"runtime.workers={workers}",
            *SMALL,
            *settings,
        ],
    )
    return Order(config=config, manifest=manifest, output=output, **options)


def run_job(manifest, output, checkpoint, *settings, workers=1, **options):
    """Run a job of the fake pipeline in this process, its workers beside it."""
    asked = order(manifest, output, checkpoint, *settings, workers=workers, **options)
    return run(asked, pipeline=FAKE)


def rows_of(folder, *columns):
    """Read results.parquet, in its order."""
    return pq.read_table(
        folder / "results.parquet", columns=list(columns) or None
    ).to_pylist()


def pixels_of(folder):
    return {r["image_id"]: r["pixel_sha256"] for r in rows_of(folder)}


def command(*arguments, script=HERE / "fake_cli.py"):
    """Give the argument list of the command line with the fake pipeline."""
    return [sys.executable, str(script), *map(str, arguments)]


def environment(**more):
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def call(*arguments, cwd, **options):
    """Run a command to its end: returncode, stdout and stderr as text."""
    return subprocess.run(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=120,
        **options,
    )


def start(*arguments, cwd, **options):
    """Start a command and leave it running, in a process group of its own."""
    return subprocess.Popen(
        command(*arguments),
        cwd=cwd,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


def run_arguments(manifest, output, checkpoint, *settings, workers=1):
    """Give the words of a small `run` command."""
    words = ["run", manifest, "--output", output, "--checkpoint", checkpoint]
    words += ["--workers", workers]
    for setting in (*SMALL, *settings):
        words += ["--set", setting]
    return words
