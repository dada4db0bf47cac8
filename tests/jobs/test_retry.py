"""retry makes the failed rows that were chosen, and touches nothing else."""

import hashlib

import inline_pool
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from jobs_shared import FAKE, order, rows_of, write_csv

from jobs import cli, run
from jobs.order import Order, Retry
from jobs.status import read_status
from jobs.store import Store
from jobs.verify import verify

WORDS = {2: "make-nan", 5: "raise=oom", 7: "make-black", 9: "raise=broken"}


@pytest.fixture
def job(tmp_path, checkpoint, monkeypatch):
    """A finished job of 12 rows: two `nan`, one `oom`, one `bug`, one invalid row."""
    inline_pool.install(monkeypatch)
    rows = [(f"r{i}", f"a picture {WORDS.get(i, i)}", None) for i in range(12)]
    rows.append(("bad", "wrong", "65"))
    manifest = write_csv(tmp_path / "m.csv", rows, ("id", "prompt", "width"))
    run.run(order(manifest, tmp_path / "out", checkpoint), pipeline=FAKE)
    return tmp_path / "out"


def retry(folder, *classes):
    order = Order.stored(Store(folder))
    return run.run(order, pipeline=FAKE, retry=Retry(only=classes or None))


def mend(monkeypatch):
    """Have the fake device work from now on."""
    import fake_pipeline

    monkeypatch.setattr(fake_pipeline, "_misbehave", lambda prompt: None)
    original = fake_pipeline._latent

    def latent(picture):
        return original(picture) if "make-" not in picture.prompt else whole(picture)

    def whole(picture):
        import numpy as np

        shape = (4, picture.height // 8, picture.width // 8)
        return np.random.RandomState(picture.seed).randn(*shape).astype(np.float32)

    monkeypatch.setattr(fake_pipeline, "_latent", latent)


def files(folder):
    return {
        path: (path.stat().st_mtime_ns, hashlib.sha256(path.read_bytes()).digest())
        for path in folder.glob("images/*/*")
    }


def by_id(folder):
    return {row["prompt_id"]: row for row in rows_of(folder)}


def published(folder, but):
    """Give the bytes of all rows but some, as Arrow writes them to a stream."""
    table = pq.read_table(folder / "results.parquet").replace_schema_metadata()
    kept = table.filter(
        pc.invert(pc.is_in(table["prompt_id"], pa.array(but, pa.string())))
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, kept.schema) as stream:
        stream.write_table(kept.combine_chunks())
    return len(kept), sink.getvalue().to_pybytes()


def test_only_the_chosen_rows_are_touched(job, monkeypatch):
    rows, images = by_id(job), files(job)
    others = published(job, ["r2", "r7"])
    mend(monkeypatch)
    summary = retry(job, "nan")
    again, now = by_id(job), files(job)
    assert summary.made == 2 and summary.exit_code == 4
    assert {again[f"r{i}"]["status"] for i in (2, 7)} == {"ok"}
    for name, row in rows.items():
        if name not in ("r2", "r7"):
            assert again[name] == row, name
    assert published(job, ["r2", "r7"]) == others and others[0] == 11
    assert published(job, []) != others
    assert images.items() <= now.items() and len(now) == len(images) + 2


def test_without_classes_every_failed_row_is_tried(job, monkeypatch):
    mend(monkeypatch)
    assert retry(job).counts == {"ok": 12, "failed": 0, "invalid": 1}


def test_attempts_add_up_over_runs_and_the_row_stays_failed(job):
    before = by_id(job)["r5"]["attempts"]
    retry(job, "oom")
    once = by_id(job)["r5"]
    retry(job, "oom")
    twice = by_id(job)["r5"]
    assert before >= 3
    assert (once["attempts"], twice["attempts"]) == (before + 3, before + 6)
    assert twice["status"] == "failed" and twice["error_class"] == "oom"


def test_rows_that_are_not_made_yet_are_left_alone(job, monkeypatch):
    manifest = Order.stored(Store(job)).manifest
    with manifest.open("a") as file:
        file.write("more,one more,\n")
    mend(monkeypatch)
    retry(job, "bug")
    assert "more" not in by_id(job) and by_id(job)["r9"]["status"] == "ok"
    report = verify(job)  # the row that is left is pending, not lost
    assert report.sound and report.counts["pending"] == 1
    assert read_status(job)["state"] == "interrupted"
    run.run(Order.stored(Store(job)), pipeline=FAKE)
    assert by_id(job)["more"]["status"] == "ok"


def test_nothing_to_retry_changes_no_row(job):
    rows, images = by_id(job), files(job)
    assert retry(job, "timeout").made == 0
    assert by_id(job) == rows and files(job) == images


def test_a_made_picture_beats_the_failure_in_any_order_of_files(job, monkeypatch):
    mend(monkeypatch)
    monkeypatch.setattr(Store, "compact", lambda *_: job)
    retry(job, "nan")
    counts = Store(job).index().counts()
    assert counts == {"ok": 10, "failed": 2, "invalid": 1}


def test_an_unknown_class_is_refused_with_the_known_ones(job, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["retry", str(job), "--only", "nan,oops"])
    assert ended.value.code == 1
    assert "unknown error class `oops`" in capsys.readouterr().err
