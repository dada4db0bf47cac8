"""replay makes one picture again from its row alone, and compares the pixels."""

import hashlib
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import inline_pool
import pytest
from jobs_shared import (
    FAKE,
    environment,
    order,
    rows_of,
    run_arguments,
    write_csv,
)

from jobs import crash, images, parts, plan, run
from jobs.books import resolved_again, settings_hash
from jobs.errors import ConfigError, ModelError, OutputError
from jobs.manifest import open_manifest
from jobs.order import Order
from jobs.replay import replay, task_again
from jobs.store import Store

NAMES = ("id", "prompt", "eta", "guidance_scale", "sampler", "num_images")
ROWS = [
    ("plain", "a picture", None, "3.3", None, None),
    ("own", "another", "0.1", "7.7", "EulerAncestralSampler", "2"),
    ("failed", "make-nan", None, None, None, None),
]


@pytest.fixture
def job(tmp_path, checkpoint, monkeypatch):
    inline_pool.install(monkeypatch)
    manifest = write_csv(tmp_path / "m.csv", ROWS, NAMES)
    settings = ("runtime.batch_size=4",)
    run.run(order(manifest, tmp_path / "out", checkpoint, *settings), pipeline=FAKE)
    return tmp_path / "out"


def row_of(folder, name):
    return {r["prompt_id"]: r for r in rows_of(folder)}[name]


@pytest.mark.parametrize("name", ["plain", "own"])
def test_a_picture_is_made_again_to_the_byte(job, tmp_path, name):
    row = row_of(job, name)
    before = {p: p.stat().st_mtime_ns for p in job.rglob("*")}
    again = tmp_path / "again.png"
    assert replay(job, row["image_id"], out=again, pipeline=FAKE).same
    assert hashlib.sha256(again.read_bytes()).hexdigest() == row["image_sha256"]
    assert {p: p.stat().st_mtime_ns for p in job.rglob("*")} == before


def test_other_pixels_are_told(job, monkeypatch):
    row = row_of(job, "plain")
    monkeypatch.setattr(images, "pixel_sha256", lambda pixels: "0" * 64)
    found = replay(job, row["image_id"], pipeline=FAKE)
    assert not found.same and found.expected == row["pixel_sha256"]


def test_a_task_comes_back_from_its_row_as_it_was_planned(job):
    # Oracle: the plan, from the manifest; the results hold numbers in single precision.
    stored = Order.stored(Store(job))
    resolved = resolved_again(stored, Store(job).read_job())
    tasks = {
        task.image_id: task
        for request in open_manifest(stored.manifest).rows()
        for task in plan.tasks_of(request, resolved)
    }
    for row in rows_of(job):
        again, planned = task_again(row), tasks[row["image_id"]]
        assert again == planned
        assert settings_hash(row) == settings_hash(row | {"attempts": 9})


def test_a_row_without_a_picture_is_refused(job):
    with pytest.raises(OutputError, match="is failed"):
        replay(job, row_of(job, "failed")["image_id"], pipeline=FAKE)
    with pytest.raises(OutputError, match="has no row"):
        replay(job, "0" * 16, pipeline=FAKE)
    with pytest.raises(ConfigError, match="is not an image id"):
        replay(job, "../../etc/passwd", pipeline=FAKE)


def test_another_checkpoint_is_refused(job, monkeypatch):
    path = Order.stored(Store(job)).config.model.checkpoint
    data = bytearray(Path(path).read_bytes())
    data[-1] ^= 1
    other = job.parent / "other.safetensors"
    other.write_bytes(data)
    stored = Order.stored(Store(job))
    config = stored.config
    changed = replace(config, model=replace(config.model, checkpoint=str(other)))
    moved = replace(stored, config=changed)
    monkeypatch.setattr(Order, "stored", classmethod(lambda *_: moved))
    with pytest.raises(ModelError, match="not the checkpoint that made"):
        replay(job, row_of(job, "plain")["image_id"], pipeline=FAKE)


@pytest.mark.slow
def test_the_real_network_gives_the_same_pixels_after_a_kill_and_in_a_replay(
    tmp_path, checkpoint
):
    # The worker is killed once, between the first picture and its row.
    manifest = write_csv(tmp_path / "m.csv", [("a", "a red circle"), ("b", "a star")])
    words = run_arguments(manifest, tmp_path / "out", checkpoint)
    killed = {crash.VARIABLE: f"image.renamed:1:KILL:{tmp_path / 'once'}"}
    command = [sys.executable, "-m", "jobs"]
    done = subprocess.run(
        [*command, *map(str, words)],
        env=environment(**killed),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    assert "is lost: killed by signal 9" in done.stderr
    rows = rows_of(tmp_path / "out")
    assert max(row["attempts"] for row in rows) == 2
    again = subprocess.run(
        [*command, "replay", str(tmp_path / "out"), rows[0]["image_id"]],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert again.returncode == 0 and "the same pixels" in again.stdout, again.stderr


def cut(path):
    path.write_bytes(path.read_bytes()[:-9])


def flip(path):
    data = bytearray(path.read_bytes())
    for at in range(200, len(data) // 2, 50):
        data[at] ^= 0xFF
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip])
def test_damaged_rows_are_one_line(job, damage):
    row = row_of(job, "plain")
    damage(job / "results.parquet")
    with pytest.raises(OutputError, match=r"can't read .*results.parquet"):
        replay(job, row["image_id"], pipeline=FAKE)


def test_a_part_that_goes_while_it_looks_is_looked_for_again(job, monkeypatch):
    row = row_of(job, "plain")
    original, gone = parts.rows_of, []

    def rows_of_once(path, image_id):
        if not gone:
            gone.append(path)
            raise FileNotFoundError(path)
        return original(path, image_id)

    monkeypatch.setattr(parts, "rows_of", rows_of_once)
    assert replay(job, row["image_id"], pipeline=FAKE).same and gone
