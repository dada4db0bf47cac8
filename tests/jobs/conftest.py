"""What the runner's tests share: their helpers on the path, and a checkpoint."""

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # workers are spawned with it: they find fake_pipeline


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory):
    """A file that the strict reader takes: the tiny geometry, random weights."""
    from sdxl.config import PRESETS
    from sdxl.random_weights import write_random

    path = tmp_path_factory.mktemp("checkpoint") / "tiny.safetensors"
    write_random(path, PRESETS["tiny"], "fp16")
    return path


@pytest.fixture
def run_rows(tmp_path, checkpoint, monkeypatch):
    """Give a function that runs rows as a job: run_rows(rows, *settings) -> summary."""
    from jobs_shared import run_job, write_csv

    from jobs import pool

    monkeypatch.setattr(pool, "BACK_OFF_SECONDS", 0.01)

    def run(rows, *settings, name="out", columns=("id", "prompt"), **options):
        manifest = write_csv(tmp_path / "m.csv", rows, columns)
        return run_job(manifest, tmp_path / name, checkpoint, *settings, **options)

    return run
