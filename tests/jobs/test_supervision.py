"""Workers that die, hang or fall silent: nothing waits for them, nothing is lost."""

import sys
import time
from collections import Counter

import pytest
from jobs_shared import FAKE, numbered, order, rows_of, write_csv

from jobs import pool, process, run, slot, worker
from jobs.errors import WorkerError
from jobs.records import ERROR_CLASSES
from jobs.slot import Slot
from jobs.slot import overdue as is_overdue
from jobs.store import Store


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(pool, "BACK_OFF_SECONDS", 0.01)
    monkeypatch.setattr(pool, "MAX_BACK_OFF_SECONDS", 0.3)


@pytest.fixture
def job(tmp_path, checkpoint):
    def run_rows(rows, *settings, workers=1, pipeline=FAKE):
        manifest = write_csv(tmp_path / "m.csv", rows)
        base = ("runtime.batch_size=2", "output.commit_every=2")
        asked = order(
            manifest, tmp_path / "out", checkpoint, *base, *settings, workers=workers
        )
        return run.run(asked, pipeline=pipeline)

    return run_rows


def classes(folder):
    return Counter(r["error_class"] for r in rows_of(folder) if r["status"] != "ok")


def test_a_worker_that_falls_silent_is_replaced(job, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(slot, "SILENT_IN_CALL_SECONDS", 3.0)
    rows = numbered(8)
    rows[5] = ("r5", f"a picture stop-once={tmp_path / 'once'}")
    summary = job(rows, workers=2)
    assert summary.counts == {"ok": 8, "failed": 0, "invalid": 0}
    assert "is lost: not a word from it for" in capfd.readouterr().err


def test_the_death_of_the_last_shards_holder_does_not_hang_the_job(job, tmp_path):
    rows = numbered(8)
    rows[7] = ("r7", f"a picture kill-once={tmp_path / 'once'}")
    started = time.monotonic()
    assert job(rows, workers=2).counts["ok"] == 8
    assert time.monotonic() - started < 60


@pytest.mark.parametrize("most", [1, 3])
def test_no_innocent_is_given_up_with_the_task_that_kills(job, tmp_path, most):
    rows = numbered(12)
    rows[3] = ("r3", "kill-worker")
    summary = job(rows, f"runtime.max_attempts={most}", "runtime.shard_batches=6")
    assert summary.counts == {"ok": 11, "failed": 1, "invalid": 0}
    (failed,) = [r for r in rows_of(tmp_path / "out") if r["status"] == "failed"]
    assert failed["prompt_id"] == "r3" and failed["attempts"] == 3


def test_more_killers_than_losses_allowed_are_all_found(job, tmp_path):
    rows = numbered(14)
    for i in range(2, 6):
        rows[i] = (f"r{i}", "kill-worker")
    assert job(rows, workers=1).counts == {"ok": 10, "failed": 4, "invalid": 0}
    assert classes(tmp_path / "out") == {"worker_lost": 4}


def test_a_device_on_which_every_task_dies_is_given_up(job, tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "MAX_BLAMED", 8)
    with pytest.raises(WorkerError, match="no worker is left"):
        job(numbered(12, "kill-worker {}"))
    counts = Store(tmp_path / "out").index().counts()
    assert counts["ok"] == 0 and 1 <= counts["failed"] <= 4


def test_a_worker_that_can_not_start_leaves_the_job_to_the_others(
    job, tmp_path, monkeypatch, capfd
):
    monkeypatch.setenv("LOADS_ONCE", str(tmp_path / "once"))
    summary = job(numbered(8), workers=2, pipeline="loads_once:LoadsOnce")
    assert summary.counts["ok"] == 8
    seen = capfd.readouterr().err
    assert "is lost: RuntimeError: this device is taken" in seen


def test_parts_are_merged_and_no_row_is_lost_or_doubled(job, tmp_path, monkeypatch):
    merged = []
    original = Store.merge

    def merge(self, names):
        merged.append(len(names))
        original(self, names)

    monkeypatch.setattr(pool, "MERGE_AT", 3)
    monkeypatch.setattr(Store, "merge", merge)
    summary = job(numbered(24), "runtime.shard_batches=1", workers=2)
    assert sum(merged) >= 6 and summary.counts["ok"] == 24
    assert len({r["image_id"] for r in rows_of(tmp_path / "out")}) == 24


def test_leftover_parts_are_merged_before_a_run(tmp_path, monkeypatch):
    from jobs import parts, store
    from jobs.records import RESULT_COLUMNS

    monkeypatch.setattr(store, "MERGE_AT", 4)
    here = Store(tmp_path)
    here.prepare()
    for i in range(11):
        row = dict.fromkeys(RESULT_COLUMNS) | {
            "image_id": f"{i:016x}",
            "status": "ok",
            "attempts": 1,
        }
        here.write_part(f"p{i}", [row], parts.result_schema())
    here.merge_leftovers()
    assert len(here.sources()) == 5
    assert here.index().counts()["ok"] == 11


@pytest.mark.parametrize(
    ("limit", "first", "elapsed", "overdue"),
    [
        (10.0, False, 9.0, False),
        (10.0, False, 11.0, True),
        (10.0, True, 11.0, False),
        (10.0, True, 3_611.0, True),
        (None, False, 299.0, False),
        (None, False, 3_599.0, False),
        (None, False, 3_601.0, True),
    ],
)
def test_a_call_is_overdue_after_its_time(limit, first, elapsed, overdue):
    class Spec:
        batch_timeout = limit

    place = Slot(Spec(), state="ready", heard_at=100.0)
    place.call_since, place.first_call = 100.0, first
    if limit is not None:
        place.heard_at = 100.0 + elapsed
    found = is_overdue(place, 100.0 + elapsed)
    assert (found is not None) == overdue
    if overdue:
        assert found[0] in ERROR_CLASSES


def test_back_off_doubles_with_each_loss(job, tmp_path, monkeypatch):
    waits = []
    original = pool.Pool._gone

    def gone(self, slot):
        before = time.monotonic()
        original(self, slot)
        waits.append(slot.start_at - before)

    monkeypatch.setattr(pool, "BACK_OFF_SECONDS", 0.1)
    monkeypatch.setattr(pool.Pool, "_gone", gone)
    rows = [("r0", "kill-worker"), ("r1", "kill-worker")]
    job(rows)
    assert 0.05 < waits[0] < 0.15 and 0.15 < waits[1] < 0.3


def test_a_worker_that_can_not_open_its_log_says_why(monkeypatch):
    def no_log(spec):
        raise OSError(28, "No space left on device")

    class Pipe:
        def __init__(self):
            self.sent = []

        def send(self, message):
            self.sent.append(message)

    monkeypatch.setattr(process, "_settle", no_log)
    pipe = Pipe()
    process.main(None, pipe)
    ((kind, content),) = pipe.sent
    assert kind == "fatal" and "No space left" in content["error"]


def test_a_full_disk_under_the_log_hides_no_reason(monkeypatch):
    class Full:
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stderr", Full())
    try:
        raise ValueError("the reason")
    except ValueError:
        worker.log_trace()
